#pragma once
// The one by-value parameter of every kernel, the same bytes on host and device. Valid C++ for NVRTC and for
// the host. Strides are in elements. The last dimension (K, V) of q, k, v, g, o and their gradients is
// contiguous.

/// A template file may hold several kernels; one alone is compiled with KDA_ONE_KERNEL=1 and
/// KDA_ONE_<name>=1.
#ifndef KDA_ONE_KERNEL
#define KDA_ONE_KERNEL 0
#endif
#define KDA_COMPILES(name) (!KDA_ONE_KERNEL || KDA_ONE_##name)

namespace kda {

/// A tensor [B, T, heads, dim] or, for beta, [B, T, heads].
struct TokenTensor {
  void* data;
  long long stride_batch, stride_token, stride_head;
};
/// States [N, HV, K, V] or [N, HV, V, K], the inner matrix contiguous; data may be null (absent).
struct StateTensor {
  void* data;
  long long stride_sequence, stride_head;
};
/// Whole numbers by sequence and column.
struct NumberTable {
  const void* data;
  long long stride_sequence, stride_column;
  int columns;
  int wide; // 0: int32, 1: int64
};
/// Slot numbers that mean padding: bits of KernelArgs::padding.
enum Padding { kSkipNegative = 1, kSkipZero = 2 };

/// What decode reads comes first and stands together: a launch finds its parameters in no cache, and a call
/// of one token waits for each line of them.
struct KernelArgs {
  // With a state pool: the slots that sequences read and write, null where initial_state and final_state are,
  // and how many slots each has.
  NumberTable read_slots, write_slots;
  NumberTable accepted; // 1 + the last accepted token; null: read_slots has one column
  long long read_pool, write_pool;
  int padding;              // bits of Padding
  unsigned head_reciprocal; // floor(2^32 / value_heads), 2^32 - 1 for one head
  int* slot_error;          // maximum with 1 + a refused sequence; may be null
  int batch, sequences, heads, value_heads;
  float scale, lower_bound;
  long long tokens;                       // T of a batch row, or all packed tokens
  const void* cu_seqlens;                 // [N+1], null when not packed
  StateTensor initial_state, final_state; // null: zero, not wanted
  TokenTensor q, k, v, g, beta, o;        // forward; gate: g in, o out (fp32 natural-log decay)
  const float* A_log;                     // [HV]
  const float* dt_bias;                   // [HV, K]
  // Problem::updates: out, replay: in. fp32 [B, T, HV, V], [B, T, H, K], [B, T, HV, K].
  TokenTensor update_u, update_k, update_decay;
  NumberTable parents; // Problem::tree: by token, -1 for a root
  // Problem::interior_states: the state after (j + 1) * interior_interval tokens of sequence n goes to slot
  // interior_slots[n, j], if that is one of interior_pool. Backward, Problem::saved_interval: it is there.
  StateTensor interior_states;
  NumberTable interior_slots;
  long long interior_pool;
  int interior_interval;
  NumberTable has_initial_state;               // by sequence, 0: it starts from zero; null: all have one
  TokenTensor d_o, d_q, d_k, d_v, d_g, d_beta; // backward; gate_backward: d_o in (fp32), d_g out
  StateTensor d_final_state, d_initial_state;  // null: zero, not wanted
  float* d_A_log;                              // [HV], null: not wanted
  float* d_dt_bias;                            // [HV, K], null: not wanted
  // Chunk backward in slabs (chunk_backward/slab.cuh): this launch's slab, and codegen's Slabs.
  int slab, slab_chunks, slab_rows, slab_pieces;
  void* workspace[24]; // slots of codegen's workspace_layout
};

} // namespace kda
