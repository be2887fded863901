// Sentences about facts; nothing here looks at the machine.
#include "kda/diagnosis.h"
#include <algorithm>
#include <fmt/format.h>

namespace kda {
namespace {

void driver(const MachineFacts& m, std::vector<Finding>& out) {
  if (!m.driver_problem.empty())
    return out.push_back(
        {false, m.driver_problem,
         "install NVIDIA's driver, 525 (CUDA 12.0) or later, or in a container start it with the GPUs "
         "(--gpus all); host kernels work without"});
  const int major = m.driver_version / 1000;
  if (m.nvrtc_major > major)
    out.push_back(
        {false,
         fmt::format("the driver is older than what is compiled: it is of CUDA {}.{}, NVRTC of CUDA {}",
                     major, m.driver_version % 1000 / 10, m.nvrtc_major),
         fmt::format("update the driver ({} or later), or point KDA_JIT_NVRTC at a libnvrtc.so.{}",
                     m.nvrtc_major >= 13 ? "580" : "525", major)});
  else
    out.push_back({true, fmt::format("driver of CUDA {}.{}", major, m.driver_version % 1000 / 10), ""});
}

void nvrtc(const MachineFacts& m, std::vector<Finding>& out) {
  if (!m.nvrtc_problem.empty())
    return out.push_back(
        {false, m.nvrtc_problem,
         "install the CUDA toolkit's NVRTC, or `pip install nvidia-cuda-nvrtc` and set KDA_JIT_NVRTC "
         "to its libnvrtc.so; host kernels work without"});
  out.push_back({true, fmt::format("NVRTC {}", m.nvrtc_path.string()), ""});
  const auto& known = m.nvrtc_architectures;
  for (const GpuFacts& gpu : m.gpus)
    if (!known.empty() && gpu.compute_capability > 0 &&
        std::find(known.begin(), known.end(), gpu.compute_capability) == known.end()) {
      const bool old = gpu.compute_capability > *std::max_element(known.begin(), known.end());
      out.push_back(
          {false,
           fmt::format("{}: NVRTC {} does not compile for {}", to_string(gpu.device), m.nvrtc_path.string(),
                       gpu.arch),
           old ? "NVRTC is too old for the card: install a newer one, or point KDA_JIT_NVRTC at it"
               : "this NVRTC no longer knows the card: point KDA_JIT_NVRTC at one of an older toolkit"});
    }
  if (m.nvrtc_found.size() > 1 && !m.nvrtc_given) {
    std::string all;
    for (const auto& path : m.nvrtc_found)
      all += fmt::format("{}{}", all.empty() ? "" : ", ", path.string());
    out.push_back(
        {false, fmt::format("several toolkits: {}; used is {}", all, m.nvrtc_path.string()),
         "set KDA_JIT_NVRTC to the one you mean: each has its own kernels in the cache, and another process "
         "may find another"});
  }
}

void clocks(const GpuFacts& gpu, std::vector<Finding>& out) {
  const std::string name = to_string(gpu.device);
  if (!gpu.slowed_by.empty())
    out.push_back(
        {false,
         fmt::format("{}: slowed down by {} ({} of {} MHz)", name, fmt::join(gpu.slowed_by, ", "), gpu.clock,
                     gpu.largest_clock),
         "look at cooling, power supply and power limit (nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE); "
         "do not tune until it is gone"});
  if (gpu.application_clock > 0 && gpu.application_clock < gpu.largest_clock)
    out.push_back(
        {false,
         fmt::format("{}: application clocks hold the SMs at {} of {} MHz", name, gpu.application_clock,
                     gpu.largest_clock),
         "reset them (nvidia-smi -rac), unless they are meant; then tune with them, since rows of other "
         "clocks mislead"});
}

void cache(const MachineFacts& m, std::vector<Finding>& out) {
  const CacheFacts& c = m.cache;
  const std::string path = c.directory.string();
  if (path.empty())
    return out.push_back({false, "no cache directory: kernels are compiled again in every process",
                          "set KDA_JIT_CACHE_DIR to a directory that this user owns and can write"});
  if (!c.ours || c.others_write)
    out.push_back({false,
                   fmt::format("the cache {} {}: who writes there can run code here", path,
                               c.ours ? "can be written by others" : "belongs to another user"),
                   c.ours ? fmt::format("chmod go-w {}", path)
                          : "set KDA_JIT_CACHE_DIR to a directory of your own, and that one as "
                            "KDA_JIT_CACHE_READONLY_DIRS if you trust it"});
  constexpr std::uint64_t kLeast = 64U << 20U;
  if (!c.unwritable.empty())
    out.push_back({false, fmt::format("the cache {} cannot be written: {}", path, c.unwritable),
                   "mend its permissions or the full disk, or set KDA_JIT_CACHE_DIR"});
  else if (c.free_bytes < kLeast)
    out.push_back({false, fmt::format("the cache {} has {} MB of disk left", path, c.free_bytes >> 20U),
                   "free some, lower KDA_JIT_CACHE_MAX_MB, or set KDA_JIT_CACHE_DIR"});
  else
    out.push_back(
        {true, fmt::format("cache {} can be written{}", path, c.network ? ", on a network file system" : ""),
         ""});
}

} // namespace

std::vector<Finding> diagnose(const MachineFacts& m) {
  std::vector<Finding> out;
  cache(m, out);
  for (const std::string& sentence : m.bad_packs)
    out.push_back({false, sentence, "make the pack anew, or take it out of KDA_JIT_CACHE_PACKS"});
  driver(m, out);
  nvrtc(m, out);
  for (const GpuFacts& gpu : m.gpus)
    clocks(gpu, out);
  return out;
}

} // namespace kda
