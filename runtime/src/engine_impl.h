#pragma once
// What an Engine shares with its plans and kernels.
#include "backend.h"
#include "cache/store.h"
#include "cache/tuning_db.h"
#include "cuda_driver.h"
#include "fork_count.h"
#include "kda/engine.h"
#include "nvrtc.h"
#include <atomic>
#include <map>
#include <mutex>
#include <set>

namespace kda {

struct Plan::Impl {
  Problem problem;
  Variant variant;
  Device device;
  Sizes typical;
  std::string choice; ///< "cost model", "tuned", "pinned", "given"
  std::string note;   ///< why rows or pins did not count; may be empty
  std::size_t max_workspace = kNoLimit;
};

struct Kernel::Impl {
  std::shared_ptr<Engine::Impl> engine; ///< keeps the backend's libraries open
  std::shared_ptr<const Backend> backend;
  std::shared_ptr<const Module> module;
  Problem problem;
  Variant variant;
  bool host_memory = false;
  KernelInfo info;
};

/// One compiled and loaded image; `mutex` is held while the first user makes it.
struct LoadedImage {
  std::mutex mutex;
  std::shared_ptr<const Module> module;
  KernelInfo info;
};

/// Of the kernel that asks for most: what the compiler reported, and what a launch adds.
[[nodiscard]] int shared_bytes_of(const Problem&, const Variant&, const Target&, const KernelInfo&);

struct Engine::Impl {
  explicit Impl(EngineOptions o);
  /// The only way to make one: in a child of fork() it is left behind undestroyed, since joining threads and
  /// closing connections that stayed with the parent would hang or harm it.
  [[nodiscard]] static std::shared_ptr<Impl> make(EngineOptions o);

  EngineOptions options;
  cache::Store store;
  cache::TuningDb tuning;
  Result<std::shared_ptr<const Nvrtc>> nvrtc;
  Result<std::shared_ptr<const CudaDriver>> driver;
  std::vector<TuneReport> pins; ///< of TuneMode::pinned
  std::atomic<std::int64_t> compiles{0};

  /// An error in a child of fork(), where nothing of this engine may be touched, not even its locks.
  [[nodiscard]] Status usable() const;
  /// The device's backend, made on first use.
  [[nodiscard]] Result<std::shared_ptr<Backend>> backend(const Device&);
  /// The image of a unit, from the cache or through `compile`.
  [[nodiscard]] Result<Image> image(const SourceUnit&, const Target&, const std::string& compiler,
                                    const std::function<Result<Image>(const SourceUnit&)>& compile,
                                    KernelInfo&);
  /// The digest of the entry that holds the image of (problem, variant) today.
  [[nodiscard]] static Result<std::string> image_key(const Backend&, const Problem&, const Variant&);
  /// The module of (problem, variant) on a device, loaded once; a refused image is dropped and compiled
  /// again.
  [[nodiscard]] Result<std::shared_ptr<const Kernel::Impl>> kernel(const std::shared_ptr<Impl>& self,
                                                                   const Plan::Impl&);
  /// Held while one tunes on a device; `waiting` is called once when another tunes there.
  [[nodiscard]] std::shared_ptr<const void> tuning_lock(const Backend&, const std::function<void()>& waiting);
  [[nodiscard]] int threads() const; ///< of host kernels and parallel compiles
  void log(std::string_view line) const;
  void warn(std::string_view line) const;
  /// The first time that there is such a line.
  void log_once(const std::string& line);
  void warn_once(const std::string& line);

private:
  const std::uint32_t forks_ = fork_count();
  Status load(const Backend&, const SourceUnit&, LoadedImage&);
  [[nodiscard]] bool first(const std::string& line);
  /// Writes what does not compile as one file, with the error on top; a line that says where.
  [[nodiscard]] std::string keep_reproducer(const SourceUnit&, const cache::KeyManifest&, const Error&);
  /// Source, log and code, for who set the directory.
  void dump(const SourceUnit&, const Target&, const cache::KeyManifest&, const Image&);
  std::mutex mutex_;        ///< of the maps and the set
  std::mutex tuning_mutex_; ///< where there is no lock file
  std::map<std::string, std::shared_ptr<Backend>> backends_;
  std::map<std::string, std::shared_ptr<LoadedImage>> images_;
  std::set<std::string> said_;
};

/// The bucket of a tuning row: T and N rounded up to powers of two, e.g. "T8192 N1". The only bucket
/// function.
[[nodiscard]] std::string bucket(const Sizes&);
/// What a variant is chosen and tuned for: a batch-invariant problem has one choice for all sizes.
[[nodiscard]] Sizes choice_sizes(const Problem&, const Sizes&);
/// The run-time workspace of a call; none on the host.
[[nodiscard]] WorkspaceLayout workspace_of(const Target&, const Problem&, const Variant&, const Sizes&);
/// Points the slots of `args` into `workspace` and launches everything. Allocates nothing.
Status launch_all(const Backend&, const Module&, const Problem&, const Variant&, const Sizes&, KernelArgs&,
                  void* workspace, void* stream);

} // namespace kda
