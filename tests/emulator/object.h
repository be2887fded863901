#pragma once
// Source unit -> shared object: the host compiler against tests/emulator/primitives.
#include "codegen/source_unit.h"
#include <filesystem>

namespace kda::emulator {

/// The path of the shared object, compiled unless it is in the cache folder. The folder of an object also
/// holds the sources that it was made of, for a debugger. Safe to call from several threads and processes.
[[nodiscard]] Result<std::filesystem::path> compile_object(const SourceUnit& unit, int optimize,
                                                           bool checked);
/// A file with these bytes (of a shared object), written unless it is in the cache folder.
[[nodiscard]] Result<std::filesystem::path> object_file(const std::string& bytes);
[[nodiscard]] Result<std::string> read_file(const std::filesystem::path& path);

} // namespace kda::emulator
