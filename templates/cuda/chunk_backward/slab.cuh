#pragma once
// Walking a call in slabs of chunks, from the last to the first, so that the workspace is one slab's.
//
// Fixed batches: a slab is one piece of time, slab_chunks chunks, of slab_rows rows side by side; slab_pieces
// pieces make a group of rows, and one group comes after the other. Packed: chunks are taken in their order
// over all sequences, so that one sequence at most crosses the boundary between two slabs; boundaries lie
// where a state was saved. The host knows how many slabs there are, and nothing of the lengths.
//
// Workspace slots:
//   10:  packed: SlabStart [slabs + 1]
//   11:  S at boundaries within a sequence, when the forward saved nothing: [boundary][row of the group]
//   12:  D at the boundary that the slab before waits for: [row of the group], packed: [boundary % 2]
// both fp32 as a warp of the scan holds it, [value head][value block][channels / 8][lane][4].
#include "chunk/state.cuh"
#include "chunk_backward/workspace.cuh"
#include "primitives/vote.cuh"
#include "stages/schedule.cuh"

namespace kda {

struct SlabStart {
  int chunk;    ///< first of the slab, over all sequences
  int sequence; ///< first that has a chunk in it; an empty sequence counts as one of a chunk
};
KDA_DEVICE SlabStart* slab_starts(const KernelArgs& args) {
  return static_cast<SlabStart*>(args.workspace[10]);
}

/// The first sequence that ends behind `chunk`.
KDA_DEVICE int first_sequence(const int* offsets, int sequences, int chunk) {
  int low = -1, high = sequences; // those up to low end before, those from high on do not
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (max(offsets[middle + 1], offsets[middle] + 1) > chunk)
      high = middle;
    else
      low = middle;
  }
  return high;
}
/// Call with one CTA when the offsets are there.
KDA_DEVICE void write_slab_starts(const KernelArgs& args, const int* offsets) {
  const int chunks = offsets[args.sequences];
  for (int slab = thread_index(); slab <= args.slab_pieces; slab += 256) {
    int chunk = static_cast<int>(min(i64(slab) * args.slab_chunks, i64(chunks)));
    if (slab == args.slab_pieces) chunk = chunks;
    if (args.interior_states.data != nullptr && chunk < chunks) {
      const int before = chunk - offsets[first_sequence(offsets, args.sequences, chunk)];
      chunk -= before % (args.interior_interval / Config::chunk);
    }
    slab_starts(args)[slab] = {chunk, first_sequence(offsets, args.sequences, chunk)};
  }
}

/// Of a fixed batch: rows [row, row + rows) and their chunks [first, first + chunks).
struct SlabRows {
  int row, rows, first, chunks;
};
KDA_DEVICE SlabRows slab_rows(const KernelArgs& args) {
  const int group = args.slab / args.slab_pieces, piece = args.slab % args.slab_pieces;
  const int row = group * args.slab_rows, first = piece * args.slab_chunks;
  return {row, min(args.slab_rows, args.batch - row), first,
          min(args.slab_chunks, static_cast<int>(chunks_of(args.tokens)) - first)};
}

/// The chunk whose place in the workspace is `index`.
KDA_DEVICE ChunkSpan find_slab_chunk(const KernelArgs& args, i64 index) {
  if constexpr (!Config::slabs) {
    return find_chunk(args, chunk_offsets(args), index);
  } else if constexpr (Config::varlen) {
    const SlabStart* const start = slab_starts(args) + args.slab;
    if (index >= start[1].chunk - start[0].chunk) return {0, 0, 0};
    return find_chunk(args, chunk_offsets(args), start[0].chunk + index);
  } else {
    const SlabRows slab = slab_rows(args);
    const int number = static_cast<int>(index);
    if (number >= slab.rows * slab.chunks) return {0, 0, 0};
    const i64 first = i64(slab.first + number % slab.chunks) * Config::chunk;
    return {slab.row + number / slab.chunks, first,
            static_cast<int>(min(args.tokens - first, i64(Config::chunk)))};
  }
}
/// The same for the states at the slab's end. Packed, those before the sequence that crosses it do not count,
/// as far as whole CTAs of `together` chunks have no other.
template <int together>
KDA_DEVICE ChunkSpan find_crossing_chunk(const KernelArgs& args, i64 index) {
  if constexpr (Config::varlen) {
    const SlabStart* const start = slab_starts(args) + args.slab;
    const int first =
        chunk_offsets(args)[min(start[1].sequence, args.sequences)]; // end of the slab: nothing crosses
    if (start[0].chunk + (index / together + 1) * together <= first) return {0, 0, 0};
  }
  return find_slab_chunk(args, index);
}
/// Its number in the order of the whole call.
KDA_DEVICE i64 chunk_number(const KernelArgs& args, i64 index) {
  if constexpr (!Config::slabs) {
    return index;
  } else if constexpr (Config::varlen) {
    return slab_starts(args)[args.slab].chunk + index;
  } else {
    const SlabRows slab = slab_rows(args);
    const int number = static_cast<int>(index);
    return (slab.row + number / slab.chunks) * chunks_of(args.tokens) + slab.first + number % slab.chunks;
  }
}

/// The part of a sequence that lies in a slab.
struct Piece {
  SequenceSpan span; ///< first_chunk: in the workspace
  int sequence;
  bool starts, ends;     ///< with the sequence
  i64 done;              ///< tokens of the sequence before it
  int before, after;     ///< places of slot 11 for S at its start and end
  int d_before, d_after; ///< the same of slot 12 for D
};
/// Of row `unit` of the group.
KDA_DEVICE Piece fixed_piece(const KernelArgs& args, int unit) {
  const SlabRows slab = slab_rows(args);
  const i64 begin = i64(slab.first) * Config::chunk, end = begin + i64(slab.chunks) * Config::chunk;
  const int place = args.slab % args.slab_pieces * args.slab_rows + unit;
  Piece piece;
  piece.sequence = slab.row + unit;
  piece.span = {piece.sequence, begin, min(end, args.tokens), i64(unit) * slab.chunks};
  piece.starts = slab.first == 0;
  piece.ends = end >= args.tokens;
  piece.done = begin;
  piece.before = place - args.slab_rows;
  piece.after = place;
  piece.d_before = piece.d_after = unit;
  return piece;
}
KDA_DEVICE Piece packed_piece(const KernelArgs& args, int sequence) {
  const int* const offsets = chunk_offsets(args) + sequence;
  const SlabStart* const start = slab_starts(args) + args.slab;
  const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens) + sequence;
  const int first = max(start[0].chunk, offsets[0]), end = min(start[1].chunk, offsets[1]);
  Piece piece;
  piece.sequence = sequence;
  piece.done = i64(first - offsets[0]) * Config::chunk;
  piece.span = {0, cu[0] + piece.done, min(i64(cu[1]), cu[0] + i64(end - offsets[0]) * Config::chunk),
                first - start[0].chunk};
  piece.starts = first == offsets[0];
  piece.ends = end == offsets[1];
  piece.before = args.slab - 1;
  piece.after = args.slab;
  piece.d_before = args.slab % 2;
  piece.d_after = (args.slab + 1) % 2;
  return piece;
}

template <int slot>
KDA_DEVICE Word4* carry_of(const KernelArgs& args, int place, int head, int column) {
  const i64 block = (i64(place) * args.value_heads + head) * kValueBlocks + column / 16;
  return static_cast<Word4*>(args.workspace[slot]) + block * (2 * kKeyBlocks * 32) + lane_index();
}
template <int slot>
KDA_DEVICE void load_carry(const KernelArgs& args, int place, int head, int column, ScanState& state) {
  const Word4* const from = carry_of<slot>(args, place, head, column);
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n) {
    const Word4 words = from[n * 32];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      state.s[n][e] = bits_float(words.w[e]);
  }
}
template <int slot>
KDA_DEVICE void store_carry(const KernelArgs& args, int place, int head, int column, const ScanState& state) {
  Word4* const to = carry_of<slot>(args, place, head, column);
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n)
    to[n * 32] = Word4{{float_bits(state.s[n][0]), float_bits(state.s[n][1]), float_bits(state.s[n][2]),
                        float_bits(state.s[n][3])}};
}

/// A state that the forward saved. One that it did not save makes every gradient it would reach NaN, and
/// raises the error word.
KDA_DEVICE void load_saved_state(const KernelArgs& args, const Piece& piece, int head, int column,
                                 ScanState& state) {
  const NumberTable& table = args.interior_slots;
  const i64 at_column = piece.done / args.interior_interval - 1;
  const i64 at = piece.sequence * table.stride_sequence + at_column * table.stride_column;
  i64 slot = -1;
  if (at_column < table.columns)
    slot = table.wide != 0 ? static_cast<const i64*>(table.data)[at]
                           : i64{static_cast<const int*>(table.data)[at]};
  if (slot >= 0 && slot < args.interior_pool)
    return load_state(args.interior_states, static_cast<int>(slot), head, column, state);
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      state.s[n][e] = bits_float(0x7fc00000u);
  if (args.slot_error != nullptr && lane_index() == 0) atomic_max(args.slot_error, 1 + piece.sequence);
}

/// S at the start of a piece, D at its end; and what the next slab needs of either.
KDA_DEVICE void load_s(const KernelArgs& args, const Piece& piece, int head, int column, ScanState& state) {
  if constexpr (Config::slabs)
    if (!piece.starts)
      return args.interior_states.data != nullptr ? load_saved_state(args, piece, head, column, state)
                                                  : load_carry<11>(args, piece.before, head, column, state);
  load_state(args.initial_state, piece.sequence, head, column, state);
}
KDA_DEVICE void load_d(const KernelArgs& args, const Piece& piece, int head, int column, ScanState& state) {
  if constexpr (Config::slabs)
    if (!piece.ends) return load_carry<12>(args, piece.d_after, head, column, state);
  load_state(args.d_final_state, piece.sequence, head, column, state);
}
KDA_DEVICE void store_d(const KernelArgs& args, const Piece& piece, int head, int column,
                        const ScanState& state) {
  if constexpr (Config::slabs)
    if (!piece.starts) return store_carry<12>(args, piece.d_before, head, column, state);
  store_state(args.d_initial_state, piece.sequence, head, column, state);
}

} // namespace kda
