#pragma once
// Which tokens a chunk covers. Chunks of all sequences are numbered one after the other; the last chunk of a
// sequence may be short. Packed sequences need the first chunk of each (kda_schedule writes it); nothing is
// read back to the host, so grids are sized by a bound and surplus CTAs find an empty chunk.
#include "config.cuh"
#include "kernel_args.cuh"

namespace kda {

/// Tokens [first, first + rows) of batch row `batch`; rows is 0 behind the last chunk.
struct ChunkSpan {
  i64 batch, first;
  int rows;
};
/// Tokens [begin, end) of batch row `batch`, in chunks first_chunk, first_chunk + 1, ...
struct SequenceSpan {
  i64 batch, begin, end, first_chunk;
};

KDA_DEVICE i64 chunks_of(i64 tokens) {
  return (tokens + Config::chunk - 1) / Config::chunk;
}

/// Packed: offsets[n] = first chunk of sequence n, offsets[sequences] = chunks in all. Call with one CTA of
/// `threads`, a multiple of 32 (at most 1,024), and threads/32 ints of shared memory.
template <int threads>
KDA_DEVICE void write_chunk_offsets(const KernelArgs& args, int* offsets, int* warp_totals) {
  const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
  const int warp = warp_index();
  int before = 0;
  for (int base = 0; base < args.sequences; base += threads) {
    const int n = base + thread_index();
    const int count = n < args.sequences ? static_cast<int>(chunks_of(i64(cu[n + 1]) - i64(cu[n]))) : 0;
    int sum = count; // inclusive over the warp
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = shuffle_up(sum, delta);
      if (lane_index() >= delta) sum += other;
    }
    sync_block();
    if (lane_index() == 31) warp_totals[warp] = sum;
    sync_block();
    int all = 0, earlier = 0;
    for (int w = 0; w < threads / 32; ++w) {
      if (w == warp) earlier = all;
      all += warp_totals[w];
    }
    if (n < args.sequences) offsets[n] = before + earlier + sum - count;
    before += all;
  }
  if (thread_index() == 0) offsets[args.sequences] = before;
}

/// `offsets` is null when not packed.
KDA_DEVICE ChunkSpan find_chunk(const KernelArgs& args, const int* offsets, i64 chunk) {
  if constexpr (Config::varlen) {
    if (chunk >= offsets[args.sequences]) return {0, 0, 0};
    int low = 0, high = args.sequences; // offsets[low] <= chunk < offsets[high]; empty sequences drop out
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (offsets[middle] <= chunk)
        low = middle;
      else
        high = middle;
    }
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    const i64 first = cu[low] + (chunk - offsets[low]) * Config::chunk;
    return {0, first, static_cast<int>(min(i64(cu[low + 1]) - first, i64(Config::chunk)))};
  } else {
    // 32 bits: a 64-bit division is a call. A chunk number fits, as grids do.
    const u32 chunks = static_cast<u32>(chunks_of(args.tokens)), number = static_cast<u32>(chunk);
    if (number >= chunks * static_cast<u32>(args.batch)) return {0, 0, 0};
    const i64 first = static_cast<i64>(number % chunks) * Config::chunk;
    return {number / chunks, first, static_cast<int>(min(args.tokens - first, i64(Config::chunk)))};
  }
}

KDA_DEVICE SequenceSpan find_sequence(const KernelArgs& args, const int* offsets, int sequence) {
  if constexpr (Config::varlen) {
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    return {0, i64(cu[sequence]), i64(cu[sequence + 1]), offsets[sequence]};
  } else {
    return {sequence, 0, args.tokens, sequence * chunks_of(args.tokens)};
  }
}

} // namespace kda
