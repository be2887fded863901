#pragma once
// Sequential part of the backward: one CTA walks the chunks of one sequence, value head and value tile,
// either forwards, to find the state S at the start of every chunk again, or backwards with its gradient D.
// Neither needs the other, so both run at the same time.
//   forwards:  U = u - W S,              S <- 2^tot S + k^T U
//   backwards: dU = M^T dO + k D,        D <- 2^tot D + (scale q 2^G)^T dO - W^T dU
// where k stands for k 2^(tot - G). Both have the form of the forward's scan (chunk_forward/scan.cuh): a warp
// owns 16 columns of V and holds S^T or D^T in fp32 accumulators.
//
// Budget of a warp and chunk at K = 128, C = 64: 128 (forwards) and 276 (backwards) mma.sync; a CTA of 64
// columns reads 41 KB forwards and 62 KB backwards into shared memory and writes 24 and 32 KB.
#include "chunk/state.cuh"
#include "chunk_backward/finish.cuh"
#include "chunk_backward/workspace.cuh"
#include "stages/chunk_load.cuh"

namespace kda {

/// One stage of shared memory, byte offsets. Forwards: [w, u) of the record, then u by value block.
/// Backwards: [0, u) of the record, then rows of dO.
struct Stage {
  static constexpr int u_block = Config::chunk * 32;
  static constexpr int factors = Record::u - Record::w;
  using OutputTile = Tile<Config::value_tile>;
  static constexpr int forwards = factors + kScanBlocks * u_block;
  static constexpr int backwards = Record::u + OutputTile::bytes(Config::chunk);
  static constexpr int bytes = forwards > backwards ? forwards : backwards;
};

/// What a CTA works on.
struct ScanWork {
  Piece piece;
  int head, first_column, blocks, thread; ///< thread: number among those that copy, or negative
};

KDA_DEVICE void load_stage_forwards(const KernelArgs& args, const ScanWork& work, int chunk,
                                    unsigned char* stage) {
  const unsigned char* record = record_of(args, work.piece.span.first_chunk + chunk, work.head);
  copy_linear<Stage::factors, kScanLoaders>(stage, record + Record::w, work.thread);
  for (int b = 0; b < work.blocks; ++b)
    copy_linear<Stage::u_block, kScanLoaders>(
        stage + Stage::factors + b * Stage::u_block,
        record + Record::u + (work.first_column / 16 + b) * Stage::u_block, work.thread);
}
KDA_DEVICE void load_stage_backwards(const KernelArgs& args, const ScanWork& work, int chunk,
                                     unsigned char* stage) {
  const SequenceSpan& span = work.piece.span;
  const unsigned char* record = record_of(args, span.first_chunk + chunk, work.head);
  copy_linear<Record::u, kScanLoaders>(stage, record, work.thread);
  const i64 first = span.begin + i64(chunk) * Config::chunk;
  const int rows = static_cast<int>(min(span.end - first, i64(Config::chunk)));
  const auto* d_o = row_of<const Config::Element>(args.d_o, span.batch, first, work.head);
  constexpr int piece = Config::V % 8 == 0 ? 8 : 4, pieces = Config::value_tile / piece;
  auto* tile = reinterpret_cast<Config::Element*>(stage + Record::u);
#pragma unroll 4
  for (int i = work.thread; i < Config::chunk * pieces; i += kScanLoaders) {
    const int row = i / pieces, local = i % pieces * piece, column = work.first_column + local;
    const bool valid = row < rows && column < Config::V;
    const auto* source = valid ? d_o + row * args.d_o.stride_token + column : d_o;
    auto* target = tile + row * Stage::OutputTile::stride + local;
    if constexpr (piece == 8)
      copy_async_16(target, source, valid);
    else
      copy_async_8(target, source, valid);
  }
}

/// Writes the state as fragments of value block `block`.
KDA_DEVICE void store_fragments(unsigned char* out, int block, const u32 (&rounded)[kKeyBlocks][4]) {
#pragma unroll
  for (int c = 0; c < kKeyBlocks; ++c)
    *fragment(out, block * kKeyBlocks + c) =
        Word4{{rounded[c][0], rounded[c][1], rounded[c][2], rounded[c][3]}};
}

/// state^T += a rows, rows a KeyTile of `tokens` from row `row` on.
KDA_DEVICE void add_outer(ScanState& state, const u32 (&a)[4], const Operand* rows, int row) {
#pragma unroll
  for (int c = 0; c < kKeyBlocks; ++c) {
    u32 b[4];
    load_b_transposed_swizzled<kPaddedK>(b, rows, row, c * 16);
    mma_16x8x16<Operand>(state.s[2 * c], a, b[0], b[1]);
    mma_16x8x16<Operand>(state.s[2 * c + 1], a, b[2], b[3]);
  }
}
/// x += state^T rows^T: 16 columns of V by 16 tokens.
KDA_DEVICE void multiply_rows(Accumulator& x, const u32 (&rounded)[kKeyBlocks][4], const Operand* rows,
                              int row) {
#pragma unroll
  for (int c = 0; c < kKeyBlocks; ++c) {
    u32 b[4];
    load_b_swizzled<kPaddedK>(b, rows, row, c * 16);
    multiply_add(x, rounded[c], b);
  }
}

/// `block` counts the tile's value blocks, `value_block` all of V's. Not `keeps`: only S moves on.
template <bool keeps>
KDA_DEVICE void scan_forwards(const KernelArgs& args, const ScanWork& work, i64 chunk, int block,
                              const unsigned char* stage, ScanState& state) {
  const auto* w = reinterpret_cast<const Operand*>(stage);
  const auto* k = reinterpret_cast<const Operand*>(stage + Record::k - Record::w);
  const int value_block = work.first_column / 16 + block;
  u32 rounded[kKeyBlocks][4], u[kChunkTiles][4];
  round_state(state, rounded);
  if constexpr (keeps) store_fragments(chunk_slot<2>(args, chunk, work.head), value_block, rounded);
  unsigned char* out = chunk_slot<4>(args, chunk, work.head);
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    Accumulator ws;
    multiply_rows(ws, rounded, w, i * kTileRows);
    const Word4 own = *fragment(stage + Stage::factors + block * Stage::u_block, i);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      u[i][n] = pack2<Operand>(low_half<Operand>(own.w[n]) - ws.d[n >> 1][(n & 1) * 2],
                               high_half<Operand>(own.w[n]) - ws.d[n >> 1][(n & 1) * 2 + 1]);
    if constexpr (keeps)
      *fragment(out, value_block * kChunkTiles + i) = Word4{{u[i][0], u[i][1], u[i][2], u[i][3]}};
  }
  decay_state(state, stage + Record::decay - Record::w);
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i)
    add_outer(state, u[i], k, i * kTileRows);
}

KDA_DEVICE void scan_backwards(const KernelArgs& args, const ScanWork& work, i64 chunk, int block,
                               const unsigned char* stage, ScanState& state) {
  const auto* q = reinterpret_cast<const Operand*>(stage + Record::q);
  const auto* w = reinterpret_cast<const Operand*>(stage + Record::w);
  const auto* k = reinterpret_cast<const Operand*>(stage + Record::k);
  const auto* d_o = reinterpret_cast<const Operand*>(stage + Record::u);
  const int value_block = work.first_column / 16 + block;
  u32 rounded[kKeyBlocks][4], o[kChunkTiles][4], u[kChunkTiles][4];
  round_state(state, rounded);
  store_fragments(chunk_slot<3>(args, chunk, work.head), value_block, rounded);
  unsigned char* out = chunk_slot<5>(args, chunk, work.head);
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    load_a_transposed<Config::value_tile>(o[i], d_o, i * kTileRows, block * 16);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      o[i][n] = as_operand<Config::Element>(o[i][n]);
  }
  Accumulator d_u[kChunkTiles]; // dU^T
#pragma unroll
  for (int c = 0; c < kKeyBlocks; ++c) {
    u32 rest[4]; // what rounding left of D: dbeta is small beside the terms of dU . v that cancel in it
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float* d = state.s[2 * c + (n >> 1)] + (n & 1) * 2;
      rest[n] =
          pack2<Operand>(d[0] - low_half<Operand>(rounded[c][n]), d[1] - high_half<Operand>(rounded[c][n]));
    }
#pragma unroll
    for (int j = 0; j < kChunkTiles; ++j) {
      u32 b[4];
      load_b_swizzled<kPaddedK>(b, k, j * kTileRows, c * 16);
      multiply_add(d_u[j], rounded[c], b);
      multiply_add(d_u[j], rest, b);
    }
  }
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      const Word4 m = *fragment(stage + Record::m, pair_place(i, j));
      mma_16x8x16<Operand>(d_u[j].d[0], o[i], m.w[0], m.w[1]);
      mma_16x8x16<Operand>(d_u[j].d[1], o[i], m.w[2], m.w[3]);
    }
    const Word4 packed = pack_a(d_u[j]);
    Word4 rest; // what rounding leaves: R would lose as much as from rounding D
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      rest.w[n] = pack2<Operand>(d_u[j].d[n >> 1][(n & 1) * 2] - low_half<Operand>(packed.w[n]),
                                 d_u[j].d[n >> 1][(n & 1) * 2 + 1] - high_half<Operand>(packed.w[n]));
      u[j][n] = packed.w[n] ^ 0x80008000u; // -dU
    }
    *fragment(out, (value_block * kChunkTiles + j) * 2) = packed;
    *fragment(out, (value_block * kChunkTiles + j) * 2 + 1) = rest;
  }
  decay_state(state, stage + Record::decay);
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    add_outer(state, o[i], q, i * kTileRows);
    add_outer(state, u[i], w, i * kTileRows);
  }
}

enum class Walk { forwards, backwards, states }; ///< states: forwards, and only the last S is kept

/// Walks the chunks of a piece.
template <Walk walk>
KDA_DEVICE void scan_piece(const KernelArgs& args, const ScanWork& work) {
  constexpr bool reverse = walk == Walk::backwards;
  const Piece& piece = work.piece;
  const int chunks = static_cast<int>(chunks_of(piece.span.end - piece.span.begin));
  const auto number = [&](int step) { return reverse ? chunks - 1 - step : step; };
  const auto stage = [&](int step) { return shared_memory() + step % Config::stages * Stage::bytes; };
  const auto load = [&](int step) {
    if (work.thread >= 0 && step < chunks) {
      if constexpr (reverse)
        load_stage_backwards(args, work, number(step), stage(step));
      else
        load_stage_forwards(args, work, number(step), stage(step));
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < Config::stages - 1; ++step)
    load(step);
  const int warp = warp_index();
  const bool works = warp < work.blocks;
  const int column = work.first_column + warp * 16;
  ScanState state;
  if (works) {
    if constexpr (reverse)
      load_d(args, piece, work.head, column, state);
    else
      load_s(args, piece, work.head, column, state);
  }
#pragma unroll 1
  for (int step = 0; step < chunks; ++step) {
    wait_copies<Config::stages - 2>();
    sync_block(); // this step's record is there, and nobody reads the one before any more
    load(step + Config::stages - 1);
    if (!works) continue;
    const i64 chunk = piece.span.first_chunk + number(step);
    if constexpr (reverse)
      scan_backwards(args, work, chunk, warp, stage(step), state);
    else
      scan_forwards<walk == Walk::forwards>(args, work, chunk, warp, stage(step), state);
  }
  if (reverse && works) store_d(args, piece, work.head, column, state);
  if (walk == Walk::states && works) store_carry<11>(args, piece.after, work.head, column, state);
}

KDA_DEVICE ScanWork scan_work(const KernelArgs& args, int head, int tile) {
  ScanWork work;
  work.head = head;
  work.first_column = tile * Config::value_tile;
  work.blocks = min(kScanBlocks, (kPaddedV - work.first_column) / 16);
  work.thread = thread_index() - (kScanThreads - kScanLoaders);
  return work;
}

/// What lies in this slab of the rows or sequences of unit `unit` of `units`, in one direction.
template <Walk walk>
KDA_DEVICE void scan_unit(const KernelArgs& args, ScanWork& work, int unit, int units) {
  if constexpr (!Config::slabs) {
    work.piece.sequence = unit;
    work.piece.span = find_sequence(args, chunk_offsets(args), unit);
    scan_piece<walk>(args, work);
  } else if constexpr (!Config::varlen) {
    if (unit >= slab_rows(args).rows) return;
    work.piece = fixed_piece(args, unit);
    if (walk != Walk::states || !work.piece.ends) scan_piece<walk>(args, work);
  } else {
    const SlabStart* const start = slab_starts(args) + args.slab;
    const bool last = args.slab + 1 == args.slab_pieces;
    for (int n = start[0].sequence + unit; n < args.sequences; n += units) {
      if (!last && chunk_offsets(args)[n] >= start[1].chunk) return;
      work.piece = packed_piece(args, n);
      if (walk == Walk::states && work.piece.ends) continue;
      scan_piece<walk>(args, work);
      sync_block(); // nobody reads the stages any more
    }
  }
}

KDA_DEVICE void scan_chunks(const KernelArgs& args) {
  // Even CTAs walk backwards, odd ones forwards; value tiles of a head are near each other.
  const int tile = block_index_x() / 2 % kScanTiles, number = block_index_x() / (2 * kScanTiles);
  const int head = number % args.value_heads, unit = number / args.value_heads;
  const int units = Config::slabs ? args.slab_rows : args.sequences;
  const bool reverse = block_index_x() % 2 == 0;
  if (Config::varlen && unit == units)
    return fill_padding(args, head, (block_index_x() % (2 * kScanTiles)) * kScanThreads + thread_index(),
                        2 * kScanTiles * kScanThreads);
  ScanWork work = scan_work(args, head, tile);
  if (reverse)
    scan_unit<Walk::backwards>(args, work, unit, units);
  else
    scan_unit<Walk::forwards>(args, work, unit, units);
}

/// S at the end of the slab.
KDA_DEVICE void scan_states(const KernelArgs& args) {
  const int tile = block_index_x() % kScanTiles, number = block_index_x() / kScanTiles;
  ScanWork work = scan_work(args, number % args.value_heads, tile);
  scan_unit<Walk::states>(args, work, number / args.value_heads, args.slab_rows);
}

} // namespace kda
