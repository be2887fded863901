// A forward cut into segments of time, on the emulator: what is forgotten at a boundary, what is not, and
// what only seems to be. That every case group of forward_cases.h comes out right is in forward_cases.cpp;
// here the machinery is broken, and must be missed.
#include "checked.h"
#include "chunk_cases.h"
#include "forward_cases.h"

using namespace kda;
using test::chunk::variant;
using test::forward_cases::kDim;
using test::forward_cases::many_rates;
using test::forward_cases::precomputed;
using test::forward_cases::with_gates;

namespace {

constexpr const char* kFour = "fused c=16 vt=128 pw=7 sw=8 st=10 seg=4";

/// A text in stages/segments.cuh and what stands there instead.
struct Fault {
  const char* from = "";
  const char* to = "";
};
constexpr Fault kNoRepair{"if (boundary_marks(args, unit, s)[1] != 0) return s;", "continue;"};
/// Makes every repair show.
constexpr Fault kPoisonedRepair{"if (boundary_marks(args, unit, s)[1] != 0) return s;",
                                "if (boundary_marks(args, unit, s)[1] != 0) {"
                                " segment_start(args, unit, s)[0] = 1e30f; return s; }"};
constexpr Fault kNoMerge{
    "if (k < Config::K && column + r < Config::V) next[(column + r) * Config::K] = sum[r];", ";"};
constexpr Fault kAlwaysForgets{"return vote_all(all);", "return true;"};

test::RunReport run(const test::TestCase& c, const Variant& v, Fault fault = {}, std::uint64_t seed = 0,
                    bool checked = false) {
  emulator::Options options;
  options.seed = seed;
  options.checked = checked;
  options.optimize = 0; // most of the time is the compiler's
  const auto device = emulator::make_backend(options).value();
  SourceUnit unit = emit(c.inputs.problem, v, device->target()).value();
  if (*fault.from != 0)
    for (SourceFile& file : unit.files)
      if (file.name == "stages/segments.cuh") {
        const std::size_t at = file.text.find(fault.from);
        REQUIRE(at != std::string::npos);
        file.text.replace(at, std::string(fault.from).size(), fault.to);
      }
  const auto report = test::run_unit(*device, unit, c, v);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  return *report;
}

/// The worst error over its tolerance.
double badness(const test::RunReport& report, const test::TestCase& c, const Variant& v) {
  double worst = 0;
  for (const test::TensorReport& t : report.tensors)
    worst = std::max(worst, t.error / test::tolerance(c.inputs.problem, v, t.name));
  return worst;
}

test::TestCase prefix(const std::string& name) {
  std::vector<test::ForwardCase> all;
  test::forward_cases::prefixes(all, 330);
  for (const test::ForwardCase& c : all)
    if (c.name == name) return c.test_case;
  FAIL("no case " << name);
  return {};
}

} // namespace

TEST_CASE("segments: a boundary is merged where the state lives on, and not where it does not") {
  const Variant v = variant(kFour);
  const test::CaseOptions o = precomputed(330);
  const test::TestCase fast = test::random_case(o), slow = with_gates(o, many_rates);
  CHECK(badness(run(fast, v, kNoMerge), fast, v) <= 1);
  CHECK(badness(run(slow, v, kNoMerge), slow, v) > 10);
  // Nothing is walked twice ...
  CHECK(badness(run(fast, v, kPoisonedRepair), fast, v) <= 1);
  CHECK(badness(run(slow, v, kPoisonedRepair), slow, v) <= 1);
  // ... but for what is taken for forgetful and is not.
  CHECK(badness(run(slow, v, kAlwaysForgets), slow, v) <= 1);
}

TEST_CASE("segments: a state handed from channel to channel outlives every channel's decay, and is missed") {
  const Variant v = variant(kFour);
  const test::TestCase c = prefix("a state handed from channel to channel");
  CHECK(badness(run(c, v), c, v) <= 1);
  CHECK(badness(run(c, v, kNoRepair), c, v) > 100);
}

TEST_CASE("segments: the same bits in any order of threads, every access checked") {
  const Variant v = variant(kFour);
  const test::TestCase c = prefix("a head that forgets beside one that does not");
  const test::RunReport first = run(c, v, {}, 0, true);
  CHECK(badness(first, c, v) <= 1);
  for (const std::uint64_t seed : {1, 2, 3}) {
    const test::RunReport again = run(c, v, {}, seed);
    for (std::size_t t = 0; t < first.tensors.size(); ++t)
      CHECK(again.tensors[t].values == first.tensors[t].values);
  }
}

TEST_CASE("segments: a sequence has the same bits alone and among others") {
  const Variant v = variant(kFour);
  test::CaseOptions o = precomputed(0);
  o.problem.value_heads = 1;
  o.problem.varlen = true;
  const auto at_many_rates = [&] {
    test::TestCase c = test::random_case(o);
    for (std::size_t i = 0; i < c.inputs.g.size(); ++i)
      c.inputs.g[i] = many_rates(0, i % kDim);
    return c;
  };
  o.lengths = {300};
  test::TestCase alone = at_many_rates();
  test::expect_recurrence(alone);
  o.lengths = {0, 70, 300, 1};
  test::TestCase among = at_many_rates();
  const auto put = [](reference::Array& to, const reference::Array& from, std::size_t at) {
    std::copy(from.begin(), from.end(), to.begin() + static_cast<std::ptrdiff_t>(at));
  };
  put(among.inputs.q, alone.inputs.q, 70 * kDim);
  put(among.inputs.k, alone.inputs.k, 70 * kDim);
  put(among.inputs.v, alone.inputs.v, 70 * kDim);
  put(among.inputs.beta, alone.inputs.beta, 70);
  put(among.inputs.initial_state, alone.inputs.initial_state, 2 * kDim * kDim);
  test::expect_recurrence(among);
  const test::RunReport one = run(alone, v), all = run(among, v);
  CHECK(badness(all, among, v) <= 1);
  const auto part = [](const reference::Array& x, std::size_t at, std::size_t size) {
    return reference::Array(x.begin() + static_cast<std::ptrdiff_t>(at),
                            x.begin() + static_cast<std::ptrdiff_t>(at + size));
  };
  CHECK(part(all.tensors[0].values, 70 * kDim, 300 * kDim) == one.tensors[0].values);
  CHECK(part(all.tensors[1].values, 2 * kDim * kDim, kDim * kDim) == one.tensors[1].values);
}
