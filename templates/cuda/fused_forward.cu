// Chunked forward in one kernel (sm_90a): a CTA walks the chunks of one sequence and value head, or of one of
// their segments. Warps of three kinds hand chunks of 16 tokens to each other through a ring in shared
// memory, so that nothing but inputs and outputs touches global memory.
//
// Launches: kda_forward_fused; in segments kda_forward_summary, kda_forward_merge (more than two),
// kda_forward_fused, kda_forward_repair.
#include "fused_forward/load.cuh"
#include "fused_forward/prepare.cuh"
#include "fused_forward/state.cuh"

namespace kda {

template <Pass pass>
KDA_DEVICE void walk_fused(const KernelArgs& args, const Walk& walk) {
  begin_fused(args, walk);
  const int warp = warp_index();
  if (warp < kStateWarps) {
    take_registers<kStateRegisters>();
    carry_state<pass>(args);
  } else {
    release_registers<kOtherRegisters>();
    if (warp == kStateWarps + kPrepareWarps)
      load_chunks<pass>(args);
    else
      prepare_chunks<pass>(args);
  }
}

/// The copy of the initial state that the passes behind read: the final state may lie in its place.
KDA_DEVICE void keep_initial_state(const KernelArgs& args, int sequence, int head, float* start) {
  const Config::State* from = nullptr;
  if (has_initial_state(args, sequence))
    from = static_cast<const Config::State*>(args.initial_state.data) +
           sequence * args.initial_state.stride_sequence + head * args.initial_state.stride_head;
  for (int i = thread_index(); i < Config::K * Config::V; i += kFusedThreads) {
    const int k = Config::state_v_k ? i % Config::K : i / Config::V,
              v = Config::state_v_k ? i / Config::K : i % Config::V;
    start[v * Config::K + k] = from != nullptr ? to_float(from[i]) : 0.f;
  }
}

/// CTAs: B of every segment but the last, then A of those but the first.
template <int = kSegments>
KDA_DEVICE void summarise(const KernelArgs& args) {
  const int units = args.sequences * args.value_heads, part = block_index_x() / units,
            unit = block_index_x() % units;
  const int head = unit % args.value_heads, sequence = unit / args.value_heads;
  const bool transition = part >= kSegments - 1;
  const int segment = transition ? part - (kSegments - 1) + 1 : part;
  const FusedSpan span = find_span(args, sequence);
  const Segments segments(span.chunks);
  if (segment == 0) keep_initial_state(args, sequence, head, segment_start(args, unit, 0));
  if (segment + 1 >= segments.used()) return;
  constexpr int window = kWindow / kChunk;
  const int end = segments.first(segment + 1);
  const bool forgetful = forgets<kFusedThreads>(args, span.batch, span.begin + static_cast<i64>(end) * kChunk,
                                                head, shared_memory());
  if (transition && forgetful) return;
  sync_block();
  if (!transition && thread_index() == 0) {
    u32* marks = boundary_marks(args, unit, segment);
    marks[0] = forgetful;
    marks[1] = 0;
  }
  const int first = forgetful ? end - window : segments.first(segment);
  const Walk walk{sequence,
                  head,
                  span.part(first, end - first),
                  first,
                  !transition,
                  false,
                  first == 0 ? segment_start(args, unit, 0) : nullptr,
                  transition ? segment_transition(args, unit, segment)
                             : segment_start(args, unit, segment + 1),
                  nullptr};
  walk_fused<Pass::summary>(args, walk);
}

/// From the start of a segment to its end, or to that of the sequence.
template <Pass pass>
KDA_DEVICE void walk_segment(const KernelArgs& args, const FusedSpan& span, const Segments& segments,
                             int unit, int segment) {
  const bool last = pass == Pass::repair || segment + 1 == segments.used();
  const int first = segments.first(segment);
  const Walk walk{unit / args.value_heads,
                  unit % args.value_heads,
                  span.part(first, last ? segments.chunks - first : segments.length),
                  first,
                  true,
                  last,
                  segment_start(args, unit, segment),
                  last ? nullptr : segment_start(args, unit, segment + 1),
                  last ? nullptr : boundary_marks(args, unit, segment)};
  walk_fused<pass>(args, walk);
}

KDA_DEVICE void fused_forward(const KernelArgs& args) {
  if constexpr (kSegments == 1) {
    const int head = block_index_x() % args.value_heads, sequence = block_index_x() / args.value_heads;
    if (Config::varlen && sequence == args.sequences) return zero_padding(args, head);
    const Walk walk{sequence, head, find_span(args, sequence), 0, true, true, nullptr, nullptr, nullptr};
    walk_fused<Pass::whole>(args, walk);
  } else {
    const int units = args.sequences * args.value_heads;
    if (Config::varlen && block_index_x() >= units * kSegments)
      return zero_padding(args, block_index_x() - units * kSegments);
    const int unit = block_index_x() % units, segment = block_index_x() / units;
    const FusedSpan span = find_span(args, unit / args.value_heads);
    const Segments segments(span.chunks);
    if (segment < segments.used()) walk_segment<Pass::walk>(args, span, segments, unit, segment);
  }
}

template <int = kSegments>
KDA_DEVICE void repair(const KernelArgs& args) {
  const int unit = block_index_x();
  const FusedSpan span = find_span(args, unit / args.value_heads);
  const Segments segments(span.chunks);
  const int segment = first_missed(args, unit, segments);
  if (segment >= 0) walk_segment<Pass::repair>(args, span, segments, unit, segment);
}

} // namespace kda

#if KDA_COMPILES(kda_forward_fused)
KDA_KERNEL(kda::kFusedThreads, 1) kda_forward_fused(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::fused_forward(args);
}
#endif

#if KDA_COMPILES(kda_forward_summary)
KDA_KERNEL(kda::kFusedThreads, 1) kda_forward_summary(KDA_GRID_CONSTANT kda::KernelArgs args) {
  if constexpr (kda::kSegments > 1) kda::summarise(args);
}
#endif

#if KDA_COMPILES(kda_forward_merge)
KDA_KERNEL(kda::kMergeThreads, 1) kda_forward_merge(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  if constexpr (kSegments > 2) {
    const int unit = block_index_x() / kMergeTiles;
    merge_segments(args, unit, block_index_x() % kMergeTiles,
                   Segments(find_span(args, unit / args.value_heads).chunks));
  }
}
#endif

#if KDA_COMPILES(kda_forward_repair)
KDA_KERNEL(kda::kFusedThreads, 1) kda_forward_repair(KDA_GRID_CONSTANT kda::KernelArgs args) {
  if constexpr (kda::kSegments > 1) kda::repair(args);
}
#endif
