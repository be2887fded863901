#pragma once
// What a machine offers, and what is wrong with it: facts are gathered apart from what is said about them.
#include "kda/engine.h"

namespace kda {

/// Facts that the driver and, where it is there, NVML tell about a GPU.
struct GpuFacts {
  Device device;
  std::string name, arch;
  int compute_capability = 0;
  std::string problem; ///< why it cannot be used; empty when it can
  // NVML; 0 and empty where there is none. MHz of the SMs.
  int clock = 0, application_clock = 0, largest_clock = 0;
  std::vector<std::string> slowed_by; ///< e.g. "thermal slowdown", of this moment
};

struct CacheFacts {
  std::filesystem::path directory; ///< empty: there is none
  bool ours = true;                ///< owned by this user
  bool others_write = false;       ///< the world may write in it, or a group that is not this user's own
  std::string unwritable;          ///< why; empty: a file can be written
  std::uint64_t free_bytes = 0;    ///< of the file system, for this user
  bool network = false;
};

struct MachineFacts {
  std::string driver_problem; ///< why there is no driver; empty when there is one
  int driver_version = 0;     ///< CUDA, as 13000
  std::string nvrtc_problem;  ///< likewise
  std::filesystem::path nvrtc_path;
  int nvrtc_major = 0;
  std::vector<int> nvrtc_architectures;           ///< compute capabilities; empty: not told
  std::vector<std::filesystem::path> nvrtc_found; ///< every libnvrtc in the usual places, once each
  bool nvrtc_given = false;                       ///< by KDA_JIT_NVRTC
  std::vector<GpuFacts> gpus;
  CacheFacts cache;
  std::vector<std::string> bad_packs; ///< sentences
};

struct Finding {
  bool good = true;
  std::string what, advice;
};

/// One finding a fact, the bad ones with what to do.
[[nodiscard]] std::vector<Finding> diagnose(const MachineFacts&);
/// Writes and removes a file in the cache directory; touches nothing else.
[[nodiscard]] MachineFacts gather_facts(const Engine&, const EngineOptions&);

} // namespace kda
