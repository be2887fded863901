#pragma once
// Safetensors files: an 8-byte little-endian header length, a JSON header, the tensors' bytes. Reading is
// strict, so that a damaged file is an error and never a wrong tensor; writing is atomic.
#include "codegen/error.h"
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace kda::safetensors {

enum class DType : std::uint8_t { f64, f32, f16, bf16, i64, i32 };
[[nodiscard]] const char* to_string(DType); ///< "F32", as the header spells it
[[nodiscard]] std::size_t size_of(DType);

struct Tensor {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data; ///< contiguous, little endian
};
/// Elements of a shape, -1 when an extent is negative or the product exceeds 2^62.
[[nodiscard]] std::int64_t element_count(const std::vector<std::int64_t>& shape);

struct File {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// invalid_argument, with what is wrong, for a file that cannot be opened or is not valid: header length,
/// JSON, dtype, shape times size against offsets, overlaps, holes, truncation.
[[nodiscard]] Result<File> read(const std::filesystem::path&);
/// Writes a temporary file beside `path` and renames it: on an error nothing is left and an existing file is
/// untouched. io_error.
[[nodiscard]] Status write(const std::filesystem::path&, const File&);

} // namespace kda::safetensors
