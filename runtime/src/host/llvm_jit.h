#pragma once
// All that touches LLVM: IR text to an object, an object to addresses. The rest of the host backend includes
// no LLVM header.
#include "codegen/source_unit.h"
#include <memory>

namespace kda::host {

/// The machine that runs this, as LLVM names it; `multiprocessors` is left 0.
[[nodiscard]] Result<Target> detect_target();
/// "llvm 19.1.7"
[[nodiscard]] std::string compiler_version();
/// compile_failed with LLVM's diagnostic.
[[nodiscard]] Result<std::string> compile_object(const SourceUnit&);

/// An object in executable memory, for as long as it lives.
class LoadedObject {
public:
  LoadedObject() = default;
  LoadedObject(const LoadedObject&) = delete;
  LoadedObject& operator=(const LoadedObject&) = delete;
  virtual ~LoadedObject() = default;
  std::vector<void*> entries; ///< as SourceUnit::entries
};
/// load_failed when `bytes` is no object for this machine or lacks an entry.
[[nodiscard]] Result<std::unique_ptr<LoadedObject>> load_object(const SourceUnit&, const std::string& bytes);

} // namespace kda::host
