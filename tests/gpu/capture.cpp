// While a stream is captured into a CUDA graph: what is refused, what may be done beside it, and that the
// capture stays valid. And samples that are replayed from a graph.
#include "gpu.h"
#include <atomic>
#include <cstdlib>
#include <fmt/format.h>
#include <thread>

using namespace kda;
using namespace kda::test;

namespace {

const Problem kProblem = production(Operation::forward, 4);
constexpr Sizes kSizes{1, 1000, 1};
using Handle = Caller::Handle;

/// A capture in the strictest mode, of a stream of the caller's; then a graph.
class Capture {
public:
  Capture(const Caller& caller, unsigned stream_flags) : d_(*caller.driver) {
    REQUIRE(d_.stream_create(&stream, stream_flags) == 0);
    constexpr int kGlobal = 0;
    REQUIRE(d_.stream_begin_capture(stream, kGlobal) == 0);
  }
  ~Capture() {
    if (executable_ != nullptr) d_.graph_executable_destroy(executable_);
    if (graph_ != nullptr) d_.graph_destroy(graph_);
    d_.stream_destroy(stream);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  /// Fails when anything has made the capture invalid.
  void end() {
    REQUIRE(d_.stream_end_capture(stream, &graph_) == 0);
    REQUIRE(d_.graph_instantiate(&executable_, graph_, 0) == 0);
  }
  void replay() const {
    REQUIRE(d_.graph_launch(executable_, stream) == 0);
    REQUIRE(d_.stream_synchronize(stream) == 0);
  }
  Handle stream = nullptr;

private:
  const CudaDriver& d_;
  Handle graph_ = nullptr, executable_ = nullptr;
};

/// The outputs of a replay are those of an eager call.
void check_replay(const Capture& capture, const Call& call, const Backend& backend) {
  REQUIRE(call.tensors.poison());
  REQUIRE(backend.wait(backend.stream()));
  capture.replay();
  const auto replayed = call.output("o"), state = call.output("final_state");
  REQUIRE(call.tensors.poison());
  REQUIRE(backend.wait(backend.stream()));
  REQUIRE(call.execute(backend.stream()));
  REQUIRE(backend.wait(backend.stream()));
  CHECK(replayed == call.output("o"));
  CHECK(state == call.output("final_state"));
}

} // namespace

TEST_CASE("in a capture a cold execute and run are refused as not prepared, and the capture stays valid",
          "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, kSizes);
  const Caller caller;
  for (const unsigned flags : {CudaDriver::kNonBlockingStream, 0U}) {
    CAPTURE(flags);
    Capture capture(caller, flags);
    CHECK(backend->capturing(capture.stream));
    const Status cold = Kernel().execute(call.tensors.args(), call.workspace, call.bytes, capture.stream);
    REQUIRE_FALSE(cold);
    CHECK(cold.error().code == ErrorCode::not_prepared);
    const Status run = engine.run(kProblem, kGpu, kSizes, call.tensors.args(), capture.stream);
    REQUIRE_FALSE(run);
    CHECK(run.error().code == ErrorCode::not_prepared);
    REQUIRE(call.execute(capture.stream));
    capture.end();
    CHECK_FALSE(backend->capturing(capture.stream));
    check_replay(capture, call, *backend);
  }
}

TEST_CASE("the thread that captures may prepare, allocate and tune, and the capture stays valid", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, kSizes);
  const Problem decode = production(Operation::recurrent, 3);
  const Caller caller;
  Capture capture(caller, CudaDriver::kNonBlockingStream);
  REQUIRE(engine.prepare(engine.plan(decode, kGpu, {1, 1, 1}).value())); // compiles and loads
  void* const memory = backend->allocate(1U << 20U).value();
  std::vector<std::byte> bytes(1U << 20U);
  CHECK(backend->copy_to_device(memory, bytes.data(), bytes.size()));
  CHECK(backend->copy_from_device(bytes.data(), memory, bytes.size()));
  backend->release(memory);
  CHECK(engine.tune(decode, kGpu, {1, 1, 1}));
  REQUIRE(call.execute(capture.stream));
  capture.end();
  check_replay(capture, call, *backend);
}

TEST_CASE("what another thread does meanwhile leaves a capture valid", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, kSizes);
  const Caller caller;
  for (const unsigned flags : {CudaDriver::kNonBlockingStream, 0U}) {
    CAPTURE(flags);
    Capture capture(caller, flags);
    std::string failed;
    std::jthread([&] { // assertions belong to the test's thread
      const auto expect = [&](const char* what, const auto& result) {
        if (!result && failed.empty()) failed = fmt::format("{}: {}", what, result.error().message);
      };
      const Engine other = gpu_engine(); // cold: its backend, compiles and loads
      const Problem decode = production(Operation::recurrent, 5);
      const auto plan = other.plan(decode, kGpu, {2, 3, 2});
      expect("plan", plan);
      if (plan) expect("prepare", other.prepare(*plan));
      expect("tune", other.tune(decode, kGpu, {2, 3, 2}));
      const auto memory = backend->allocate(1U << 20U);
      expect("allocate", memory);
      if (!memory) return;
      std::vector<std::byte> bytes(1U << 20U);
      expect("copy to", backend->copy_to_device(*memory, bytes.data(), bytes.size()));
      expect("copy from", backend->copy_from_device(bytes.data(), *memory, bytes.size()));
      for (const Replay replay : {Replay::eager, Replay::graph})
        expect("time",
               backend->time_us([&](void* stream) { return backend->fill(*memory, 0, 1U << 18U, stream); },
                                replay));
      expect("wait", backend->wait(backend->stream()));
      backend->release(*memory);
    })
        .join();
    CHECK(failed.empty());
    INFO(failed);
    REQUIRE(failed == "");
    REQUIRE(call.execute(capture.stream));
    capture.end();
    check_replay(capture, call, *backend);
  }
}

TEST_CASE("after preparing, a hundred calls are captured without a compile", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  std::vector<std::unique_ptr<Call>> calls;
  for (const Operation operation : {Operation::forward, Operation::recurrent})
    for (const int heads : {2, 5}) // of one text, of two workspaces
      calls.push_back(std::make_unique<Call>(engine, backend, production(operation, heads), Sizes{2, 70, 2}));
  const std::int64_t compiles = engine.compile_count();
  const Caller caller;
  Capture capture(caller, CudaDriver::kNonBlockingStream);
  for (std::size_t i = 0; i < 100; ++i)
    REQUIRE(calls[i % calls.size()]->execute(capture.stream));
  capture.end();
  CHECK(engine.compile_count() == compiles);
  for (const auto& call : calls)
    check_replay(capture, *call, *backend);
}

TEST_CASE("a replay from a graph takes the time of a launch, within a factor of three", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, {1, 4096, 1});
  double best[2] = {1e9, 1e9};
  for (int i = 0; i < 20; ++i)
    for (const Replay replay : {Replay::eager, Replay::graph}) {
      const auto us = backend->time_us([&](void* stream) { return call.execute(stream); }, replay);
      REQUIRE(us);
      double& least = best[replay == Replay::graph ? 1 : 0];
      least = std::min(least, *us);
    }
  fmt::print("forward, T=4096, H=4: {:.1f} us launched, {:.1f} us replayed\n", best[0], best[1]);
  CHECK(best[1] < 3 * best[0]);
  CHECK(best[0] < 3 * best[1]);
}

TEST_CASE("a flush leaves nothing in the L2: a kernel of little arithmetic is slower after it", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  Problem p = production(Operation::gate, 8);
  const Sizes sizes{1, 4096, 1}; // 8 MB in, 16 MB out: both fit in the L2
  double us[2] = {};
  for (const bool warm : {false, true}) {
    EngineOptions options;
    options.cache_directory = "";
    options.nvrtc = nvrtc_path();
    options.log = [](std::string_view) {};
    options.tune_timing.warm_l2 = warm;
    const TuneReport report = Engine::create(options).value().tune(p, kGpu, sizes).value();
    us[warm ? 1 : 0] = 1e9;
    for (const TuneRow& row : report.rows)
      if (row.status == "ok") us[warm ? 1 : 0] = std::min(us[warm ? 1 : 0], row.median_us);
  }
  fmt::print("gate, T=4096, H=8: {:.1f} us after a flush, {:.1f} us with a warm L2\n", us[0], us[1]);
  CHECK(us[0] > 1.1 * us[1]);
}

TEST_CASE("in a process of its own: an illegal address stays with every later wait", "[.sticky]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  SourceUnit unit;
  unit.name = "illegal.cu";
  unit.main = "extern \"C\" __global__ void illegal() { *reinterpret_cast<volatile int*>(16) = 1; }\n";
  unit.options = {"--gpu-architecture=" + backend->target().arch};
  unit.entries = {"illegal"};
  const auto image = backend->compile(unit);
  if (!image) FAIL(image.error().message << image.error().context);
  const auto module = backend->load(unit, *image).value();
  Launch launch;
  launch.block = 32;
  CHECK(backend->wait(backend->stream()));
  (void)module->launch(launch, KernelArgs{}, backend->stream());
  // What the tuner takes for a fault: an error that a second wait still reports.
  for (int i = 0; i < 2; ++i) {
    const Status status = backend->wait(backend->stream());
    REQUIRE_FALSE(status);
    CHECK(status.error().code == ErrorCode::device_error);
  }
}

TEST_CASE("an error that stays is told from one that passes", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  // NOLINTNEXTLINE(concurrency-mt-unsafe,cert-env33-c): the device of this process must stay whole
  CHECK(std::system("/proc/$PPID/exe '[.sticky]' >/dev/null") == 0);
  const Variant v = choose(kProblem, backend->target(), kSizes).value();
  const SourceUnit unit = emit(kProblem, v, backend->target()).value();
  const auto module = backend->load(unit, backend->compile(unit).value()).value();
  Launch too_large;
  too_large.block = 4096;
  const Status status = module->launch(too_large, KernelArgs{}, backend->stream());
  REQUIRE_FALSE(status);
  CHECK(status.error().code == ErrorCode::device_error);
  CHECK(backend->wait(backend->stream()));
}
