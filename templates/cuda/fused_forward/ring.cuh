#pragma once
// Shared memory of the fused forward, and how its warps hand chunks on.
//
// A chunk of 16 tokens passes through one slot of a ring: the loader fills it with rows of q, k, v and g
// ("full"), a warp that prepares replaces q, k and g by the factors of the chunk, in place ("ready"), the
// state warps use them up ("free"). Every barrier completes once a round of the ring, so its parity is that
// of the round. A warp that prepares waits for "free" of the round before, too: without that, "full" could be
// two rounds behind, where parities are alike.
//
// Budget at K = V = 128: 20 KB a slot, 22.4 KB with its share of the rest; 10 slots. 512 threads: 8 state
// warps with 144 registers (64 of state, 32 of its copy), 8 others with 112.
#include "config.cuh"
#include "kernel_args.cuh"
#include "primitives/mbarrier.cuh"
#include "primitives/vote.cuh"
#include "stages/gate.cuh"
#include "stages/segments.cuh"
#include "stages/token_load.cuh"

namespace kda {

constexpr int kStateWarps = Config::scan_warps, kPrepareWarps = Config::prepare_warps;
constexpr int kFusedThreads = (kStateWarps + kPrepareWarps + 1) * 32;
/// A thread, at 512 threads; the kernel starts with 128.
constexpr int kStateRegisters = 144, kOtherRegisters = 112;
constexpr int kChunk = 16;
static_assert(Config::chunk == kChunk && Config::K == 128 && Config::V == 128 && Config::value_tile == 128);
static_assert(kStateWarps * 16 == Config::value_tile && (kPrepareWarps + 1) % 4 == 0);
static_assert(sizeof(Config::Element) == 2 && sizeof(Config::Gate) == 2);

/// What the tensor units of the state warps multiply; of bf16, o would carry 4e-3 and the state as much.
using StateOperand = fp16;
/// fp16 ends at 65,504. Products are never checked: once S, R or U (state.cuh) has left that range, its
/// column of the state is infinite or NaN to the end. Then the CTA walks the sequence anew, such columns
/// scaled by a power of two: by 2^-12, 2^-28, ... 2^-124, as long as it takes. Half of the 2^29 between
/// fp16's largest and least normal numbers stays below a column's largest value.
constexpr int kAttempts = 9;
constexpr float kFirstScale = 1.f / 4096, kScaleStep = 1.f / 65536;

/// Byte offsets in a slot. A tile is [2 halves of the channels][16 tokens][64 channels], its rows of 128
/// bytes swizzled as wgmma wants it. The keys that meet the state and the queries are one operand of 32 rows.
struct Slot {
  static constexpr int tile_half = kChunk * 128;
  static constexpr int rows = 0; ///< [2 halves]: k 2^G over q
  static constexpr int rows_half = 2 * tile_half;
  static constexpr int q = rows + tile_half;     ///< q, then scale q 2^G; halves are rows_half apart
  static constexpr int k = rows + 2 * rows_half; ///< k, then k 2^(tot - G)
  static constexpr int v = k + 2 * tile_half;
  static constexpr int g = v + 2 * tile_half;
  static constexpr int t = g;       ///< T [16][16], 8x8 matrices dense, over g
  static constexpr int m = t + 512; ///< M, likewise
  static constexpr int bytes = g + 2 * tile_half;
};
/// Byte offset of the 16 bytes `piece` (0..7) of a row of a tile's half.
KDA_DEVICE int tile_place(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

struct FusedShared {
  static constexpr int slots = 0;
  static constexpr int decay = slots + Config::stages * Slot::bytes;  ///< [stages][K], 2^tot
  static constexpr int beta = decay + Config::stages * Config::K * 4; ///< [stages][16]
  static constexpr int bias = beta + Config::stages * kChunk * 4;     ///< [K], as gate_input wants it
  static constexpr int solve_stride = kChunk + 4;                     ///< of the scratch, in floats
  static constexpr int solve_bytes = kChunk * solve_stride * 4;
  static constexpr int solve = bias + Config::K * 4;                 ///< [kPrepareWarps]
  static constexpr int output = solve + kPrepareWarps * solve_bytes; ///< [kStateWarps][16 tokens][16 columns]
  static constexpr int barriers = output + kStateWarps * 512;
  static constexpr int next_chunk = barriers + 3 * Config::stages * 8; ///< [kAttempts], u32
  static constexpr int overflows = next_chunk + kAttempts * 4;         ///< [kAttempts], u32
  static constexpr int walk = (overflows + kAttempts * 4 + 7) / 8 * 8; ///< Walk
  static constexpr int bytes = walk + 80;
};

template <class T>
KDA_DEVICE T* fused_at(int offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

/// A place in the ring.
struct Place {
  int slot = 0, parity = 0;
  /// Of the chunk that enters the ring as number `entry`; attempts go on counting.
  KDA_DEVICE static Place of(int entry) { return {entry % Config::stages, entry / Config::stages & 1}; }
  KDA_DEVICE void advance() {
    if (++slot < Config::stages) return;
    slot = 0;
    parity ^= 1;
  }
  KDA_DEVICE u64* full() const { return fused_at<u64>(FusedShared::barriers) + slot; }
  KDA_DEVICE u64* ready() const { return full() + Config::stages; }
  KDA_DEVICE u64* free() const { return full() + 2 * Config::stages; }
  KDA_DEVICE unsigned char* data() const { return shared_memory() + FusedShared::slots + slot * Slot::bytes; }
  KDA_DEVICE float* decay() const { return fused_at<float>(FusedShared::decay) + slot * Config::K; }
  KDA_DEVICE float* beta() const { return fused_at<float>(FusedShared::beta) + slot * kChunk; }
};

/// Tokens from `begin` of batch row `batch`, the last chunk may be short.
struct FusedSpan {
  i64 batch, begin;
  int chunks, last_rows;
  KDA_DEVICE FusedSpan(i64 batch, i64 begin, i64 tokens)
      : batch(batch), begin(begin), chunks(static_cast<int>((tokens + kChunk - 1) / kChunk)),
        last_rows(static_cast<int>(tokens - static_cast<i64>(chunks - 1) * kChunk)) {}
  KDA_DEVICE int rows(int chunk) const { return chunk + 1 < chunks ? kChunk : last_rows; }
  /// Some of the chunks.
  KDA_DEVICE FusedSpan part(int first, int count) const {
    FusedSpan x = *this;
    x.begin += static_cast<i64>(first) * kChunk;
    x.chunks = count;
    if (first + count < chunks) x.last_rows = kChunk;
    return x;
  }
};
KDA_DEVICE FusedSpan find_span(const KernelArgs& args, int sequence) {
  if constexpr (!Config::varlen) return FusedSpan(sequence, 0, args.tokens);
  const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
  return FusedSpan(0, i64(cu[sequence]), i64(cu[sequence + 1]) - i64(cu[sequence]));
}

/// What a launch walks (stages/segments.cuh).
enum class Pass { whole, summary, walk, repair };
/// What one CTA walks. In shared memory, where each kind of warp reads what it needs: held in registers from
/// before they part, it made every kind spill.
struct Walk {
  int sequence, head;
  FusedSpan span;
  int first;         ///< its first chunk in the sequence
  bool values;       ///< v is read; zeros else
  bool last;         ///< to the end of the sequence
  const float* from; ///< not whole: the S^T before it; null: zero, without values the identity
  float* to;         ///< summary: for the S^T behind it; walk: what the next segment took for it
  u32* marks;        ///< walk: of the boundary behind it; null behind the last
};
KDA_DEVICE const Walk& current_walk() {
  return *fused_at<const Walk>(FusedShared::walk);
}
static_assert(sizeof(Walk) <= FusedShared::bytes - FusedShared::walk);

constexpr bool kPrecomputed = Config::gate == GateKind::log_e || Config::gate == GateKind::log2;
KDA_DEVICE float gate_a(const KernelArgs& args, int head) {
  return kReadsA ? exp_clamped(args.A_log[head]) : 1.f;
}
/// What a raw gate is multiplied with before dt_bias, so multiplied too, is added: the argument of 2^x in
/// the activation.
KDA_DEVICE float gate_slope(float a) {
  return Config::gate == GateKind::softplus ? kLog2E : -kLog2E * a;
}

/// All threads, first: barriers and constants of the head.
KDA_DEVICE void begin_fused(const KernelArgs& args, const Walk& walk) {
  const int thread = thread_index();
  if (thread == 0) {
    for (Place place; place.parity == 0; place.advance()) {
      mbarrier_init(place.full(), 33); // 32 lanes' copies, and beta
      mbarrier_init(place.ready(), 1);
      mbarrier_init(place.free(), kStateWarps);
    }
    fence_mbarrier_init();
    for (int i = 0; i < 2 * kAttempts; ++i)
      fused_at<u32>(FusedShared::next_chunk)[i] = 0;
    *fused_at<Walk>(FusedShared::walk) = walk;
  }
  if (!kPrecomputed && thread < Config::K)
    fused_at<float>(FusedShared::bias)[thread] =
        Config::dt_bias ? gate_slope(gate_a(args, walk.head)) * args.dt_bias[walk.head * Config::K + thread]
                        : 0.f;
  sync_block();
}

/// All threads, behind an attempt: whether there is to be another, `attempt` then. `overflow`: a column of
/// the state that this thread holds is lost.
KDA_DEVICE bool another_attempt(int& attempt, bool overflow = false) {
  u32* overflows = fused_at<u32>(FusedShared::overflows) + attempt;
  if (overflow) atomic_add(overflows, 1u);
  sync_block();
  return *overflows != 0 && ++attempt < kAttempts;
}

/// Zeros o behind the last packed sequence.
KDA_DEVICE void zero_padding(const KernelArgs& args, int head) {
  constexpr int pieces = Config::V / 8;
  const i64 begin = static_cast<const Config::Index*>(args.cu_seqlens)[args.sequences];
  for (i64 i = thread_index(); i < (args.tokens - begin) * pieces; i += kFusedThreads)
    *reinterpret_cast<Word4*>(row_of<Config::Element>(args.o, 0, begin + i / pieces, head) + i % pieces * 8) =
        Word4{};
}

} // namespace kda
