// Chunked forward in one kernel (sm_90a): a CTA walks the chunks of one sequence and value head. Warps of
// three kinds hand chunks of 16 tokens to each other through a ring in shared memory, so that nothing but
// inputs and outputs touches global memory.
//
// Launch: kda_forward_fused.
#include "fused_forward/load.cuh"
#include "fused_forward/prepare.cuh"
#include "fused_forward/state.cuh"

namespace kda {

KDA_DEVICE void fused_forward(const KernelArgs& args) {
  const int head = block_index_x() % args.value_heads, sequence = block_index_x() / args.value_heads;
  if (Config::varlen && sequence == args.sequences) return zero_padding(args, head);
  const FusedSpan span = find_span(args, sequence);
  begin_fused(args, head);
  const int warp = warp_index();
  if (warp < kStateWarps) {
    take_registers<kStateRegisters>();
    carry_state(args, span, sequence, head);
  } else {
    release_registers<kOtherRegisters>();
    if (warp == kStateWarps + kPrepareWarps)
      load_chunks(args, span, head);
    else
      prepare_chunks(args, span, head);
  }
}

} // namespace kda

KDA_KERNEL(kda::kFusedThreads, 1) kda_forward_fused(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::fused_forward(args);
}
