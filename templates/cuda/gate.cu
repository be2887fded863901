// The gate alone: g -> natural-log decay in fp32, and back.
#include "stages/gate_tile.cuh"

#if KDA_COMPILES(kda_gate_forward)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_gate_forward(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const Tile tile = find_tile(args);
  const HeadGate head = load_head_gate(args, tile);
  for (i64 t = tile.begin + warp_index() * Spread::rows + tile.part; t < tile.end;
       t += kWarps * Spread::rows) {
    float x[kChannels] = {};
    if (t < tile.packed_end) {
      load_row<Config::K>(row_of<const Gate>(args.g, tile.batch, t, tile.value_head), tile.lane, x);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        x[c] = gate_natural(x[c], head.bias[c], head.a, args.lower_bound);
    }
    store_row(row_of<float>(args.o, tile.batch, t, tile.value_head), tile.lane, x);
  }
}
#endif

#if KDA_COMPILES(kda_gate_backward)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_gate_backward(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::gate_backward_tile(args, args.d_o);
}
#endif

/// One CTA a value head.
#if KDA_COMPILES(kda_gate_reduce)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_gate_reduce(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::gate_reduce_head(args);
}
#endif
