#pragma once
// A Backend in this process's memory that counts what it is asked for and does what the test says. The engine
// takes it for a GPU of architecture sm_90a: CUDA source is emitted for it, and nothing compiles it.
#include "backend.h"
#include "kda/engine.h"
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace kda::test {

class ScriptedBackend final : public Backend {
public:
  // What the test may change. The defaults succeed and launch nothing.
  Target target_ = cuda_target("sm_90a").value();
  std::string compiler_ = "scripted 1.0", driver_ = "1.0";
  std::function<Result<Image>(const SourceUnit&)> on_compile = image_of;
  std::function<Status(const SourceUnit&, const Image&)> on_load = [](auto&&...) { return Status{}; };
  std::function<Status(const SourceUnit&, const Launch&, const KernelArgs&)> on_launch = [](auto&&...) {
    return Status{};
  };
  /// The time of a measurement, of the unit that was launched last.
  std::function<double(const SourceUnit& last)> on_time = [](const SourceUnit&) { return 1.0; };
  /// The time of a measurement that launches nothing.
  std::function<double()> on_fill = [] { return 1.0; };
  std::function<Status()> on_synchronize = [] { return Status{}; };
  std::size_t memory_limit = std::size_t{1} << 30; ///< of one allocation
  std::string name_ = "scripted", id_ = "scripted";
  std::atomic<double> clock{0}; ///< stands unless the test moves it: how busy the machine is changes nothing

  // What it was asked for.
  mutable std::atomic<int> compiles{0}, loads{0}, launches{0}, allocations{0}, live{0};
  mutable std::atomic<int> timings{0}, replays{0}; ///< of launches; those from a graph
  mutable std::atomic<std::size_t> live_bytes{0}, peak_bytes{0};

  /// What compiles by default: the entries, with figures.
  static Result<Image> image_of(const SourceUnit& unit) {
    Image image;
    image.bytes = "code of " + unit.name;
    image.log = "log";
    for (const std::string& entry : unit.entries)
      image.kernels.push_back({entry, 100, 2048, 16, 8});
    return image;
  }

  [[nodiscard]] const Target& target() const override { return target_; }
  [[nodiscard]] std::string name() const override { return name_; }
  [[nodiscard]] std::string id() const override { return id_; }
  [[nodiscard]] std::string driver() const override { return driver_; }
  [[nodiscard]] Result<std::string> compiler() const override { return compiler_; }
  [[nodiscard]] Result<Image> compile(const SourceUnit& unit) const override {
    ++compiles;
    return on_compile(unit);
  }
  [[nodiscard]] Result<std::shared_ptr<const kda::Module>> load(const SourceUnit& unit,
                                                                const Image& image) const override {
    ++loads;
    if (Status ok = on_load(unit, image); !ok) return tl::unexpected(ok.error());
    return std::make_shared<const Loaded>(*this, unit);
  }

  [[nodiscard]] Result<void*> allocate(std::size_t bytes) const override {
    if (bytes > memory_limit) return fail(ErrorCode::out_of_memory, "the scripted memory is full");
    ++allocations;
    ++live;
    void* const data = std::aligned_alloc(256, (bytes + 256) / 256 * 256);
    const std::scoped_lock lock(mutex_);
    sizes_[data] = bytes;
    live_bytes += bytes;
    peak_bytes = std::max(peak_bytes.load(), live_bytes.load());
    return data;
  }
  void release(void* data) const override {
    {
      const std::scoped_lock lock(mutex_);
      live_bytes -= sizes_.at(data);
      sizes_.erase(data);
    }
    --live;
    std::free(data);
  }
  Status copy_to_device(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
    return {};
  }
  Status copy_from_device(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
    return {};
  }
  Status synchronize() const override { return on_synchronize(); }
  Status fill(void* to, std::uint32_t word, std::size_t words, void*) const override {
    // A flush of the L2 needs no reality here.
    if (words * 4 < std::size_t{32} << 20U) std::fill_n(static_cast<std::uint32_t*>(to), words, word);
    return {};
  }
  [[nodiscard]] Result<double> time_us(const std::function<Status(void* stream)>& work,
                                       Replay replay) const override {
    const int before = launches;
    if (Status ok = work(nullptr); !ok) return tl::unexpected(ok.error());
    if (launches == before) return on_fill();
    ++timings;
    if (replay == Replay::graph) ++replays;
    if (Status ok = synchronize(); !ok) return tl::unexpected(ok.error());
    return on_time(last_);
  }
  [[nodiscard]] double seconds() const override { return clock; }

private:
  class Loaded final : public kda::Module {
  public:
    Loaded(const ScriptedBackend& backend, SourceUnit unit) : backend_(backend), unit_(std::move(unit)) {}
    Status launch(const Launch& l, const KernelArgs& args, void*) const override {
      ++backend_.launches;
      if (backend_.remember_last) backend_.last_ = unit_;
      return backend_.on_launch(unit_, l, args);
    }

  private:
    const ScriptedBackend& backend_;
    SourceUnit unit_;
  };

public:
  bool remember_last = false; ///< for on_time; costs allocations

private:
  mutable SourceUnit last_;
  mutable std::mutex mutex_;
  mutable std::map<void*, std::size_t> sizes_;
};

inline constexpr Device kScripted{Device::Kind::emulator, 0};

/// An engine on that backend. No directory: memory only. Warnings go to `log`.
inline Engine engine_on(std::shared_ptr<Backend> backend, const std::filesystem::path& directory = {},
                        std::vector<std::string>* log = nullptr, TuneMode tune = TuneMode::cached) {
  EngineOptions options;
  options.cache_directory = directory;
  options.emulator = std::move(backend);
  options.threads = 2;
  options.tune = tune;
  options.log = [log](std::string_view line) {
    if (log != nullptr) log->emplace_back(line);
  };
  return Engine::create(options).value();
}

/// A small problem of any operation.
inline Problem small_problem(Operation operation = Operation::forward) {
  Problem p;
  p.operation = operation;
  p.key_dim = p.value_dim = 64;
  p.gate = GateKind::bounded;
  p.dt_bias = true;
  return p;
}

} // namespace kda::test
