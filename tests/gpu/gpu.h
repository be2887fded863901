#pragma once
// The GPU that the tests of this folder run on. Without one they are skipped, aloud.
#include "call_tensors.h"
#include "cuda_backend.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <cstdlib>
#include <dlfcn.h>

namespace kda::test {

inline std::optional<std::filesystem::path> nvrtc_path() {
  const char* const path = std::getenv("KDA_JIT_NVRTC");
  return path == nullptr ? std::nullopt : std::optional<std::filesystem::path>(path);
}

/// cuda:0 and its compiler, made once; null where either is absent.
inline std::shared_ptr<const Backend> gpu() {
  static const Result<std::shared_ptr<Backend>> backend = []() -> Result<std::shared_ptr<Backend>> {
    const auto driver = CudaDriver::open();
    if (!driver) return tl::unexpected(driver.error());
    auto made = make_cuda_backend(*driver, 0, Nvrtc::open(nvrtc_path()));
    if (!made) return made;
    if (const auto compiler = (*made)->compiler(); !compiler) return tl::unexpected(compiler.error());
    return made;
  }();
  if (!backend)
    WARN("SKIPPED, " << backend.error().message
                     << "; on a machine with a GPU: ctest --test-dir build -L gpu");
  return backend ? *backend : nullptr;
}

/// An empty directory: memory only.
inline Engine gpu_engine(const std::filesystem::path& directory = {}) {
  EngineOptions options;
  options.cache_directory = directory;
  options.nvrtc = nvrtc_path();
  options.log = [](std::string_view) {};
  return Engine::create(std::move(options)).value();
}

inline constexpr Device kGpu{Device::Kind::cuda, 0};

/// The layer of a production model; H query/key heads and as many value heads.
inline Problem production(Operation operation, int heads) {
  Problem p;
  p.operation = operation;
  p.heads = p.value_heads = heads;
  p.gate = GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  p.state_layout = StateLayout::v_k;
  return p;
}

/// Driver functions that only a caller of the library needs.
struct Caller {
  using Handle = CudaDriver::Handle;
  std::shared_ptr<const CudaDriver> driver = CudaDriver::open().value();
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  Handle context = nullptr;

  Caller() {
    REQUIRE(driver->primary_retain(&context, 0) == 0);
    driver->context_push(context);
  }
  ~Caller() { driver->context_pop(&context); }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  template <class F>
  F function(const char* name) const {
    auto f = reinterpret_cast<F>(dlsym(library, name));
    REQUIRE(f != nullptr);
    return f;
  }
  [[nodiscard]] Handle stream() const {
    Handle s = nullptr;
    constexpr unsigned kNonBlocking = 1;
    REQUIRE(driver->stream_create(&s, kNonBlocking) == 0);
    return s;
  }
  void wait(Handle s) const { REQUIRE(function<int (*)(Handle)>("cuStreamSynchronize")(s) == 0); }
};

/// A prepared kernel, its tensors and its workspace.
struct Call {
  Kernel kernel;
  CallTensors tensors;
  std::size_t bytes;
  void* workspace;
  std::shared_ptr<const Backend> backend;

  Call(const Engine& engine, std::shared_ptr<const Backend> on, const Problem& p, const Sizes& s,
       const std::optional<Variant>& variant = std::nullopt, std::uint64_t seed = 1)
      : kernel(engine.prepare(engine.plan(p, kGpu, s, variant).value()).value()), tensors(on),
        bytes(kernel.workspace_bytes(s).value()), workspace(on->allocate(bytes).value()),
        backend(std::move(on)) {
    REQUIRE(tensors.create(p, s, seed));
    REQUIRE(tensors.poison());
    REQUIRE(backend->fill(workspace, 0xFFFFFFFF, bytes / 4, nullptr));
    REQUIRE(backend->synchronize());
  }
  ~Call() { backend->release(workspace); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Status execute(void* stream = nullptr) const {
    return kernel.execute(tensors.args(), workspace, bytes, stream);
  }
  [[nodiscard]] reference::Array output(const std::string& name) const {
    return tensors.output(name).value();
  }
};

/// What a caller captured in a stream, to be launched again.
class Graph {
public:
  using Handle = Caller::Handle;
  explicit Graph(const std::function<Status(Handle stream)>& work) : stream_(caller_.stream()) {
    Handle graph = nullptr;
    constexpr int kGlobal = 0;
    REQUIRE(caller_.driver->stream_begin_capture(stream_, kGlobal) == 0);
    const Status done = work(stream_);
    REQUIRE(caller_.driver->stream_end_capture(stream_, &graph) == 0);
    REQUIRE(done);
    REQUIRE(caller_.driver->graph_instantiate(&executable_, graph, 0) == 0);
  }
  /// Launches it and waits.
  void launch() const {
    REQUIRE(caller_.driver->graph_launch(executable_, stream_) == 0);
    caller_.wait(stream_);
  }

private:
  Caller caller_;
  Handle stream_, executable_ = nullptr;
};

} // namespace kda::test
