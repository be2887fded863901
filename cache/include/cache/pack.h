#pragma once
// What is told of a pack: a read-only file of many entries. Store reads and writes them; format:
// docs/cache.md and src/pack.h.
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace kda::cache {

/// Which entries go into a pack.
struct PackRequest {
  std::set<std::string> digests;   ///< of their keys; empty: any
  std::set<std::string> arch = {}; ///< values of the key's field of that name; empty: any
};

struct PackInfo {
  std::filesystem::path file;
  std::size_t entries = 0;
  std::uint64_t bytes = 0; ///< of the file
  std::string digest;      ///< 32 hex digits; covers every byte of the file
  /// What the entries are for: kLabelFields and their values, e.g. {"arch", "sm_90a"}. A name may come twice.
  std::vector<std::pair<std::string, std::string>> labels;
};

} // namespace kda::cache
