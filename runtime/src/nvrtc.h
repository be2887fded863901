#pragma once
// NVRTC, opened at run time. Works with no GPU and no toolkit headers; every method is thread-safe.
#include "backend.h"
#include "compile_slots.h"
#include <filesystem>
#include <optional>

namespace kda {

class Nvrtc {
public:
  explicit Nvrtc(int threads) : slots_(threads) {}
  /// `library`: a path, or unset: the loader's libnvrtc.so.13 or .12, then the CUDA toolkit's usual
  /// directories. unavailable when there is none; the message says where it was looked for and what to do.
  /// `threads`: kernels that compile at a time; 0: as many as the machine has.
  [[nodiscard]] static Result<std::shared_ptr<const Nvrtc>>
  open(const std::optional<std::filesystem::path>& library, int threads = 0);

  /// "nvrtc 13.0 <size of the library file>": two builds of one version differ in size, the only thing that
  /// NVRTC tells cheaply.
  [[nodiscard]] const std::string& identity() const { return identity_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] int major() const { return major_; }
  /// Compute capabilities that it compiles for, e.g. 90; empty where it does not say.
  [[nodiscard]] std::vector<int> architectures() const;
  /// A cubin an entry, packed (pack_cubins), for the architecture in the unit's options, with registers,
  /// stack, spills and advisories from ptxas's log. The kernels of a unit compile at the same time, as many
  /// as threads and memory allow, whoever calls. compile_failed carries the source around the first error
  /// line, the generated config and the log.
  [[nodiscard]] Result<Image> compile(const SourceUnit&) const;

private:
  struct Functions;
  [[nodiscard]] Result<Image> compile_entry(const SourceUnit&, const std::string& entry) const;
  std::shared_ptr<const Functions> f_;
  std::string identity_;
  std::filesystem::path path_;
  int major_ = 0;
  mutable CompileSlots slots_;
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
