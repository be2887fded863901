// Looks at the machine for `kda-jit doctor`.
#include "cache/store.h"
#include "engine_impl.h"
#include "kda/diagnosis.h"
#include "nvml.h"
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <system_error>
#include <unistd.h>

namespace kda {
namespace fs = std::filesystem;
namespace {

CacheFacts cache_facts(const fs::path& directory) {
  CacheFacts c;
  c.directory = directory;
  if (directory.empty()) return c;
  for (const fs::path& path : {directory, directory.parent_path()}) // v1, and what it could be renamed in
    if (struct stat status = {}; ::stat(path.c_str(), &status) == 0) {
      c.ours &= status.st_uid == ::geteuid();
      // Where every user is a group of his own, that group may write.
      c.others_write |= (status.st_mode & S_IWOTH) != 0 ||
                        ((status.st_mode & S_IWGRP) != 0 && status.st_gid != ::getegid());
    }
  const fs::path probe = directory / fmt::format("doctor.{}.tmp", ::getpid());
  const int fd = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0 || ::write(fd, "probe", 5) != 5) c.unwritable = std::generic_category().message(errno);
  if (fd >= 0) {
    ::close(fd);
    ::unlink(probe.c_str());
  }
  struct statvfs disk = {};
  if (::statvfs(directory.c_str(), &disk) == 0) c.free_bytes = std::uint64_t{disk.f_bavail} * disk.f_frsize;
  c.network = cache::on_network(directory);
  return c;
}

/// Every NVRTC in the places where toolkits are and where the loader looks first, once each.
std::vector<fs::path> nvrtc_libraries() {
  std::vector<fs::path> folders;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/usr/local", error))
    if (entry.path().filename().string().rfind("cuda", 0) == 0) folders.push_back(entry.path() / "lib64");
  folders.emplace_back("/usr/lib/x86_64-linux-gnu");
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* const value =
            std::getenv(name)) // NOLINT(concurrency-mt-unsafe): nothing writes the environment
      folders.push_back(fs::path(value) / "lib64");
  if (const char* const value = std::getenv("LD_LIBRARY_PATH")) // NOLINT(concurrency-mt-unsafe)
    for (fs::path& path : parse_paths(value))
      folders.push_back(std::move(path));
  std::vector<fs::path> all;
  for (const fs::path& folder : folders)
    for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12"}) {
      const fs::path real = fs::canonical(folder / name, error);
      if (!error && std::find(all.begin(), all.end(), real) == all.end()) all.push_back(real);
    }
  return all;
}

} // namespace

MachineFacts gather_facts(const Engine& engine, const EngineOptions& options) {
  MachineFacts m;
  m.cache = cache_facts(engine.cache_directory());
  if (const auto driver = CudaDriver::open())
    m.driver_version = (*driver)->version;
  else
    m.driver_problem = driver.error().message;
  m.nvrtc_given = options.nvrtc.has_value();
  m.nvrtc_found = nvrtc_libraries();
  if (const auto nvrtc = Nvrtc::open(options.nvrtc)) {
    m.nvrtc_path = (*nvrtc)->path();
    m.nvrtc_major = (*nvrtc)->major();
    m.nvrtc_architectures = (*nvrtc)->architectures();
    if (std::find(m.nvrtc_found.begin(), m.nvrtc_found.end(), m.nvrtc_path) == m.nvrtc_found.end())
      m.nvrtc_found.push_back(m.nvrtc_path);
  } else {
    m.nvrtc_problem = nvrtc.error().message;
  }
  for (const DeviceInfo& d : engine.devices()) {
    if (d.device.kind != Device::Kind::cuda || d.arch.empty()) continue;
    GpuFacts gpu{d.device, d.name, d.arch, d.compute_capability, d.problem, 0, 0, 0, {}};
    read_clocks(d.id, gpu);
    m.gpus.push_back(std::move(gpu));
  }
  const cache::Store packs(
      {.packs = options.cache_packs, .warn = [&](const std::string& text) { m.bad_packs.push_back(text); }});
  return m;
}

} // namespace kda
