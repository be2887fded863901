#pragma once
// How a problem is computed: a plain struct of tunables. Its one-line text is what reports, logs and tuning
// rows show.
#include "codegen/problem.h"
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

enum class Algorithm : std::uint8_t {
  token, ///< one token after the other, state in registers, fp32 arithmetic
  chunk, ///< chunk-parallel preparation and a sequential scan of the state, tensor cores
  gate,  ///< elementwise
  fused, ///< chunks in one kernel: warps that load, that prepare and that carry the state; sm_90a
};

/// Products on tensor cores, so 16-bit operands; the others work in fp32.
[[nodiscard]] constexpr bool is_chunked(Algorithm a) {
  return a == Algorithm::chunk || a == Algorithm::fused;
}

struct Variant {
  Algorithm algorithm = Algorithm::token;
  int chunk = 0; ///< C, tokens of a chunk: 16, 32 or 64. token: those that a CTA's warps prepare together
                 ///< in shared memory; 0: every warp prepares all of them for itself
  int value_tile = 0;    ///< V columns that one CTA of the scan (chunk) or fused kernel owns
  int prepare_warps = 0; ///< warps of the chunk-parallel kernels, or of a fused CTA that prepare
  int scan_warps = 0;    ///< warps of the scan, of a token CTA, or of a fused CTA that carry the state
  int rows = 0;          ///< token: V rows that one warp owns. Host: V columns of a register tile
  int stages = 0;        ///< depth of the scan's prefetch, or of the fused kernel's ring
  int lanes = 0;         ///< token: lanes of a warp that share a row of K; 0: as many as K fills
  int streaming = 0;     ///< token: 1: states pass by L1 and leave L2 first
  int segments = 0;      ///< fused: pieces of a sequence that run side by side; 0: one
  int slab = 0;          ///< chunk backward: tokens, of all sequences, that are worked on at a time; 0: all.
                         ///< Twice as many, and so on, where a call would take more than 64 launches
  int overlap = 0;       ///< token: 1: starts while the kernel before it ends (programmatic dependent launch)

  bool operator==(const Variant&) const = default;
};

/// "chunk c=64 vt=32 pw=4 sw=4 st=2"; fields that are 0 are left out. parse_variant is the inverse.
[[nodiscard]] std::string to_string(const Variant&);
[[nodiscard]] Result<Variant> parse_variant(std::string_view);

/// What a kernel may use on a device.
struct Target {
  enum class Kind : std::uint8_t { cuda, host } kind = Kind::cuda;
  std::string arch;           ///< "sm_90a"; host: LLVM's CPU name, e.g. "znver4"
  std::string features;       ///< host: LLVM's feature string; empty for CUDA
  int compute_capability = 0; ///< 90 for sm_90a; 0 for host
  int multiprocessors = 0;    ///< SMs, or host threads
  int max_shared_bytes = 0;   ///< dynamic shared memory that one CTA may ask for
  int shared_bytes_per_sm = 0;
  int registers_per_sm = 65536;
  int vector_bytes = 0; ///< host: width of a vector register
};
/// The limits of a CUDA architecture by name: sm_80, sm_86, sm_89, sm_90, sm_90a, sm_100a, sm_103a, sm_120a.
[[nodiscard]] Result<Target> cuda_target(std::string_view arch);

/// A variant and, when it does not fit, why.
struct Candidate {
  Variant variant;
  std::string rejected; ///< empty: may be compiled
};
/// Every variant known for the problem, rejected ones with their reason. Deterministic order.
[[nodiscard]] std::vector<Candidate> enumerate(const Problem&, const Target&);

/// Estimated time in microseconds of one call: bytes, latency chain and issue, from measured constants.
[[nodiscard]] double estimate_us(const Problem&, const Variant&, const Target&, const Sizes&);
/// The untuned choice: the candidate of least estimated time, first in order on a tie, for sizes whose every
/// extent is rounded up to three significant bits (1 to 8, 10, 12, 14, 16, 20 ...): at most a quarter more,
/// less than the cost model is off.
[[nodiscard]] Result<Variant> choose(const Problem&, const Target&, const Sizes&);
/// The same among those whose workspace for these sizes, not rounded, is at most `max_workspace` bytes.
[[nodiscard]] Result<Variant> choose(const Problem&, const Target&, const Sizes&, std::size_t max_workspace);
/// Calls that `choices` covers: this many tokens, sequences and batch rows.
inline constexpr std::int64_t kMostTokens = std::int64_t{1} << 22, kMostSequences = std::int64_t{1} << 14;
/// Every answer of `choose` for any call within those limits, in order of `enumerate`. Rounding makes them
/// a finite set, so that what is compiled ahead is complete. Some milliseconds to a second.
[[nodiscard]] Result<std::vector<Variant>> choices(const Problem&, const Target&);

} // namespace kda
