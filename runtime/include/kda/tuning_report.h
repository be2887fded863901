#pragma once
// What a tuner found, and its text: JSON, for export, import, pins and comparisons.
#include "codegen/error.h"
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

/// How candidates are timed: as they will run. Part of the key of a row.
struct TuneTiming {
  bool warm_l2 = false; ///< a call right before leaves its tensors in the L2; else the L2 is flushed
  bool graph = false;   ///< replayed from a CUDA graph; else launched. The host knows no difference
  bool operator==(const TuneTiming&) const = default;
};
/// "cold L2, eager", "warm L2, graph": the mode of a report.
[[nodiscard]] std::string to_string(const TuneTiming&);

/// One candidate.
///   ok        checked and timed
///   rejected  it does not fit the problem or the device
///   wrong     it computes something else
///   failed    it does not compile or launch
///   skipped   budget or memory ended before its turn; tried again
///   faulted   it broke the device for its process, or killed or hung it; not run again with this image
struct TuneRow {
  std::string variant, status, reason;
  double median_us = 0, spread_us = 0; ///< spread: p90 - p10. NaN: unknown
  double error = 0;                    ///< largest relative L2 error of an output
  int registers = 0, shared_bytes = 0; ///< largest over the kernels of the image
  bool chosen = false;
  std::string image;   ///< digest of the cache entry that was measured
  std::string written; ///< UTC, ISO 8601
};

struct TuneReport {
  std::string problem, bucket, device, driver, compiler, mode;
  double floor_us = 0; ///< `bytes` over the rate at which the device fills memory, as measured
  double bytes = 0;    ///< compulsory: every input read once, every output written once. NaN: unknown
  double flop = 0;     ///< of the recurrence, token by token; 0 where there is next to none. NaN: unknown
  std::vector<TuneRow> rows;
};

/// {"schema": 3, "reports": [{"problem", ..., "rows": [{"variant", ...}]}]}: the members above by name.
/// Numbers that are not finite become null.
[[nodiscard]] std::string write_reports(const std::vector<TuneReport>&);
/// The inverse; also of schema 2, which lacks `bytes` and `flop`. invalid_argument, with the place, for
/// anything else: another schema, a missing or unknown member, a status or a variant that does not exist.
[[nodiscard]] Result<std::vector<TuneReport>> parse_reports(std::string_view json);
/// The reports of a file; the error names it.
[[nodiscard]] Result<std::vector<TuneReport>> read_reports(const std::filesystem::path& file);

} // namespace kda
