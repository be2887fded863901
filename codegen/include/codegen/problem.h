#pragma once
// What is asked. Everything here is part of a kernel's text or of its key; T, N, cu_seqlens, strides, scale
// and lower_bound are run-time arguments and are not here.
#include "codegen/error.h"
#include <cstdint>
#include <string>
#include <string_view>

namespace kda {

enum class Operation : std::uint8_t {
  forward,       ///< chunked or token by token, whichever is faster; o and the final state
  backward,      ///< gradients of every input from do and the gradient of the final state
  recurrent,     ///< token by token, fp32 arithmetic; the device reference and the decode form
  gate,          ///< g -> natural-log decay, fp32
  gate_backward, ///< gradient of the natural-log decay -> gradient of g, A_log, dt_bias
  replay,        ///< the kept updates of accepted tokens -> the state after them
};
enum class DType : std::uint8_t { bf16, fp16, fp32 };
enum class IndexType : std::uint8_t { int32, int64 };
/// [K,V]: element (k, v) at k*V + v. [V,K]: at v*K + k, fla's state_v_first, what serving engines store.
enum class StateLayout : std::uint8_t { k_v, v_k };
enum class GateKind : std::uint8_t {
  log_e,        ///< g is the natural-log decay
  log2,         ///< g is the base-2 log decay
  softplus,     ///< -exp(A_log) * softplus(g + dt_bias)
  bounded,      ///< lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
  bounded_no_a, ///< lower_bound * sigmoid(g + dt_bias)
};

struct Problem {
  Operation operation = Operation::forward;
  int heads = 1;                  ///< H, query/key heads
  int value_heads = 1;            ///< HV, a multiple of H; value head hv reads query/key head hv / (HV/H)
  int key_dim = 128;              ///< K, 16..256, a multiple of 4
  int value_dim = 128;            ///< V, 16..256, a multiple of 4
  DType dtype = DType::bf16;      ///< q, k, v, o and their gradients
  DType gate_dtype = DType::bf16; ///< g and dg
  DType beta_dtype = DType::bf16; ///< beta and dbeta
  DType state_dtype = DType::fp32;
  StateLayout state_layout = StateLayout::k_v;
  GateKind gate = GateKind::log_e;
  bool dt_bias = false;        ///< g + dt_bias before the activation; refused for log_e and log2
  bool beta_sigmoid = false;   ///< beta holds logits
  bool beta_times_two = false; ///< 2*sigmoid(beta), "allow_neg_eigval"; needs beta_sigmoid
  bool qk_l2norm = false;      ///< x * rsqrt(sum x^2 + 1e-6) on q and k
  bool varlen = false;         ///< packed sequences through cu_seqlens; the batch is then 1
  IndexType cu_seqlens_type = IndexType::int64;
  // Decode: recurrent and replay. Args describes them.
  bool state_pool = false;  ///< states lie in the slots of a pool
  bool every_state = false; ///< recurrent with a pool: the state after every token is kept, not the last one
  bool updates = false;     ///< recurrent: u, k and decay of every token are kept, what replay needs
  // Forward. Args describes the states.
  bool interior_states = false; ///< states within the sequences are kept, too
  bool batch_invariant = false; ///< a sequence gets the same bits whatever else is in the call: the variant
                                ///< does not depend on the sizes
  bool tree = false; ///< tokens continue from a parent, not from the one before; recurrent with updates
  // Backward.
  int saved_interval = 0; ///< the forward saved states every so many tokens, a multiple of 64; 0: it did not

  bool operator==(const Problem&) const = default;
};

/// The run-time extents of one call.
struct Sizes {
  std::int64_t batch = 1;     ///< B; 1 when packed
  std::int64_t tokens = 0;    ///< T: tokens per batch row, or all tokens when packed
  std::int64_t sequences = 1; ///< N: equals batch when not packed
};

/// Refuses what no kernel supports, with a sentence that says what is supported.
[[nodiscard]] Status validate(const Problem& problem);

/// What a forward saves for the backward of the same call: the state after every `interval` tokens of every
/// sequence, in the state's dtype and layout, or nothing. Both have the same Args::interior_states and
/// Args::interior_slots, and the backward has Problem::saved_interval.
struct SavedStates {
  std::int64_t interval = 0;
  std::int64_t slots = 0;   ///< interior_states [slots,HV,K,V] or [slots,HV,V,K]: enough for any lengths
  std::int64_t columns = 0; ///< interior_slots [N,columns]: state j of sequence n may take slot b + j, b
                            ///< being the tokens before the sequence divided by the interval
  std::int64_t bytes = 0;   ///< of both, the table in int32
};
/// `interval` 0: nothing. Of the problem only the states count: heads, dims, dtype, packed or not.
[[nodiscard]] Result<SavedStates> saved_states(const Problem&, const Sizes&, std::int64_t interval);

/// True when the gate reads A_log.
[[nodiscard]] constexpr bool reads_a_log(GateKind gate) {
  return gate == GateKind::softplus || gate == GateKind::bounded;
}
[[nodiscard]] constexpr bool is_bounded(GateKind gate) {
  return gate == GateKind::bounded || gate == GateKind::bounded_no_a;
}
[[nodiscard]] constexpr int size_of(DType type) {
  return type == DType::fp32 ? 4 : 2;
}
/// K or V rounded up to the tensor unit's 16.
[[nodiscard]] constexpr int padded(int dim) {
  return (dim + 15) / 16 * 16;
}

// Names as they stand in JSON, reports and keys; parse_* are the inverse and refuse everything else.
[[nodiscard]] const char* to_string(Operation);
[[nodiscard]] const char* to_string(DType);
[[nodiscard]] const char* to_string(IndexType);
[[nodiscard]] const char* to_string(StateLayout);
[[nodiscard]] const char* to_string(GateKind);
[[nodiscard]] Result<Operation> parse_operation(std::string_view);
[[nodiscard]] Result<DType> parse_dtype(std::string_view);
[[nodiscard]] Result<GateKind> parse_gate(std::string_view);
[[nodiscard]] Result<StateLayout> parse_state_layout(std::string_view);

/// One line, e.g. "forward H=32 HV=32 K=128 V=128 bf16 gate=bounded/bf16 beta=sigmoid/bf16 state=fp32/v_k
/// dt_bias l2norm".
[[nodiscard]] std::string to_string(const Problem&);

} // namespace kda
