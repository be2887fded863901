#pragma once
// Sequences cut into segments of time that run side by side (docs/forward.md). A segment maps the state
// before it, S, to A S + B. Launches, in order:
//   summary: the start of every segment but the first. A boundary that the tokens before it seem to forget
//            everything across is "forgetful": B of its last kWindow tokens alone, from a zero state. Any
//            other gets A and B of its whole segment.
//   merge:   S' = A S + B from boundary to boundary, in fp32; nothing where a boundary is forgetful.
//   walk:    all segments with outputs. At a forgetful boundary the state that was walked to is compared with
//            the start that was taken: whether forgetting was complete is measured, not believed.
//   repair:  where it was not, the sequence is walked again from there, one segment after the other.
// All of it depends on the tokens of one sequence and head alone, and nothing is read back to the host.
//
// Workspace: slot 2 starts, fp32 [sequence][value head][segments][V][K]; slot 3 transitions A^T, fp32
// [sequence][value head][segments - 2][K][K], of segments 1 and later; slot 4 marks, u32 [sequence][value
// head][segments - 1][2]: forgetful, and missed.
#include "config.cuh"
#include "kernel_args.cuh"
#include "primitives/vote.cuh"
#include "stages/gate.cuh"
#include "stages/token_load.cuh"

namespace kda {

constexpr int kSegments = Config::segments > 1 ? Config::segments : 1;
/// Tokens before a boundary that are looked at, and what every channel's log2 decay over them must stay below
/// for a boundary to count as forgetful. The product of decays is no bound of |A|: the keys mix channels, and
/// what one forgets at one token may pass through another. It only has to be right most of the time.
constexpr int kWindow = 64;
constexpr float kForgetful = -64.f;

/// Segments of `length` chunks, the last may have fewer; a short sequence has fewer than kSegments.
struct Segments {
  int chunks, length;
  KDA_DEVICE explicit Segments(int chunks)
      : chunks(chunks), length(max((chunks + kSegments - 1) / kSegments, kWindow / Config::chunk)) {}
  KDA_DEVICE int used() const { return max((chunks + length - 1) / length, 1); }
  KDA_DEVICE int first(int segment) const { return segment * length; }
  KDA_DEVICE int count(int segment) const { return min(length, chunks - first(segment)); }
};

/// `unit`: sequence * value heads + value head.
KDA_DEVICE float* segment_start(const KernelArgs& args, i64 unit, int segment) {
  return static_cast<float*>(args.workspace[2]) + (unit * kSegments + segment) * (Config::V * Config::K);
}
KDA_DEVICE float* segment_transition(const KernelArgs& args, i64 unit, int segment) {
  return static_cast<float*>(args.workspace[3]) +
         (unit * (kSegments - 2) + segment - 1) * (Config::K * Config::K);
}
/// Of the boundary behind `segment`: [0] forgetful, [1] missed.
KDA_DEVICE u32* boundary_marks(const KernelArgs& args, i64 unit, int segment) {
  return static_cast<u32*>(args.workspace[4]) + (unit * (kSegments - 1) + segment) * 2;
}
/// The first boundary whose start was missed, or -1.
KDA_DEVICE int first_missed(const KernelArgs& args, i64 unit, const Segments& segments) {
  for (int s = 0; s + 1 < segments.used(); ++s)
    if (boundary_marks(args, unit, s)[1] != 0) return s;
  return -1;
}

/// Shared memory of forgets(), bytes.
template <int threads>
constexpr int kForgetsBytes = threads / (Config::K / 4) * Config::K * 4;

/// All `threads` threads: whether every channel decays by kForgetful over the kWindow tokens before `end` of
/// batch row `batch`. Behind it a barrier must come before the shared memory is used again.
template <int threads>
KDA_DEVICE bool forgets(const KernelArgs& args, i64 batch, i64 end, int head, unsigned char* shared) {
  constexpr int groups = Config::K / 4, rows = threads / groups;
  static_assert(rows > 0);
  float* sums = reinterpret_cast<float*>(shared);
  const int row = thread_index() / groups, channel = thread_index() % groups * 4;
  if (row < rows) {
    const float a = kReadsA ? exp_clamped(args.A_log[head]) : 1.f;
    float bias[4] = {}, sum[4] = {};
    if (Config::dt_bias)
      for (int i = 0; i < 4; ++i)
        bias[i] = args.dt_bias[head * Config::K + channel + i];
    for (int t = row; t < kWindow; t += rows) {
      float g[4];
      widen<Config::Gate>(
          load_raw(row_of<Config::Gate>(args.g, batch, end - kWindow + t, head) + channel, true), g);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] += gate_log2(g[i], bias[i], a, args.lower_bound);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[row * Config::K + channel + i] = sum[i];
  }
  sync_block();
  // Every warp for itself: all of them need the answer.
  bool all = true;
  for (int k = lane_index(); k < Config::K; k += 32) {
    float sum = 0.f;
    for (int r = 0; r < rows; ++r)
      sum += sums[r * Config::K + k];
    all = all && sum <= kForgetful;
  }
  return vote_all(all);
}

constexpr int kMergeThreads = 256, kMergeRows = 16; ///< columns of V of a CTA
constexpr int kMergeTiles = (Config::V + kMergeRows - 1) / kMergeRows;
constexpr int kMergeBytes = kMergeRows * Config::K * 4;

/// One CTA: kMergeRows columns of V of one unit, from boundary to boundary. A thread has one channel k of
/// some columns; budget a boundary at K = 128: 128 reads of A from L2 and 1,024 FMA a thread.
KDA_DEVICE void merge_segments(const KernelArgs& args, i64 unit, int tile, const Segments& segments) {
  constexpr int lanes = Config::K <= 128 ? 128 : 256, own = kMergeRows * lanes / kMergeThreads;
  float* x = reinterpret_cast<float*>(shared_memory()); // [kMergeRows][K]
  const int k = thread_index() % lanes, row = thread_index() / lanes * own;
  const int column = tile * kMergeRows + row;
  for (int s = 0; s + 1 < segments.used(); ++s) {
    float* next = segment_start(args, unit, s + 1) + k;
    float sum[own];
#pragma unroll
    for (int r = 0; r < own; ++r)
      sum[r] = k < Config::K && column + r < Config::V ? next[(column + r) * Config::K] : 0.f;
    if (s > 0 && boundary_marks(args, unit, s)[0] == 0) {
      const float* a = segment_transition(args, unit, s) + k;
      if (k < Config::K)
#pragma unroll 2
        for (int j = 0; j < Config::K; j += 4) {
          float factor[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            factor[i] = a[(j + i) * Config::K];
#pragma unroll
          for (int r = 0; r < own; ++r) {
            const Word4 from = *reinterpret_cast<const Word4*>(x + (row + r) * Config::K + j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              sum[r] = fma(bits_float(from.w[i]), factor[i], sum[r]);
          }
        }
#pragma unroll
      for (int r = 0; r < own; ++r)
        if (k < Config::K && column + r < Config::V) next[(column + r) * Config::K] = sum[r];
    }
    sync_block();
#pragma unroll
    for (int r = 0; r < own; ++r)
      if (k < Config::K) x[(row + r) * Config::K + k] = sum[r];
    sync_block();
  }
}

} // namespace kda
