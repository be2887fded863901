// Every form of the forward on the emulator, at the ends of its inputs' ranges.
#include "forward_cases.h"
#include "chunk_cases.h"
#include "emulator.h"

using namespace kda;

namespace {

void check(const char* form) {
  const Variant v = test::chunk::variant(form);
  emulator::Options options;
  options.optimize = 0; // most of the time is the compiler's
  const auto backend = emulator::make_backend(options).value();
  test::ForwardRunner runner(*backend, v);
  for (const test::ForwardCase& c : test::all_forward_cases(300)) {
    CAPTURE(c.name, form);
    CHECK(runner.fault(c) == "");
  }
}

} // namespace

TEST_CASE("forward cases: two kernels") {
  check("chunk c=64 vt=32 pw=8 sw=4 st=2");
}
TEST_CASE("forward cases: fused") {
  check("fused c=16 vt=128 pw=7 sw=8 st=10");
}
TEST_CASE("forward cases: fused, in four segments") {
  check("fused c=16 vt=128 pw=7 sw=8 st=10 seg=4");
}
