// Where arithmetic is exact, no order of sums and no rounding can differ: the bits of float64.
#include "emulator.h"
#include "exact_cases.h"
#include "kept_outputs.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("exact cases give the bits of float64") {
  const auto backend = emulator::make_backend();
  REQUIRE(backend);
  for (const test::ExactCase& e : test::exact_cases()) {
    CAPTURE(to_string(e.test_case.inputs.problem), to_string(e.variant));
    const auto report = test::run_case(**backend, e.test_case, e.variant);
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    for (const test::TensorReport& t : report->tensors) {
      CAPTURE(t.name, t.place);
      CHECK(t.error <= test::kSameBits);
    }
  }
}

TEST_CASE("the outputs kept for a card have the same bits in every order of threads") {
  for (const test::KeptCase& k : test::kept_cases())
    for (const std::uint64_t seed : {0, 1, 5}) {
      emulator::Options order;
      order.seed = seed;
      const auto backend = emulator::make_backend(order);
      REQUIRE(backend);
      const auto report = test::run_case(**backend, k.test_case, k.variant);
      if (!report) FAIL(report.error().message << "\n" << report.error().context);
      for (const test::TensorReport& t : report->tensors) {
        CAPTURE(k.name, t.name, seed);
        CHECK(t.error <= test::tolerance(k.test_case.inputs.problem, k.variant, t.name));
        const auto path = test::kept_file(k.name, t.name);
        if (seed == 0) test::keep(path, t.values);
        CHECK(test::kept(path) == t.values);
      }
    }
}
