#include "cuda_backend.h"
#include <array>
#include <fmt/format.h>
#include <future>
#include <mutex>

namespace kda {
namespace {

/// Makes the device's primary context current for a scope and puts the caller's back. Where it is current
/// already, as in a thread of PyTorch, that costs one look.
class CurrentContext {
public:
  CurrentContext(const CudaDriver& d, CudaDriver::Handle context) : d_(d) {
    CudaDriver::Handle current = nullptr;
    pushed_ = d_.context_current(&current) != 0 || current != context;
    if (pushed_) d_.context_push(context);
  }
  ~CurrentContext() {
    CudaDriver::Handle ignored = nullptr;
    if (pushed_) d_.context_pop(&ignored);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

private:
  const CudaDriver& d_;
  bool pushed_;
};

/// For work that a capture forbids: allocating, loading, waiting. In a scope of relaxed mode this thread may
/// do it while it or another one captures a stream into a graph, and the capture stays valid.
class RelaxedCapture {
public:
  explicit RelaxedCapture(const CudaDriver& d) : d_(d) { d_.exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { d_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

private:
  const CudaDriver& d_;
  int mode_ = CudaDriver::kRelaxed; // then what it was
};

/// Both.
struct BesideCaptures {
  BesideCaptures(const CudaDriver& d, CudaDriver::Handle context) : relaxed(d), current(d, context) {}
  RelaxedCapture relaxed;
  CurrentContext current;
};

class CudaModule final : public Module {
public:
  CudaModule(std::shared_ptr<const CudaDriver> d, CudaDriver::Handle context)
      : d_(std::move(d)), context_(context) {}
  ~CudaModule() override {
    const BesideCaptures current(*d_, context_);
    for (CudaDriver::Handle library : libraries_)
      d_->library_unload(library);
  }
  CudaModule(const CudaModule&) = delete;
  CudaModule& operator=(const CudaModule&) = delete;

  /// `cubin` holds the kernel `entry`, the next one of Launch::entry.
  Status add(const std::string& cubin, const std::string& entry, CudaDriver::Device device, int max_shared) {
    CudaDriver::Handle library = nullptr, kernel = nullptr, function = nullptr;
    if (Status ok =
            d_->check(d_->library_load(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                      "cuLibraryLoadData");
        !ok)
      return ok;
    libraries_.push_back(library);
    if (Status ok = d_->check(d_->library_kernel(&kernel, library, entry.c_str()), "cuLibraryGetKernel"); !ok)
      return ok;
    // The limit is raised once, here: execute then only launches.
    if (Status ok =
            d_->check(d_->kernel_set_attribute(CudaDriver::kMaxDynamicShared, max_shared, kernel, device),
                      "cuKernelSetAttribute");
        !ok)
      return ok;
    if (Status ok = d_->check(d_->kernel_function(&function, kernel), "cuKernelGetFunction"); !ok) return ok;
    functions_.push_back(function);
    return {};
  }

  Status launch(const Launch& l, const KernelArgs& args, void* stream) const override {
    const CurrentContext current(*d_, context_);
    KernelArgs own = args;
    return launch_current(l, own, stream);
  }
  Status launch_all(const LaunchList& list, const KernelArgs& args, void* stream) const override {
    const CurrentContext current(*d_, context_);
    KernelArgs own = args;
    for (int i = 0; i < list.count; ++i)
      if (Status ok = launch_current(list.items[static_cast<std::size_t>(i)], own, stream); !ok) return ok;
    return {};
  }

private:
  Status launch_current(const Launch& l, KernelArgs& args, void* stream) const {
    args.slab = l.slab;
    std::array<void*, 1> parameters{&args};
    CudaDriver::LaunchAttribute overlap;
    overlap.id = CudaDriver::kStreamSerialization;
    overlap.value[0] = 1;
    CudaDriver::LaunchConfig config;
    config.grid[0] = static_cast<unsigned>(l.ctas);
    config.block[0] = l.block;
    config.shared_bytes = l.shared_bytes;
    config.stream = stream;
    config.attributes = &overlap;
    config.count = l.overlap && d_->version >= CudaDriver::kOverlapInGraphs ? 1 : 0;
    const int code =
        d_->launch(&config, functions_[static_cast<std::size_t>(l.entry)], parameters.data(), nullptr);
    return code == 0 ? Status{} : d_->check(code, "cuLaunchKernelEx");
  }

  std::shared_ptr<const CudaDriver> d_;
  CudaDriver::Handle context_;
  std::vector<CudaDriver::Handle> libraries_, functions_;
};

class CudaBackend final : public Backend {
public:
  CudaBackend(std::shared_ptr<const CudaDriver> d, Result<std::shared_ptr<const Nvrtc>> nvrtc)
      : d_(std::move(d)), nvrtc_(std::move(nvrtc)) {}

  Status open(int index) {
    const RelaxedCapture relaxed(*d_);
    int count = 0;
    d_->device_count(&count);
    if (index < 0 || index >= count)
      return fail(ErrorCode::unavailable,
                  fmt::format("there is no cuda:{}; {} GPUs are visible", index, count));
    if (Status ok = d_->check(d_->device_get(&device_, index), "cuDeviceGet"); !ok) return ok;
    std::array<char, 128> name{};
    d_->device_name(name.data(), static_cast<int>(name.size()), device_);
    name_ = name.data();
    std::array<unsigned char, 16> uuid{};
    if (Status ok = d_->check(d_->device_uuid(uuid.data(), device_), "cuDeviceGetUuid"); !ok) return ok;
    id_ = fmt::format("GPU-{:02x}", fmt::join(uuid, ""));
    const auto attribute = [&](int which) {
      int value = 0;
      d_->device_attribute(&value, which, device_);
      return value;
    };
    const int major = attribute(CudaDriver::kMajor), minor = attribute(CudaDriver::kMinor);
    target_.compute_capability = 10 * major + minor;
    // The architecture-specific form carries wgmma and tcgen05; consumer parts before Hopper have none.
    target_.arch = fmt::format("sm_{}{}", target_.compute_capability, major >= 9 ? "a" : "");
    target_.multiprocessors = attribute(CudaDriver::kMultiprocessors);
    target_.max_shared_bytes = attribute(CudaDriver::kSharedOptin);
    target_.shared_bytes_per_sm = attribute(CudaDriver::kSharedPerSm);
    target_.registers_per_sm = attribute(CudaDriver::kRegistersPerSm);
    // A context takes a third of a second, and a compile does not need one: they run side by side.
    opening_ = std::async(std::launch::async, [this] { return open_context(); }).share();
    return {};
  }

  [[nodiscard]] const Target& target() const override { return target_; }
  [[nodiscard]] std::string name() const override { return name_; }
  [[nodiscard]] std::string id() const override { return id_; }
  [[nodiscard]] std::string driver() const override {
    return fmt::format("{}.{}", d_->version / 1000, d_->version % 1000 / 10);
  }
  [[nodiscard]] Result<std::string> compiler() const override {
    if (!nvrtc_) return tl::unexpected(nvrtc_.error());
    return (*nvrtc_)->identity();
  }
  [[nodiscard]] Result<Image> compile(const SourceUnit& unit) const override {
    if (!nvrtc_) return tl::unexpected(nvrtc_.error());
    return (*nvrtc_)->compile(unit);
  }
  [[nodiscard]] Result<std::shared_ptr<const Module>> load(const SourceUnit& unit,
                                                           const Image& image) const override {
    const auto refused = [&](const std::string& why) {
      return fail(ErrorCode::load_failed,
                  fmt::format("the driver refuses the image of {} for {}", unit.name, target_.arch), why);
    };
    const auto cubins = unpack_cubins(image.bytes);
    if (!cubins) return refused(cubins.error().message);
    if (cubins->size() != unit.entries.size())
      return refused(fmt::format("it holds {} kernels of {}", cubins->size(), unit.entries.size()));
    if (Status ok = opened(); !ok) return tl::unexpected(ok.error());
    const BesideCaptures current(*d_, context_);
    auto module = std::make_shared<CudaModule>(d_, context_);
    for (std::size_t i = 0; i < cubins->size(); ++i)
      if (Status ok = module->add((*cubins)[i], unit.entries[i], device_, target_.max_shared_bytes); !ok)
        return refused(ok.error().message);
    return std::shared_ptr<const Module>(std::move(module));
  }

  [[nodiscard]] Result<void*> allocate(std::size_t bytes) const override {
    if (Status ok = opened(); !ok) return tl::unexpected(ok.error());
    const BesideCaptures current(*d_, context_);
    CudaDriver::DevicePointer p = 0;
    if (Status ok = d_->check(d_->allocate(&p, std::max<std::size_t>(bytes, 256)), "cuMemAlloc"); !ok)
      return fail(ok.error().code,
                  fmt::format("cannot allocate {} bytes on {}: {}", bytes, name_, ok.error().message));
    return reinterpret_cast<void*>(p);
  }
  void release(void* p) const override {
    const BesideCaptures current(*d_, context_);
    d_->release(reinterpret_cast<CudaDriver::DevicePointer>(p));
  }
  Status copy_to_device(void* to, const void* from, std::size_t bytes) const override {
    if (Status ok = opened(); !ok) return ok;
    const BesideCaptures current(*d_, context_);
    return finish_copy(
        d_->copy_to_device(reinterpret_cast<CudaDriver::DevicePointer>(to), from, bytes, copies_),
        "cuMemcpyHtoDAsync");
  }
  Status copy_from_device(void* to, const void* from, std::size_t bytes) const override {
    if (Status ok = opened(); !ok) return ok;
    const BesideCaptures current(*d_, context_);
    return finish_copy(
        d_->copy_to_host(to, reinterpret_cast<CudaDriver::DevicePointer>(from), bytes, copies_),
        "cuMemcpyDtoHAsync");
  }
  Status synchronize() const override {
    if (Status ok = opened(); !ok) return ok;
    const BesideCaptures current(*d_, context_);
    return d_->check(d_->context_synchronize(), "cuCtxSynchronize");
  }
  [[nodiscard]] void* stream() const override { return opened() ? stream_ : nullptr; }
  Status wait(void* stream) const override {
    if (Status ok = opened(); !ok) return ok;
    const BesideCaptures current(*d_, context_);
    return d_->check(d_->stream_synchronize(stream), "cuStreamSynchronize");
  }
  [[nodiscard]] bool capturing(void* stream) const override {
    if (!opened()) return false;
    const CurrentContext current(*d_, context_);
    int status = 0; // the default stream answers with an error while it must not be used
    return d_->stream_is_capturing(stream, &status) != 0 || status != 0;
  }
  Status fill(void* to, std::uint32_t word, std::size_t words, void* stream) const override {
    if (Status ok = opened(); !ok) return ok;
    const CurrentContext current(*d_, context_);
    return d_->check(d_->fill_words(reinterpret_cast<CudaDriver::DevicePointer>(to), word, words, stream),
                     "cuMemsetD32");
  }
  [[nodiscard]] Result<double> time_us(const std::function<Status(void* stream)>& work,
                                       Replay replay) const override {
    if (Status ok = opened(); !ok) return tl::unexpected(ok.error());
    const BesideCaptures current(*d_, context_);
    const std::scoped_lock lock(timing_);
    Recorded recorded(*d_);
    if (replay == Replay::graph)
      if (const Status ok = recorded.capture(stream_, work); !ok) return tl::unexpected(ok.error());
    const Event begin(*d_), end(*d_);
    d_->event_record(begin.handle, stream_);
    Status ok = replay == Replay::graph ? recorded.launch(stream_) : work(stream_);
    d_->event_record(end.handle, stream_);
    if (ok) ok = d_->check(d_->event_synchronize(end.handle), "cuEventSynchronize");
    float ms = 0;
    if (ok) ok = d_->check(d_->event_elapsed(&ms, begin.handle, end.handle), "cuEventElapsedTime");
    if (!ok) return tl::unexpected(ok.error());
    return static_cast<double>(ms) * 1e3;
  }

private:
  struct Event {
    explicit Event(const CudaDriver& driver) : d(driver) { d.event_create(&handle, 0); }
    ~Event() { d.event_destroy(handle); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    const CudaDriver& d;
    CudaDriver::Handle handle = nullptr;
  };

  /// Work as a graph, ready on the device.
  class Recorded {
  public:
    explicit Recorded(const CudaDriver& d) : d_(d) {}
    ~Recorded() {
      if (executable_ != nullptr) d_.graph_executable_destroy(executable_);
      if (graph_ != nullptr) d_.graph_destroy(graph_);
    }
    Recorded(const Recorded&) = delete;
    Recorded& operator=(const Recorded&) = delete;

    Status capture(CudaDriver::Handle stream, const std::function<Status(void* stream)>& work) {
      if (Status ok = d_.check(d_.stream_begin_capture(stream, CudaDriver::kRelaxed), "cuStreamBeginCapture");
          !ok)
        return ok;
      const Status ok = work(stream);
      const Status ended = d_.check(d_.stream_end_capture(stream, &graph_), "cuStreamEndCapture");
      if (!ok) return ok;
      if (!ended) return ended;
      if (Status made = d_.check(d_.graph_instantiate(&executable_, graph_, 0), "cuGraphInstantiate"); !made)
        return made;
      return d_.check(d_.graph_upload(executable_, stream), "cuGraphUpload");
    }
    Status launch(CudaDriver::Handle stream) const {
      return d_.check(d_.graph_launch(executable_, stream), "cuGraphLaunch");
    }

  private:
    const CudaDriver& d_;
    CudaDriver::Handle graph_ = nullptr, executable_ = nullptr;
  };

  Status open_context() {
    const RelaxedCapture relaxed(*d_);
    if (Status ok = d_->check(d_->primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain"); !ok)
      return ok;
    // Streams of our own, that wait for no other: the default stream would break a capture of a blocking
    // stream.
    const CurrentContext current(*d_, context_);
    for (CudaDriver::Handle* stream : {&stream_, &copies_})
      if (Status ok = d_->check(d_->stream_create(stream, CudaDriver::kNonBlockingStream), "cuStreamCreate");
          !ok)
        return ok;
    return {};
  }
  /// Whether there is a context; waits for it.
  [[nodiscard]] const Status& opened() const { return opening_.get(); }

  Status finish_copy(int code, const char* call) const {
    if (Status ok = d_->check(code, call); !ok) return ok;
    return d_->check(d_->stream_synchronize(copies_), call);
  }

  std::shared_ptr<const CudaDriver> d_;
  Result<std::shared_ptr<const Nvrtc>> nvrtc_;
  CudaDriver::Device device_ = 0;
  CudaDriver::Handle context_ = nullptr;                   ///< this and the streams: once opened
  CudaDriver::Handle stream_ = nullptr, copies_ = nullptr; ///< timed and tuners' work; copies
  mutable std::mutex timing_;                              ///< of stream_ from its first event to its last
  Target target_;
  std::string name_, id_;
  std::shared_future<Status> opening_; ///< last: waits for its thread before the rest goes
};

} // namespace

Result<std::shared_ptr<Backend>> make_cuda_backend(std::shared_ptr<const CudaDriver> driver, int index,
                                                   Result<std::shared_ptr<const Nvrtc>> nvrtc) {
  auto backend = std::make_shared<CudaBackend>(std::move(driver), std::move(nvrtc));
  if (Status ok = backend->open(index); !ok) return tl::unexpected(ok.error());
  return std::shared_ptr<Backend>(std::move(backend));
}

} // namespace kda
