// recurrent.cu on the emulator against the float64 recurrence.
#include "checked.h"
#include "marshal.h"
#include "option_matrix.h"
#include "pairwise.h"
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;

namespace {

Target h100() {
  return cuda_target("sm_90a").value();
}

std::vector<Variant> accepted(const Problem& p) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, h100()))
    if (c.rejected.empty()) all.push_back(c.variant);
  return all;
}

/// What fp32 arithmetic and one rounding of the result leave.
double tolerance(DType type) {
  switch (type) {
  case DType::bf16: return 2.5e-3;
  case DType::fp16: return 3e-4;
  case DType::fp32: break;
  }
  return 2e-6;
}

void check_case(const test::CaseOptions& options, const Variant& v, const test::RunOptions& run,
                const emulator::Options& order = {}) {
  const Problem& p = options.problem;
  CAPTURE(to_string(p), to_string(v), options.batch, options.tokens, options.lengths, options.padding,
          run.strided, run.optional_outputs, options.initial_state, static_cast<int>(options.regime));
  REQUIRE(validate(p));
  const test::TestCase c = test::random_case(options);
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  const auto report = test::run_case(**backend, c, v, run);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  CHECK(report->tensors.size() == (run.optional_outputs ? 2 : 1));
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= tolerance(t.name == "o" ? p.dtype : p.state_dtype));
  }
}

} // namespace

TEST_CASE("recurrent kernel: every two options together") {
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(test::kOptionSizes)) {
    const test::CaseOptions o = test::case_of(row, Operation::recurrent, index);
    check_case(o, test::variant_of(row, accepted(o.problem)), test::run_of(row), test::checked(index));
    ++index;
  }
}

TEST_CASE("recurrent kernel: every variant, rows that do not divide V, more tokens than prefetched") {
  test::CaseOptions o;
  o.problem.operation = Operation::recurrent;
  o.problem.key_dim = 44;
  o.problem.value_dim = 36;
  o.problem.dtype = o.problem.gate_dtype = o.problem.beta_dtype = DType::fp32;
  o.problem.gate = GateKind::softplus;
  o.problem.qk_l2norm = o.problem.beta_sigmoid = true;
  o.tokens = 23;
  for (const Variant& v : accepted(o.problem))
    check_case(o, v, {});
}

TEST_CASE("recurrent kernel: errors do not grow with the length") {
  test::CaseOptions o;
  o.problem.operation = Operation::recurrent;
  o.problem.key_dim = o.problem.value_dim = 32;
  o.problem.dtype = o.problem.gate_dtype = o.problem.beta_dtype = DType::fp32;
  o.problem.qk_l2norm = true;
  o.tokens = 3000;
  o.regime = test::Regime::slow;
  check_case(o, choose(o.problem, h100(), {1, o.tokens, 1}).value(), {});
}

TEST_CASE("recurrent kernel: the final state may take the place of the initial one") {
  test::CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::recurrent;
  p.key_dim = p.value_dim = 32;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.heads = p.value_heads = 2;
  o.tokens = 3;
  const test::TestCase c = test::random_case(o);
  const auto backend = emulator::make_backend().value();
  const Variant v = choose(p, backend->target(), c.inputs.sizes).value();
  const SourceUnit unit = emit(p, v, backend->target()).value();
  const auto module = backend->load(unit, backend->compile(unit).value()).value();

  const auto upload = [&](const reference::Array& x) {
    const std::vector<float> narrow(x.begin(), x.end());
    void* data = backend->allocate(narrow.size() * sizeof(float)).value();
    REQUIRE(backend->copy_to_device(data, narrow.data(), narrow.size() * sizeof(float)));
    return data;
  };
  const auto tokens = [&](const reference::Array& x, int heads, int dim) {
    return TokenTensor{upload(x), o.tokens * heads * dim, heads * dim, dim};
  };
  KernelArgs args{};
  args.q = tokens(c.inputs.q, 2, 32);
  args.k = tokens(c.inputs.k, 2, 32);
  args.v = tokens(c.inputs.v, 2, 32);
  args.g = tokens(c.inputs.g, 2, 32);
  args.beta = tokens(c.inputs.beta, 2, 1);
  args.o = tokens(c.inputs.v, 2, 32);
  args.initial_state = args.final_state = {upload(c.inputs.initial_state), 2 * 32 * 32, 32 * 32};
  args.tokens = o.tokens;
  args.batch = args.sequences = 1;
  args.heads = args.value_heads = 2;
  args.head_reciprocal = head_reciprocal(2);
  args.scale = static_cast<float>(c.inputs.scale > 0 ? c.inputs.scale : 1 / std::sqrt(32.0));
  const LaunchList list = launches(p, v, backend->target(), c.inputs.sizes);
  REQUIRE(list.count == 1);
  REQUIRE(module->launch(list.items[0], args, nullptr));

  const reference::Outputs expected = reference::recurrence(c.inputs);
  std::vector<float> state(expected.final_state.size());
  REQUIRE(backend->copy_from_device(state.data(), args.final_state.data, state.size() * sizeof(float)));
  CHECK(reference::relative_error({state.begin(), state.end()}, expected.final_state) < 2e-6);
  for (const TokenTensor* x : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.o})
    backend->release(x->data);
  backend->release(args.final_state.data);
}

TEST_CASE("recurrent kernel: what does not fit is rejected with a reason") {
  Problem p;
  p.operation = Operation::recurrent;
  p.key_dim = 256;
  p.dtype = p.gate_dtype = DType::fp32;
  p.state_layout = StateLayout::v_k;
  const auto reason = [&](const char* variant) {
    const Variant v = parse_variant(variant).value();
    for (const Candidate& c : enumerate(p, h100()))
      if (c.variant == v) return c.rejected;
    return std::string("not enumerated");
  };
  CHECK(reason("token sw=4 r=4 st=1").empty());
  CHECK_THAT(reason("token sw=4 r=32 st=4"), Catch::Contains("registers a thread of 255"));
  p.key_dim = 16;
  CHECK_THAT(reason("token sw=4 r=4 st=1"), Catch::Contains("8 rows at a time at K=16"));
  p.value_dim = 16;
  CHECK_THAT(reason("token sw=4 r=32 st=1"), Catch::Contains("more than V=16 has"));
  CHECK_THAT(reason("token c=4 sw=4 r=8 st=1 pdl=1"), Catch::Contains("2 tiles of rows do not fill"));
  p.state_layout = StateLayout::k_v;
  CHECK_THAT(reason("token sw=4 r=8 st=1"), Catch::Contains("32 rows at a time at K=16 in k_v"));
  CHECK_THAT(reason("token c=4 sw=4 r=16 st=1 l=8 pdl=1"),
             Catch::Contains("8 lanes are more than K=16 fills"));
}

TEST_CASE("recurrent kernel: the untuned choice prefetches when there are tokens to prefetch") {
  Problem p;
  p.operation = Operation::recurrent;
  p.heads = p.value_heads = 32;
  CHECK(choose(p, h100(), {1, 1, 1})->stages == 1);
  CHECK(choose(p, h100(), {1, 8192, 1})->stages == 4);
}
