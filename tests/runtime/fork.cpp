// After fork() the child has neither the threads nor the devices of its parent's engine: using that engine is
// an error, never a crash or a hang, and a new engine works.
#include "process.h"
#include "scratch.h"
#include "scripted_backend.h"
#include <catch2/catch.hpp>

using namespace kda;
using namespace kda::test;
using cache::test::Process;
using cache::test::Scratch;

namespace {
constexpr Sizes kSizes{1, 64, 1};

bool refused(const auto& result) {
  return !result && result.error().code == ErrorCode::unavailable &&
         result.error().message.find("before fork") != std::string::npos;
}
} // namespace

TEST_CASE("an engine that was made before fork() refuses in the child, and a new one works") {
  const Scratch scratch;
  EngineOptions options;
  options.cache_directory = scratch.path();
  options.threads = 4;
  options.emulator = std::make_shared<ScriptedBackend>();
  const Device device = GENERATE(Device::host(), kScripted);
  Engine engine = Engine::create(options).value();
  auto plan = engine.plan(small_problem(), device, kSizes);
  if (!plan) {
    CHECK(plan.error().code == ErrorCode::unavailable); // built without host kernels
    return;
  }
  Kernel kernel = engine.prepare(*plan).value();
  Process child([&] {
    ::alarm(20); // a hang is a failure
    const Problem p = small_problem();
    if (!refused(engine.plan(p, device, kSizes)) || !refused(engine.prepare(*plan))) return 1;
    if (!refused(engine.prepare_async(*plan).get()) || !refused(engine.tune(p, device, kSizes))) return 2;
    if (!refused(kernel.execute({}, nullptr, 0)) || !refused(engine.run(p, device, kSizes, {}))) return 3;
    if (!refused(engine.allocate(device, 16)) || !refused(engine.synchronize(device))) return 4;
    if (!refused(engine.reports())) return 5;
    for (const DeviceInfo& d : engine.devices())
      if (d.problem.find("before fork") == std::string::npos) return 6;
    { // The last handles: their destructors run here.
      const Kernel last_kernel = std::move(kernel);
      const Engine last_engine = std::move(engine);
    }
    const Engine fresh = Engine::create(options).value();
    const auto again = fresh.prepare(fresh.plan(p, device, kSizes).value());
    return again && again->info().origin == Origin::disk ? 0 : 7;
  });
  CHECK(child.wait() == 0);
  CHECK(engine.prepare(*plan)); // the parent's goes on
  CHECK(engine.reports());
}
