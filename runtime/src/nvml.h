#pragma once
// What NVML says of a GPU's clocks. The library is opened at run time and need not be there.
#include "kda/diagnosis.h"
#include <string_view>

namespace kda {

/// The reasons that hold clocks down against the user's will, in words; of
/// nvmlDeviceGetCurrentClocksEventReasons.
[[nodiscard]] std::vector<std::string> slowdowns(unsigned long long reasons);
/// Fills in the clocks of the GPU with this UUID ("GPU-..."); leaves them alone where NVML or the GPU is not
/// found.
void read_clocks(const std::string& uuid, GpuFacts&);

} // namespace kda
