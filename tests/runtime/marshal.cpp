// What a call must satisfy before anything is launched, and the sentence that each fault gets.
#include "marshal.h"
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <functional>

using namespace kda;

namespace {

/// A packed call with every input, all tensors in one buffer: nothing but cu_seqlens is ever read.
struct Call {
  Problem problem;
  Args args;
  std::array<std::int64_t, 4> cu_seqlens{0, 5, 5, 9};
  KernelArgs out{};
  Sizes sizes;

  explicit Call(Operation operation = Operation::forward) {
    problem.operation = operation;
    problem.heads = 2;
    problem.value_heads = 4;
    problem.key_dim = 64;
    problem.value_dim = 32;
    problem.gate = GateKind::bounded;
    problem.dt_bias = problem.beta_sigmoid = problem.varlen = true;
    args.q = tensor(DType::bf16, {1, 10, 2, 64});
    args.k = args.q;
    args.v = tensor(DType::bf16, {1, 10, 4, 32});
    args.g = tensor(DType::bf16, {1, 10, 4, 64});
    args.beta = tensor(DType::bf16, {1, 10, 4});
    args.A_log = tensor(DType::fp32, {4});
    args.dt_bias = tensor(DType::fp32, {4, 64});
    args.initial_state = args.final_state = tensor(DType::fp32, {3, 4, 64, 32});
    args.o = args.d_o = args.d_v = args.v;
    args.d_q = args.d_k = args.q;
    args.d_g = args.g;
    args.d_beta = args.beta;
    args.d_A_log = args.A_log;
    args.d_dt_bias = args.dt_bias;
    args.d_initial_state = args.d_final_state = args.initial_state;
    args.cu_seqlens = {cu_seqlens.data(), IndexType::int64, 4};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static Tensor tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
    alignas(256) static std::array<std::byte, 512> memory;
    return contiguous(memory.data(), dtype, shape);
  }
  Status check(bool host_memory = true) { return make_kernel_args(problem, args, host_memory, out, sizes); }
};

void* moved(void* data, int bytes) {
  return static_cast<std::byte*>(data) + bytes;
}

struct Fault {
  std::function<void(Call&)> plant;
  const char* sentence; ///< what the refusal says
};
void check_refused(const std::vector<Fault>& faults, Operation operation = Operation::forward) {
  for (const Fault& fault : faults) {
    INFO("expected: " << fault.sentence);
    Call call(operation);
    REQUIRE(call.check());
    fault.plant(call);
    const Status status = call.check();
    REQUIRE_FALSE(status);
    CHECK(status.error().code == ErrorCode::invalid_argument);
    CHECK_THAT(status.error().message, Catch::Matchers::Contains(fault.sentence));
  }
}

} // namespace

TEST_CASE("a call in order becomes the kernel parameter: sizes, strides, scale") {
  Call call;
  REQUIRE(call.check());
  CHECK(call.sizes.batch == 1);
  CHECK(call.sizes.tokens == 10);
  CHECK(call.sizes.sequences == 3);
  CHECK(call.out.tokens == 10);
  CHECK(call.out.heads == 2);
  CHECK(call.out.value_heads == 4);
  CHECK(call.out.q.data == call.args.q.data);
  CHECK(call.out.q.stride_head == 64);
  CHECK(call.out.v.stride_token == 4 * 32);
  CHECK(call.out.beta.stride_token == 4);
  CHECK(call.out.final_state.stride_sequence == 4 * 64 * 32);
  CHECK(call.out.d_q.data == nullptr);
  CHECK(call.out.scale == 0.125F); // K^-1/2
  CHECK(call.out.lower_bound == -5);
  call.args.scale = 0.5F;
  call.args.q.stride[0] = 4096; // a view of a larger tensor
  call.args.q.stride[1] = 256;
  call.args.q.stride[2] = 128;
  call.args.q.stride[3] = 1;
  REQUIRE(call.check());
  CHECK(call.out.scale == 0.5F);
  CHECK(call.out.q.stride_batch == 4096);
  CHECK(call.out.q.stride_token == 256);
  CHECK(call.out.q.stride_head == 128);
}

TEST_CASE("a tensor that is required and absent is refused by its name") {
  check_refused({{[](Call& c) { c.args.q = {}; }, "q is required"},
                 {[](Call& c) { c.args.k.data = nullptr; }, "k is required"},
                 {[](Call& c) { c.args.v = {}; }, "v is required"},
                 {[](Call& c) { c.args.g = {}; }, "g is required"},
                 {[](Call& c) { c.args.beta = {}; }, "beta is required"},
                 {[](Call& c) { c.args.o = {}; }, "o is required"},
                 {[](Call& c) { c.args.A_log = {}; }, "A_log is required"},
                 {[](Call& c) { c.args.dt_bias = {}; }, "dt_bias is required"},
                 {[](Call& c) { c.args.cu_seqlens = {}; }, "cu_seqlens is required"}});
  check_refused({{[](Call& c) { c.args.d_o = {}; }, "d_o is required"},
                 {[](Call& c) { c.args.d_q = {}; }, "d_q is required"},
                 {[](Call& c) { c.args.d_k = {}; }, "d_k is required"},
                 {[](Call& c) { c.args.d_v = {}; }, "d_v is required"},
                 {[](Call& c) { c.args.d_g = {}; }, "d_g is required"},
                 {[](Call& c) { c.args.d_beta = {}; }, "d_beta is required"}},
                Operation::backward);
}

TEST_CASE("a tensor of another dtype, rank or shape is refused with what was expected") {
  check_refused({{[](Call& c) { c.args.q.dtype = DType::fp16; }, "q is fp16, the problem says bf16"},
                 {[](Call& c) { c.args.A_log.dtype = DType::bf16; }, "A_log is bf16"},
                 {[](Call& c) { c.args.final_state.dtype = DType::bf16; }, "final_state is bf16"},
                 {[](Call& c) { c.args.cu_seqlens.dtype = IndexType::int32; }, "cu_seqlens is int32"},
                 {[](Call& c) { c.args.v.rank = 3; }, "v has rank 3, expected 4"},
                 {[](Call& c) { c.args.g.rank = 3; }, "g has rank 3, expected 4: [B, T, HV, K]"},
                 {[](Call& c) { c.args.beta.rank = 4; }, "beta has rank 4, expected 3"},
                 {[](Call& c) { c.args.q.shape[2] = 4; }, "q has size 4 in dimension 2, expected 2"},
                 {[](Call& c) { c.args.k.shape[1] = 9; }, "k has size 9 in dimension 1, expected 10"},
                 {[](Call& c) { c.args.v.shape[3] = 64; }, "v has size 64 in dimension 3, expected 32"},
                 {[](Call& c) { c.args.g.shape[0] = 2; }, "a packed problem has batch 1, not 2"},
                 {[](Call& c) { c.args.g.shape[1] = -1; }, "must not be negative"},
                 {[](Call& c) { c.args.initial_state.shape[0] = 2; }, "initial_state has size 2"},
                 {[](Call& c) { c.args.dt_bias.shape[1] = 32; }, "dt_bias has size 32"}});
  check_refused({{[](Call& c) { c.args.d_beta.dtype = DType::fp32; }, "d_beta is fp32"},
                 {[](Call& c) { c.args.d_A_log.shape[0] = 2; }, "d_A_log has size 2"},
                 {[](Call& c) { c.args.d_initial_state.shape[3] = 64; }, "d_initial_state has size 64"}},
                Operation::backward);
}

TEST_CASE("strides and addresses that a vector load cannot use are refused") {
  const auto strided = [](Tensor& t, std::int64_t token, std::int64_t head, std::int64_t last) {
    t.stride[0] = 10 * token;
    t.stride[1] = token;
    t.stride[2] = head;
    t.stride[3] = last;
  };
  check_refused(
      {{[=](Call& c) { strided(c.args.q, 256, 128, 2); }, "q must be contiguous in its last dimension"},
       {[=](Call& c) { strided(c.args.q, 256, 68, 1); }, "q has stride 68 in dimension 2"},
       {[=](Call& c) { strided(c.args.v, 132, 32, 1); }, "v has stride 132 in dimension 1"},
       {[](Call& c) { c.args.q.data = moved(c.args.q.data, 8); }, "q is at an address"},
       {[](Call& c) { c.args.o.data = moved(c.args.o.data, 2); }, "o is at an address"},
       {[](Call& c) { c.args.beta.data = moved(c.args.beta.data, 1); }, "beta is at an address"},
       {[](Call& c) { c.args.A_log.data = moved(c.args.A_log.data, 4); }, "A_log is at an address"},
       {[](Call& c) { c.args.final_state.data = moved(c.args.final_state.data, 4); },
        "final_state is at an address"},
       {[=](Call& c) { strided(c.args.initial_state, 64 * 32, 36, 1); },
        "initial_state must have a contiguous inner matrix"}});
}

TEST_CASE("rows that are no multiple of 16 bytes need 8-byte alignment only") {
  Call call;
  call.problem.key_dim = 60; // 120 bytes a row
  call.args.q = call.args.k = Call::tensor(DType::bf16, {1, 10, 2, 60});
  call.args.g = Call::tensor(DType::bf16, {1, 10, 4, 60});
  call.args.dt_bias = Call::tensor(DType::fp32, {4, 60});
  call.args.initial_state = call.args.final_state = Call::tensor(DType::fp32, {3, 4, 60, 32});
  call.args.q.data = moved(call.args.q.data, 8);
  CHECK(call.check());
  call.args.q.data = moved(call.args.q.data, -4);
  CHECK_FALSE(call.check());
}

TEST_CASE("beta may have any strides") {
  Call call;
  call.args.beta.stride[0] = 1;
  call.args.beta.stride[1] = 3;
  call.args.beta.stride[2] = 31;
  REQUIRE(call.check());
  CHECK(call.out.beta.stride_head == 31);
}

TEST_CASE("cu_seqlens must start at 0, not decrease and stay within T, where it can be read") {
  check_refused({{[](Call& c) {
                    c.cu_seqlens = {1, 5, 5, 9};
                  },
                  "cu_seqlens starts at 1, expected 0"},
                 {[](Call& c) {
                    c.cu_seqlens = {0, 5, 4, 9};
                  },
                  "decreases from 5 to 4 at element 2"},
                 {[](Call& c) {
                    c.cu_seqlens = {0, 5, 5, 11};
                  },
                  "reaches 11 with only 10 tokens"},
                 {[](Call& c) {
                    c.cu_seqlens = {0, -1, 5, 9};
                  },
                  "decreases from 0 to -1"},
                 {[](Call& c) { c.args.cu_seqlens.size = 0; }, "needs N+1 elements"},
                 {[](Call& c) { c.problem.varlen = false; }, "the problem is not packed"}});
  std::array<std::int32_t, 4> narrow{0, 5, 3, 9};
  Call call;
  call.problem.cu_seqlens_type = IndexType::int32;
  call.args.cu_seqlens = {narrow.data(), IndexType::int32, 4};
  CHECK_FALSE(call.check());
  narrow[2] = 5;
  CHECK(call.check());
}

TEST_CASE("cu_seqlens on a device is never read") {
  Call call;
  call.args.cu_seqlens.data = reinterpret_cast<const void*>(std::uintptr_t{16}); // reading it would crash
  CHECK(call.check(/*host_memory=*/false));
}

TEST_CASE("tensors that the problem does not have are refused, optional ones may be absent") {
  check_refused(
      {{[](Call& c) { c.problem.dt_bias = false; }, "dt_bias is given, but the problem has no dt_bias"}});
  Call call;
  call.args.initial_state = call.args.final_state = {};
  CHECK(call.check());
  Call backward(Operation::backward);
  backward.args.d_A_log = backward.args.d_dt_bias = backward.args.d_initial_state = {};
  backward.args.d_final_state = backward.args.o = {};
  CHECK(backward.check());
  CHECK(backward.out.d_A_log == nullptr);
}

TEST_CASE("saved states reach the kernel, and every fault has its sentence") {
  const auto save = [](Call& c) {
    static std::array<std::int32_t, 6> slots{0, 1, 2, 3, 4, 5};
    c.problem.saved_interval = 64;
    c.args.interior_states = Call::tensor(DType::fp32, {4, 4, 64, 32});
    c.args.interior_slots = contiguous_table(slots.data(), IndexType::int32, {3, 2});
  };
  Call call(Operation::backward);
  save(call);
  std::int32_t error = 0;
  call.args.slot_error = &error;
  REQUIRE(call.check());
  CHECK(call.out.interior_states.data == call.args.interior_states.data);
  CHECK(call.out.interior_pool == 4);
  CHECK(call.out.interior_interval == 64);
  CHECK(call.out.interior_slots.columns == 2);
  CHECK(call.out.slot_error == &error);
  const auto with = [&](auto change) {
    return [=](Call& c) {
      save(c);
      change(c);
    };
  };
  check_refused(
      {{with([](Call& c) { c.problem.saved_interval = 0; }), "or the saved_interval of a backward"},
       {with([](Call& c) { c.args.interior_interval = 128; }),
        "interior_interval is 128, the problem says 64"},
       {with([](Call& c) { c.args.interior_states = {}; }), "interior_states is required by saved_interval"},
       {with([](Call& c) { c.args.interior_slots = {}; }), "interior_slots is required by saved_interval"},
       {with([](Call& c) { c.args.interior_states.shape[2] = 32; }), "expected 64"},
       {with([](Call& c) { c.args.interior_slots.shape[0] = 2; }), "expected 3: one a sequence"},
       {with([](Call& c) {
          c.problem.varlen = false;
          c.args.cu_seqlens = {};
          for (Tensor* t : {&c.args.q, &c.args.k, &c.args.v, &c.args.g, &c.args.beta, &c.args.d_o,
                            &c.args.d_q, &c.args.d_k, &c.args.d_v, &c.args.d_g, &c.args.d_beta}) {
            t->shape[0] = 3;
            t->shape[1] = 200;
            std::fill(t->stride, t->stride + 4, 0);
          }
        }),
        "has 2 columns; 200 tokens have 3 saved states, one every 64"}},
      Operation::backward);
}

TEST_CASE("a call without tokens needs no token tensors") {
  Call call;
  call.cu_seqlens = {0, 0, 0, 0};
  for (Tensor* t : {&call.args.q, &call.args.k, &call.args.v, &call.args.g, &call.args.beta, &call.args.o}) {
    t->shape[1] = 0;
    t->data = nullptr;
  }
  REQUIRE(call.check());
  CHECK(call.sizes.tokens == 0);
  CHECK(call.sizes.sequences == 3);
}

TEST_CASE("the gate operations read g alone and write fp32") {
  Call gate(Operation::gate);
  gate.problem.varlen = false;
  gate.args.cu_seqlens = {};
  gate.args.q = gate.args.k = gate.args.v = gate.args.beta = {};
  gate.args.o = Call::tensor(DType::fp32, {1, 10, 4, 64});
  REQUIRE(gate.check());
  gate.args.o.dtype = DType::bf16;
  CHECK_FALSE(gate.check());
}

TEST_CASE("sizes that a problem cannot have are refused") {
  Problem p;
  CHECK(check_sizes(p, {2, 100, 2}));
  CHECK_FALSE(check_sizes(p, {2, 100, 3}));
  CHECK_FALSE(check_sizes(p, {-1, 100, -1}));
  CHECK_FALSE(check_sizes(p, {1, -1, 1}));
  CHECK(check_sizes(p, {4, 1 << 28, 4}));
  CHECK_FALSE(check_sizes(p, {4, (1 << 28) + 1, 4}));
  CHECK_FALSE(check_sizes(p, {1 << 30, std::int64_t{1} << 40, 1 << 30}));
  p.varlen = true;
  CHECK(check_sizes(p, {1, 100, 0}));
  CHECK_FALSE(check_sizes(p, {2, 100, 2}));
}

namespace {

/// The same call on a pool of 7 slots, sequences in slots that stand in every second element of a table.
void put_into_pool(Call& c) {
  alignas(8) static const std::array<std::int32_t, 6> table{};
  alignas(4) static std::int32_t word = 0;
  c.problem.state_pool = true;
  c.args.padding = PaddingPolicy::negative;
  c.args.initial_state = c.args.final_state = Call::tensor(DType::fp32, {7, 4, 64, 32});
  c.args.read_slots = c.args.write_slots = contiguous_table(table.data(), IndexType::int32, {3});
  c.args.read_slots.stride[0] = 2;
  c.args.slot_error = &word;
}

} // namespace

TEST_CASE("a state pool: slots and strides reach the kernel, and every fault has its sentence") {
  Call call(Operation::recurrent);
  put_into_pool(call);
  call.args.initial_state.stride[0] = std::int64_t{1} << 33; // 64-bit, with gaps
  call.args.initial_state.stride[1] = 64 * 32;
  call.args.initial_state.stride[2] = 32;
  call.args.initial_state.stride[3] = 1;
  REQUIRE(call.check());
  CHECK(call.out.initial_state.stride_sequence == std::int64_t{1} << 33);
  CHECK(call.out.read_slots.data == call.args.read_slots.data);
  CHECK(call.out.read_slots.stride_sequence == 2);
  CHECK(call.out.read_slots.wide == 0);
  CHECK(call.out.read_pool == 7);
  CHECK(call.out.write_slots.stride_sequence == 1);
  CHECK(call.out.padding == kSkipNegative);
  CHECK(call.out.slot_error == call.args.slot_error);

  const std::pair<std::function<void(Call&)>, const char*> faults[] = {
      {[](Call& c) { c.args.read_slots = {}; }, "read_slots is required by a state pool"},
      {[](Call& c) { c.args.write_slots = {}; }, "write_slots is required by a state pool"},
      {[](Call& c) { c.args.initial_state = {}; }, "read_slots is given without its states"},
      {[](Call& c) { c.args.read_slots.dtype = static_cast<IndexType>(7); }, "must be int32 or int64"},
      {[](Call& c) { c.args.write_slots.shape[0] = 4; }, "has 4 elements, expected 3"},
      {[](Call& c) { c.args.write_slots.rank = 2; }, "write_slots has rank 2, expected 1"},
      {[](Call& c) { c.args.write_slots.stride[0] = 0; }, "write_slots has stride 0"},
      {[](Call& c) { c.args.padding = static_cast<PaddingPolicy>(9); }, "padding is not one of"},
      {[](Call& c) {
         c.args.read_slots.data = moved(const_cast<void*>(c.args.read_slots.data), 4);
         c.args.read_slots.dtype = IndexType::int64;
       },
       "read_slots is at an address"},
      {[](Call& c) { c.args.final_state.shape[1] = 3; }, "expected 4"},
      {[](Call& c) { c.args.slot_error = static_cast<std::int32_t*>(moved(c.args.slot_error, 2)); },
       "slot_error is at an address"},
      {[](Call& c) {
         c.problem.state_pool = false;
         c.args.initial_state = c.args.final_state = Call::tensor(DType::fp32, {3, 4, 64, 32});
       },
       "the problem has no state pool"}};
  for (const auto& [plant, sentence] : faults) {
    Call faulty(Operation::recurrent);
    put_into_pool(faulty);
    REQUIRE(faulty.check());
    plant(faulty);
    const Status status = faulty.check();
    REQUIRE_FALSE(status);
    CHECK_THAT(status.error().message, Catch::Matchers::Contains(sentence));
  }
}

TEST_CASE("one sequence may have any stride in its slot table") {
  Call call(Operation::recurrent);
  put_into_pool(call);
  call.cu_seqlens = {0, 9, 0, 0};
  call.args.cu_seqlens.size = 2;
  call.args.read_slots.shape[0] = call.args.write_slots.shape[0] = 1;
  call.args.read_slots.stride[0] = 0;
  call.args.write_slots.stride[0] = -5;
  CHECK(call.check());
}

namespace {

/// Verifies three tokens a row of two rows on a pool: every state, as a tree that keeps updates.
struct Verify {
  Problem problem;
  Args args;
  KernelArgs out{};
  Sizes sizes;

  explicit Verify(Operation operation = Operation::recurrent) {
    alignas(8) static const std::array<std::int64_t, 12> numbers{};
    const Call call(operation);
    problem = call.problem;
    problem.operation = operation;
    problem.varlen = false;
    problem.state_pool = problem.tree = true;
    problem.every_state = problem.updates = operation == Operation::recurrent;
    args.update_u = Call::tensor(DType::fp32, {2, 3, 4, 32});
    args.update_k = Call::tensor(DType::fp32, {2, 3, 2, 64});
    args.update_decay = Call::tensor(DType::fp32, {2, 3, 4, 64});
    args.initial_state = args.final_state = Call::tensor(DType::fp32, {9, 4, 64, 32});
    args.read_slots = args.write_slots = contiguous_table(numbers.data(), IndexType::int32, {2, 3});
    args.accepted = contiguous_table(numbers.data(), IndexType::int64, {2});
    args.parents = contiguous_table(numbers.data(), IndexType::int64, {2, 3});
    if (operation == Operation::replay) {
      args.read_slots = args.write_slots = contiguous_table(numbers.data(), IndexType::int32, {2});
      return;
    }
    args.q = args.k = Call::tensor(DType::bf16, {2, 3, 2, 64});
    args.v = args.o = Call::tensor(DType::bf16, {2, 3, 4, 32});
    args.g = Call::tensor(DType::bf16, {2, 3, 4, 64});
    args.beta = Call::tensor(DType::bf16, {2, 3, 4});
    args.A_log = call.args.A_log;
    args.dt_bias = call.args.dt_bias;
  }
  Status check() { return make_kernel_args(problem, args, true, out, sizes); }
};

void check_verify(Operation operation,
                  const std::vector<std::pair<std::function<void(Verify&)>, const char*>>& faults) {
  Verify right(operation);
  const Status fine = right.check();
  REQUIRE((fine ? "" : fine.error().message) == "");
  for (const auto& [plant, sentence] : faults) {
    INFO("expected: " << sentence);
    Verify faulty(operation);
    plant(faulty);
    const Status status = faulty.check();
    REQUIRE_FALSE(status);
    CHECK_THAT(status.error().message, Catch::Matchers::Contains(sentence));
  }
}

} // namespace

TEST_CASE("verifying drafts: tables with columns, updates and trees, and the sentence that each fault gets") {
  Verify v;
  v.args.write_slots.stride[0] = 1; // by columns
  v.args.write_slots.stride[1] = 2;
  REQUIRE(v.check());
  CHECK(v.out.read_slots.columns == 3);
  CHECK(v.out.read_slots.stride_sequence == 3);
  CHECK(v.out.write_slots.stride_sequence == 1);
  CHECK(v.out.write_slots.stride_column == 2);
  CHECK(v.out.parents.wide == 1);
  CHECK(v.out.update_k.stride_token == 2 * 64);
  check_verify(
      Operation::recurrent,
      {{[](Verify& c) { c.args.accepted = {}; }, "accepted is required to choose among the columns"},
       {[](Verify& c) { c.args.accepted.rank = 2; }, "accepted has rank 2, expected 1"},
       {[](Verify& c) { c.args.write_slots.shape[1] = 2; }, "write_slots has 2 columns for 3 tokens"},
       {[](Verify& c) { c.args.write_slots.stride[1] = 0; }, "write_slots has stride 0"},
       {[](Verify& c) { c.args.write_slots.shape[1] = 0; }, "write_slots has 0 columns"},
       {[](Verify& c) { c.args.read_slots.rank = 3; }, "read_slots has rank 3, expected 1 or 2"},
       {[](Verify& c) { c.args.parents = {}; }, "parents is required by a tree"},
       {[](Verify& c) { c.args.parents.shape[1] = 2; }, "parents has 2 columns for 3 tokens"},
       {[](Verify& c) { c.problem.tree = false; }, "parents is given, but the problem is not a tree"},
       {[](Verify& c) {
          c.problem.every_state = false;
          c.args.write_slots.rank = 1;
        },
        "a tree has no last state"},
       {[](Verify& c) { c.args.update_u = {}; }, "update_u is required"},
       {[](Verify& c) { c.args.update_k.dtype = DType::bf16; }, "update_k is bf16"},
       {[](Verify& c) { c.args.update_decay.shape[3] = 32; }, "update_decay has size 32"},
       {[](Verify& c) { c.problem.updates = c.problem.tree = false, c.args.parents = {}; },
        "the problem keeps no updates"}});
  check_verify(
      Operation::replay,
      {{[](Verify& c) { c.args.accepted = {}; }, "accepted is required by replay"},
       {[](Verify& c) { c.args.final_state = {}, c.args.write_slots = {}; }, "final_state is required"},
       {[](Verify& c) { c.args.update_decay = {}; }, "update_decay is required"},
       {[](Verify& c) { c.args.read_slots.rank = 2, c.args.read_slots.shape[1] = 1; },
        "read_slots has rank 2, expected 1"}});
}

TEST_CASE("a tree of more tokens than the kernels keep a path for is refused") {
  Verify v(Operation::replay);
  v.args.update_u.shape[1] = v.args.update_k.shape[1] = v.args.update_decay.shape[1] = 65;
  v.args.parents.shape[1] = 65;
  const Status status = v.check();
  REQUIRE_FALSE(status);
  CHECK_THAT(status.error().message, Catch::Matchers::Contains("a tree has at most 64"));
}

TEST_CASE("interior states and the mask: strides reach the kernel, and every fault has its sentence") {
  std::array<std::int32_t, 8> numbers{};
  const auto give = [&](Call& c) {
    c.problem.interior_states = true;
    c.args.interior_states = Call::tensor(DType::fp32, {5, 4, 64, 32});
    c.args.interior_slots = contiguous_table(numbers.data(), IndexType::int32, {3, 2});
    c.args.interior_interval = 128;
    c.args.has_initial_state = contiguous_table(numbers.data(), IndexType::int32, {3});
  };
  Call call;
  give(call);
  REQUIRE(call.check());
  CHECK(call.out.interior_pool == 5);
  CHECK(call.out.interior_interval == 128);
  CHECK(call.out.interior_slots.columns == 2);
  CHECK(call.out.interior_slots.stride_sequence == 2);
  CHECK(call.out.has_initial_state.data == numbers.data());
  const std::pair<std::function<void(Args&)>, const char*> faults[] = {
      {[](Args& a) { a.interior_interval = 96; }, "interior_interval is 96, expected a multiple of 64"},
      {[](Args& a) { a.interior_interval = 0; }, "interior_interval is 0"},
      {[](Args& a) { a.interior_slots = {}; }, "interior_slots is required"},
      {[](Args& a) { a.interior_slots.shape[0] = 2; }, "interior_slots has 2 elements, expected 3"},
      {[](Args& a) { a.interior_states.dtype = DType::bf16; }, "interior_states is bf16"},
      {[](Args& a) { a.interior_states.shape[1] = 3; }, "interior_states has size 3"},
      {[](Args& a) { a.has_initial_state.rank = 2; }, "has_initial_state has rank 2, expected 1"},
  };
  for (const auto& [plant, sentence] : faults) {
    INFO(sentence);
    Call bad;
    give(bad);
    plant(bad.args);
    const Status status = bad.check();
    REQUIRE_FALSE(status);
    CHECK_THAT(status.error().message, Catch::Matchers::Contains(sentence));
  }
  check_refused({{[&](Call& c) { give(c), c.problem.interior_states = false; }, "the problem has none"}});
  check_refused({{[&](Call& c) {
                    give(c), c.args.interior_states = {}, c.args.interior_slots = {},
                             c.problem.interior_states = false;
                  },
                  "has_initial_state goes with the operations forward and recurrent"}},
                Operation::backward);
}
