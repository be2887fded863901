// Of the variants that the enumerator offers for sm_90a and sm_80, whatever K, V and dtype are, so many that
// any two values of tunables that occur together run together, on small cases, thread for thread, with every
// access checked; all of them with KDA_EMULATOR_EVERY set. The tables in the output say what was known, run
// and left out (none, unless the time is up: KDA_EMULATOR_SECONDS, 400 by default). test_gpu runs every
// variant.
#include "emulator.h"
#include "run_case.h"
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <fmt/format.h>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>

using namespace kda;

namespace {

struct SmallCase {
  test::CaseOptions options;
  bool checked = false;
  bool rest = false; ///< only for variants that no case before it has
};

/// Problems that between them have tails, empty sequences, grouped heads, both state layouts, padding of K
/// and V. Every variant runs on one of them, because compiling is what takes time.
std::vector<SmallCase> cases(Operation operation) {
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
  test::CaseOptions narrow = production; // the widest value tiles with the most stages fit only here
  narrow.problem.key_dim = 32;
  test::CaseOptions thin = narrow; // and slabs with the narrowest tile only here
  thin.problem.value_dim = 16;
  return {{packed, true}, {production}, {odd}, {narrow, true, true}, {thin, true, true}};
}

bool contains(const std::vector<Variant>& all, const Variant& v) {
  return std::find(all.begin(), all.end(), v) != all.end();
}

/// The variants of both architectures, without repetition.
std::vector<Variant> variants(const Problem& p) {
  std::vector<Variant> all;
  for (const char* arch : {"sm_90a", "sm_80"})
    for (const Candidate& c : enumerate(p, cuda_target(arch).value()))
      if (c.rejected.empty() && !contains(all, c.variant)) all.push_back(c.variant);
  return all;
}

/// Those of any problem.
std::vector<Variant> variants(Operation operation) {
  std::vector<Variant> all;
  Problem p;
  p.operation = operation;
  for (p.key_dim = 16; p.key_dim <= 256; p.key_dim += 16)
    for (p.value_dim = 16; p.value_dim <= 256; p.value_dim += 16)
      for (p.dtype = DType::bf16;; p.dtype = DType::fp32) {
        for (const Variant& v : variants(p))
          if (!contains(all, v)) all.push_back(v);
        if (p.dtype == DType::fp32) break;
      }
  return all;
}

/// Every pair of a variant's tunables, as text; a tunable that it does not name has a value of its own, too.
std::set<std::string> pairs_of(const Variant& v) {
  std::map<std::string, std::string> values{{"c", ""},   {"vt", ""}, {"pw", ""}, {"sw", ""},
                                            {"r", ""},   {"st", ""}, {"l", ""},  {"cs", ""},
                                            {"seg", ""}, {"sl", ""}, {"pdl", ""}};
  std::istringstream text(to_string(v));
  for (std::string word; text >> word;) {
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos)
      values["algorithm"] = word;
    else
      values[word.substr(0, equals)] = word.substr(equals + 1);
  }
  std::set<std::string> pairs;
  for (auto a = values.begin(); a != values.end(); ++a)
    for (auto b = std::next(a); b != values.end(); ++b)
      pairs.insert(a->first + "=" + a->second + " " + b->first + "=" + b->second);
  return pairs;
}

/// The one that adds most pairs, until all are there.
std::vector<Variant> pairwise(const std::vector<Variant>& all) {
  if (std::getenv("KDA_EMULATOR_EVERY") != nullptr) return all;
  std::vector<std::pair<Variant, std::set<std::string>>> left;
  for (const Variant& v : all)
    left.emplace_back(v, pairs_of(v));
  std::vector<Variant> chosen;
  for (;;) {
    const auto most = std::max_element(left.begin(), left.end(), [](const auto& a, const auto& b) {
      return a.second.size() < b.second.size();
    });
    if (most == left.end() || most->second.empty()) return chosen;
    chosen.push_back(most->first);
    const std::set<std::string> added = most->second;
    for (auto& [v, pairs] : left)
      for (const std::string& pair : added)
        pairs.erase(pair);
  }
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
  explicit Coverage(Operation operation)
      : operation_(operation), known_(variants(operation)), chosen_(pairwise(known_)) {
    const char* const limit = std::getenv("KDA_EMULATOR_SECONDS");
    seconds_ = limit != nullptr ? std::atof(limit) : 400;
    const std::vector<SmallCase> all = cases(operation);
    for (const SmallCase& small : all)
      cases_.push_back(test::random_case(small.options));
    // Each in its turn, then whatever the turn has left out.
    for (const bool rest : {false, true})
      for (std::size_t c = 0; c < all.size(); ++c)
        for (const Variant& v : variants(all[c].options.problem)) {
          const std::size_t turn = std::hash<std::string>{}(to_string(v)) % 3;
          if (contains(chosen_, v) && (rest ? !in_work(v) : !all[c].rest && turn == c))
            work_.push_back({c, v, all[c].checked});
        }
  }

  void run() {
    std::thread other([this] { work(); });
    work();
    other.join();
  }

  /// Also fails the test for every fault.
  void report() const {
    const bool all_ran = std::all_of(work_.begin(), work_.end(), [](const Work& w) { return w.run; });
    std::size_t ran = 0;
    for (const Variant& v : chosen_) {
      const bool run =
          std::any_of(work_.begin(), work_.end(), [&](const Work& w) { return w.run && w.variant == v; });
      ran += run ? 1 : 0;
      if (!run && all_ran) FAIL_CHECK("no case has " << to_string(v));
    }
    CHECK(ran > 0);
    fmt::print("{}: variants known for any K, V and dtype {}, chosen {}, run {}\n", to_string(operation_),
               known_.size(), chosen_.size(), ran);
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
      if (known == 0) continue;
      fmt::print("  {}\n    variants {}, run {}{}\n", to_string(cases_[c].inputs.problem), known, run,
                 left_out);
    }
  }

private:
  struct Work {
    std::size_t test_case;
    Variant variant;
    bool checked;
    bool run = false;
    std::string fault{};
  };

  [[nodiscard]] bool in_work(const Variant& v) const {
    return std::any_of(work_.begin(), work_.end(), [&](const Work& w) { return w.variant == v; });
  }

  /// Variants of a case are far apart in order: when the time is up, no case was forgotten.
  void work() {
    emulator::Options options;
    options.seed = 2;
    options.threads = 1;
    options.optimize = 0; // most of the time is the compiler's
    const auto plain = emulator::make_backend(options).value();
    options.checked = true;
    const auto checked = emulator::make_backend(options).value();
    const std::size_t stride = 97; // prime to most counts; the loop below visits every item anyway
    for (std::size_t i = next_++; i < work_.size(); i = next_++) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin_;
      if (spent.count() > seconds_) return;
      Work& w = work_[work_.size() % stride == 0 ? i : i * stride % work_.size()];
      w.fault = fault(w.checked ? *checked : *plain, cases_[w.test_case], w.variant);
      w.run = true;
    }
  }

  Operation operation_;
  std::vector<Variant> known_, chosen_;
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

TEST_CASE("every two tunables of recurrent run together") {
  check(Operation::recurrent);
}
TEST_CASE("every two tunables of forward run together") {
  check(Operation::forward);
}
TEST_CASE("every two tunables of gate run together") {
  check(Operation::gate);
}
TEST_CASE("every two tunables of gate_backward run together") {
  check(Operation::gate_backward);
}
TEST_CASE("every two tunables of backward run together") {
  check(Operation::backward);
}
