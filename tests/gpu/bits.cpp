// A card against the emulator, bit for bit.
#include "exact_cases.h"
#include "gpu.h"
#include "kept_outputs.h"
#include <cmath>
#include <fmt/format.h>

using namespace kda;
using namespace kda::test;

namespace {

/// Steps of `dtype` between two numbers of the same sign; the distance through zero otherwise.
double steps(double a, double b, DType dtype) {
  const int mantissa = dtype == DType::bf16 ? 8 : dtype == DType::fp16 ? 11 : 24;
  const double step = std::ldexp(1, std::ilogb(std::max(std::abs(a), std::abs(b))) - mantissa + 1);
  return std::abs(a - b) / step;
}

void compare(const KeptCase& k, const TensorReport& t) {
  const reference::Array emulated = kept(kept_file(k.name, t.name));
  CAPTURE(k.name, t.name);
  REQUIRE(emulated.size() == t.values.size());
  const Problem& p = k.test_case.inputs.problem;
  const bool fp32 = p.operation == Operation::gate || t.name.find("state") != std::string::npos ||
                    t.name == "d_A_log" || t.name == "d_dt_bias";
  const DType dtype = fp32 ? DType::fp32 : p.dtype; // of d_g and d_beta too
  std::size_t same = 0;
  double most = 0;
  for (std::size_t i = 0; i < emulated.size(); ++i) {
    if (emulated[i] == t.values[i])
      ++same;
    else
      most = std::max(most, steps(emulated[i], t.values[i], dtype));
  }
  const double difference = reference::relative_error(t.values, emulated);
  fmt::print("{:<10}{:<12} the same bits: {} of {} ({:.2f} %); most steps apart: {:.0f}; 2-norm {:.2e}\n",
             k.name, t.name, same, emulated.size(),
             100.0 * static_cast<double>(same) / static_cast<double>(emulated.size()), most, difference);
  // Each is within the tolerance of float64.
  CHECK(difference <= 2 * tolerance(p, k.variant, t.name));
}

RunReport run(const Backend& backend, const TestCase& c, const Variant& v) {
  const auto report = run_case(backend, c, v);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  return *report;
}

} // namespace

TEST_CASE("exact cases give the bits of float64, which are the emulator's", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  for (const ExactCase& e : exact_cases())
    for (const TensorReport& t : run(*backend, e.test_case, e.variant).tensors) {
      CAPTURE(to_string(e.test_case.inputs.problem), to_string(e.variant), t.name, t.place);
      CHECK(t.error <= kSameBits);
    }
}

TEST_CASE("kernels beside what the emulator gave: how many bits are the same", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  for (const KeptCase& k : kept_cases()) {
    const auto first = kept_file(k.name, k.test_case.expected.front().name);
    if (!std::filesystem::exists(first)) {
      WARN("SKIPPED, no outputs of the emulator in " << first.parent_path()
                                                     << "; first run test_kernels \"the outputs kept*\"");
      return;
    }
    for (const TensorReport& t : run(*backend, k.test_case, k.variant).tensors)
      compare(k, t);
  }
}

TEST_CASE(
    "a backward in slabs gives the bits of the whole call, and the gradients of float64 from saved states",
    "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  for (const bool packed : {false, true})
    for (const char* whole : {"chunk c=32 vt=64 pw=8 sw=4 st=2", "chunk c=64 vt=32 pw=8 sw=4 st=2"}) {
      CaseOptions o;
      Problem& p = o.problem;
      p.operation = Operation::backward;
      p.value_heads = packed ? 2 : 1;
      p.gate = GateKind::bounded_no_a;
      p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
      p.varlen = packed;
      o.batch = 2;
      o.tokens = 600;
      if (packed) o.lengths = {0, 300, 1, 0, 500, 130};
      o.regime = Regime::slow;
      const Variant slabs = parse_variant(fmt::format("{} sl=512", whole)).value();
      const TestCase c = random_case(o);
      CAPTURE(to_string(p), to_string(slabs));
      REQUIRE(launches(p, slabs, backend->target(), c.inputs.sizes).slabs.count > 2);
      const RunReport report = run(*backend, c, slabs),
                      expected = run(*backend, c, parse_variant(whole).value());
      for (std::size_t i = 0; i < expected.tensors.size(); ++i) {
        CAPTURE(expected.tensors[i].name);
        CHECK(report.tensors[i].error <= tolerance(p, slabs, expected.tensors[i].name));
        CHECK(report.tensors[i].values == expected.tensors[i].values);
      }
      p.saved_interval = 256;
      for (const TensorReport& t : run(*backend, random_case(o), slabs).tensors) {
        CAPTURE(t.name, t.place);
        CHECK(t.error <= tolerance(p, slabs, t.name));
      }
    }
}
