// What a call is refused for, before anything is launched.
#include "marshal.h"
#include <catch2/catch.hpp>
#include <functional>

using namespace kda;

namespace {

constexpr int kTokens = 6, kHeads = 2, kValueHeads = 4, kKeys = 32, kValues = 16;
alignas(64) float g_memory[kTokens * kValueHeads * kKeys + 64];

Problem packed_problem() {
  Problem p;
  p.heads = kHeads;
  p.value_heads = kValueHeads;
  p.key_dim = kKeys;
  p.value_dim = kValues;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.gate = GateKind::softplus;
  p.dt_bias = true;
  p.varlen = true;
  return p;
}

struct Call {
  std::int64_t cu[4] = {0, 2, 2, 5};
  Args args;
  Call() {
    args.q = contiguous(g_memory, DType::fp32, {1, kTokens, kHeads, kKeys});
    args.k = args.q;
    args.v = contiguous(g_memory, DType::fp32, {1, kTokens, kValueHeads, kValues});
    args.o = args.v;
    args.g = contiguous(g_memory, DType::fp32, {1, kTokens, kValueHeads, kKeys});
    args.beta = contiguous(g_memory, DType::fp32, {1, kTokens, kValueHeads});
    args.A_log = contiguous(g_memory, DType::fp32, {kValueHeads});
    args.dt_bias = contiguous(g_memory, DType::fp32, {kValueHeads, kKeys});
    args.final_state = contiguous(g_memory, DType::fp32, {3, kValueHeads, kKeys, kValues});
    args.cu_seqlens = {cu, IndexType::int64, 4};
  }
};

void refused(const char* word, const std::function<void(Call&)>& change, bool host_memory = true) {
  Call call;
  change(call);
  KernelArgs out;
  Sizes sizes;
  const Status status = make_kernel_args(packed_problem(), call.args, host_memory, out, sizes);
  INFO(word);
  REQUIRE_FALSE(status);
  CHECK(status.error().code == ErrorCode::invalid_argument);
  CHECK_THAT(status.error().message, Catch::Matchers::Contains(word));
}

} // namespace

TEST_CASE("a good call gives strides, sizes and the default scale") {
  Call call;
  KernelArgs out;
  Sizes sizes;
  REQUIRE(make_kernel_args(packed_problem(), call.args, true, out, sizes));
  CHECK(sizes.tokens == kTokens);
  CHECK(sizes.sequences == 3);
  CHECK(out.g.stride_token == kValueHeads * kKeys);
  CHECK(out.q.stride_head == kKeys);
  CHECK(out.beta.stride_token == kValueHeads);
  CHECK(out.final_state.stride_sequence == kValueHeads * kKeys * kValues);
  CHECK(out.initial_state.data == nullptr);
  CHECK(out.scale == Approx(1 / std::sqrt(32.0)));
}

TEST_CASE("bad tensors are refused with a sentence that names them") {
  refused("q is required", [](Call& c) { c.args.q.data = nullptr; });
  refused("A_log is required", [](Call& c) { c.args.A_log = {}; });
  refused("dt_bias is required", [](Call& c) { c.args.dt_bias = {}; });
  refused("cu_seqlens is required", [](Call& c) { c.args.cu_seqlens = {}; });
  refused("v is bf16", [](Call& c) { c.args.v.dtype = DType::bf16; });
  refused("q has size 31 in dimension 3", [](Call& c) { c.args.q.shape[3] = 31; });
  refused("g has rank 3", [](Call& c) { c.args.g.rank = 3; });
  refused("cu_seqlens is int32", [](Call& c) { c.args.cu_seqlens.dtype = IndexType::int32; });
  refused("k must be contiguous in its last", [](Call& c) {
    const std::int64_t strides[] = {0, kHeads * kKeys * 2, kKeys * 2, 2};
    std::copy(std::begin(strides), std::end(strides), c.args.k.stride);
  });
  refused("v has stride 33", [](Call& c) {
    const std::int64_t strides[] = {0, 33, kValues, 1};
    std::copy(std::begin(strides), std::end(strides), c.args.v.stride);
  });
  refused("o is at an address", [](Call& c) { c.args.o.data = g_memory + 1; });
  refused("final_state has size", [](Call& c) { c.args.final_state.shape[0] = 2; });
}

TEST_CASE("cu_seqlens is checked where it can be read, and only there") {
  refused("starts at 1", [](Call& c) { c.cu[0] = 1; });
  refused("decreases from 2 to 1", [](Call& c) { c.cu[2] = 1; });
  refused("reaches 7 with only 6", [](Call& c) { c.cu[3] = 7; });
  Call call;
  call.cu[3] = 7;
  KernelArgs out;
  Sizes sizes;
  CHECK(make_kernel_args(packed_problem(), call.args, false, out, sizes));
}

TEST_CASE("impossible sizes are refused") {
  Problem p = packed_problem();
  CHECK_FALSE(check_sizes(p, {2, 8, 2}));
  CHECK_FALSE(check_sizes(p, {1, -1, 1}));
  p.varlen = false;
  CHECK_FALSE(check_sizes(p, {2, 8, 1}));
  CHECK(check_sizes(p, {2, 0, 2}));
}
