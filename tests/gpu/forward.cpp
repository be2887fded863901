// Every form of the forward at the ends of its inputs' ranges, and in segments.
#include "forward_cases.h"
#include "gpu.h"

using namespace kda;
using namespace kda::test;

namespace {

constexpr std::array kForms{
    "chunk c=64 vt=32 pw=8 sw=4 st=2",         "fused c=16 vt=128 pw=7 sw=8 st=10",
    "fused c=16 vt=128 pw=7 sw=8 st=10 seg=3", "fused c=16 vt=128 pw=7 sw=8 st=10 seg=4",
    "fused c=16 vt=128 pw=7 sw=8 st=10 seg=8", "fused c=16 vt=128 pw=7 sw=8 st=10 seg=16"};

/// Those that this GPU takes.
std::vector<Variant> forms(const Backend& backend) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(production(Operation::forward, 1), backend.target()))
    if (c.rejected.empty() && std::find(kForms.begin(), kForms.end(), to_string(c.variant)) != kForms.end())
      all.push_back(c.variant);
  return all;
}

} // namespace

TEST_CASE("forward: the case groups, in every form", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const std::vector<ForwardCase> cases = all_forward_cases(1100);
  CHECK(!forms(*backend).empty());
  for (const Variant& v : forms(*backend)) {
    ForwardRunner runner(*backend, v);
    for (const ForwardCase& c : cases) {
      CAPTURE(c.name, to_string(v));
      CHECK(runner.fault(c) == "");
    }
  }
}

TEST_CASE("forward: 4,096 tokens that hardly decay", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  std::vector<ForwardCase> cases;
  forward_cases::gates(cases, 4096);
  for (const Variant& v : forms(*backend)) {
    ForwardRunner runner(*backend, v);
    for (const ForwardCase& c : cases)
      if (c.name == "no decay" || c.name == "every channel at its own rate") {
        CAPTURE(c.name, to_string(v));
        CHECK(runner.fault(c) == "");
      }
  }
}

TEST_CASE("forward: the same bits every time", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  std::vector<ForwardCase> cases;
  forward_cases::prefixes(cases, 700);
  for (const Variant& v : forms(*backend)) {
    ForwardRunner runner(*backend, v);
    for (const ForwardCase& c : cases) {
      CAPTURE(c.name, to_string(v));
      const RunReport first = runner.run(c.test_case).value();
      for (int i = 0; i < 5; ++i) {
        const RunReport again = runner.run(c.test_case).value();
        for (std::size_t t = 0; t < first.tensors.size(); ++t)
          CHECK(again.tensors[t].values == first.tensors[t].values);
      }
    }
  }
}
