// chunk_backward.cu in slabs on the emulator: against the float64 adjoint, and bit for bit against the whole
// call at once.
#include "checked.h"
#include "chunk_cases.h"
#include "kda/engine.h"
#include "option_matrix.h"
#include "pairwise.h"
#include "run_case.h"

using namespace kda;
using test::chunk::variant;

namespace {

test::RunReport run(const test::TestCase& c, const Variant& v, test::RunOptions options = {},
                    const emulator::Options& order = {}) {
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  auto report = test::run_case(**backend, c, v, options);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  return std::move(*report);
}

void check(const test::RunReport& report, const Problem& p, const Variant& v) {
  CHECK(report.tensors.size() >= 2); // those of parameters and states are there without tokens, too
  for (const test::TensorReport& t : report.tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= test::tolerance(p, v, t.name));
  }
}

/// The call in slabs of `tokens` against float64 and, with `bits`, against the call as a whole.
void check_case(const test::TestCase& c, const std::string& whole, int tokens, bool bits = true,
                test::RunOptions options = {}, const emulator::Options& order = {}) {
  const Problem& p = c.inputs.problem;
  const Variant v = variant(fmt::format("{} sl={}", whole, tokens));
  CAPTURE(to_string(p), to_string(v));
  const Slabs slabs = launches(p, v, cuda_target("sm_90a").value(), c.inputs.sizes).slabs;
  CAPTURE(slabs.count, slabs.pieces, slabs.rows, slabs.chunks);
  CHECK(slabs.count > 1);
  const test::RunReport report = run(c, v, options, order);
  check(report, p, v);
  // A saved state is rounded to its dtype, and was found by another kernel.
  if (!bits || p.saved_interval != 0) return;
  const test::RunReport expected = run(c, variant(whole), options, order);
  REQUIRE(report.tensors.size() == expected.tensors.size());
  for (std::size_t i = 0; i < expected.tensors.size(); ++i) {
    CAPTURE(expected.tensors[i].name);
    CHECK(report.tensors[i].values == expected.tensors[i].values);
  }
}

constexpr std::array kVariants{"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=3",
                               "chunk c=16 vt=16 pw=4 sw=8 st=2", "chunk c=32 vt=16 pw=4 sw=4 st=2"};

/// Slabs that begin within a sequence and between two, also one without tokens; slabs of two sequences and
/// more, and of one alone.
void set_shape(test::CaseOptions& o, int shape) {
  Problem& p = o.problem;
  o.batch = 2;
  o.tokens = 147; // neither a whole number of tiles nor of chunks
  if (shape == test::chunk::fixed) return;
  o.batch = 1;
  p.varlen = true;
  p.cu_seqlens_type = shape == test::chunk::packed_int32 ? IndexType::int32 : IndexType::int64;
  o.lengths = {0, 128, 1, 0, 0, 150, 17, 0};
  o.padding = shape == test::chunk::packed_int32 ? 7 : 0;
}

test::CaseOptions plain_case(std::int64_t batch, std::int64_t tokens) {
  test::CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::backward;
  p.key_dim = p.value_dim = 32;
  p.heads = p.value_heads = 2;
  p.gate = GateKind::bounded_no_a; // d A_log of two heads is what is left of terms a thousand times larger
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  o.batch = batch;
  o.tokens = tokens;
  o.regime = test::Regime::slow;
  return o;
}

} // namespace

/// A third of the rows in which every two options meet: all of them are the whole call's test.
TEST_CASE("backward in slabs: options together, with states saved and not") {
  std::vector<int> sizes = test::chunk::kOptionSizes;
  sizes.push_back(2); // saved states
  sizes.push_back(2); // tokens of a slab
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    if (++index % 3 != 0) continue;
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    test::chunk::set_dims(o, row);
    test::set_flags(o, row);
    set_shape(o, row[11]);
    if (row[17] == 1) p.saved_interval = 64;
    o.seed = index + 100;
    check_case(test::random_case(o), kVariants[static_cast<std::size_t>(row[16])], row[18] == 1 ? 128 : 64,
               index % 2 == 0, test::run_of(row), test::checked(index / 3));
  }
}

TEST_CASE("backward in slabs: rows side by side, rows one after the other, and a short last piece") {
  // 512 tokens are the shortest piece of a row.
  const std::string whole = "chunk c=64 vt=32 pw=4 sw=4 st=2";
  const auto slabs = [](const Problem& p, std::int64_t batch, std::int64_t tokens, int slab) {
    return launches(p, variant(fmt::format("chunk c=64 vt=32 pw=4 sw=4 st=2 sl={}", slab)),
                    cuda_target("sm_90a").value(), {batch, tokens, batch})
        .slabs;
  };
  const test::CaseOptions side = plain_case(2, 1100);
  CHECK(slabs(side.problem, 2, 1100, 1024).rows == 2);
  CHECK(slabs(side.problem, 2, 1100, 1024).pieces == 3);
  check_case(test::random_case(side), whole, 1024);
  const test::CaseOptions after = plain_case(3, 600);
  CHECK(slabs(after.problem, 3, 600, 1024).rows == 2);
  CHECK(slabs(after.problem, 3, 600, 1024).count == 4);
  check_case(test::random_case(after), whole, 1024);
  test::CaseOptions saved = plain_case(2, 1100);
  saved.problem.saved_interval = 192; // pieces of 384
  CHECK(slabs(saved.problem, 2, 1100, 1024).chunks == 6);
  check_case(test::random_case(saved), whole, 1024);
}

TEST_CASE("backward in slabs: more empty sequences than units, all tokens in one slab, none at all") {
  test::CaseOptions o = plain_case(1, 0);
  o.problem.varlen = true;
  o.lengths.assign(40, 0);
  const std::string whole = "chunk c=16 vt=16 pw=4 sw=4 st=2";
  check_case(test::random_case(o), whole, 64);
  o.lengths[3] = 5;
  o.lengths[20] = 130;
  o.lengths[21] = 1;
  o.lengths[39] = 40;
  check_case(test::random_case(o), whole, 64);
}

TEST_CASE("backward in slabs: a state that is missing makes gradients NaN, and others do not see it") {
  test::CaseOptions o = plain_case(2, 150);
  o.problem.saved_interval = 64;
  test::TestCase c = test::random_case(o);
  c.interior_slots[0] = -1; // the state after 64 tokens of row 0
  const Variant v = variant("chunk c=64 vt=32 pw=4 sw=4 st=2 sl=64");
  REQUIRE(launches(c.inputs.problem, v, cuda_target("sm_90a").value(), c.inputs.sizes).slabs.pieces == 3);
  const test::RunReport report = run(c, v);
  for (const test::TensorReport& t : report.tensors)
    if (t.name == "d_q") {
      const auto row = static_cast<std::ptrdiff_t>(150 * 64), missing = static_cast<std::ptrdiff_t>(64 * 64);
      CHECK(std::isnan(t.values[64 * 64]));
      CHECK(
          std::none_of(t.values.begin(), t.values.begin() + missing, [](double x) { return std::isnan(x); }));
      CHECK(std::none_of(t.values.begin() + row, t.values.end(), [](double x) { return std::isnan(x); }));
    }
}

TEST_CASE("backward in slabs: from the states that a forward kernel saved, packed and not") {
  for (const bool packed : {false, true}) {
    test::CaseOptions o = plain_case(2, 150);
    o.problem.saved_interval = 64;
    o.problem.varlen = packed;
    if (packed) {
      o.batch = 1;
      o.lengths = {70, 0, 130, 64};
    }
    test::TestCase backward = test::random_case(o);
    test::TestCase forward;
    forward.inputs = backward.inputs;
    forward.inputs.problem.operation = Operation::forward;
    forward.inputs.problem.saved_interval = 0;
    forward.inputs.problem.interior_states = true;
    forward.interior_interval = 64;
    forward.interior_slots = backward.interior_slots;
    forward.interior_states = backward.interior_states;
    const reference::Outputs outputs = reference::recurrence(forward.inputs);
    forward.expected = {
        {"o", outputs.o}, {"final_state", outputs.final_state}, {"interior_states", backward.saved}};
    const Variant saves = variant("chunk c=32 vt=32 pw=4 sw=4 st=2");
    const test::RunReport saved = run(forward, saves);
    check(saved, forward.inputs.problem, saves);
    REQUIRE(saved.tensors.back().name == "interior_states");
    backward.saved = saved.tensors.back().values;
    const Variant v = variant("chunk c=64 vt=32 pw=4 sw=4 st=2 sl=64");
    check(run(backward, v), backward.inputs.problem, v);
  }
}

TEST_CASE(
    "backward in slabs: the tuner checks several of them, from states that a forward would have saved") {
  EngineOptions options;
  options.cache_directory = "";
  options.emulator = emulator::make_backend().value();
  options.tune_budget_seconds = 3600;
  const Engine engine = Engine::create(options).value();
  test::CaseOptions o = plain_case(1, 64);
  Problem& p = o.problem;
  p.key_dim = p.value_dim = 16;
  p.state_layout = StateLayout::v_k;
  p.saved_interval = 64;
  TuneRequest request;
  request.only = {variant("chunk c=32 vt=16 pw=4 sw=4 st=2 sl=512")};
  const TuneReport report = engine.tune(p, {Device::Kind::emulator, 0}, {1, 64, 1}, request).value();
  for (const TuneRow& row : report.rows)
    if (row.variant == to_string(request.only[0])) {
      INFO(row.reason);
      CHECK(row.status == "ok");
      CHECK(row.error > 0);
      return;
    }
  FAIL("the variant has no row");
}
