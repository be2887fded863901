// What broke others' recurrences, on the host; tests/README.md has the table.
#include "host_backend.h"
#include "reported_cases.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("host recurrence: inputs that users reported elsewhere") {
  const auto backend = make_host_backend(2).value();
  for (const test::ReportedCase& c : test::reported_cases(true)) {
    const Problem& p = c.options.problem;
    const test::TestCase x = test::random_case(c.options);
    const Variant v = choose(p, backend->target(), x.inputs.sizes).value();
    CAPTURE(c.name, to_string(p), c.options.tokens);
    const auto report = test::run_case(*backend, x, v, c.run);
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    for (const test::TensorReport& t : report->tensors)
      CHECK(t.error <= test::decode_tolerance(t.name == "o" ? p.dtype : p.state_dtype));
  }
}

TEST_CASE(
    "host recurrence: pieces of a prompt leave the bits of the whole, any strides those of none") { // B14,
                                                                                                    // B49,
                                                                                                    // B50
  const auto backend = make_host_backend(1).value();
  for (const char* variant : {"token r=32", "token r=16"}) {
    CHECK(test::run_in_pieces(*backend, parse_variant(variant).value()) == "");
    CHECK(test::run_other_strides(*backend, parse_variant(variant).value()) == "");
  }
}
