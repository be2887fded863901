// execute allocates nothing and takes no lock, on any backend that is not the emulator.
#include "call_tensors.h"
#include "cuda_backend.h"
#include "cuda_driver.h"
#include "host_backend.h"
#include "nvrtc.h"
#include "probe.h"
#include "scripted_backend.h"
#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <mutex>
#include <shared_mutex>
#include <thread>

using namespace kda;
using namespace kda::test;

namespace {

template <class F>
Counts counts_of(const F& f) {
  Probe probe;
  f();
  return probe.stop();
}

/// A kernel, the tensors and the workspace of a call to it.
struct Call {
  Kernel kernel;
  std::shared_ptr<ScriptedBackend> memory = std::make_shared<ScriptedBackend>();
  CallTensors tensors{memory};
  void* workspace;
  std::size_t bytes;

  Call(const Engine& engine, Device device, const Problem& p, const Sizes& s)
      : kernel(engine.prepare(engine.plan(p, device, s).value()).value()),
        bytes(kernel.workspace_bytes(s).value()) {
    workspace = memory->allocate(bytes + 1).value();
    REQUIRE(tensors.create(p, s, 1));
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() { memory->release(workspace); }

  void check() const {
    Status status;
    const Counts counts = counts_of([&] { status = kernel.execute(tensors.args(), workspace, bytes); });
    INFO((status ? std::string() : status.error().message));
    REQUIRE(status);
    CHECK(counts.allocations == 0);
    CHECK(counts.releases == 0);
    CHECK(counts.locks == 0);
  }
};

/// Every operation that has launches, on packed and on fixed batches.
std::vector<Problem> problems() {
  std::vector<Problem> all;
  for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                    Operation::gate, Operation::gate_backward})
    for (const bool varlen : {false, true}) {
      Problem p = small_problem(operation);
      p.varlen = varlen;
      all.push_back(p);
    }
  return all;
}
Sizes sizes_of(const Problem& p) {
  return p.varlen ? Sizes{1, 300, 3} : Sizes{2, 150, 2};
}

int driver_launches = 0;

/// A driver that says yes.
std::shared_ptr<CudaDriver> driver() {
  auto d = std::make_shared<CudaDriver>();
  d->version = 13000;
  d->error_name = [](int, const char**) { return 0; };
  d->device_count = [](int* n) { return (*n = 1) - 1; };
  d->device_get = [](int* device, int) { return *device = 0; };
  d->device_name = [](char* name, int, int) { return (*name = 0) + 0; };
  d->device_uuid = [](unsigned char*, int) { return 0; };
  d->device_attribute = [](int* value, int which, int) {
    *value = which == CudaDriver::kMajor             ? 9
             : which == CudaDriver::kMultiprocessors ? 132
             : which == CudaDriver::kMinor           ? 0
                                                     : 232448;
    return 0;
  };
  d->primary_retain = [](CudaDriver::Handle*, int) { return 0; };
  // Another context is current: the longer way.
  d->context_current = [](CudaDriver::Handle* context) {
    return (*context = &driver_launches) == nullptr ? 1 : 0;
  };
  d->context_push = [](CudaDriver::Handle) { return 0; };
  d->context_pop = [](CudaDriver::Handle*) { return 0; };
  d->exchange_capture_mode = [](int*) { return 0; };
  d->stream_create = [](CudaDriver::Handle*, unsigned) { return 0; };
  d->stream_destroy = [](CudaDriver::Handle) { return 0; };
  d->library_load = [](CudaDriver::Handle*, const void*, const int*, void* const*, unsigned, const int*,
                       void* const*, unsigned) { return 0; };
  d->library_unload = [](CudaDriver::Handle) { return 0; };
  d->library_kernel = [](CudaDriver::Handle*, CudaDriver::Handle, const char*) { return 0; };
  d->kernel_function = [](CudaDriver::Handle*, CudaDriver::Handle) { return 0; };
  d->kernel_set_attribute = [](int, int, CudaDriver::Handle, int) { return 0; };
  d->launch = [](const CudaDriver::LaunchConfig*, CudaDriver::Handle, void**, void**) {
    ++driver_launches;
    return 0;
  };
  return d;
}

} // namespace

TEST_CASE("the probe sees what it is for") {
  void* volatile memory = nullptr; // a pair that nobody looks at is optimised away
  CHECK(counts_of([&] { memory = new int(1); }).allocations == 1);
  CHECK(counts_of([&] { delete static_cast<int*>(memory); }).releases == 1);
  CHECK(counts_of([&] { memory = std::aligned_alloc(64, 64); }).allocations == 1);
  CHECK(counts_of([&] { std::free(memory); }).releases == 1);
  CHECK(counts_of([] { (void)fmt::format("{:>200}", 1); }).allocations > 0);
  std::mutex mutex;
  CHECK(counts_of([&] { const std::scoped_lock lock(mutex); }).locks == 1);
  std::shared_mutex shared;
  CHECK(counts_of([&] { const std::shared_lock lock(shared); }).locks == 1);
  CHECK(counts_of([&] { const std::unique_lock lock(shared); }).locks == 1);
  std::once_flag once;
  CHECK(counts_of([&] { std::call_once(once, [] {}); }).locks > 0);
  CHECK(counts_of([] {}).allocations == 0);
}

TEST_CASE("execute takes no lock and allocates nothing: every operation on a scripted device") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = engine_on(backend);
  for (const Problem& p : problems()) {
    INFO(to_string(p));
    const Call call(engine, kScripted, p, sizes_of(p));
    const int before = backend->launches;
    call.check(); // also the first time
    call.check();
    CHECK(backend->launches > before);
  }
}

TEST_CASE("execute takes no lock and allocates nothing: while other threads prepare") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = engine_on(backend);
  const Problem p = small_problem(Operation::recurrent);
  const Call call(engine, kScripted, p, sizes_of(p));
  const std::jthread other([&](const std::stop_token& stop) {
    for (int dim = 16; !stop.stop_requested(); dim = dim == 128 ? 16 : dim + 16) {
      Problem q = p;
      q.key_dim = q.value_dim = dim;
      (void)engine.prepare(engine.plan(q, kScripted, sizes_of(q)).value());
    }
  });
  for (int i = 0; i < 50; ++i)
    call.check();
}

TEST_CASE("execute takes no lock and allocates nothing: the CUDA backend on a driver that says yes") {
  const char* const path = std::getenv("KDA_JIT_NVRTC");
  auto nvrtc = Nvrtc::open(path == nullptr ? std::nullopt : std::optional<std::filesystem::path>(path));
  if (!nvrtc) {
    WARN("SKIPPED, no NVRTC: " << nvrtc.error().message);
    return;
  }
  const Engine engine = engine_on(make_cuda_backend(driver(), 0, nvrtc).value());
  for (const Operation operation : {Operation::recurrent, Operation::gate}) {
    const Problem p = small_problem(operation);
    const Call call(engine, kScripted, p, sizes_of(p));
    driver_launches = 0;
    call.check();
    CHECK(driver_launches > 0);
  }
}

TEST_CASE("execute allocates nothing on the host") {
  // Its threads park in mutexes between launches: locks belong to it.
  if (!make_host_backend(1)) {
    WARN("SKIPPED: this build has no host backend");
    return;
  }
  EngineOptions options;
  options.cache_directory = "";
  options.threads = 1;
  const Engine engine = Engine::create(options).value();
  const Problem p = small_problem(Operation::recurrent);
  const Call call(engine, Device::host(), p, sizes_of(p));
  Status status;
  const Counts counts =
      counts_of([&] { status = call.kernel.execute(call.tensors.args(), call.workspace, call.bytes); });
  REQUIRE(status);
  CHECK(counts.allocations == 0);
}
