// Chunked forward in two kernels: everything that does not depend on the state for all chunks at once, then
// the state from chunk to chunk. mma.sync on bf16 operands with fp32 sums: sm_80 and later.
//
// Launches: kda_schedule (packed only), kda_forward_prepare, kda_forward_scan.
#include "chunk/prepare.cuh"
#include "chunk_forward/scan.cuh"

#if KDA_COMPILES(kda_schedule)
KDA_KERNEL(256, 1) kda_schedule(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  if constexpr (Config::varlen)
    write_chunk_offsets<256>(args, static_cast<int*>(args.workspace[0]),
                             reinterpret_cast<int*>(shared_memory()));
}
#endif

#if KDA_COMPILES(kda_forward_prepare)
KDA_KERNEL(kda::kPrepareThreads, kda::prepare_ctas())
kda_forward_prepare(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::prepare_chunks<false>(
      args, [&](kda::i64 chunk) { return kda::find_chunk(args, kda::chunk_offsets(args), chunk); });
}
#endif

#if KDA_COMPILES(kda_forward_scan)
KDA_KERNEL(kda::kScanThreads, 1) kda_forward_scan(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::scan_chunks(args);
}
#endif
