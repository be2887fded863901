#pragma once
// Errors as values: one code, one sentence that tells a person what to do, and context for the curious.
#include <cstdint>
#include <string>
#include <tl/expected.hpp>
#include <utility>

namespace kda {

enum class ErrorCode : std::uint8_t {
  invalid_argument, ///< the caller asked for something that is not supported or malformed
  not_prepared,     ///< execute on a plan that was never prepared
  compile_failed,   ///< NVRTC or LLVM refused the source; `context` holds the log
  load_failed,      ///< the driver or the linker refused an image
  device_error,     ///< the driver reported an error
  unavailable,      ///< no driver, no NVRTC, no such device
  out_of_memory,    ///< host or device memory ran out
  io_error,         ///< a file could not be read or written
  internal,         ///< a fault of this library
};

struct Error {
  ErrorCode code = ErrorCode::internal;
  std::string message; ///< one sentence
  std::string context; ///< compiler log, paths, versions; may be empty
};

template <class T>
using Result = tl::expected<T, Error>;
using Status = tl::expected<void, Error>;

[[nodiscard]] inline tl::unexpected<Error> fail(ErrorCode code, std::string message,
                                                std::string context = {}) {
  return tl::unexpected<Error>(Error{code, std::move(message), std::move(context)});
}

/// The name of a code as it stands in logs and JSON, e.g. "compile_failed".
[[nodiscard]] const char* to_string(ErrorCode code);

} // namespace kda
