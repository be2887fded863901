#pragma once
// Sequential part of the forward: one CTA walks the chunks of one sequence, value head and value tile.
//
// A warp owns 16 columns of V and no warp needs another's results. The state is held transposed, S^T [16 of
// V][K], as fp32 accumulators: rounded to bf16 those words are at once the A operand of S^T W^T and the B
// operand of q S, and U^T is likewise A of U^T k and B of M U. So nothing but records passes through shared
// memory, and a chunk costs one barrier, which frees the stage before.
//
// Budget at K = 128, C = 64, 64 columns: 64 fp32 registers of state and 32 of its copy, 16 of U; 212 mma.sync
// and 54 KB of shared-memory reads a warp and chunk, 65 KB of shared memory a stage.
#include "chunk/state.cuh"
#include "stages/number_table.cuh"
#include "stages/schedule.cuh"

namespace kda {

/// One stage of shared memory, byte offsets.
struct Stage {
  static constexpr int u = Record::u; ///< [0, u) is as in the record
  static constexpr int u_block = Config::chunk * 32;
  static constexpr int bytes = u + kScanBlocks * u_block;
};

/// Starts the copies of one record; the caller commits.
template <int threads>
KDA_DEVICE void load_stage(unsigned char* stage, const unsigned char* record, int first_block, int blocks,
                           int thread) {
  copy_linear<Record::u, threads>(stage, record, thread);
  for (int b = 0; b < blocks; ++b)
    copy_linear<Stage::u_block, threads>(stage + Stage::u + b * Stage::u_block,
                                         record + Record::u + (first_block + b) * Stage::u_block, thread);
}

/// Tiles of tokens whose products are formed together: 8 independent sums of mma hide its latency, where the
/// registers allow.
constexpr int kScanGroup = kChunkTiles >= 2 && kKeyBlocks <= 8 ? 2 : 1;
/// Stores of o wait for the chunk's end, because their conditions would cut the arithmetic into blocks.
constexpr bool kStoreLate = kKeyBlocks <= 8;
static_assert(kStoreLate || kScanGroup == 1);

/// One chunk: U = u - W S, o = q S + M U, S = 2^tot S + k^T U.
KDA_DEVICE void scan_chunk(ScanState& state, const unsigned char* stage, int block, Config::Element* o,
                           i64 stride, int rows, int columns) {
  const auto* q = reinterpret_cast<const Operand*>(stage + Record::q);
  const auto* k = reinterpret_cast<const Operand*>(stage + Record::k);
  u32 rounded[kKeyBlocks][4]; // S^T of the chunk's start as A
  round_state(state, rounded);
  u32 u[kChunkTiles][4]; // U^T as A
  Word4 packed[kChunkTiles];
#pragma unroll
  for (int first = 0; first < kChunkTiles; first += kScanGroup) {
    Accumulator ws[kScanGroup], out[kScanGroup];
#pragma unroll
    for (int c = 0; c < kKeyBlocks; ++c)
#pragma unroll
      for (int i = 0; i < kScanGroup; ++i) {
        const Word4 w = *fragment(stage + Record::w, (first + i) * kKeyBlocks + c);
        mma_16x8x16<Operand>(ws[i].d[0], rounded[c], w.w[0], w.w[1]);
        mma_16x8x16<Operand>(ws[i].d[1], rounded[c], w.w[2], w.w[3]);
        u32 a[4];
        load_a_swizzled<kPaddedK>(a, q, (first + i) * kTileRows, c * 16);
        mma_16x8x16<Operand>(out[i].d[0], a, rounded[c][0], rounded[c][2]);
        mma_16x8x16<Operand>(out[i].d[1], a, rounded[c][1], rounded[c][3]);
      }
#pragma unroll
    for (int i = 0; i < kScanGroup; ++i) {
      const Word4 own = *fragment(stage + Stage::u + block * Stage::u_block, first + i);
#pragma unroll
      for (int w = 0; w < 4; ++w)
        u[first + i][w] = pack2<Operand>(low_half<Operand>(own.w[w]) - ws[i].d[w >> 1][(w & 1) * 2],
                                         high_half<Operand>(own.w[w]) - ws[i].d[w >> 1][(w & 1) * 2 + 1]);
    }
#pragma unroll
    for (int j = 0; j < first + kScanGroup; ++j)
#pragma unroll
      for (int i = 0; i < kScanGroup; ++i) {
        if (j > first + i) continue;
        const Word4 m = *fragment(stage + Record::m, pair_place(first + i, j));
        mma_16x8x16<Operand>(out[i].d[0], m.w, u[j][0], u[j][2]);
        mma_16x8x16<Operand>(out[i].d[1], m.w, u[j][1], u[j][3]);
      }
#pragma unroll
    for (int i = 0; i < kScanGroup; ++i)
      packed[first + i] = pack_rows<Config::Element>(out[i]);
    if constexpr (!kStoreLate)
      store_rows<Config::V>(o + first * kTileRows * stride, stride, packed[first], rows - first * kTileRows,
                            columns);
    if (first == 0) decay_state(state, stage + Record::decay);
#pragma unroll
    for (int c = 0; c < kKeyBlocks; ++c)
#pragma unroll
      for (int i = 0; i < kScanGroup; ++i) {
        u32 b[4];
        load_b_transposed_swizzled<kPaddedK>(b, k, (first + i) * kTileRows, c * 16);
        mma_16x8x16<Operand>(state.s[2 * c], u[first + i], b[0], b[1]);
        mma_16x8x16<Operand>(state.s[2 * c + 1], u[first + i], b[2], b[3]);
      }
  }
  if constexpr (kStoreLate)
#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i)
      store_rows<Config::V>(o + i * kTileRows * stride, stride, packed[i], rows - i * kTileRows, columns);
}

/// Zeros o behind the last packed sequence.
KDA_DEVICE void fill_padding(const KernelArgs& args, int head, int column) {
  const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
  const i64 begin = cu[args.sequences];
  const int columns = min(Config::value_tile, Config::V - column) / 2;
  for (i64 i = thread_index(); i < (args.tokens - begin) * columns; i += kScanThreads) {
    auto* row = row_of<Config::Element>(args.o, 0, begin + i / columns, head);
    *reinterpret_cast<u32*>(row + column + i % columns * 2) = 0;
  }
}

KDA_DEVICE void scan_chunks(const KernelArgs& args) {
  // Value tiles of a head are neighbours: they read the same records, from L2 when they run together.
  const int unit = block_index_x() / kScanTiles;
  const int first_column = block_index_x() % kScanTiles * Config::value_tile;
  const int head = unit % args.value_heads, sequence = unit / args.value_heads;
  if (Config::varlen && sequence == args.sequences) return fill_padding(args, head, first_column);

  const SequenceSpan span = find_sequence(args, chunk_offsets(args), sequence);
  const int chunks = static_cast<int>(chunks_of(span.end - span.begin));
  const int blocks = min(kScanBlocks, (kPaddedV - first_column) / 16);
  const bool loads = kScanLoaders == kScanThreads || warp_index() >= kScanBlocks;
  const auto load = [&](int chunk) {
    if (loads && chunk < chunks)
      load_stage<kScanLoaders>(shared_memory() + chunk % Config::stages * Stage::bytes,
                               record_of(args, span.first_chunk + chunk, head), first_column / 16, blocks,
                               thread_index() - (kScanThreads - kScanLoaders));
    commit_copies();
  };
#pragma unroll
  for (int chunk = 0; chunk < Config::stages - 1; ++chunk)
    load(chunk);
  const bool works = warp_index() < blocks;
  const int column = first_column + warp_index() * 16;
  ScanState state;
  StateTensor initial = args.initial_state;
  if (!has_initial_state(args, sequence)) initial.data = nullptr;
  if (works) load_state(initial, sequence, head, column, state);
  Config::Element* o = row_of<Config::Element>(args.o, span.batch, span.begin, head) + column;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<Config::stages - 2>();
    sync_block(); // this chunk's record is there, and nobody reads the one before any more
    load(chunk + Config::stages - 1);
    if (!works) continue;
    const i64 first = static_cast<i64>(chunk) * Config::chunk;
    const i64 rest = span.end - span.begin - first;
    scan_chunk(state, shared_memory() + chunk % Config::stages * Stage::bytes, warp_index(),
               o + first * args.o.stride_token, args.o.stride_token,
               static_cast<int>(min(rest, i64(Config::chunk))), Config::V - column);
    if constexpr (Config::interior_states)
      if (rest >= Config::chunk) {
        const i64 slot = interior_slot(args, sequence, first + Config::chunk);
        if (slot != kNowhere) store_state(args.interior_states, slot, head, column, state);
      }
  }
  if (works) store_state(args.final_state, sequence, head, column, state);
}

} // namespace kda
