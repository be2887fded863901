#pragma once
// NVRTC, opened at run time. Works with no GPU and no toolkit headers; every method is thread-safe.
#include "backend.h"
#include <algorithm>
#include <filesystem>
#include <optional>
#include <semaphore>
#include <thread>

namespace kda {

class Nvrtc {
public:
  /// `library`: a path, or unset: the loader's libnvrtc.so.13 or .12, then the CUDA toolkit's usual
  /// directories. unavailable when there is none; the message says where it was looked for and what to do.
  [[nodiscard]] static Result<std::shared_ptr<const Nvrtc>>
  open(const std::optional<std::filesystem::path>& library);

  /// "nvrtc 13.0 <size of the library file>": two builds of one version differ in size, the only thing that
  /// NVRTC tells cheaply.
  [[nodiscard]] const std::string& identity() const { return identity_; }
  /// A cubin an entry, packed (pack_cubins), for the architecture in the unit's options, with registers,
  /// stack, spills and advisories from ptxas's log. The kernels of a unit compile at the same time, as many
  /// as the machine has threads, whoever calls. compile_failed carries the source around the first error
  /// line, the generated config and the log.
  [[nodiscard]] Result<Image> compile(const SourceUnit&) const;

private:
  struct Functions;
  [[nodiscard]] Result<Image> compile_entry(const SourceUnit&, const std::string& entry) const;
  std::shared_ptr<const Functions> f_;
  std::string identity_;
  int major_ = 0;
  mutable std::counting_semaphore<> free_threads_{std::max<int>(1, std::thread::hardware_concurrency())};
};

/// What an image of CUDA kernels is: a cubin a kernel, each after its size in 8 bytes, little endian.
[[nodiscard]] std::string pack_cubins(const std::vector<std::string>& cubins);
/// The cubins of an image, each in memory of its own, as aligned as the driver may want it; load_failed when
/// the bytes are no such list.
[[nodiscard]] Result<std::vector<std::string>> unpack_cubins(std::string_view image);

/// Parses "ptxas info" lines: one entry a kernel.
[[nodiscard]] std::vector<KernelFigures> parse_ptxas_log(std::string_view log);
/// The C75xx lines: setmaxnreg ignored, wgmma serialised. Empty when there are none.
[[nodiscard]] std::string ptxas_advisories(std::string_view log);

} // namespace kda
