#pragma once
// Chunk-parallel first part of forward and backward: from q, k, v, g and beta of some chunks of one value
// head to their factor records (record.cuh). No chunk needs another.
//
// Budget at K = V = 128, bf16, C = 64, 4 warps: reads 1,026 B and writes 1,112 B a token and head, 77 KB of
// shared memory so that 3 CTAs share an SM and cover each other's barriers (8 + C/16 of them), about 55
// instructions an element, 1,060 mma.sync of 16x8x16.
#include "chunk/record.cuh"
#include "stages/decay.cuh"
#include "stages/pair.cuh"
#include "stages/solve.cuh"

namespace kda {

constexpr int kPrepareThreads = Config::prepare_warps * 32;
/// Tiles of 16 tokens a CTA works on: 4, or fewer where K is wide and chunks are short.
constexpr int prepare_tiles() {
  int tiles = 4;
  while (tiles > kChunkTiles && kPrepareThreads / tiles * 4 < kPaddedK)
    tiles /= 2;
  return tiles;
}
constexpr int kPrepareTiles = prepare_tiles();
constexpr int kPrepareChunks = kPrepareTiles / kChunkTiles;
constexpr int kPrepareRows = kPrepareTiles * kTileRows;
using PrepareMap = ChannelMap<kPrepareThreads, kPrepareTiles>;

/// Shared memory, byte offsets. Operands of the pair products die before the solve begins, and its matrices
/// and v take their place.
struct PrepareShared {
  static constexpr int key_tile = Tile<kPaddedK>::bytes(kPrepareRows);
  static constexpr int sums_bytes = kPrepareTiles * kPaddedK * 4;
  static constexpr int decayed_k = 0; ///< k 2^(G - G before the tile)
  static constexpr int total = decayed_k + key_tile;
  static constexpr int q_factor = total + sums_bytes;
  static constexpr int k_factor = q_factor + kPrepareRows * 4;
  static constexpr int beta = k_factor + kPrepareRows * 4;
  static constexpr int spans = beta + kPrepareRows * 4;
  static constexpr int shared_region = (spans + kPrepareChunks * 24 + 15) / 16 * 16;
  static constexpr int row_q = shared_region;
  static constexpr int row_k = row_q + key_tile;
  static constexpr int column_k = row_k + key_tile;
  static constexpr int start = column_k + key_tile;
  static constexpr int anchor = start + sums_bytes;
  static constexpr int pair_end = anchor + sums_bytes;
  static constexpr int matrix = shared_region;
  static constexpr int t_high = matrix + kPrepareRows * kSolveStride * 4;
  static constexpr int t_low = t_high + TransposedT::bytes(kPrepareRows);
  static constexpr int v = t_low + TransposedT::bytes(kPrepareRows);
  static constexpr int solve_end = v + Tile<kPaddedV>::bytes(kPrepareRows);
  static constexpr int bytes = pair_end > solve_end ? pair_end : solve_end;
};
static_assert(sizeof(ChunkSpan) == 24);
/// CTAs that share an SM of 228 KB; registers are limited accordingly. Three of 8 warps leave 80, which the
/// backward's inverse does not fit.
constexpr int prepare_ctas() {
  constexpr int fit = 233472 / (PrepareShared::bytes + 1024);
  constexpr int most = Config::backward && Config::prepare_warps == 8 ? 2 : 3;
  return fit > most ? most : fit < 1 ? 1 : fit;
}

KDA_DEVICE GateSums prepare_sums() {
  return {shared_at<float>(PrepareShared::total), shared_at<float>(PrepareShared::start),
          shared_at<float>(PrepareShared::anchor)};
}

/// k 2^(tot - G) of this thread's tile into the record: running sums from the chunk's end backwards.
KDA_DEVICE void write_state_keys(const PrepareMap& map, unsigned char* record) {
  constexpr int width = PrepareMap::width, stride = Tile<kPaddedK>::stride;
  const int local_tile = map.tile % kChunkTiles;
  const float* factor = shared_at<float>(PrepareShared::k_factor) + map.tile * kTileRows;
  const int place = map.tile * kTileRows * stride + map.channel;
  const auto* raw = shared_at<Config::Element>(PrepareShared::row_k) + place;
  const Operand* high = shared_at<Operand>(PrepareShared::decayed_k) + place;
  const Operand* low = shared_at<Operand>(PrepareShared::column_k) + place;
  auto* out = reinterpret_cast<Operand*>(record + Record::k);
  float after[width] = {};
  sum_other_tiles<true>(prepare_sums(), map.tile, map.channel, after);
#pragma unroll 4
  for (int r = kTileRows - 1; r >= 0; --r) {
    float k[width], g[width];
    load_elements(raw + r * stride, k);
    unpark_gates(high + r * stride, low + r * stride, g);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      k[i] *= factor[r] * exp2_fast(after[i]);
      after[i] += g[i];
    }
    store_elements(out + Record::KeyTile::place(local_tile * kTileRows + r, map.channel), k);
  }
  if (local_tile == 0) {
    // The running sum has reached the chunk's start: tot.
    float* decay = reinterpret_cast<float*>(record + Record::decay) + map.channel;
#pragma unroll
    for (int i = 0; i < width; ++i)
      decay[i] = exp2_fast(after[i]);
  }
}

/// Operands of the pair products and of W in shared memory, over the raw q, k and the parked gates, and scale
/// q 2^G into the record (null: a chunk that does not exist).
KDA_DEVICE void write_operands(const PrepareMap& map, unsigned char* record) {
  constexpr int width = PrepareMap::width, stride = Tile<kPaddedK>::stride;
  const int local_tile = map.tile % kChunkTiles;
  const float* q_factor = shared_at<float>(PrepareShared::q_factor) + map.tile * kTileRows;
  const float* k_factor = shared_at<float>(PrepareShared::k_factor) + map.tile * kTileRows;
  const int place = map.tile * kTileRows * stride + map.channel;
  Operand* row_q = shared_at<Operand>(PrepareShared::row_q) + place;
  Operand* row_k = shared_at<Operand>(PrepareShared::row_k) + place;
  Operand* column_k = shared_at<Operand>(PrepareShared::column_k) + place;
  Operand* decayed_k = shared_at<Operand>(PrepareShared::decayed_k) + place;
  Operand* out = nullptr;
  if (record != nullptr) out = reinterpret_cast<Operand*>(record + Record::q);

  float start[width] = {}, sum[width] = {}, anchored[width];
  const GateSums sums = prepare_sums();
  sum_other_tiles<false>(sums, map.tile, map.channel, start);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    start[i] = exp2_fast(start[i]);
    const int at = map.tile * kPaddedK + map.channel + i;
    anchored[i] = sums.start[at] - sums.anchor[at];
  }
#pragma unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    float q[width], k[width], g[width], x[width], y[width];
    load_elements(reinterpret_cast<const Config::Element*>(row_q + r * stride), q);
    load_elements(reinterpret_cast<const Config::Element*>(row_k + r * stride), k);
    unpark_gates(decayed_k + r * stride, column_k + r * stride, g);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sum[i] += g[i];
      anchored[i] += max(g[i], kPairGateFloor);
      q[i] *= q_factor[r];
      k[i] *= k_factor[r];
      g[i] = exp2_fast(anchored[i]);
      x[i] = q[i] * g[i];
      y[i] = k[i] * g[i];
    }
    store_elements(row_q + r * stride, x);
    store_elements(row_k + r * stride, y);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float decay = exp2_fast(sum[i]);
      x[i] = k[i] * exp2_fast(-anchored[i]);
      y[i] = k[i] * decay;
      q[i] *= decay * start[i];
    }
    store_elements(column_k + r * stride, x);
    store_elements(decayed_k + r * stride, y);
    if (out != nullptr)
      store_elements(out + Record::KeyTile::place(local_tile * kTileRows + r, map.channel), q);
  }
}

/// L and M. M goes into the records, A = diag(beta) L into `matrix` once no warp reads the operands there any
/// more.
template <bool states>
KDA_DEVICE void write_pairs(const KernelArgs& args, i64 first_chunk, const ChunkSpan* spans, int head) {
  constexpr int rounds = (kPrepareChunks * kChunkPairs + Config::prepare_warps - 1) / Config::prepare_warps;
  Accumulator l[rounds];
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const TilePair pair = find_pair<kPrepareTiles>(warp_index() + round * Config::prepare_warps);
    const int chunk = pair.i / kChunkTiles;
    if (!pair.valid || spans[chunk].rows == 0) continue;
    Accumulator m;
    multiply_pair(pair, shared_at<Operand>(PrepareShared::row_q), shared_at<Operand>(PrepareShared::row_k),
                  shared_at<Operand>(PrepareShared::column_k), prepare_sums(), l[round], m);
    if (pair.i == pair.j) mask_diagonal(l[round], true);
    if constexpr (states) continue;
    if (pair.i == pair.j) mask_diagonal(m, false);
    unsigned char* record = record_of(args, first_chunk + chunk, head);
    Word4 words = pack_a(m);
    if constexpr (Config::backward)
#pragma unroll
      for (int w = 0; w < 4; ++w)
        words.w[w] = transpose_matrix(words.w[w]);
    *fragment(record + Record::m, pair_place(pair.i % kChunkTiles, pair.j % kChunkTiles)) = words;
  }
  sync_block();
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const TilePair pair = find_pair<kPrepareTiles>(warp_index() + round * Config::prepare_warps);
    if (!pair.valid) continue;
    const int row = pair.i / kChunkTiles * Config::chunk;
    store_solve_tile(shared_at<float>(PrepareShared::matrix) + row * kSolveStride, pair.i % kChunkTiles,
                     pair.j % kChunkTiles, l[round], shared_at<float>(PrepareShared::beta) + row);
  }
}

/// 16 channels of 16 tokens into a KeyTile, 16 bytes a lane.
KDA_DEVICE void store_key_block(Operand* tile, const Accumulator& x, int token_tile, int block) {
  const int row = lane_index() >> 2, t = lane_index() & 3;
  Word4 words = pack_rows<Operand>(x);
  transpose_quad(words);
  *reinterpret_cast<Word4*>(tile + Record::KeyTile::place(token_tile * kTileRows + row + (t >> 1) * 8,
                                                          block * 16 + (t & 1) * 8)) = words;
}

/// One warp: 16 channels of W = T k 2^G of a chunk. Tiles j from the last to the first: k's decay counts from
/// its own tile's start, so the sums over later tiles are scaled as j moves on.
KDA_DEVICE void write_w(const TransposedT& t_transposed, int first_row, int block, unsigned char* record) {
  const Operand* keys = shared_at<Operand>(PrepareShared::decayed_k) + first_row * Tile<kPaddedK>::stride;
  const float* total = shared_at<float>(PrepareShared::total) + first_row / kTileRows * kPaddedK;
  Accumulator w[kChunkTiles];
#pragma unroll
  for (int j = kChunkTiles - 1; j >= 0; --j) {
    u32 k[4];
    load_b_transposed<kPaddedK>(k, keys, j * kTileRows, block * 16);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float decay[2];
      load_elements(total + j * kPaddedK + block * 16 + n * 8 + (lane_index() & 3) * 2, decay);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        decay[e] = exp2_fast(decay[e]);
#pragma unroll
      for (int i = j + 1; i < kChunkTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          w[i].d[n][e] *= decay[e & 1];
    }
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      u32 t[4];
      load_a_transposed<Config::chunk>(t, t_transposed.high, j * kTileRows, i * kTileRows);
      multiply_add(w[i], t, k);
      load_a_transposed<Config::chunk>(t, t_transposed.low, j * kTileRows, i * kTileRows);
      multiply_add(w[i], t, k);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    if constexpr (Config::backward) {
      store_key_block(reinterpret_cast<Operand*>(record + Record::w), w[i], i, block);
    } else {
      // As the B operand of S^T W^T: tokens are N. Rows 0..7 give its first two words.
      const Word4 a = pack_a(w[i]);
      *fragment(record + Record::w, i * kKeyBlocks + block) = Word4{{a.w[0], a.w[2], a.w[1], a.w[3]}};
    }
  }
}

/// One warp: 16 columns of u = T v of a chunk, transposed.
KDA_DEVICE void write_u(const TransposedT& t_transposed, int first_row, int block, unsigned char* record) {
  const Operand* values = shared_at<Operand>(PrepareShared::v) + first_row * Tile<kPaddedV>::stride;
  Accumulator u[kChunkTiles];
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    u32 v[4];
    load_a_transposed<kPaddedV>(v, values, j * kTileRows, block * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      v[w] = as_operand<Config::Element>(v[w]);
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      u32 t[4];
      load_b_transposed<Config::chunk>(t, t_transposed.high, j * kTileRows, i * kTileRows);
      multiply_add(u[i], v, t);
      load_b_transposed<Config::chunk>(t, t_transposed.low, j * kTileRows, i * kTileRows);
      multiply_add(u[i], v, t);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i)
    *fragment(record + Record::u, block * kChunkTiles + i) = pack_a(u[i]);
}

/// X^T for R = X^T dU, from the solved matrix.
KDA_DEVICE void write_inverse(const float* matrix, int pair, unsigned char* record) {
  const TilePair at = find_pair<kChunkTiles>(pair);
  const SplitOperand x = at.i == at.j ? load_split_transposed(matrix + solve_place(at.i, at.i))
                                      : load_split(matrix + solve_place(at.j, at.i));
  const int place = 2 * pair_place(at.i, at.j);
  *fragment(record + Record::x, place) = Word4{{x.high[0], x.high[1], x.high[2], x.high[3]}};
  *fragment(record + Record::x, place + 1) = Word4{{x.low[0], x.low[1], x.low[2], x.low[3]}};
}

/// `find` gives the tokens of a chunk by its place in the workspace. `states`: only what moves S on, without
/// q, M and X.
template <bool states, class Find>
KDA_DEVICE void prepare_chunks(const KernelArgs& args, const Find& find) {
  const int head = block_index_x() % args.value_heads;
  const i64 first_chunk = static_cast<i64>(block_index_x() / args.value_heads) * kPrepareChunks;
  ChunkSpan* spans = shared_at<ChunkSpan>(PrepareShared::spans);
  if (thread_index() < kPrepareChunks) spans[thread_index()] = find(first_chunk + thread_index());
  sync_block();
  if (spans[0].rows == 0) return;

  Operand* row_q = shared_at<Operand>(PrepareShared::row_q);
  Operand* row_k = shared_at<Operand>(PrepareShared::row_k);
  const i64 key_head = head / Config::group;
  load_rows<Config::K, kPrepareChunks, kPrepareThreads, Config::Element>(row_q, args.q, spans, key_head);
  load_rows<Config::K, kPrepareChunks, kPrepareThreads, Config::Element>(row_k, args.k, spans, key_head);
  commit_copies();
  load_beta<kPrepareChunks, kPrepareThreads>(args, spans, head, shared_at<float>(PrepareShared::beta));
  const PrepareMap map;
  const int chunk = map.tile / kChunkTiles;
  const int place = map.tile * kTileRows * Tile<kPaddedK>::stride + map.channel;
  evaluate_gates(args, map, spans[chunk], map.tile % kChunkTiles * kTileRows, head, prepare_sums(),
                 [&](int row, const float(&g)[PrepareMap::width]) {
                   const int at = place + row * Tile<kPaddedK>::stride;
                   park_gates(shared_at<Operand>(PrepareShared::decayed_k) + at,
                              shared_at<Operand>(PrepareShared::column_k) + at, g);
                 });
  wait_copies<0>();
  sync_block();
  accumulate_anchors<kPrepareThreads, kPrepareTiles>(prepare_sums());
  write_row_factors<kPrepareThreads, kPrepareRows>(row_q, row_k, args.scale,
                                                   shared_at<float>(PrepareShared::q_factor),
                                                   shared_at<float>(PrepareShared::k_factor));
  sync_block();
  if (map.active) {
    unsigned char* record = spans[chunk].rows > 0 ? record_of(args, first_chunk + chunk, head) : nullptr;
    if (record != nullptr) write_state_keys(map, record);
    write_operands(map, states ? nullptr : record);
  }
  sync_block();
  write_pairs<states>(args, first_chunk, spans, head);
  load_rows<Config::V, kPrepareChunks, kPrepareThreads, Config::Element>(shared_at<Operand>(PrepareShared::v),
                                                                         args.v, spans, head);
  commit_copies();
  sync_block();
  const TransposedT t_transposed{shared_at<Operand>(PrepareShared::t_high),
                                 shared_at<Operand>(PrepareShared::t_low)};
  solve_chunks<Config::prepare_warps, kPrepareChunks>(shared_at<float>(PrepareShared::matrix),
                                                      shared_at<float>(PrepareShared::beta), t_transposed);
  wait_copies<0>();
  sync_block();
  constexpr int blocks = kKeyBlocks + kValueBlocks,
                tasks = blocks + (Config::backward && !states ? kChunkPairs : 0);
#pragma unroll 1
  for (int task = warp_index(); task < kPrepareChunks * tasks; task += Config::prepare_warps) {
    const int c = task / tasks, block = task % tasks, first_row = c * Config::chunk;
    if (spans[c].rows == 0) break;
    unsigned char* record = record_of(args, first_chunk + c, head);
    const TransposedT t = t_transposed.chunk(first_row);
    if (block < kKeyBlocks)
      write_w(t, first_row, block, record);
    else if (block < blocks)
      write_u(t, first_row, block - kKeyBlocks, record);
    else if constexpr (Config::backward && !states)
      write_inverse(shared_at<float>(PrepareShared::matrix) + first_row * kSolveStride, block - blocks,
                    record);
  }
}

} // namespace kda
