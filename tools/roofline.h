#pragma once
// How fast a problem could run on its device, for reports.
#include "kda/tuning_report.h"
#include <optional>

namespace kda::tools {

struct Roofline {
  double flop, bytes;     ///< of a call, at least
  double bytes_per_s;     ///< at which the device filled memory when it was tuned
  double peak_flop_per_s; ///< of the device's data sheet; 0: not known
  [[nodiscard]] double intensity() const { return flop / bytes; } ///< flop a byte
  /// The most flop a second at an intensity.
  [[nodiscard]] double roof(double at) const;
};

/// None where a figure is missing: rows of an older build, an operation that is all bytes.
[[nodiscard]] std::optional<Roofline> roofline(const TuneReport&);
/// One line: the arithmetic, the bytes and what bounds them.
[[nodiscard]] std::string to_string(const Roofline&);
/// 12.3e9: "12.3 G".
[[nodiscard]] std::string si(double value);

} // namespace kda::tools
