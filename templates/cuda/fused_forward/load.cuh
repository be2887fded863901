#pragma once
// The warp of the fused forward that fills slots: 32 copies of 16 bytes a lane and chunk, in flight for as
// many chunks as the ring has free slots. Plain copies and not the TMA unit: they take any strides, zero the
// rows behind a sequence, and write the swizzle.
#include "fused_forward/ring.cuh"
#include "primitives/async.cuh"

namespace kda {

/// Rows of one tensor as this lane copies them: 16 lanes a row.
template <class T>
struct TileCopy {
  const T* from;
  i64 stride;
  KDA_DEVICE TileCopy(const TokenTensor& x, const FusedSpan& span, int head)
      : from(row_of<T>(x, span.batch, span.begin + (lane_index() >> 4), head) + (lane_index() & 15) * 8),
        stride(x.stride_token) {}
  /// The next chunk.
  template <int half_bytes>
  KDA_DEVICE void start(unsigned char* tile, int rows) {
    const int row = lane_index() >> 4, piece = lane_index() & 15;
    tile += (piece >> 3) * half_bytes;
#pragma unroll
    for (int r = 0; r < kChunk; r += 2)
      copy_async_16(tile + tile_place(r + row, piece & 7), from + r * stride, r + row < rows);
    from += kChunk * stride;
  }
};

template <Pass pass>
KDA_DEVICE void load_attempt(const KernelArgs& args, int attempt) {
  const Walk& walk = current_walk();
  const FusedSpan span = walk.span;
  const int lane = lane_index(), chunks = span.chunks, head = walk.head, key_head = head / Config::group;
  TileCopy<Config::Element> q(args.q, span, key_head), k(args.k, span, key_head), v(args.v, span, head);
  TileCopy<Config::Gate> g(args.g, span, head);
  const Config::Beta* beta = row_of<Config::Beta>(args.beta, span.batch, span.begin + lane, head);
  const auto load_beta = [&](int chunk) {
    const bool valid = chunk < chunks && lane < span.rows(chunk);
    const float raw = valid ? to_float(*beta) : 0.f;
    beta += kChunk * args.beta.stride_token;
    return valid ? beta_value(raw) : 0.f;
  };
  float next = load_beta(0);
  Place place = Place::of(attempt * chunks);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk, place.advance()) {
    const float own = next;
    next = load_beta(chunk + 1);
    mbarrier_wait(place.free(), place.parity ^ 1);
    const int rows = span.rows(chunk);
    unsigned char* slot = place.data();
    g.start<Slot::tile_half>(slot + Slot::g, rows);
    k.start<Slot::tile_half>(slot + Slot::k, rows);
    if constexpr (pass != Pass::summary) q.start<Slot::rows_half>(slot + Slot::q, rows);
    v.start<Slot::tile_half>(slot + Slot::v, walk.values ? rows : 0);
    arrive_copies(place.full());
    if (lane < kChunk) place.beta()[lane] = own;
    sync_warp();
    if (lane == 0) mbarrier_arrive(place.full());
  }
}

template <Pass pass>
KDA_DEVICE void load_chunks(const KernelArgs& args) {
  int attempt = 0;
  do
    load_attempt<pass>(args, attempt);
  while (another_attempt(attempt));
}

} // namespace kda
