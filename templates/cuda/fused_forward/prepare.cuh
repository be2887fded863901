#pragma once
// The warps of the fused forward that turn a chunk of 16 tokens into factors, each a whole chunk by itself.
//
// G is the running sum of the log2 decays over the chunk, tot its last row. Sums over tokens are products
// with matrices of zeros and ones, so they come out in the fragments of the rows that they scale. Their
// operands, the log decays times 64, are fp16: 2^-12 of a log decay is lost, the same in every factor.
//
// L and M are products of rows 2^(G_i - anchor) with columns 2^(anchor - G_j), anchored so that neither
// overflows: at the chunk's start when no decay is below -5 nats a token (then the rows are k~ and q~ at
// once), else at row 8 with log2 decays clamped to -15, which changes pairs by less than 2^-15 of |q||k|, and
// k~, q~, k^ come from exact sums.
//
// Budget a chunk at K = 128, bounded gate: 1,900 instructions, of which 108 mma.sync and 300 of the MUFU.
#include "fused_forward/ring.cuh"
#include "primitives/matrix.cuh"
#include "primitives/tma.cuh"

namespace kda {

/// Log2 decays below -150 are zero as factors, and as sums would cost digits: -150 * 64, twice in fp16.
constexpr u32 kLeastGates = 0xf0b0f0b0u;

/// Constants of a head's gate: log2 decay times 64 = scale * activation(slope * raw + bias); of a bounded
/// gate, 1 / (scale + scale * 2^(slope * raw + bias)), scale being the inverse.
struct GateScale {
  float slope, scale;
  KDA_DEVICE GateScale(const KernelArgs& args, int head) {
    const float a = gate_a(args, head);
    slope = gate_slope(a);
    scale = Config::gate == GateKind::log_e      ? 64.f * kLog2E
            : Config::gate == GateKind::log2     ? 64.f
            : Config::gate == GateKind::softplus ? -64.f * a
            : args.lower_bound == 0.f            ? -kFloatMax
                                                 : 1.f / (64.f * kLog2E * args.lower_bound);
  }
  KDA_DEVICE float value(float raw, float bias) const {
    if constexpr (kPrecomputed) return scale * raw;
    const float y = fma(raw, slope, bias);
    if constexpr (Config::gate == GateKind::softplus) {
      // log2(1 + e): of small e, 1 + e would lose digits; of large y, it is y. No branches: eight of them a
      // block made T=8192 of 96 heads take 751 us on an H100 instead of 625.
      const float e = exp2_fast(min(y, 127.f));
      const float small = e * fma(e, fma(e, kLog2E / 3.f, -kLog2E / 2.f), kLog2E);
      return scale * max(select_less(e, 0.03f, small, log2_fast(1.f + e)), y);
    }
    const float e = exp2_fast(y);
    return rcp_fast(fma(scale, e, scale));
  }
};

/// Log2 decays times 64 of 16 channels and all tokens: word 2n + h holds channel 8n + lane/4, tokens
/// 8h + 2(lane%4), + 1; the B operand of sums over tokens.
struct GateBlock {
  u32 words[4];
  /// `raw` transposed, as ldmatrix leaves it.
  template <bool kWide>
  KDA_DEVICE void set(const GateScale& gate, const u32 (&raw)[4], const float (&bias)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = gate.value(low_half<Config::Gate>(raw[i]), bias[i >> 1]);
      const float y = gate.value(high_half<Config::Gate>(raw[i]), bias[i >> 1]);
      words[i] = pack2<fp16>(x, y);
      if constexpr (kWide) words[i] = max_pairs(words[i], kLeastGates);
    }
  }
  /// Clamped to log2 decays of -15.
  KDA_DEVICE GateBlock clamped() const {
    GateBlock c;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      c.words[i] = max_pairs(words[i], 0xe380e380u);
    return c;
  }
};

/// As A operand of a sum over tokens: which tokens each row adds up.
struct TokenSum {
  u32 a[4];
  /// `weight(row, token)` is -1, 0 or 1. The words pass through shared memory, `scratch` of this warp: the
  /// compiler would build constants anew at every use.
  template <class Weight>
  KDA_DEVICE TokenSum(float* scratch, Weight weight) {
    u32* own = reinterpret_cast<u32*>(scratch) + lane_index();
    const int row = lane_index() >> 2, token = (lane_index() & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + (i & 1) * 8, t = token + (i >> 1) * 8;
      own[i * 32] = pack2<fp16>(weight(r, t) * 0.015625f, weight(r, t + 1) * 0.015625f);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = own[i * 32];
  }
  /// d: the sums of channels 8n..8n+7.
  KDA_DEVICE void sum(float (&d)[4], const GateBlock& gates, int n) const {
    d[0] = d[1] = d[2] = d[3] = 0.f;
    mma_16x8x16<fp16>(d, a, gates.words[2 * n], gates.words[2 * n + 1]);
  }
};

/// Sums of squares of rows lane/4 and lane/4 + 8 of a tile, from the diagonals of its product with itself.
struct RowSquares {
  float upper[4] = {}, lower[4] = {};
  KDA_DEVICE void add(const unsigned char* as_a, const unsigned char* as_b) {
    u32 a[4], b[4];
    load_matrix_x4(a, as_a);
    load_matrix_x4(b, as_b);
    mma_16x8x16<Config::Element>(upper, a, b[0], b[1]);
    mma_16x8x16<Config::Element>(lower, a, b[2], b[3]);
  }
  KDA_DEVICE void finish(float (&square)[2]) const {
    const int row = lane_index() >> 2, from = (lane_index() & ~3) | row >> 1;
    const bool odd = row & 1;
    const float u = odd ? upper[1] : upper[0], l = odd ? lower[3] : lower[2];
    square[0] = shuffle(u, from);
    square[1] = shuffle(l, from);
  }
};

/// One warp prepares chunks as they come. Without queries nothing of q and M is made.
template <bool kWide, bool kQueries>
struct ChunkMaker {
  // ldmatrix rows of this lane, bytes in a tile: 16x16 blocks as A, and as B (the 8x8 matrices in another
  // order). Block b of a half is at place ^ 32 b.
  int a_place;
  float* scratch;
  GateScale gate;
  TokenSum anchored, prefix; ///< anchored: wide only
  float scale;

  KDA_DEVICE ChunkMaker(const KernelArgs& args, int head, float* scratch)
      : a_place(tile_place(lane_index() & 15, lane_index() >> 4)), scratch(scratch), gate(args, head),
        anchored(scratch, [](int row, int t) { return static_cast<float>((t <= row) - (t <= 8)); }),
        prefix(scratch, [](int row, int t) { return t <= row ? 1.f : 0.f; }), scale(args.scale) {}

  /// Lower triangles over the chunk: columns 0..7 of L and M, and columns 8..15 of rows 8..15 (0, 1: L; 2, 3:
  /// M).
  struct Pairs {
    float l[4] = {}, m[4] = {}, last[4] = {};
  };

  KDA_DEVICE void make(const Place& place, int rows) const {
    unsigned char* slot = place.data();
    if (!kPrecomputed && rows < kChunk) close_gates(slot, rows);
    float k_scale[2], q_scale[2];
    norms(slot, k_scale, q_scale);
    Pairs pairs;
    GateBlock gates;
    load_gates(gates, slot, 0);
#pragma unroll 1
    for (int half = 0; half < 2; ++half)
#pragma unroll(!kWide ? 4 : Config::gate == GateKind::softplus ? 2 : 1) // as registers allow
      for (int b = 0; b < 4; ++b)
        block(place, half, b, k_scale, q_scale, gates, pairs);
    finish(place, pairs);
  }

  /// Raw gates of the tokens behind the sequence, zeros until now: what every activation maps to no decay.
  /// The keys there are zeros, too.
  KDA_DEVICE void close_gates(unsigned char* slot, int rows) const {
    constexpr u32 infinity = 0xff80ff80u; // -inf in bf16
    unsigned char* g = slot + Slot::g + (lane_index() >> 3 & 1) * Slot::tile_half + (lane_index() & 7) * 16;
    for (int r = rows + (lane_index() >> 4); r < kChunk; r += 2)
      *reinterpret_cast<Word4*>(g + r * 128) = Word4{{infinity, infinity, infinity, infinity}};
    sync_warp();
  }

  /// The factors that normalise k, and scale and normalise q, of this lane's two rows.
  KDA_DEVICE void norms(const unsigned char* slot, float (&k_scale)[2], float (&q_scale)[2]) const {
    if constexpr (!Config::qk_l2norm) {
      k_scale[0] = k_scale[1] = 1.f;
      q_scale[0] = q_scale[1] = scale;
      return;
    }
    const int b_place = tile_place((lane_index() & 7) + (lane_index() >> 4) * 8, lane_index() >> 3 & 1);
    RowSquares q, k;
#pragma unroll(kWide ? 1 : 2)
    for (int half = 0; half < 2; ++half) {
      const unsigned char* q_half = slot + Slot::q + half * Slot::rows_half;
      const unsigned char* k_half = slot + Slot::k + half * Slot::tile_half;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        if constexpr (kQueries) q.add(q_half + (a_place ^ b * 32), q_half + (b_place ^ b * 32));
        k.add(k_half + (a_place ^ b * 32), k_half + (b_place ^ b * 32));
      }
    }
    k.finish(k_scale);
    q.finish(q_scale);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      k_scale[h] = l2norm_factor(k_scale[h]);
      q_scale[h] = scale * l2norm_factor(q_scale[h]);
    }
  }

  KDA_DEVICE void load_gates(GateBlock& gates, const unsigned char* slot, int channel) const {
    u32 raw[4];
    load_matrix_x4_transposed(raw,
                              slot + Slot::g + channel / 64 * Slot::tile_half + (a_place ^ channel % 64 * 2));
    float bias[2] = {};
    if constexpr (!kPrecomputed)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        bias[n] = fused_at<float>(FusedShared::bias)[channel + 8 * n + (lane_index() >> 2)];
    gates.set<kWide>(gate, raw, bias);
  }

  /// 16 channels: their factors into the slot, their part of L and M.
  KDA_DEVICE void block(const Place& place, int half, int b, const float (&k_scale)[2],
                        const float (&q_scale)[2], GateBlock& gates, Pairs& pairs) const {
    unsigned char* slot = place.data();
    const int at = a_place ^ b * 32, channel = half * 64 + b * 16;
    unsigned char* to_q = slot + Slot::q + half * Slot::rows_half + at;
    unsigned char* to_k = slot + Slot::k + half * Slot::tile_half + at;
    u32 raw_k[4], raw_q[4];
    load_matrix_x4(raw_k, to_k);
    if constexpr (kQueries)
      load_matrix_x4(raw_q, to_q);
    else
      raw_q[0] = raw_q[1] = raw_q[2] = raw_q[3] = 0;
    const GateBlock own = gates;
    // The next block's gates run ahead, while the products of this one are under way.
    load_gates(gates, slot, (channel + 16) % Config::K);
    u32 decayed_k[4], decayed_q[4],
        state_k[4]; // word 2n + h: channels 8n + 2(lane%4), + 1 of row lane/4 + 8h
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float down[4], before[4], total[4] = {}; // exponents
      if constexpr (kWide) {
        anchored.sum(down, own.clamped(), n);
        prefix.sum(before, own, n);
      } else {
        prefix.sum(down, own, n);
      }
      const u32 ones[4] = {0x24002400u, 0x24002400u, 0x24002400u, 0x24002400u}; // 1/64
      mma_16x8x16<fp16>(total, ones, own.words[2 * n], own.words[2 * n + 1]);
      const float decay[2] = {exp2_fast(total[0]), exp2_fast(total[1])};
      if (lane_index() < 4) // the rows of total are alike
        *reinterpret_cast<Word2*>(place.decay() + channel + 8 * n + lane_index() * 2) =
            Word2{{float_bits(decay[0]), float_bits(decay[1])}};
      float row_k[4], row_q[4], column_k[4]; // element h + 2e
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int w = 2 * n + h;
        float kb[2], qb[2], ka[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float k = k_scale[h] * (e == 0 ? low_half<Config::Element>(raw_k[w])
                                               : high_half<Config::Element>(raw_k[w]));
          const float q = q_scale[h] * (e == 0 ? low_half<Config::Element>(raw_q[w])
                                               : high_half<Config::Element>(raw_q[w]));
          const int i = 2 * h + e;
          const float d = exp2_fast(down[i]), u = k * exp2_fast(-down[i]);
          row_k[h + 2 * e] = k * d;
          row_q[h + 2 * e] = q * d;
          column_k[h + 2 * e] = u;
          if constexpr (kWide) {
            const float d0 = exp2_fast(before[i]);
            kb[e] = k * d0;
            qb[e] = q * d0;
            ka[e] = k * exp2_fast(total[e] - before[i]);
          } else {
            kb[e] = k * d;
            qb[e] = q * d;
            ka[e] = u * decay[e];
          }
        }
        decayed_k[w] = pack2<StateOperand>(kb[0], kb[1]);
        decayed_q[w] = pack2<StateOperand>(qb[0], qb[1]);
        state_k[w] = pack2<StateOperand>(ka[0], ka[1]);
      }
      // The unit takes channel lane%4 from words 0, 1 and lane%4 + 4 from 2, 3; these are 2(lane%4) and the
      // next, on both sides alike. It cuts mantissas to 10 bits.
      mma_16x8x8_tf32(pairs.l, row_k, column_k[0], column_k[2]);
      if constexpr (kQueries) mma_16x8x8_tf32(pairs.m, row_q, column_k[0], column_k[2]);
      const float last[4] = {row_k[1], row_q[1], row_k[3], row_q[3]};
      mma_16x8x8_tf32(pairs.last, last, column_k[1], column_k[3]);
    }
    store_matrix_x4(slot + Slot::rows + half * Slot::rows_half + at, decayed_k);
    if constexpr (kQueries) store_matrix_x4(to_q, decayed_q);
    store_matrix_x4(to_k, state_k);
  }

  /// T = (I + diag(beta) L)^-1 diag(beta) by substitution in fp32, and M, into the slot.
  KDA_DEVICE void finish(const Place& place, const Pairs& pairs) const {
    constexpr int stride = FusedShared::solve_stride;
    const int lane = lane_index(), row = lane >> 2, column = (lane & 3) * 2;
    // stmatrix row of a 16x16 operand whose 8x8 matrices are dense: 256 bytes to the next rows, 128 to the
    // next columns.
    unsigned char* matrix = place.data() + (lane & 7) * 16 + (lane >> 3 & 1) * 256 + (lane >> 4) * 128;
    sync_warp(); // every lane has read its gates, where M and T go
    const u32 m[4] = {
        pack2<StateOperand>(column <= row ? pairs.m[0] : 0.f, column + 1 <= row ? pairs.m[1] : 0.f),
        pack2<StateOperand>(pairs.m[2], pairs.m[3]), 0u,
        pack2<StateOperand>(column <= row ? pairs.last[2] : 0.f, column + 1 <= row ? pairs.last[3] : 0.f)};
    if constexpr (kQueries) store_matrix_x4(matrix + Slot::m, m);
    const float beta = place.beta()[lane & 15];
    const float b0 = -shuffle(beta, row), b1 = -shuffle(beta, row + 8);
    float* own = scratch + column * stride + row; // transposed: [column][row]
    own[0] = b0 * pairs.l[0];
    own[stride] = b0 * pairs.l[1];
    own[8] = b1 * pairs.l[2];
    own[stride + 8] = b1 * pairs.l[3];
    own[8 * stride + 8] = b1 * pairs.last[0];
    own[9 * stride + 8] = b1 * pairs.last[1];
    sync_warp();
    // Lane c has column c of the inverse; both halves of the warp do the same. After x[j] is final, its
    // multiples leave the rows below.
    float x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = one_if_equal(static_cast<float>(lane & 15), static_cast<float>(i));
#pragma unroll
    for (int j = 0; j < kChunk - 1; ++j)
#pragma unroll
      for (int i = (j + 1) / 4 * 4; i < kChunk; i += 4) {
        const Word4 l = *reinterpret_cast<const Word4*>(scratch + j * stride + i);
#pragma unroll
        for (int n = 0; n < 4; ++n)
          if (i + n > j) x[i + n] = fma(bits_float(l.w[n]), x[j], x[i + n]);
      }
    sync_warp();
    if (lane < kChunk)
#pragma unroll
      for (int i = 0; i < kChunk; i += 4)
        *reinterpret_cast<Word4*>(scratch + lane * stride + i) =
            Word4{{float_bits(x[i] * beta), float_bits(x[i + 1] * beta), float_bits(x[i + 2] * beta),
                   float_bits(x[i + 3] * beta)}};
    sync_warp();
    const u32 t[4] = {pack2<StateOperand>(own[0], own[stride]), pack2<StateOperand>(own[8], own[stride + 8]),
                      0u, pack2<StateOperand>(own[8 * stride + 8], own[9 * stride + 8])};
    store_matrix_x4(matrix + Slot::t, t);
  }
};

template <bool kWide, bool kQueries>
KDA_DEVICE void prepare_some(const KernelArgs& args) {
  const FusedSpan& span = current_walk().span; // read again and again: registers are short
  const int warp = warp_index() - kStateWarps;
  float* scratch = fused_at<float>(FusedShared::solve) + warp * (FusedShared::solve_bytes / 4);
  const ChunkMaker<kWide, kQueries> maker(args, current_walk().head, scratch);
  int attempt = 0;
  do {
    const auto claim = [&] {
      const u32 next =
          lane_index() == 0 ? atomic_add(fused_at<u32>(FusedShared::next_chunk) + attempt, 1u) : 0;
      return static_cast<int>(shuffle(next, 0));
    };
#pragma unroll 1
    for (int chunk = claim(); chunk < span.chunks; chunk = claim()) {
      const Place place = Place::of(attempt * span.chunks + chunk);
      mbarrier_wait(place.free(), place.parity ^ 1);
      mbarrier_wait(place.full(), place.parity);
      sync_warp();
      maker.make(place, span.rows(chunk));
      fence_proxy_async();
      sync_warp();
      if (lane_index() == 0) mbarrier_arrive(place.ready());
    }
  } while (another_attempt(attempt));
}

template <Pass pass>
KDA_DEVICE void prepare_chunks(const KernelArgs& args) {
  constexpr bool queries = pass != Pass::summary;
  constexpr bool bounded = Config::gate == GateKind::bounded || Config::gate == GateKind::bounded_no_a;
  if constexpr (bounded)
    if (args.lower_bound >= -5.f) return prepare_some<false, queries>(args);
  prepare_some<true, queries>(args);
}

} // namespace kda
