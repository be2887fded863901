#pragma once
// Source text and launch geometry: pure functions of problem, variant and target.
#include "codegen/variant.h"
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

struct SourceFile {
  std::string name; ///< as an #include spells it, e.g. "primitives/mma.cuh"
  std::string text;
};

/// What a compiler needs. CUDA: `main` is C++ and includes `files`. Host: `main` is LLVM IR text and `files`
/// is empty.
struct SourceUnit {
  std::string name; ///< file name of `main`, e.g. "chunk_forward.cu"
  std::string main;
  std::vector<SourceFile> files;    ///< config.cuh and every template that main reaches, sorted by name
  std::vector<std::string> options; ///< compiler options, the architecture among them
  std::vector<std::string> entries; ///< extern "C" names, in the order that Launch::entry indexes
};
[[nodiscard]] Result<SourceUnit> emit(const Problem&, const Variant&, const Target&);
/// The unit as one text: every file in the place of its first #include, with #line directives, so that
/// compilers, debuggers and profilers name the templates. `comment` goes on top.
[[nodiscard]] std::string flatten(const SourceUnit&, const std::string& comment);

/// One kernel launch of an execute.
struct Launch {
  int entry = 0;         ///< index into SourceUnit::entries
  std::int64_t ctas = 1; ///< a grid of one dimension; host: work items. At most kMostCtas
  unsigned block = 0;    ///< threads of a CTA; 0 on the host
  unsigned shared_bytes = 0;
  bool overlap = false; ///< may start before the kernel before it has ended; it waits itself
  int slab = 0;         ///< KernelArgs::slab
};
constexpr std::int64_t kMostCtas = 2147483647; ///< that a CUDA grid has in x
/// What a call is walked in (templates/cuda/chunk_backward/slab.cuh).
struct Slabs {
  int chunks = 0; ///< fixed batches: of a piece of a row. Packed: of a slab
  int rows = 0;   ///< fixed batches: rows side by side. Packed: units of CTAs that share a slab's sequences
  int pieces = 0; ///< of a group of rows
  int count = 1;  ///< slabs of a call
};
/// The launches of one call, in order, in one stream; no allocation. A launch without CTAs is left out.
struct LaunchList {
  static constexpr int kMost = 64;
  std::array<Launch, kMost> items; ///< the first `count`
  int count = 0;
  Slabs slabs;
  void add(int entry, std::int64_t ctas, int block, int shared_bytes, bool overlap = false, int slab = 0) {
    if (ctas > 0)
      items[static_cast<std::size_t>(count++)] = {
          entry, ctas, static_cast<unsigned>(block), static_cast<unsigned>(shared_bytes), overlap, slab};
  }
};
[[nodiscard]] LaunchList launches(const Problem&, const Variant&, const Target&, const Sizes&);

/// Byte offsets of the buffers that KernelArgs::workspace points at; slot i of the kernel's documented list.
struct WorkspaceLayout {
  static constexpr int kSlots = 24;
  std::array<std::size_t, kSlots> offset{};
  int count = 0;
  std::size_t bytes = 0; ///< exact total; offsets are multiples of 256
  void add(std::size_t size) {
    offset[static_cast<std::size_t>(count++)] = bytes;
    bytes += (size + 255) / 256 * 256;
  }
};
[[nodiscard]] WorkspaceLayout workspace_layout(const Problem&, const Variant&, const Sizes&);

} // namespace kda
