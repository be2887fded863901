#pragma once
// Token rows into shared memory by cp.async. Rows behind a chunk's end and channels behind `dim` become
// zeros; nothing outside of the tensor is read.
#include "primitives/async.cuh"
#include "stages/gate.cuh"
#include "stages/schedule.cuh"
#include "stages/tile.cuh"
#include "stages/token_load.cuh"

namespace kda {

/// Starts copying the rows of `chunks` chunks of 16-bit elements of one head into `tile`, a Tile<padded dim>
/// whose rows c * Config::chunk on are chunk c's, with all `threads` threads of the CTA. The caller commits.
template <int dim, int chunks, int threads, class T>
KDA_DEVICE void load_rows(Operand* tile, const TokenTensor& x, const ChunkSpan* spans, i64 head) {
  static_assert(sizeof(T) == 2);
  constexpr int padded = (dim + 15) / 16 * 16;
  constexpr int piece = dim % 8 == 0 ? 8 : 4; // elements: 16 or 8 bytes, what the rows are aligned to
  constexpr int pieces = padded / piece, copies = Config::chunk * pieces;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const ChunkSpan span = spans[c];
    const T* base = row_of<const T>(x, span.batch, span.first, head);
    // Trips known to the compiler: an open end costs a fifth of kda_prepare's compile time.
    // Two in flight where pieces are small: more spill the addresses of 16 trips.
#pragma unroll(piece == 8 ? 4 : 2)
    for (int n = 0; n < (copies + threads - 1) / threads; ++n) {
      const int i = thread_index() + n * threads;
      if (copies % threads != 0 && i >= copies) break;
      const int row = i / pieces, column = i % pieces * piece;
      const bool valid = row < span.rows && column < dim;
      const T* source = valid ? base + row * x.stride_token + column : base;
      Operand* target = tile + (c * Config::chunk + row) * Tile<padded>::stride + column;
      if constexpr (piece == 8)
        copy_async_16(target, source, valid);
      else
        copy_async_8(target, source, valid);
    }
  }
}

/// beta as the recurrence uses it, fp32 [chunks * Config::chunk]; 0 behind a chunk's end.
template <int chunks, int threads>
KDA_DEVICE void load_beta(const KernelArgs& args, const ChunkSpan* spans, i64 head, float* beta) {
  for (int row = thread_index(); row < chunks * Config::chunk; row += threads) {
    const ChunkSpan& span = spans[row / Config::chunk];
    const int local = row % Config::chunk;
    float b = 0.f;
    if (local < span.rows)
      b = beta_value(to_float(*row_of<const Config::Beta>(args.beta, span.batch, span.first + local, head)));
    beta[row] = b;
  }
}

} // namespace kda
