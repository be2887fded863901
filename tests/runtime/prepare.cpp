// plan and prepare: what is chosen, what is refused, and when something is compiled.
#include "scripted_backend.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <set>
#include <thread>

using namespace kda;
using namespace kda::test;

namespace {

constexpr Sizes kSizes{2, 100, 2};

std::string failure(const auto& result) {
  REQUIRE_FALSE(result);
  return result.error().message;
}

} // namespace

TEST_CASE("plan compiles nothing, takes nothing from the device and says what it chose") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = engine_on(backend);
  const Plan plan = engine.plan(small_problem(), kScripted, kSizes).value();
  CHECK(plan.variant() == choose(small_problem(), backend->target(), kSizes).value());
  CHECK_THAT(plan.explain(),
             Catch::Matchers::Contains(to_string(plan.variant())) && Catch::Matchers::Contains("cost model"));
  CHECK(backend->compiles == 0);
  CHECK(backend->allocations == 0);
  CHECK(engine.compile_count() == 0);
}

TEST_CASE("plan refuses a problem, a variant and sizes that cannot be, with the reason") {
  const Engine engine = engine_on(std::make_shared<ScriptedBackend>());
  Problem p = small_problem();
  p.key_dim = 17;
  CHECK_THAT(failure(engine.plan(p, kScripted, kSizes)), Catch::Matchers::Contains("multiples of 4"));
  p = small_problem();
  CHECK_THAT(failure(engine.plan(p, kScripted, {2, 100, 3})), Catch::Matchers::Contains("3 sequences"));
  CHECK_THAT(failure(engine.plan(p, kScripted, kSizes, parse_variant("chunk c=48").value())),
             Catch::Matchers::Contains("not a variant of this problem"));
  for (const Candidate& c : enumerate(p, cuda_target("sm_90a").value()))
    if (!c.rejected.empty()) {
      CHECK_THAT(failure(engine.plan(p, kScripted, kSizes, c.variant)),
                 Catch::Matchers::Contains(c.rejected));
      return;
    }
  FAIL("no variant is rejected");
}

TEST_CASE("a batch-invariant problem has one variant, whatever the sizes") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = engine_on(backend);
  Problem p;
  p.varlen = true;
  const auto variants = [&] {
    std::set<std::string> all;
    for (const std::int64_t tokens : {1, 60, 500, 8192, 100000})
      for (const std::int64_t sequences : {1, 8, 700})
        all.insert(to_string(engine.plan(p, kScripted, {1, tokens, sequences}).value().variant()));
    return all;
  };
  CHECK(variants().size() > 1);
  p.batch_invariant = true;
  CHECK(variants().size() == 1);
}

TEST_CASE("a plan keeps to the workspace that it is allowed, also with a variant that is given") {
  const Engine engine = engine_on(std::make_shared<ScriptedBackend>());
  Problem p = small_problem(Operation::backward);
  p.key_dim = p.value_dim = 128;
  p.dtype = DType::bf16;
  const Sizes sizes{1, 8192, 1};
  const Variant whole = engine.plan(p, kScripted, sizes).value().variant();
  CHECK(whole.slab == 0);
  const std::size_t bytes = workspace_layout(p, whole, sizes).bytes;
  CHECK(engine.plan(p, kScripted, sizes, std::nullopt, bytes).value().variant() == whole);
  const Plan within = engine.plan(p, kScripted, sizes, std::nullopt, bytes / 3).value();
  CHECK(workspace_layout(p, within.variant(), sizes).bytes <= bytes / 3);
  CHECK(engine.prepare(within).value().workspace_bytes(sizes).value() <= bytes / 3);
  CHECK_THAT(failure(engine.plan(p, kScripted, sizes, std::nullopt, 1000)),
             Catch::Matchers::Contains("and 1000 are allowed"));
  CHECK_THAT(failure(engine.plan(p, kScripted, sizes, whole, bytes - 1)),
             Catch::Matchers::Contains("needs a workspace of"));
}

TEST_CASE("a device that is not there is unavailable, and the host comes last in the list") {
  EngineOptions options;
  options.cache_directory = "";
  const Engine engine = Engine::create(options).value();
  const auto plan = engine.plan(small_problem(), kScripted, kSizes);
  REQUIRE_FALSE(plan);
  CHECK(plan.error().code == ErrorCode::unavailable);
  const auto far = engine.plan(small_problem(), Device::cuda(99), kSizes);
  REQUIRE_FALSE(far);
  CHECK(far.error().code == ErrorCode::unavailable);
  const auto devices = engine.devices();
  REQUIRE(devices.size() >= 2);
  CHECK(devices.back().device == Device::host());
  for (const DeviceInfo& d : devices)
    CHECK((d.problem.empty() || d.device != engine.best_device()));
}

TEST_CASE("prepare compiles once; the number of tokens, sequences and heads is not part of the kernel") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = engine_on(backend);
  const Variant v = choose(small_problem(), backend->target(), kSizes).value();
  const auto prepare = [&](const Problem& p, const Sizes& s) {
    return engine.prepare(engine.plan(p, kScripted, s, v).value()).value().info();
  };
  const KernelInfo first = prepare(small_problem(), kSizes);
  CHECK(first.origin == Origin::compiled);
  CHECK(first.variant == to_string(v));
  CHECK(first.choice == "given");
  CHECK(first.registers == 100);
  std::int64_t dynamic = 0;
  const LaunchList list = launches(small_problem(), v, backend->target(), kSizes);
  for (int i = 0; i < list.count; ++i)
    dynamic = std::max<std::int64_t>(dynamic, list.items[static_cast<std::size_t>(i)].shared_bytes);
  CHECK(dynamic > 0);
  CHECK(first.shared_bytes == 2048 + dynamic); // what the compiler lays out, and what launches ask for
  CHECK(first.spill_bytes == 8);
  for (std::int64_t tokens = 1; tokens < 1000; tokens += 7)
    CHECK(prepare(small_problem(), {1, tokens, 1}).origin == Origin::memory);
  Problem heads = small_problem();
  heads.heads = heads.value_heads = 32;
  CHECK(prepare(heads, kSizes).key == first.key);
  CHECK(backend->compiles == 1);
  CHECK(backend->loads == 1);
  CHECK(engine.compile_count() == 1);
}

TEST_CASE("whatever the text of a kernel depends on changes its key") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const auto key = [&](const Problem& p, const Variant& v) {
    const Engine engine = engine_on(backend);
    return engine.prepare(engine.plan(p, kScripted, {1, 64, 1}, v).value()).value().info().key;
  };
  const Problem p = small_problem(Operation::recurrent);
  const Variant v = parse_variant("token sw=4 r=8 st=1").value();
  const std::string base = key(p, v);
  CHECK(key(p, v) == base);
  const std::pair<const char*, std::function<void(Problem&)>> changes[] = {
      {"K", [](Problem& x) { x.key_dim = 60; }},
      {"V", [](Problem& x) { x.value_dim = 32; }},
      {"group", [](Problem& x) { x.value_heads = 2; }},
      {"dtype", [](Problem& x) { x.dtype = DType::fp16; }},
      {"gate dtype", [](Problem& x) { x.gate_dtype = DType::fp32; }},
      {"beta dtype", [](Problem& x) { x.beta_dtype = DType::fp32; }},
      {"state dtype", [](Problem& x) { x.state_dtype = DType::bf16; }},
      {"state layout", [](Problem& x) { x.state_layout = StateLayout::v_k; }},
      {"gate", [](Problem& x) { x.gate = GateKind::softplus; }},
      {"dt_bias", [](Problem& x) { x.dt_bias = false; }},
      {"beta", [](Problem& x) { x.beta_sigmoid = true; }},
      {"norm", [](Problem& x) { x.qk_l2norm = true; }},
      {"varlen", [](Problem& x) { x.varlen = true; }},
      {"index", [](Problem& x) { x.cu_seqlens_type = IndexType::int32; }},
      {"pool", [](Problem& x) { x.state_pool = true; }},
      {"every state", [](Problem& x) { x.state_pool = x.every_state = true; }},
      {"updates", [](Problem& x) { x.updates = true; }},
      {"tree", [](Problem& x) { x.updates = x.tree = true; }},
      {"replay", [](Problem& x) { x.operation = Operation::replay; }}};
  std::vector<std::string> keys{base};
  for (const auto& [name, change] : changes) {
    INFO(name);
    Problem other = p;
    change(other);
    keys.push_back(key(other, v));
    CHECK(std::count(keys.begin(), keys.end(), keys.back()) == 1);
  }
  CHECK(key(p, parse_variant("token sw=4 r=16 st=1").value()) != base);
  backend->compiler_ = "scripted 1.1";
  CHECK(key(p, v) != base);
  backend->compiler_ = "scripted 1.0";
  backend->target_ = cuda_target("sm_80").value();
  CHECK(key(p, v) != base);
}

TEST_CASE("a failing compile gives the same error every time, and nothing is kept of it") {
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_compile = [](const SourceUnit&) -> Result<Image> {
    return fail(ErrorCode::compile_failed, "the compiler refuses", "its log");
  };
  const Engine engine = engine_on(backend);
  const Plan plan = engine.plan(small_problem(), kScripted, kSizes).value();
  for (int i = 0; i < 3; ++i) {
    const auto kernel = engine.prepare(plan);
    REQUIRE_FALSE(kernel);
    CHECK(kernel.error().code == ErrorCode::compile_failed);
    CHECK(kernel.error().message == "the compiler refuses");
    CHECK_THAT(kernel.error().context, Catch::Matchers::EndsWith("its log"));
  }
  CHECK(engine.compile_count() == 0);
  backend->on_compile = ScriptedBackend::image_of;
  CHECK(engine.prepare(plan));
}

TEST_CASE("threads that prepare one kernel share one compile and one load") {
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_compile = [](const SourceUnit& unit) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20)); // long enough for all to arrive
    return ScriptedBackend::image_of(unit);
  };
  const Engine engine = engine_on(backend);
  const Plan plan = engine.plan(small_problem(), kScripted, kSizes).value();
  std::vector<std::future<Result<Kernel>>> all;
  all.reserve(8);
  for (int i = 0; i < 8; ++i)
    all.push_back(engine.prepare_async(plan));
  int compiled = 0;
  for (auto& kernel : all)
    compiled += kernel.get().value().info().origin == Origin::compiled ? 1 : 0;
  CHECK(compiled == 1);
  CHECK(backend->compiles == 1);
  CHECK(backend->loads == 1);
}

TEST_CASE("a kernel outlives the engine that prepared it") {
  const auto backend = std::make_shared<ScriptedBackend>();
  Kernel kernel;
  {
    const Engine engine = engine_on(backend);
    kernel = engine.prepare(engine.plan(small_problem(), kScripted, kSizes).value()).value();
  }
  CHECK(kernel.workspace_bytes(kSizes));
  CHECK(kernel.problem() == small_problem());
}

TEST_CASE("precompile without NVRTC says where it was looked for and what to do") {
  EngineOptions options;
  options.cache_directory = "";
  options.nvrtc = "/nowhere/libnvrtc.so";
  const Engine engine = Engine::create(options).value();
  const Target target = cuda_target("sm_90a").value();
  const auto info =
      engine.precompile(small_problem(), choose(small_problem(), target, kSizes).value(), target);
  REQUIRE_FALSE(info);
  CHECK(info.error().code == ErrorCode::unavailable);
  CHECK_THAT(info.error().message, Catch::Matchers::Contains("KDA_JIT_NVRTC"));
  CHECK_THAT(info.error().context, Catch::Matchers::Contains("/nowhere/libnvrtc.so"));
}
