#include "roofline.h"
#include <algorithm>
#include <fmt/format.h>
#include <iterator>

namespace kda::tools {
namespace {

/// Tensor cores, bf16 and fp16 without sparsity, of the vendor's data sheets, by the exact name of the
/// driver: a slice of a card has another name and another peak. What is not here is not guessed.
struct Peak {
  std::string_view device;
  double flop_per_s;
};
constexpr Peak kPeaks[] = {{"NVIDIA H100 80GB HBM3", 989e12}, {"NVIDIA H100 PCIe", 756e12},
                           {"NVIDIA H200", 989e12},           {"NVIDIA A100-SXM4-40GB", 312e12},
                           {"NVIDIA A100-SXM4-80GB", 312e12}, {"NVIDIA A100 80GB PCIe", 312e12}};

double peak_of(std::string_view device) {
  const auto* const found =
      std::find_if(std::begin(kPeaks), std::end(kPeaks), [&](const Peak& p) { return p.device == device; });
  return found == std::end(kPeaks) ? 0 : found->flop_per_s;
}

} // namespace

double Roofline::roof(double at) const {
  const double memory = bytes_per_s * at;
  return peak_flop_per_s > 0 ? std::min(memory, peak_flop_per_s) : memory;
}

std::optional<Roofline> roofline(const TuneReport& r) {
  if (!(r.flop > 0) || !(r.bytes > 0) || !(r.floor_us > 0)) return std::nullopt; // also when NaN
  return Roofline{r.flop, r.bytes, r.bytes / r.floor_us * 1e6, peak_of(r.device)};
}

std::string to_string(const Roofline& r) {
  const std::string peak = r.peak_flop_per_s > 0
                               ? fmt::format("peak {}FLOP/s (data sheet)", si(r.peak_flop_per_s))
                               : "peak FLOP/s of this device not known";
  return fmt::format("{}FLOP, {}B: {:.3g} FLOP/B; memory {}B/s (measured), {}; at most {}FLOP/s", si(r.flop),
                     si(r.bytes), r.intensity(), si(r.bytes_per_s), peak, si(r.roof(r.intensity())));
}

std::string si(double value) {
  constexpr const char* kPrefixes[] = {"", "k", "M", "G", "T", "P"};
  std::size_t i = 0;
  for (; value >= 999.5 && i + 1 < std::size(kPrefixes); ++i)
    value /= 1000;
  return fmt::format("{:.3g} {}", value, kPrefixes[i]);
}

} // namespace kda::tools
