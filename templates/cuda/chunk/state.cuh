#pragma once
// The state as one warp of a scan holds it, and the copies of records into shared memory.
#include "chunk/record.cuh"
#include "primitives/async.cuh"
#include "stages/state_place.cuh"
#include "stages/token_load.cuh"

namespace kda {

constexpr int kScanThreads = Config::scan_warps * 32;
constexpr int kScanBlocks = Config::value_tile / 16; ///< of 16 columns
/// Threads that copy: those of warps without columns, or all.
constexpr int kScanLoaders =
    Config::scan_warps > kScanBlocks ? kScanThreads - kScanBlocks * 32 : kScanThreads;
constexpr int kScanTiles = (kPaddedV + Config::value_tile - 1) / Config::value_tile;
static_assert(Config::value_tile % 16 == 0 && kScanBlocks <= Config::scan_warps);

/// Copies `bytes` bytes with `threads` threads, of which this is number `thread`.
template <int bytes, int threads>
KDA_DEVICE void copy_linear(unsigned char* to, const unsigned char* from, int thread) {
  constexpr int pieces = bytes / 16, rounds = (pieces + threads - 1) / threads;
  to += thread * 16;
  from += thread * 16;
#pragma unroll
  for (int i = 0; i < rounds; ++i)
    if ((i + 1) * threads <= pieces || i * threads + thread < pieces)
      copy_async_16(to + i * threads * 16, from + i * threads * 16);
}

/// S^T of one warp: s[n] are the accumulators of channels 8n..8n+7, 16 columns of V.
struct ScanState {
  float s[2 * kKeyBlocks][4];
};

KDA_DEVICE void load_state(const StateTensor& x, int sequence, int head, int column, ScanState& state) {
  const auto* base = static_cast<const Config::State*>(x.data);
  if (base != nullptr) base += sequence * x.stride_sequence + head * x.stride_head;
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      int offset;
      const bool valid = state_place(column, n, e, offset) && base != nullptr;
      state.s[n][e] = valid ? to_float(base[offset]) : 0.f;
      state.s[n][e + 1] = valid ? to_float(base[offset + kStateStep]) : 0.f;
    }
}
KDA_DEVICE void store_state(const StateTensor& x, i64 sequence, int head, int column,
                            const ScanState& state) {
  if (x.data == nullptr) return;
  auto* base = static_cast<Config::State*>(x.data) + sequence * x.stride_sequence + head * x.stride_head;
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      int offset;
      if (!state_place(column, n, e, offset)) continue;
      base[offset] = from_float<Config::State>(state.s[n][e]);
      base[offset + kStateStep] = from_float<Config::State>(state.s[n][e + 1]);
    }
}

/// `factors`: 2^tot in shared memory, fp32 [kPaddedK].
KDA_DEVICE void decay_state(ScanState& state, const unsigned char* factors) {
  const auto* decay = reinterpret_cast<const Word2*>(factors) + (lane_index() & 3);
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n) {
    const Word2 d = decay[n * 4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      state.s[n][e] *= bits_float(d.w[e & 1]);
  }
}

/// The state rounded to operands: S^T as A, [channel block].
KDA_DEVICE void round_state(const ScanState& state, u32 (&rounded)[kKeyBlocks][4]) {
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n) {
    rounded[n / 2][n % 2 * 2] = pack2<Operand>(state.s[n][0], state.s[n][1]);
    rounded[n / 2][n % 2 * 2 + 1] = pack2<Operand>(state.s[n][2], state.s[n][3]);
  }
}

} // namespace kda
