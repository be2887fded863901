#pragma once
// NVRTC, opened at run time. Works with no GPU and no toolkit headers; every method is thread-safe.
#include "backend.h"
#include <filesystem>
#include <optional>

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
  /// A cubin for the architecture in the unit's options, with registers, stack, spills and advisories from
  /// ptxas's log. compile_failed carries the source around the first error line, the generated config and the
  /// log.
  [[nodiscard]] Result<Image> compile(const SourceUnit&) const;

private:
  struct Functions;
  std::shared_ptr<const Functions> f_;
  std::string identity_;
  int major_ = 0;
};

/// Parses "ptxas info" lines: one entry a kernel.
[[nodiscard]] std::vector<KernelFigures> parse_ptxas_log(std::string_view log);
/// The C75xx lines: setmaxnreg ignored, wgmma serialised. Empty when there are none.
[[nodiscard]] std::string ptxas_advisories(std::string_view log);

} // namespace kda
