#pragma once
// Rows of K or V elements in groups of four: every dimension is a multiple of 4, so a row is a whole number
// of groups, and a group is one aligned access (16 bytes in fp32, 8 in 16-bit types).
#include "config.cuh"
#include "kernel_args.cuh"

namespace kda {

template <class T>
struct RawGroup {
  using Type = Word2;
};
template <>
struct RawGroup<float> {
  using Type = Word4;
};
/// Four elements as they lie in memory. A prefetch keeps them so: converting would wait for the load.
template <class T>
using Raw4 = typename RawGroup<T>::Type;

/// Four elements at `p`, or zeros when `valid` is false (nothing is read then).
template <class T>
KDA_DEVICE Raw4<T> load_raw(const T* p, bool valid) {
  Raw4<T> raw = {};
  if (valid) raw = *reinterpret_cast<const Raw4<T>*>(p);
  return raw;
}
template <class T>
KDA_DEVICE void widen(Word2 raw, float* x) {
  x[0] = low_half<T>(raw.w[0]);
  x[1] = high_half<T>(raw.w[0]);
  x[2] = low_half<T>(raw.w[1]);
  x[3] = high_half<T>(raw.w[1]);
}
template <class T>
KDA_DEVICE void widen(Word4 raw, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    x[i] = bits_float(raw.w[i]);
}
template <class T>
KDA_DEVICE Raw4<T> pack4(const float* x) {
  return Word2{{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])}};
}
template <>
KDA_DEVICE Raw4<float> pack4<float>(const float* x) {
  return Word4{{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}};
}
template <class T>
KDA_DEVICE void store4(T* p, const float* x) {
  *reinterpret_cast<Raw4<T>*>(p) = pack4<T>(x);
}

/// How a warp spreads rows of `dim` elements over its lanes: `lanes` lanes share a row, each with `groups`
/// groups of four; the warp works on `rows` rows at a time. Lanes past the end of a row hold zeros.
/// `lanes_wanted` 0: as many as have something to hold.
template <int dim, int lanes_wanted = 0>
struct RowSpread {
  static constexpr int row_groups = dim / 4;
  static constexpr int lanes = lanes_wanted != 0 ? lanes_wanted
                               : row_groups > 16 ? 32
                               : row_groups > 8  ? 16
                               : row_groups > 4  ? 8
                                                 : 4;
  static constexpr int groups = (row_groups + lanes - 1) / lanes;
  static constexpr int elements = 4 * groups; ///< of one lane
  static constexpr int rows = 32 / lanes;
  static constexpr bool exact = row_groups == lanes * groups;

  /// First channel of group `j` of the lane that is number `lane` of its row.
  KDA_DEVICE static int channel(int lane, int j) { return 4 * (lane + j * lanes); }
  KDA_DEVICE static bool valid(int lane, int j) { return exact || lane + j * lanes < row_groups; }
};

/// This lane's part of a contiguous row of `dim` elements.
template <int dim, int lanes = 0, class T>
KDA_DEVICE void load_row(const T* row, int lane, float (&x)[RowSpread<dim, lanes>::elements]) {
  using Spread = RowSpread<dim, lanes>;
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j)
    widen<T>(load_raw(row + Spread::channel(lane, j), Spread::valid(lane, j)), x + 4 * j);
}

/// Element (batch, token, head, 0) of a strided tensor.
template <class T>
KDA_DEVICE T* row_of(const TokenTensor& x, i64 batch, i64 token, i64 head) {
  return static_cast<T*>(x.data) + batch * x.stride_batch + token * x.stride_token + head * x.stride_head;
}

} // namespace kda
