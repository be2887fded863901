// The golden cases of the recurrence on the emulator; those of the chunk kernels stand with their tests.
#include "chunk_cases.h"
#include "emulator.h"
#include "kda/case_io.h"
#include "run_case.h"

using namespace kda;

TEST_CASE("recurrent kernel: golden cases") {
  const auto backend = emulator::make_backend();
  REQUIRE(backend);
  for (const auto& path : test::chunk::golden_files()) {
    const Case golden = read_case(path).value();
    test::TestCase c;
    c.inputs = reference_inputs(golden);
    Problem& p = c.inputs.problem;
    p.operation = Operation::recurrent;
    p.dtype = p.gate_dtype = p.beta_dtype = DType::bf16; // which hold the inputs exactly
    c.expected = {{"o", values(golden, "o")}, {"final_state", values(golden, "final_state")}};
    for (const Variant& v : test::chunk::golden_variants(
             golden.name, p,
             {"token sw=1 r=4 st=4", "token sw=4 r=8 st=1", "token c=4 sw=4 r=16 st=1 cs=1 pdl=1"})) {
      CAPTURE(golden.name, to_string(v));
      const auto report = test::run_case(**backend, c, v);
      if (!report) FAIL(report.error().message << "\n" << report.error().context);
      for (const test::TensorReport& t : report->tensors) {
        CAPTURE(t.name, t.place);
        CHECK(t.error <= test::tolerance(p, v, t.name));
      }
    }
  }
}
