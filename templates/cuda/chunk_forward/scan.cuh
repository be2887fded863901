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
#include "chunk_forward/record.cuh"
#include "primitives/async.cuh"
#include "stages/schedule.cuh"
#include "stages/token_load.cuh"

namespace kda {

constexpr int kScanThreads = Config::scan_warps * 32;
constexpr int kScanBlocks = Config::value_tile / 16; ///< of 16 columns
/// Threads that copy records: those of warps without columns, or all.
constexpr int kScanLoaders =
    Config::scan_warps > kScanBlocks ? kScanThreads - kScanBlocks * 32 : kScanThreads;
constexpr int kScanTiles = (kPaddedV + Config::value_tile - 1) / Config::value_tile;
static_assert(Config::value_tile % 16 == 0 && kScanBlocks <= Config::scan_warps);

/// One stage of shared memory, byte offsets.
struct Stage {
  static constexpr int u = Record::u; ///< [0, u) is as in the record
  static constexpr int u_block = Config::chunk * 32;
  static constexpr int bytes = u + kScanBlocks * u_block;
};

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
/// Starts the copies of one record; the caller commits.
template <int threads>
KDA_DEVICE void load_stage(unsigned char* stage, const unsigned char* record, int first_block, int blocks,
                           int thread) {
  copy_linear<Record::u, threads>(stage, record, thread);
  for (int b = 0; b < blocks; ++b)
    copy_linear<Stage::u_block, threads>(stage + Stage::u + b * Stage::u_block,
                                         record + Record::u + (first_block + b) * Stage::u_block, thread);
}

/// S^T of one warp: s[n] are the accumulators of channels 8n..8n+7, 16 columns of V.
struct ScanState {
  float s[2 * kKeyBlocks][4];
};

/// Offset of the accumulators [e], e = 0 or 2, of s[n] in a state matrix whose columns of V begin at
/// `column`; the next element is `step` further. False: padding.
KDA_DEVICE bool state_place(int column, int n, int e, int& offset) {
  const int v = column + (lane_index() >> 2) + e * 4;
  const int k = n * 8 + (lane_index() & 3) * 2;
  offset = Config::state_v_k ? v * Config::K + k : k * Config::V + v;
  return v < Config::V && k < Config::K;
}
constexpr int kStateStep = Config::state_v_k ? 1 : Config::V;

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
KDA_DEVICE void store_state(const StateTensor& x, int sequence, int head, int column,
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

/// Transposes 4 words of 4 neighbouring lanes: word i of lane t goes to word t of lane i.
KDA_DEVICE void transpose_quad(Word4& x) {
  const bool odd = lane_index() & 1, upper = lane_index() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 received = shuffle_xor(odd ? x.w[i] : x.w[i + 1], 1);
    x.w[i] = odd ? received : x.w[i];
    x.w[i + 1] = odd ? x.w[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 received = shuffle_xor(upper ? x.w[i] : x.w[i + 2], 2);
    x.w[i] = upper ? received : x.w[i];
    x.w[i + 2] = upper ? x.w[i + 2] : received;
  }
}

/// 16 tokens of o by 16 columns, packed by pack_output; `o` is at the first token and column, `rows` and
/// `columns` what exists.
KDA_DEVICE Word4 pack_output(const Accumulator& x) {
  Word4 words;
#pragma unroll
  for (int w = 0; w < 4; ++w) // row half w/2, column half w%2
    words.w[w] = pack2<Config::Element>(x.d[w & 1][w & 2], x.d[w & 1][(w & 2) + 1]);
  return words;
}
KDA_DEVICE void store_output(Config::Element* o, i64 stride, Word4 words, int rows, int columns) {
  const int row = lane_index() >> 2, t = lane_index() & 3;
  if constexpr (Config::V % 8 == 0) {
    // Whole 32-byte sectors: a lane gets 8 columns of one token.
    transpose_quad(words);
    const int r = row + (t >> 1) * 8, c = (t & 1) * 8;
    if (r < rows && c < columns) *reinterpret_cast<Word4*>(o + r * stride + c) = words;
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int r = row + (w >> 1) * 8, c = (w & 1) * 8 + t * 2;
      if (r < rows && c < columns) *reinterpret_cast<u32*>(o + r * stride + c) = words.w[w];
    }
  }
}

KDA_DEVICE void decay_state(ScanState& state, const unsigned char* stage) {
  const auto* decay = reinterpret_cast<const Word2*>(stage + Record::decay) + (lane_index() & 3);
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n) {
    const Word2 d = decay[n * 4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      state.s[n][e] *= bits_float(d.w[e & 1]);
  }
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
#pragma unroll
  for (int n = 0; n < 2 * kKeyBlocks; ++n) {
    rounded[n / 2][n % 2 * 2] = pack2<Operand>(state.s[n][0], state.s[n][1]);
    rounded[n / 2][n % 2 * 2 + 1] = pack2<Operand>(state.s[n][2], state.s[n][3]);
  }
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
      packed[first + i] = pack_output(out[i]);
    if constexpr (!kStoreLate)
      store_output(o + first * kTileRows * stride, stride, packed[first], rows - first * kTileRows, columns);
    if (first == 0) decay_state(state, stage);
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
      store_output(o + i * kTileRows * stride, stride, packed[i], rows - i * kTileRows, columns);
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
  if (works) load_state(args.initial_state, sequence, head, column, state);
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
  }
  if (works) store_state(args.final_state, sequence, head, column, state);
}

} // namespace kda
