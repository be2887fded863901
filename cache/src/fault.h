#pragma once
// Why the disk could not be used. The store warns once a `cause`, so that a full disk says so once and not
// once a kernel.
#include <string>
#include <string_view>

namespace kda::cache {

struct Fault {
  std::string cause;    ///< what makes two faults the same, e.g. the text of errno
  std::string sentence; ///< what to tell a person
};

/// "<what> '<path>': <text of error>", with the text of `error` (an errno) as the cause.
[[nodiscard]] Fault io_fault(std::string_view what, std::string_view path, int error);

} // namespace kda::cache
