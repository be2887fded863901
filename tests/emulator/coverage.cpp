// Every variant that the enumerator offers runs once on small cases, thread for thread. The table in the
// output says what was known, run and left out (none, unless the time is up: KDA_EMULATOR_SECONDS, 200 by
// default).
#include "emulator.h"
#include "run_case.h"
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <fmt/format.h>
#include <mutex>
#include <thread>

using namespace kda;

namespace {

/// Problems that between them have tails, empty sequences, grouped heads, both state layouts, padding of K
/// and V.
std::vector<test::CaseOptions> cases(Operation operation) {
  test::CaseOptions packed;
  packed.problem.operation = operation;
  packed.problem.value_heads = 2;
  packed.problem.key_dim = packed.problem.value_dim = 64;
  packed.problem.gate = GateKind::bounded;
  packed.problem.state_layout = StateLayout::v_k;
  packed.problem.varlen = packed.problem.dt_bias = packed.problem.beta_sigmoid = packed.problem.qk_l2norm =
      true;
  packed.lengths = {1, 16, 0, 47};
  packed.padding = 6;
  packed.regime = test::Regime::slow;
  test::CaseOptions production;
  production.problem.operation = operation;
  production.problem.gate = GateKind::bounded;
  production.problem.dt_bias = production.problem.beta_sigmoid = production.problem.qk_l2norm = true;
  test::CaseOptions odd;
  odd.problem.operation = operation;
  odd.problem.key_dim = 60;
  odd.problem.value_dim = 96;
  odd.problem.dtype = odd.problem.gate_dtype = odd.problem.beta_dtype = DType::fp16;
  odd.problem.gate = GateKind::softplus;
  odd.regime = test::Regime::unbounded;
  odd.initial_state = false;
  return {packed, production, odd};
}

/// The variants of both architectures, without repetition.
std::vector<Variant> variants(const Problem& p) {
  std::vector<Variant> all;
  for (const char* arch : {"sm_90a", "sm_80"})
    for (const Candidate& c : enumerate(p, cuda_target(arch).value()))
      if (c.rejected.empty() && std::find(all.begin(), all.end(), c.variant) == all.end())
        all.push_back(c.variant);
  return all;
}

std::string fault(const Backend& backend, const test::TestCase& c, const Variant& v) {
  const auto report = test::run_case(backend, c, v);
  if (!report) return report.error().message + "\n" + report.error().context;
  for (const test::TensorReport& t : report->tensors)
    if (!(t.error <= test::tolerance(c.inputs.problem, v, t.name))) return "\n" + to_string(*report);
  return {};
}

class Coverage {
public:
  explicit Coverage(Operation operation) {
    const char* const limit = std::getenv("KDA_EMULATOR_SECONDS");
    seconds_ = limit != nullptr ? std::atof(limit) : 200;
    for (const test::CaseOptions& o : cases(operation)) {
      cases_.push_back(test::random_case(o));
      for (const Variant& v : variants(o.problem))
        work_.push_back({cases_.size() - 1, v});
    }
  }

  void run() {
    std::thread other([this] { work(); });
    work();
    other.join();
  }

  /// Also fails the test for every fault.
  void report() const {
    for (std::size_t c = 0; c < cases_.size(); ++c) {
      int known = 0, run = 0;
      std::string left_out;
      for (const Work& w : work_) {
        if (w.test_case != c) continue;
        ++known;
        run += w.run ? 1 : 0;
        if (!w.run) left_out += "\n  left out: " + to_string(w.variant);
        if (!w.fault.empty())
          FAIL_CHECK(to_string(cases_[c].inputs.problem) << "\n" << to_string(w.variant) << ": " << w.fault);
      }
      CHECK(known > 0);
      fmt::print("{}\n  variants known {}, run {}{}\n", to_string(cases_[c].inputs.problem), known, run,
                 left_out);
    }
  }

private:
  struct Work {
    std::size_t test_case;
    Variant variant;
    bool run = false;
    std::string fault{};
  };

  /// Variants of a case are far apart in order: when the time is up, no case was forgotten.
  void work() {
    const auto backend = emulator::make_backend({"sm_90a", 2, emulator::Copies::late, 1, 1}).value();
    const std::size_t stride = 97; // prime to most counts; the loop below visits every item anyway
    for (std::size_t i = next_++; i < work_.size(); i = next_++) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin_;
      if (spent.count() > seconds_) return;
      Work& w = work_[work_.size() % stride == 0 ? i : i * stride % work_.size()];
      w.fault = fault(*backend, cases_[w.test_case], w.variant);
      w.run = true;
    }
  }

  double seconds_ = 0;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  std::vector<test::TestCase> cases_;
  std::vector<Work> work_;
  std::atomic<std::size_t> next_{0};
};

void check(Operation operation) {
  Coverage coverage(operation);
  coverage.run();
  coverage.report();
}

} // namespace

TEST_CASE("every variant of recurrent runs") {
  check(Operation::recurrent);
}
TEST_CASE("every variant of forward runs") {
  check(Operation::forward);
}
TEST_CASE("every variant of gate runs") {
  check(Operation::gate);
}
TEST_CASE("every variant of gate_backward runs") {
  check(Operation::gate_backward);
}
TEST_CASE("every variant of backward runs") {
  check(Operation::backward);
}
