#pragma once
// A directory for one test, with a space and letters outside ASCII in its path, removed at the end; and the
// keys and entries that the tests of the cache use.
#include "cache/store.h"
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>

namespace kda::cache::test {

class Scratch {
public:
  explicit Scratch(const std::filesystem::path& base = std::filesystem::temp_directory_path()) {
    std::string name = (base / "kda jit ünï-XXXXXX").native();
    path_ = ::mkdtemp(name.data());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

private:
  std::filesystem::path path_;
};

inline KeyManifest key_of(const std::string& source) {
  KeyManifest key;
  key.add("kind", "cubin");
  key.add("source", source);
  return key;
}

inline Entry entry_of(const std::string& payload) {
  return {payload, {{"registers", "128"}, {"log", ""}}};
}

/// Where files cost no disk, for tests that make very many; the temporary directory where there is none.
inline std::filesystem::path fast_directory() {
  const char* memory = "/dev/shm";
  return ::access(memory, W_OK) == 0 ? std::filesystem::path(memory) : std::filesystem::temp_directory_path();
}

/// A make that must not run.
inline std::optional<Entry> never_made() {
  throw std::logic_error("made although the entry exists");
}

inline std::string slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
inline void spill(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

/// The file of an entry: v1/<x>/<y>/<digest>.kda.
inline std::filesystem::path file_of(const std::filesystem::path& directory, const KeyManifest& key) {
  const std::string digest = key.digest();
  return directory / "v1" / digest.substr(0, 1) / digest.substr(1, 1) / (digest + ".kda");
}

} // namespace kda::cache::test
