#pragma once
// One kernel family: a template file and the pure functions that size and launch it. A file per family in
// this folder defines its Family; family_of (family.cpp) is the table.
#include "codegen/source_unit.h"

namespace kda {

struct Family {
  const char* source; ///< template under templates/cuda, e.g. "recurrent.cu"
  std::vector<std::string> (*entries)(const Problem&, const Variant&);
  /// Appends every variant, rejected ones with their reason.
  void (*enumerate)(const Problem&, const Target&, std::vector<Candidate>&);
  LaunchList (*launches)(const Problem&, const Variant&, const Target&, const Sizes&);
  WorkspaceLayout (*workspace)(const Problem&, const Variant&, const Sizes&);
  double (*estimate_us)(const Problem&, const Variant&, const Target&, const Sizes&);
};

extern const Family kTokenFamily;         ///< recurrent.cu: operations recurrent and forward
extern const Family kChunkForwardFamily;  ///< chunk_forward.cu
extern const Family kFusedForwardFamily;  ///< fused_forward.cu
extern const Family kChunkBackwardFamily; ///< chunk_backward.cu
extern const Family kTokenBackwardFamily; ///< recurrent_backward.cu
extern const Family kReplayFamily;        ///< replay.cu
extern const Family kGateFamily;          ///< gate.cu: gate and gate_backward

[[nodiscard]] const Family& family_of(Operation, Algorithm);

// The host's side of the functions of source_unit.h and variant.h. IR is text, so none of it needs LLVM; it
// needs no workspace.
void enumerate_host(const Problem&, const Target&, std::vector<Candidate>&);
[[nodiscard]] LaunchList launches_host(const Problem&, const Variant&, const Sizes&);
[[nodiscard]] double estimate_host_us(const Problem&, const Variant&, const Target&, const Sizes&);
[[nodiscard]] Result<SourceUnit> emit_host(const Problem&, const Variant&, const Target&);

/// An upper bound, known without reading cu_seqlens, of the chunks of all sequences: ceil(T/C) + N when
/// packed.
[[nodiscard]] constexpr std::int64_t chunk_bound(const Problem& p, const Sizes& s, int chunk) {
  return p.varlen ? s.tokens / chunk + s.sequences : s.batch * ((s.tokens + chunk - 1) / chunk);
}

} // namespace kda
