// Chunked backward: factors of all chunks, the state and its gradient from chunk to chunk, then the gradients
// of all chunks. mma.sync on bf16 operands with fp32 sums: sm_80 and later.
//
// Launches: kda_schedule (packed only), kda_prepare, kda_backward_scan, kda_backward_gradients,
// kda_backward_group (grouped value heads), kda_backward_reduce (gates with parameters). In slabs (slab.cuh):
// where the forward saved nothing, first kda_backward_factors and kda_backward_states of every slab but the
// last; then the four from prepare to group for every slab, from the last to the first.
#include "chunk/prepare.cuh"
#include "chunk_backward/finish.cuh"
#include "chunk_backward/gradients.cuh"
#include "chunk_backward/scan.cuh"
#include "chunk_backward/slab.cuh"

#if KDA_COMPILES(kda_schedule)
KDA_KERNEL(256, 1) kda_schedule(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  if constexpr (Config::varlen) {
    int* const offsets = static_cast<int*>(args.workspace[0]);
    write_chunk_offsets<256>(args, offsets, reinterpret_cast<int*>(shared_memory()));
    if constexpr (Config::slabs) {
      sync_block();
      write_slab_starts(args, offsets);
    }
  }
}
#endif

#if KDA_COMPILES(kda_prepare)
KDA_KERNEL(kda::kPrepareThreads, kda::prepare_ctas()) kda_prepare(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::prepare_chunks<false>(args, [&](kda::i64 chunk) { return kda::find_slab_chunk(args, chunk); });
}
#endif

#if KDA_COMPILES(kda_backward_scan)
KDA_KERNEL(kda::kScanThreads, 1) kda_backward_scan(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::scan_chunks(args);
}
#endif

#if KDA_COMPILES(kda_backward_factors)
KDA_KERNEL(kda::kPrepareThreads, kda::prepare_ctas())
kda_backward_factors(KDA_GRID_CONSTANT kda::KernelArgs args) {
  if constexpr (kda::Config::slabs)
    kda::prepare_chunks<true>(
        args, [&](kda::i64 chunk) { return kda::find_crossing_chunk<kda::kPrepareChunks>(args, chunk); });
}
#endif

#if KDA_COMPILES(kda_backward_states)
KDA_KERNEL(kda::kScanThreads, 1) kda_backward_states(KDA_GRID_CONSTANT kda::KernelArgs args) {
  if constexpr (kda::Config::slabs) kda::scan_states(args);
}
#endif

#if KDA_COMPILES(kda_backward_gradients)
KDA_KERNEL(kda::kGradientThreads, kda::gradient_ctas())
kda_backward_gradients(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::compute_gradients(args);
}
#endif

/// One CTA a value head.
#if KDA_COMPILES(kda_backward_reduce)
KDA_KERNEL(kda::kReduceThreads, 1) kda_backward_reduce(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::reduce_parameters(args);
}
#endif

#if KDA_COMPILES(kda_backward_group)
KDA_KERNEL(kda::kGroupThreads, 1) kda_backward_group(KDA_GRID_CONSTANT kda::KernelArgs args) {
  if constexpr (kda::Config::group > 1) kda::sum_group(args);
}
#endif
