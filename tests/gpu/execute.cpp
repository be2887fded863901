// execute on a GPU: its cost on the host, CUDA graphs, streams and threads.
#include "gpu.h"
#include <algorithm>
#include <array>
#include <chrono>
#include <fmt/format.h>
#include <thread>

using namespace kda;
using namespace kda::test;

namespace {

const Problem kProblem = production(Operation::forward, 4);
constexpr Sizes kSizes{1, 1000, 1};

} // namespace

TEST_CASE("execute costs the host 10 microseconds at most", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  Problem decode = production(Operation::recurrent, 32);
  for (const auto& [p, s] : {std::pair{kProblem, kSizes}, {decode, Sizes{1, 1, 1}}}) {
    const Call call(engine, backend, p, s);
    REQUIRE(call.execute());
    double best_us = 1e9;
    for (int block = 0; block < 10; ++block) { // 50 calls do not fill the driver's queue
      REQUIRE(backend->synchronize());
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 50; ++i)
        REQUIRE(call.execute());
      const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - begin;
      best_us = std::min(best_us, spent.count() / 50);
    }
    fmt::print("execute of {}: {:.2f} us on the host\n", call.kernel.info().variant, best_us);
    CHECK(best_us <= 10);
  }
}

TEST_CASE("execute can be captured into a CUDA graph and replayed", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, kSizes);
  REQUIRE(call.execute());
  REQUIRE(backend->synchronize());
  const auto expected = call.output("o"), state = call.output("final_state");

  const Caller caller;
  using Handle = Caller::Handle;
  const Handle stream = caller.stream();
  Handle graph = nullptr, executable = nullptr;
  constexpr int kGlobal = 0;
  REQUIRE(caller.function<int (*)(Handle, int)>("cuStreamBeginCapture_v2")(stream, kGlobal) == 0);
  REQUIRE(call.execute(stream));
  CHECK_FALSE(Kernel().execute(call.tensors.args(), call.workspace, call.bytes, stream)); // a cold one
  REQUIRE(caller.function<int (*)(Handle, Handle*)>("cuStreamEndCapture")(stream, &graph) == 0);
  REQUIRE(caller.function<int (*)(Handle*, Handle, unsigned long long)>("cuGraphInstantiateWithFlags")(
              &executable, graph, 0) == 0);
  for (int i = 0; i < 3; ++i) {
    REQUIRE(call.tensors.poison());
    REQUIRE(backend->synchronize());
    REQUIRE(caller.function<int (*)(Handle, Handle)>("cuGraphLaunch")(executable, stream) == 0);
    caller.wait(stream);
    CHECK(call.output("o") == expected);
    CHECK(call.output("final_state") == state);
  }
}

TEST_CASE("a replay of a CUDA graph reads the lengths of its own time", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  Problem decode = production(Operation::recurrent, 4);
  decode.varlen = true;
  const Call call(engine, backend, decode, {1, 12, 3}); // three sequences of 4 tokens

  REQUIRE(call.execute());
  REQUIRE(backend->synchronize());
  const Graph graph([&](Graph::Handle stream) { return call.execute(stream); });

  // A call's own buffer, not const where it was allocated.
  void* const lengths = const_cast<void*>(call.tensors.args().cu_seqlens.data);
  using Lengths = std::array<std::int64_t, 4>;
  for (const Lengths& cu : {Lengths{0, 1, 1, 5}, Lengths{0, 0, 0, 0}, Lengths{0, 4, 8, 12}}) {
    REQUIRE(backend->copy_to_device(lengths, cu.data(), sizeof(cu)));
    REQUIRE(call.execute());
    REQUIRE(backend->synchronize());
    const auto expected = call.output("o"), state = call.output("final_state");
    REQUIRE(call.tensors.poison());
    REQUIRE(backend->synchronize());
    graph.launch();
    CAPTURE(cu[1], cu[2], cu[3]);
    CHECK(call.output("o") == expected);
    CHECK(call.output("final_state") == state);
    const std::size_t used = static_cast<std::size_t>(cu[3]) * 4 * 128;
    CHECK(std::all_of(expected.begin() + static_cast<std::ptrdiff_t>(used), expected.end(),
                      [](double x) { return x == 0; }));
    if (used == 0) CHECK(state == call.tensors.reference_inputs().value().initial_state);
  }
}

TEST_CASE("execute leaves the caller's current context as it was, also when there is none", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, kProblem, kSizes);
  const auto current =
      reinterpret_cast<int (*)(void**)>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuCtxGetCurrent"));
  bool ran = false;
  void* context = &ran;
  std::jthread([&] {
    ran = call.execute().has_value();
    current(&context);
  }).join();
  CHECK(ran);
  CHECK(context == nullptr);
}

TEST_CASE("threads share a kernel, each with its stream and workspace", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  constexpr std::size_t kThreads = 4;
  std::vector<std::unique_ptr<Call>> calls;
  std::vector<reference::Array> expected;
  for (std::size_t i = 0; i < kThreads; ++i) {
    calls.push_back(std::make_unique<Call>(engine, backend, kProblem, kSizes, std::nullopt, i));
    REQUIRE(calls.back()->execute());
    REQUIRE(backend->synchronize());
    expected.push_back(calls.back()->output("o"));
    REQUIRE(calls.back()->tensors.poison());
  }
  REQUIRE(backend->synchronize());
  std::atomic<int> failures{0};
  {
    const Caller caller;
    std::vector<Caller::Handle> streams;
    for (std::size_t i = 0; i < kThreads; ++i)
      streams.push_back(caller.stream());
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < kThreads; ++i)
      threads.emplace_back([&, i] {
        for (int k = 0; k < 50; ++k)
          if (!calls[i]->execute(streams[i])) ++failures;
      });
  }
  REQUIRE(backend->synchronize());
  CHECK(failures == 0);
  for (std::size_t i = 0; i < kThreads; ++i)
    CHECK(calls[i]->output("o") == expected[i]);
}

TEST_CASE("a call without tokens copies the state and launches nothing that fails", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  for (const Operation operation : {Operation::forward, Operation::recurrent}) {
    Problem p = production(operation, 2);
    const Call call(engine, backend, p, {2, 0, 2});
    REQUIRE(call.execute());
    REQUIRE(backend->synchronize());
    CHECK(call.output("final_state") == call.tensors.reference_inputs().value().initial_state);
  }
}
