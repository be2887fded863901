// The emulator as a Backend.
#include "cta.h"
#include "memory.h"
#include "object.h"
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <dlfcn.h>
#include <fmt/format.h>
#include <link.h>
#include <mutex>
#include <numeric>
#include <thread>

namespace kda::emulator {
namespace {

/// CTAs that are not in use; their stacks are worth keeping.
class CtaPool {
public:
  std::unique_ptr<Cta> take() {
    const std::scoped_lock lock(mutex_);
    if (idle_.empty()) return std::make_unique<Cta>();
    std::unique_ptr<Cta> cta = std::move(idle_.back());
    idle_.pop_back();
    return cta;
  }
  void put(std::unique_ptr<Cta> cta) {
    const std::scoped_lock lock(mutex_);
    idle_.push_back(std::move(cta));
  }

private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Cta>> idle_;
};

/// Runs a grid on `threads` threads; the first error ends it.
class Grid {
public:
  Grid(const Job& job, CtaPool& pool)
      : job_(job), pool_(pool), order_(job.grid[0] * job.grid[1] * job.grid[2]) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    if (job.seed == 1) std::reverse(order_.begin(), order_.end());
    if (job.seed > 1) std::shuffle(order_.begin(), order_.end(), std::minstd_rand(job.seed));
  }

  std::string run(int threads) {
    std::vector<std::thread> workers;
    for (std::size_t i = 0; i < std::min(order_.size(), static_cast<std::size_t>(threads)); ++i)
      workers.emplace_back([this] { work(); });
    for (std::thread& worker : workers)
      worker.join();
    return error_;
  }

private:
  void work() {
    std::unique_ptr<Cta> cta = pool_.take();
    const FaultScope faults(*cta, job_);
    for (std::size_t i = next_++; i < order_.size(); i = next_++) {
      std::string error = cta->run(job_, order_[i]);
      if (error.empty()) continue;
      next_ = order_.size();
      const std::scoped_lock lock(mutex_);
      if (error_.empty()) error_ = std::move(error);
    }
    pool_.put(std::move(cta));
  }

  const Job& job_;
  CtaPool& pool_;
  std::vector<std::size_t> order_;
  std::atomic<std::size_t> next_{0};
  std::mutex mutex_;
  std::string error_;
};

/// The loaded segment of an object that holds `address`.
std::pair<const void*, const void*> code_of(const void* address) {
  struct Search {
    std::uintptr_t address, begin, end;
  } search = {reinterpret_cast<std::uintptr_t>(address), 0, 0};
  const auto visit = [](dl_phdr_info* info, std::size_t, void* data) {
    auto& s = *static_cast<Search*>(data);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      if (segment.p_type != PT_LOAD || s.address < begin || s.address - begin >= segment.p_memsz) continue;
      s.begin = begin;
      s.end = begin + segment.p_memsz;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &search);
  return {reinterpret_cast<const void*>(search.begin), reinterpret_cast<const void*>(search.end)};
}

class EmulatedModule : public Module {
public:
  EmulatedModule(void* library, const Options& options, const Target& target, std::shared_ptr<CtaPool> pool)
      : library_(library), options_(options), target_(target), pool_(std::move(pool)) {}
  EmulatedModule(const EmulatedModule&) = delete;
  EmulatedModule& operator=(const EmulatedModule&) = delete;
  ~EmulatedModule() override { dlclose(library_); }

  Status find_entries(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      void* symbol = dlsym(library_, name.c_str());
      if (symbol == nullptr)
        return fail(ErrorCode::load_failed, fmt::format("kernel {} is not in the object", name));
      entries_.push_back(reinterpret_cast<Entry>(symbol));
    }
    names_ = names;
    if (!entries_.empty()) code_ = code_of(reinterpret_cast<const void*>(entries_[0]));
    return {};
  }

  Status launch(const Launch& launch, const KernelArgs& args, void*) const override {
    if (launch.entry < 0 || static_cast<std::size_t>(launch.entry) >= entries_.size())
      return fail(ErrorCode::device_error, fmt::format("there is no kernel {}", launch.entry));
    const auto entry = static_cast<std::size_t>(launch.entry);
    const auto refuse = [&](std::string_view why) {
      return fail(ErrorCode::device_error, fmt::format("launch of {} refused: {}", names_[entry], why));
    };
    if (launch.ctas <= 0 || launch.ctas > kMostCtas)
      return refuse(fmt::format("a grid of {} CTAs; 1 to {} are possible", launch.ctas, kMostCtas));
    if (launch.block == 0 || launch.block > 1024 || launch.block % 32 != 0)
      return refuse(fmt::format("{} threads; whole warps, at most 1024", launch.block));
    if (launch.shared_bytes > static_cast<unsigned>(target_.max_shared_bytes))
      return refuse(fmt::format("{} bytes of shared memory; {} has {}", launch.shared_bytes, target_.arch,
                                target_.max_shared_bytes));
    KernelArgs own = args;
    own.slab = launch.slab;
    Job job{entries_[entry],
            &own,
            {static_cast<unsigned>(launch.ctas), 1, 1},
            static_cast<int>(launch.block),
            launch.shared_bytes,
            options_.seed,
            options_.copies,
            {}};
    if (options_.checked) job.global.emplace();
    job.code = code_.first;
    job.code_end = code_.second;
    job.watchdog_seconds = options_.watchdog_seconds;
    std::string error = Grid(job, *pool_).run(options_.threads);
    if (error.empty()) error = Memory::check();
    if (!error.empty()) return fail(ErrorCode::device_error, fmt::format("{}: {}", names_[entry], error));
    return {};
  }

private:
  void* library_;
  Options options_;
  Target target_;
  std::shared_ptr<CtaPool> pool_;
  std::vector<Entry> entries_;
  std::vector<std::string> names_;
  std::pair<const void*, const void*> code_;
};

class Emulator : public Backend {
public:
  Emulator(Options options, Target target) : options_(std::move(options)), target_(std::move(target)) {}

  const Target& target() const override { return target_; }
  std::string name() const override { return "emulator"; }
  std::string driver() const override { return ""; }
  Result<std::string> compiler() const override { return fmt::format("host {}", __VERSION__); }

  Result<Image> compile(const SourceUnit& unit) const override {
    const auto path = compile_object(unit, options_.optimize, options_.checked);
    if (!path) return tl::unexpected(path.error());
    auto bytes = read_file(*path);
    if (!bytes) return tl::unexpected(bytes.error());
    Image image;
    image.bytes = std::move(*bytes);
    for (const std::string& entry : unit.entries)
      image.kernels.push_back({entry, 0, 0, 0, 0});
    return image;
  }

  Result<std::shared_ptr<const Module>> load(const SourceUnit& unit, const Image& image) const override {
    const auto path = object_file(image.bytes);
    if (!path) return tl::unexpected(path.error());
    void* library = dlopen(path->c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return fail(ErrorCode::load_failed, "the object cannot be loaded", dlerror());
    auto module = std::make_shared<EmulatedModule>(library, options_, target_, pool_);
    if (Status ok = module->find_entries(unit.entries); !ok) return tl::unexpected(ok.error());
    return module;
  }

  Result<void*> allocate(std::size_t bytes) const override {
    void* data = Memory::allocate(bytes, options_.checked);
    if (data == nullptr) return fail(ErrorCode::out_of_memory, fmt::format("no memory for {} bytes", bytes));
    return data;
  }
  void release(void* data) const override { Memory::release(data); }
  Status copy_to_device(void* to, const void* from, std::size_t bytes) const override {
    if (bytes != 0) std::memcpy(to, from, bytes);
    if (options_.checked) Memory::written(to, bytes);
    return {};
  }
  Status copy_from_device(void* to, const void* from, std::size_t bytes) const override {
    if (bytes != 0) std::memcpy(to, from, bytes);
    return {};
  }
  Status synchronize() const override { return {}; }
  Status fill(void* to, std::uint32_t word, std::size_t words, void*) const override {
    std::fill_n(static_cast<std::uint32_t*>(to), words, word);
    if (options_.checked) Memory::written(to, words * sizeof word);
    return {};
  }
  Result<double> time_us(const std::function<Status(void* stream)>& work, Replay) const override {
    const auto begin = std::chrono::steady_clock::now();
    if (Status ok = work(nullptr); !ok) return tl::unexpected(ok.error());
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }

private:
  Options options_;
  Target target_;
  std::shared_ptr<CtaPool> pool_ = std::make_shared<CtaPool>();
};

} // namespace

Result<std::shared_ptr<Backend>> make_backend(const Options& options) {
  auto target = cuda_target(options.arch);
  if (!target) return tl::unexpected(target.error());
  return std::make_shared<Emulator>(options, std::move(*target));
}

} // namespace kda::emulator
