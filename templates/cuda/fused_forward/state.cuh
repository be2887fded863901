#pragma once
// The warps of the fused forward that carry the state: each warpgroup holds S^T [64 of V][K] in fp32
// accumulators, whose rounded copy is the register operand of wgmma. A chunk is a chain of three dependent
// products:
//   R = v - S k~, P = -S q~       [64][16 + 16 tokens], depth K
//   U = T R                       depth 16
//   S = 2^tot S + U k^, o = M U - P
// all transposed, tokens as columns. q~ = scale q 2^G, k~ = k 2^G, k^ = k 2^(tot - G).
//
// Budget a warp and chunk: 64 conversions and multiplications of the state each, 10 wgmma of a depth of 16,
// 32 KB of operands read by the tensor unit; o waits in registers until the next chunk's first product runs.
#include "fused_forward/ring.cuh"
#include "primitives/matrix.cuh"
#include "primitives/tma.cuh"
#include "primitives/wgmma.cuh"
#include "stages/number_table.cuh"
#include "stages/state_place.cuh"

namespace kda {

constexpr int kStateFloats =
    Config::K / 2; ///< of a thread: element e + 2i + 4j is channel 8j + 2t + e, row g + 8i

/// The walking warp's 16 columns of o of one chunk, o^T as packed accumulators.
struct OutputTile {
  u32 words[4];
  Config::Element* to; ///< this lane's 8 columns of a token
  KDA_DEVICE void store(bool valid) const {
    const int lane = lane_index();
    unsigned char* tile = shared_memory() + FusedShared::output + warp_index() * 512;
    const int token = (lane & 7) + (lane >> 4) * 8;
    store_matrix_x4_transposed(tile + token * 32 + (lane >> 3 & 1) * 16, words);
    sync_warp();
    const Word4 row = *reinterpret_cast<const Word4*>(tile + lane * 16);
    if (valid) *reinterpret_cast<Word4*>(to) = row;
  }
};

/// The scale of each column of V that this thread has, as a power of two: row g + 8h.
struct ColumnScales {
  float in[2] = {1.f, 1.f};
  KDA_DEVICE float out(int h) const { return bits_float(0x7f000000u - float_bits(in[h])); }
  KDA_DEVICE void reduce(int h) { in[h] *= in[h] == 1.f ? kFirstScale : kScaleStep; }
};

/// A state in memory: of the caller, or S^T of a segment in the workspace.
template <bool segment, class Access>
KDA_DEVICE void visit_state(Access access) {
  const int column = warp_index() * 16, v = column + (lane_index() >> 2), k = (lane_index() & 3) * 2;
#pragma unroll
  for (int i = 0; i < kStateFloats; i += 2) {
    int offset;
    state_place(column, i / 4, i % 4, offset);
    if constexpr (segment) offset = (v + i / 2 % 2 * 8) * Config::K + i / 4 * 8 + k;
    access(i, offset);
  }
}

KDA_DEVICE void store_state(const StateTensor& x, i64 place, int head, const ColumnScales& scales,
                            const float (&s)[kStateFloats]) {
  auto* to = static_cast<Config::State*>(x.data) + place * x.stride_sequence + head * x.stride_head;
  visit_state<false>([&](int i, int offset) {
    const float scale = scales.out(i / 2 % 2);
    to[offset] = from_float<Config::State>(s[i] * scale);
    to[offset + kStateStep] = from_float<Config::State>(s[i + 1] * scale);
  });
}

/// Through the chunks, from the state in s to the state in s. `place`: the first chunk's. Without outputs
/// nothing of q and M is read.
template <bool kScaled, bool kOutputs>
KDA_DEVICE void walk_chunks(const KernelArgs& args, int chunks, Place place, const ColumnScales& scales,
                            float (&s)[kStateFloats]) {
  const Walk& walk = current_walk();
  const FusedSpan& span = walk.span;
  const int lane = lane_index(), warp = warp_index();
  // This lane's row of ldmatrix: v^T of its warp, 16 columns of V.
  const int token = (lane & 7) + (lane >> 4) * 8;
  const int v_place = warp / 4 * Slot::tile_half + tile_place(token, warp % 4 * 2 + (lane >> 3 & 1));
  OutputTile out{{},
                 row_of<Config::Element>(args.o, span.batch, span.begin + (lane >> 1), walk.head) +
                     warp * 16 + (lane & 1) * 8};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk, place.advance()) {
    mbarrier_wait(place.ready(), place.parity);
    sync_warp();
    const unsigned char* slot = place.data();
    const u32 operands = matrix_place(slot);
    constexpr int columns = kOutputs ? 32 : 16;
    float r[columns / 2]; // columns 0..7, 8..15 of R, then of P
    u32 x[4];
    load_matrix_x4_transposed(x, slot + Slot::v + v_place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = kScaled ? scales.in[i & 1] : 1.f;
      r[2 * i] = low_half<Config::Element>(x[i]) * scale;
      r[2 * i + 1] = high_half<Config::Element>(x[i]) * scale;
      if constexpr (kOutputs) r[8 + 2 * i] = r[9 + 2 * i] = 0.f;
    }
    u32 a[Config::K / 16][4];
#pragma unroll
    for (int i = 0; i < kStateFloats / 2; ++i)
      a[i / 4][i % 4] = pack2<StateOperand>(s[2 * i], s[2 * i + 1]);
    const auto* decay = reinterpret_cast<const Word2*>(place.decay()) + (lane & 3);
#pragma unroll
    for (int j = 0; j < Config::K / 8; ++j) {
      const Word2 d = decay[j * 4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[4 * j + e] *= bits_float(d.w[e & 1]);
    }
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < Config::K / 16; ++b)
      wgmma<StateOperand, columns, false, true>(
          r, a[b],
          matrix_descriptor(operands, Slot::rows + b / 4 * Slot::rows_half + b % 4 * 32, Swizzle::b128,
                            1024));
    wgmma_commit();
    if (kOutputs && !kScaled && chunk > 0) {
      out.store(true);
      out.to += kChunk * args.o.stride_token;
    }
    wgmma_wait<0>();

    u32 u[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      u[i] = pack2<StateOperand>(r[2 * i], r[2 * i + 1]);
    float y[8];
    wgmma_fence();
    wgmma<StateOperand, 16>(y, u, matrix_descriptor(operands, Slot::t, Swizzle::none, 256, 128), false);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      u[i] = pack2<StateOperand>(y[2 * i], y[2 * i + 1]);
    [[maybe_unused]] float o[8];
    wgmma_fence();
    wgmma<StateOperand, Config::K, true>(
        s, u, matrix_descriptor(operands, Slot::k, Swizzle::b128, 1024, Slot::tile_half));
    if constexpr (kOutputs)
      wgmma<StateOperand, 16>(o, u, matrix_descriptor(operands, Slot::m, Swizzle::none, 256, 128), false);
    wgmma_commit();
    wgmma_wait<0>();
    sync_warp();
    if (lane == 0) mbarrier_arrive(place.free());
    if constexpr (kOutputs && Config::interior_states)
      if (span.rows(chunk) == kChunk) {
        const i64 slot =
            interior_slot(args, walk.sequence, static_cast<i64>(walk.first + chunk + 1) * kChunk);
        if (slot != kNowhere) store_state(args.interior_states, slot, walk.head, scales, s);
      }
    if constexpr (kOutputs)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = kScaled ? scales.out(i & 1) : 1.f;
        out.words[i] =
            pack2<Config::Element>((o[2 * i] - r[8 + 2 * i]) * scale, (o[2 * i + 1] - r[9 + 2 * i]) * scale);
      }
    if constexpr (kOutputs && kScaled) { // at once: fewer registers
      out.store((lane >> 1) < span.rows(chunk));
      out.to += kChunk * args.o.stride_token;
    }
  }
  if (kOutputs && !kScaled && chunks > 0) out.store((lane >> 1) < span.rows(chunks - 1));
}

/// Whether the state that was walked to is the start that the next segment took: for each channel and these
/// 16 columns, the sum of differences against the sum of magnitudes. fp16 operands are rounded by as much.
KDA_DEVICE bool agrees(const float (&s)[kStateFloats], const ColumnScales& scales, const float* taken) {
  constexpr float kAgreement = 1.f / 1024;
  bool all = true;
  visit_state<true>([&](int i, int offset) {
    if (i % 4 != 0) return; // both columns of a thread at once
    const Word2 x = *reinterpret_cast<const Word2*>(taken + offset);
    const Word2 y = *reinterpret_cast<const Word2*>(taken + offset + 8 * Config::K);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float a = s[i + e] * scales.out(0), b = s[i + 2 + e] * scales.out(1);
      const float da = a - bits_float(x.w[e]), db = b - bits_float(y.w[e]);
      float difference = max(da, -da) + max(db, -db), size = max(a, -a) + max(b, -b);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        difference += shuffle_xor(difference, mask);
        size += shuffle_xor(size, mask);
      }
      all = all && difference <= kAgreement * size;
    }
  });
  return vote_all(all);
}

template <Pass pass>
KDA_DEVICE void carry_state(const KernelArgs& args) {
  const Walk& walk = current_walk();
  const int chunks = walk.span.chunks;
  float s[kStateFloats];
  ColumnScales scales;
  const auto load = [&] {
    if constexpr (pass == Pass::whole) {
      const auto* from = static_cast<const Config::State*>(args.initial_state.data);
      if (has_initial_state(args, walk.sequence))
        from +=
            walk.sequence * args.initial_state.stride_sequence + walk.head * args.initial_state.stride_head;
      else
        from = nullptr;
      visit_state<false>([&](int i, int offset) {
        const float scale = scales.in[i / 2 % 2];
        s[i] = from != nullptr ? to_float(from[offset]) * scale : 0.f;
        s[i + 1] = from != nullptr ? to_float(from[offset + kStateStep]) * scale : 0.f;
      });
    } else {
      visit_state<true>([&](int i, int offset) {
        const float scale = scales.in[i / 2 % 2];
        if (pass != Pass::summary || walk.from != nullptr) {
          s[i] = walk.from[offset] * scale;
          s[i + 1] = walk.from[offset + 1] * scale;
        } else {
          const int diagonal = walk.values ? 1 : offset % (Config::K + 1);
          s[i] = diagonal == 0 ? scale : 0.f;
          s[i + 1] = diagonal == Config::K ? scale : 0.f;
        }
      });
    }
  };
  load();
  walk_chunks<false, pass != Pass::summary>(args, chunks, Place{}, scales, s);
  int attempt = 0;
  // An overflow reaches every channel of its column: one tells.
  const auto overflow = [&] {
    bool any = false;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (!(max(s[2 * h], -s[2 * h]) <= kFloatMax)) {
        scales.reduce(h);
        any = true;
      }
    return any;
  };
#pragma unroll 1
  while (another_attempt(attempt, overflow())) {
    load();
    walk_chunks<true, pass != Pass::summary>(args, chunks, Place::of(attempt * chunks), scales, s);
  }

  if constexpr (pass == Pass::summary) {
    visit_state<true>([&](int i, int offset) {
      const float scale = scales.out(i / 2 % 2);
      *reinterpret_cast<Word2*>(walk.to + offset) =
          Word2{{float_bits(s[i] * scale), float_bits(s[i + 1] * scale)}};
    });
    return;
  }
  if (pass == Pass::walk && walk.marks != nullptr && walk.marks[0] != 0 && !agrees(s, scales, walk.to))
    if (lane_index() == 0) atomic_max(reinterpret_cast<int*>(walk.marks) + 1, 1);
  // Only now: it may lie where the initial state does.
  if (!walk.last || args.final_state.data == nullptr) return;
  store_state(args.final_state, walk.sequence, walk.head, scales, s);
}

} // namespace kda
