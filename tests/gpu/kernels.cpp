// Every variant that is offered for this GPU against float64, on small cases in every decay regime. A minute
// on 16 cores, nearly all of it in NVRTC.
#include "gpu.h"
#include "run_case.h"
#include <algorithm>
#include <atomic>
#include <fmt/format.h>
#include <mutex>
#include <thread>

using namespace kda;
using namespace kda::test;

namespace {

/// Between them: tails, empty sequences, grouped heads, both state layouts and index types, padded K and V,
/// all dtypes, gates that are not bounded, strides with gaps.
std::vector<CaseOptions> cases(Operation operation) {
  CaseOptions packed;
  packed.problem.operation = operation;
  packed.problem.heads = 2;
  packed.problem.value_heads = 4;
  packed.problem.key_dim = packed.problem.value_dim = 64;
  packed.problem.gate = GateKind::bounded;
  packed.problem.state_layout = StateLayout::v_k;
  packed.problem.varlen = packed.problem.dt_bias = packed.problem.beta_sigmoid = packed.problem.qk_l2norm =
      true;
  packed.problem.cu_seqlens_type = IndexType::int32;
  packed.lengths = {1, 16, 0, 47, 64, 129};
  packed.padding = 6;
  packed.regime = Regime::slow;
  CaseOptions standard;
  standard.problem = production(operation, 2);
  standard.batch = 2;
  standard.tokens = 203;
  CaseOptions odd;
  odd.problem.operation = operation;
  odd.problem.key_dim = 60;
  odd.problem.value_dim = 96;
  odd.problem.dtype = odd.problem.gate_dtype = odd.problem.beta_dtype = DType::fp16;
  odd.problem.gate = GateKind::softplus;
  odd.regime = Regime::unbounded;
  odd.initial_state = false;
  CaseOptions raw;
  raw.problem.operation = operation;
  raw.problem.gate = GateKind::log_e;
  raw.problem.gate_dtype = DType::fp32;
  raw.problem.state_dtype = DType::bf16;
  const bool gate = operation == Operation::gate || operation == Operation::gate_backward;
  raw.regime = gate ? Regime::unbounded : Regime::spikes; // -inf has no relative error
  return {packed, standard, odd, raw};
}

struct Job {
  const TestCase* test_case;
  Variant variant;
  SourceUnit unit;
  Result<Image> image = fail(ErrorCode::internal, "not compiled");
};

/// Compiling is most of the work, and the GPU has no part in it.
void compile(const Backend& backend, std::vector<Job>& jobs) {
  std::atomic<std::size_t> next{0};
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::jthread> pool;
  pool.reserve(threads);
  for (unsigned i = 0; i < threads; ++i)
    pool.emplace_back([&] {
      for (std::size_t k = next++; k < jobs.size(); k = next++)
        jobs[k].image = backend.compile(jobs[k].unit);
    });
}

std::string fault(const Backend& backend, const Job& job, bool strided) {
  if (!job.image) return job.image.error().message + "\n" + job.image.error().context;
  const auto report = run_image(backend, job.unit, *job.image, *job.test_case, job.variant, {strided});
  if (!report) return report.error().message;
  for (const TensorReport& t : report->tensors)
    if (!(t.error <= tolerance(job.test_case->inputs.problem, job.variant, t.name)))
      return "\n" + to_string(*report);
  return {};
}

void check(Operation operation) {
  const auto backend = gpu();
  if (backend == nullptr) return;
  std::vector<TestCase> all;
  for (const CaseOptions& options : cases(operation))
    all.push_back(random_case(options));
  std::vector<Job> jobs;
  for (const TestCase& c : all)
    for (const Candidate& x : enumerate(c.inputs.problem, backend->target()))
      if (x.rejected.empty())
        jobs.push_back({&c, x.variant, emit(c.inputs.problem, x.variant, backend->target()).value()});
  REQUIRE(jobs.size() >= all.size());
  compile(*backend, jobs);
  bool strided = false;
  for (const Job& job : jobs) {
    strided = !strided;
    if (const std::string why = fault(*backend, job, strided); !why.empty())
      FAIL_CHECK(to_string(job.test_case->inputs.problem)
                 << ": " << to_string(job.variant) << (strided ? ", strided: " : ": ") << why);
  }
  fmt::print("{}: {} kernels ran on {}\n", to_string(operation), jobs.size(), backend->name());
}

} // namespace

TEST_CASE("every variant of recurrent agrees with float64 on the GPU", "[gpu]") {
  check(Operation::recurrent);
}
TEST_CASE("every variant of forward agrees with float64 on the GPU", "[gpu]") {
  check(Operation::forward);
}
TEST_CASE("every variant of backward agrees with float64 on the GPU", "[gpu]") {
  check(Operation::backward);
}
TEST_CASE("every variant of gate agrees with float64 on the GPU", "[gpu]") {
  check(Operation::gate);
}
TEST_CASE("every variant of gate_backward agrees with float64 on the GPU", "[gpu]") {
  check(Operation::gate_backward);
}
