#pragma once
// Token rows into shared memory by cp.async. Rows behind a chunk's end and channels behind `dim` become
// zeros; nothing outside of the tensor is read.
#include "primitives/async.cuh"
#include "stages/schedule.cuh"
#include "stages/tile.cuh"
#include "stages/token_load.cuh"

namespace kda {

/// Starts copying `rows` rows of 16-bit elements (chunk r / Config::chunk of `chunks`, row r %
/// Config::chunk) of one head into `tile`, a Tile<padded dim>, with all `threads` threads of the CTA. The
/// caller commits.
template <int dim, int rows, int threads, class T>
KDA_DEVICE void load_rows(Operand* tile, const TokenTensor& x, const ChunkSpan* chunks, i64 head) {
  static_assert(sizeof(T) == 2);
  constexpr int padded = (dim + 15) / 16 * 16;
  constexpr int piece = dim % 8 == 0 ? 8 : 4; // elements: 16 or 8 bytes, what the rows are aligned to
  constexpr int pieces = padded / piece;
  for (int i = thread_index(); i < rows * pieces; i += threads) {
    const int row = i / pieces, column = i % pieces * piece;
    const ChunkSpan& chunk = chunks[row / Config::chunk];
    const int local = row % Config::chunk;
    const bool valid = local < chunk.rows && column < dim;
    const T* source = row_of<const T>(x, chunk.batch, chunk.first + (valid ? local : 0), head);
    source += valid ? column : 0;
    Operand* target = tile + row * Tile<padded>::stride + column;
    if constexpr (piece == 8)
      copy_async_16(target, source, valid);
    else
      copy_async_8(target, source, valid);
  }
}

} // namespace kda
