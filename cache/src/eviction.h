#pragma once
// The size limit of a folder. The time of modification of an entry, whose bytes never change, says when it
// was last used: file systems are often mounted without times of access.
#include "folder.h"
#include <chrono>
#include <cstdint>

namespace kda::cache {

/// What was written or used within this time is in use and stays, whatever the limit: another rank may be
/// about to read it.
inline constexpr std::chrono::minutes kInUse{5};
/// A use is noted when the last note is older than this, so the note may lag behind the use by as much.
inline constexpr std::chrono::minutes kNoted{1};
/// An older temporary file has no writer any more.
inline constexpr std::chrono::hours kInterrupted{1};

/// Notes that the entry is used now. Only when the last note is older than kNoted, so that a hit is seldom
/// a write. Where it cannot be written nothing happens.
void mark_used(const std::filesystem::path& entry);

/// Removes files of interrupted writes and, when the entries take more than `limit` bytes of disk, those
/// least recently used until they take a sixteenth less, so that not every publish must look again. 0: no
/// limit. One process does it at a time; another one's call does nothing then.
PruneReport evict(const Folder& folder, std::uint64_t limit);

} // namespace kda::cache
