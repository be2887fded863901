#include "nvml.h"
#include <array>
#include <dlfcn.h>
#include <memory>
#include <utility>

namespace kda {
namespace {

constexpr int kSmClock = 1; // NVML_CLOCK_SM

/// The functions that are asked, of NVML's stable C interface.
struct Nvml {
  using Handle = void*;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_uuid)(const char*, Handle*) = nullptr;
  int (*clock)(Handle, int, unsigned*) = nullptr;
  int (*largest_clock)(Handle, int, unsigned*) = nullptr;
  int (*application_clock)(Handle, int, unsigned*) = nullptr;
  int (*reasons)(Handle, unsigned long long*) = nullptr;
};

template <class F>
bool load(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(dlsym(library, name));
  return out != nullptr;
}

} // namespace

std::vector<std::string> slowdowns(unsigned long long reasons) {
  // Idle, application clocks and sync boost are nobody's fault, and a software power cap is every busy GPU's.
  constexpr std::array<std::pair<unsigned, const char*>, 4> kReasons{{{0x08, "hardware slowdown"},
                                                                      {0x20, "software thermal slowdown"},
                                                                      {0x40, "hardware thermal slowdown"},
                                                                      {0x80, "hardware power brake"}}};
  std::vector<std::string> all;
  for (const auto& [bit, words] : kReasons)
    if ((reasons & bit) != 0) all.emplace_back(words);
  return all;
}

void read_clocks(const std::string& uuid, GpuFacts& gpu) {
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return;
  Nvml n;
  if (!load(library, "nvmlInit_v2", n.init) || !load(library, "nvmlShutdown", n.shutdown) ||
      !load(library, "nvmlDeviceGetHandleByUUID", n.by_uuid) || n.init() != 0)
    return;
  Nvml::Handle handle = nullptr;
  if (n.by_uuid(uuid.c_str(), &handle) == 0) {
    const auto clock = [&](const char* name, auto& function, int& out) {
      unsigned value = 0;
      if (load(library, name, function) && function(handle, kSmClock, &value) == 0)
        out = static_cast<int>(value);
    };
    clock("nvmlDeviceGetClockInfo", n.clock, gpu.clock);
    clock("nvmlDeviceGetMaxClockInfo", n.largest_clock, gpu.largest_clock);
    clock("nvmlDeviceGetApplicationsClock", n.application_clock, gpu.application_clock);
    unsigned long long reasons = 0;
    // The old name, which every driver since 2014 has.
    if (load(library, "nvmlDeviceGetCurrentClocksThrottleReasons", n.reasons) &&
        n.reasons(handle, &reasons) == 0)
      gpu.slowed_by = slowdowns(reasons);
  }
  n.shutdown();
}

} // namespace kda
