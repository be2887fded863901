#include "host_backend.h"
#include "codegen/reference_unit.h"
#include "host_reference.h"
#include "llvm_jit.h"
#include "thread_pool.h"
#include <algorithm>
#include <chrono>
#include <cstring>
#include <fmt/format.h>
#include <new>

namespace kda {
namespace {

/// Tensors and the kernels' vectors: a cache line, and what the workspace contract asks for.
constexpr std::align_val_t kAlignment{256};

/// A unit without text has an image without code.
constexpr const char* kReferenceImage = "float64 reference";

class HostModule : public Module {
public:
  HostModule(std::unique_ptr<host::LoadedObject> object, std::shared_ptr<ThreadPool> pool)
      : object_(std::move(object)), pool_(std::move(pool)) {}

  Status launch(const Launch& launch, const KernelArgs& args, void*) const override {
    if (launch.entry < 0 || static_cast<std::size_t>(launch.entry) >= object_->entries.size())
      return fail(ErrorCode::internal, fmt::format("there is no kernel {}", launch.entry));
    using Entry = void (*)(const KernelArgs*, std::int64_t begin, std::int64_t end);
    const auto entry = reinterpret_cast<Entry>(object_->entries[static_cast<std::size_t>(launch.entry)]);
    pool_->run(launch.ctas, [&](std::int64_t begin, std::int64_t end) { entry(&args, begin, end); });
    return {};
  }

private:
  std::unique_ptr<host::LoadedObject> object_;
  std::shared_ptr<ThreadPool> pool_;
};

class HostBackend : public Backend {
public:
  HostBackend(Target target, int threads)
      : target_(std::move(target)), pool_(std::make_shared<ThreadPool>(threads)) {
    target_.multiprocessors = threads;
  }

  const Target& target() const override { return target_; }
  std::string name() const override { return fmt::format("{} x{}", target_.arch, target_.multiprocessors); }
  std::string driver() const override { return ""; }
  Result<std::string> compiler() const override { return host::compiler_version(); }

  Result<Image> compile(const SourceUnit& unit) const override {
    if (reference_problem(unit)) {
      Image image;
      image.bytes = kReferenceImage;
      image.log =
          "the host has no kernel for this operation: it runs as the float64 reference, on one thread";
      return image;
    }
    auto bytes = host::compile_object(unit);
    if (!bytes) return tl::unexpected(bytes.error());
    Image image;
    image.bytes = std::move(*bytes);
    for (const std::string& entry : unit.entries)
      image.kernels.push_back({entry, 0, 0, 0, 0});
    return image;
  }
  Result<std::shared_ptr<const Module>> load(const SourceUnit& unit, const Image& image) const override {
    if (const auto problem = reference_problem(unit)) {
      if (image.bytes != kReferenceImage)
        return fail(ErrorCode::load_failed, "this is not the image of the float64 reference");
      return make_reference_module(*problem);
    }
    auto object = host::load_object(unit, image.bytes);
    if (!object) return tl::unexpected(object.error());
    return std::make_shared<HostModule>(std::move(*object), pool_);
  }

  Result<void*> allocate(std::size_t bytes) const override {
    void* data = ::operator new(std::max<std::size_t>(bytes, 1), kAlignment, std::nothrow);
    if (data == nullptr) return fail(ErrorCode::out_of_memory, fmt::format("no memory for {} bytes", bytes));
    return data;
  }
  void release(void* data) const override { ::operator delete(data, kAlignment); }
  Status copy_to_device(void* to, const void* from, std::size_t bytes) const override {
    if (bytes != 0) std::memcpy(to, from, bytes);
    return {};
  }
  Status copy_from_device(void* to, const void* from, std::size_t bytes) const override {
    return copy_to_device(to, from, bytes);
  }
  Status synchronize() const override { return {}; } // a launch is complete on return
  Status fill(void* to, std::uint32_t word, std::size_t words, void*) const override {
    std::fill_n(static_cast<std::uint32_t*>(to), words, word);
    return {};
  }
  Result<double> time_us(const std::function<Status(void* stream)>& work, Replay) const override {
    const auto begin = std::chrono::steady_clock::now();
    if (Status ok = work(nullptr); !ok) return tl::unexpected(ok.error());
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }

private:
  Target target_;
  std::shared_ptr<ThreadPool> pool_;
};

} // namespace

Result<std::shared_ptr<Backend>> make_host_backend(int threads) {
  auto target = host::detect_target();
  if (!target) return tl::unexpected(target.error());
  return std::make_shared<HostBackend>(std::move(*target), std::max(threads, 1));
}

} // namespace kda
