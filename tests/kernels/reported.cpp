// What broke others' recurrences, on the emulator; tests/README.md has the table.
#include "checked.h"
#include "reported_cases.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

/// Two of the accepted variants, other ones for every row; with `blocks` all that have blocks of tokens.
std::vector<Variant> some(const Problem& p, std::size_t row, bool blocks) {
  std::vector<Variant> all, chosen;
  for (const Candidate& c : enumerate(p, cuda_target("sm_90a").value()))
    if (c.rejected.empty()) all.push_back(c.variant);
  for (const Variant& v : all)
    if (blocks && (v.chunk > 0 || v.stages > 1) && v.streaming == 0 && v.rows >= 16) chosen.push_back(v);
  for (const std::size_t i : {row * 7, row * 7 + all.size() / 2})
    chosen.push_back(all[i % all.size()]);
  return chosen;
}

} // namespace

TEST_CASE("recurrent kernel: inputs that users reported elsewhere") {
  std::size_t row = 0;
  for (const test::ReportedCase& c : test::reported_cases(false)) {
    const Problem& p = c.options.problem;
    const test::TestCase x = test::random_case(c.options);
    for (const Variant& v : some(p, row, std::string(c.name).rfind("B39", 0) == 0)) {
      CAPTURE(c.name, to_string(p), c.options.tokens, to_string(v));
      const auto backend = emulator::make_backend(test::checked(row++)).value();
      const auto report = test::run_case(*backend, x, v, c.run);
      if (!report) FAIL(report.error().message << "\n" << report.error().context);
      for (const test::TensorReport& t : report->tensors)
        CHECK(t.error <= test::decode_tolerance(t.name == "o" ? p.dtype : p.state_dtype));
    }
  }
}

TEST_CASE("recurrent kernel: pieces of a prompt leave the bits of the whole") { // B14
  const auto backend = emulator::make_backend().value();
  for (const char* variant : {"token sw=4 r=32 st=1", "token c=4 sw=4 r=16 st=1 l=8"})
    CHECK(test::run_in_pieces(*backend, parse_variant(variant).value()) == "");
}

TEST_CASE("recurrent kernel: any strides, also of 2^31 elements") { // B49, B50
  const auto backend = emulator::make_backend().value();
  for (const char* variant : {"token sw=4 r=8 st=1", "token c=4 sw=2 r=16 st=1", "token sw=1 r=16 st=4"})
    CHECK(test::run_other_strides(*backend, parse_variant(variant).value()) == "");
}
