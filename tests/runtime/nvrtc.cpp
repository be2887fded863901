// Every CUDA variant through NVRTC, with no GPU: it compiles, does not spill, draws no C75xx advisory and
// fits its target.
#include "nvrtc.h"
#include "codegen/source_unit.h"
#include "scratch.h"
#include "scripted_backend.h"
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <mutex>
#include <set>
#include <thread>

using namespace kda;

namespace {

/// Null, said aloud, where there is no NVRTC.
std::shared_ptr<const Nvrtc> open_nvrtc() {
  const char* const path = std::getenv("KDA_JIT_NVRTC");
  auto nvrtc = Nvrtc::open(path == nullptr ? std::nullopt : std::optional<std::filesystem::path>(path));
  if (!nvrtc) WARN("SKIPPED, no NVRTC: " << nvrtc.error().message);
  return nvrtc ? *nvrtc : nullptr;
}

Problem production(Operation operation) {
  Problem p;
  p.operation = operation;
  p.heads = p.value_heads = 32;
  p.gate = GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  p.state_layout = StateLayout::v_k;
  return p;
}

struct Job {
  Problem problem;
  Variant variant;
  std::string arch;
};

std::string fault(const Nvrtc& nvrtc, const Job& job) {
  const Target target = cuda_target(job.arch).value();
  const auto unit = emit(job.problem, job.variant, target);
  if (!unit) return unit.error().message;
  const auto image = nvrtc.compile(*unit);
  if (!image) return fmt::format("{}\n{}", image.error().message, image.error().context);
  if (image->kernels.size() < unit->entries.size()) return "fewer kernels than entries";
  if (const std::string advisory = ptxas_advisories(image->log); !advisory.empty()) return advisory;
  for (const KernelFigures& k : image->kernels) {
    if (k.spill_bytes > 0) return fmt::format("{} spills {} bytes", k.entry, k.spill_bytes);
    if (k.registers > 255) return fmt::format("{} uses {} registers", k.entry, k.registers);
  }
  const LaunchList list = launches(job.problem, job.variant, target, Sizes{1, 8192, 1});
  for (int i = 0; i < list.count; ++i) {
    const Launch& l = list.items[static_cast<std::size_t>(i)];
    if (static_cast<int>(l.shared_bytes) > target.max_shared_bytes)
      return "asks for more shared memory than there is";
    for (const KernelFigures& k : image->kernels)
      if (k.entry == unit->entries[static_cast<std::size_t>(l.entry)] &&
          k.registers * static_cast<int>(l.block) > target.registers_per_sm)
        return fmt::format("{}: {} registers times {} threads do not fit", k.entry, k.registers, l.block);
  }
  return {};
}

void compile_all(const Nvrtc& nvrtc, const std::vector<Job>& jobs) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::vector<std::string> faults;
  {
    std::vector<std::jthread> pool;
    for (int i = 0; i < 2; ++i)
      pool.emplace_back([&] {
        for (std::size_t k = next++; k < jobs.size(); k = next++)
          if (const std::string why = fault(nvrtc, jobs[k]); !why.empty()) {
            const std::scoped_lock lock(mutex);
            faults.push_back(fmt::format("{} {} on {}: {}", to_string(jobs[k].problem),
                                         to_string(jobs[k].variant), jobs[k].arch, why));
          }
      });
  }
  for (const std::string& f : faults)
    FAIL_CHECK(f);
  fmt::print("{} compiled, {} faults\n", jobs.size(), faults.size());
  CHECK(jobs.size() > 0);
}

} // namespace

TEST_CASE("every variant of the production problem compiles for sm_90a without a spill") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  std::vector<Job> jobs;
  for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                    Operation::gate, Operation::gate_backward})
    for (const Candidate& c : enumerate(production(operation), cuda_target("sm_90a").value())) {
      if (!c.rejected.empty())
        CHECK(c.rejected.size() > 10); // a reason, not a mark
      else if ((operation != Operation::forward || c.variant.algorithm != Algorithm::token) &&
               // token: recurrent has the same text, and so have slabs of any size; what slabs add to a
               // kernel does not depend on its tile, and numbers of segments differ in a constant.
               (c.variant.slab == 0 || (c.variant.slab == 512 && c.variant.value_tile == 64)) &&
               c.variant.segments != 4 && c.variant.segments != 8)
        jobs.push_back({production(operation), c.variant, "sm_90a"});
    }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("one variant of each family compiles for every other architecture") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  std::vector<Job> jobs;
  for (const char* arch : {"sm_80", "sm_89", "sm_100a", "sm_120a"})
    for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                      Operation::gate, Operation::gate_backward, Operation::replay}) {
      const auto variant = choose(production(operation), cuda_target(arch).value(), Sizes{1, 8192, 1});
      REQUIRE(variant);
      jobs.push_back({production(operation), *variant, arch});
    }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("every option of a problem compiles for sm_90a in every family") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const std::function<void(Problem&)> options[] = {
      [](Problem& p) { p.key_dim = 60, p.value_dim = 100; },
      [](Problem& p) { p.key_dim = 96, p.value_dim = 16; },
      [](Problem& p) { p.key_dim = 16, p.value_dim = 256; },
      [](Problem& p) { p.key_dim = 256, p.value_dim = 20; },
      [](Problem& p) { p.value_heads = 128; },
      [](Problem& p) { p.dtype = p.gate_dtype = p.beta_dtype = DType::fp16; },
      [](Problem& p) { p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32; },
      [](Problem& p) { p.gate_dtype = p.beta_dtype = DType::fp32; },
      [](Problem& p) { p.state_dtype = DType::bf16; },
      [](Problem& p) { p.state_dtype = DType::fp16, p.state_layout = StateLayout::k_v; },
      [](Problem& p) { p.gate = GateKind::log_e, p.dt_bias = p.qk_l2norm = p.beta_sigmoid = false; },
      [](Problem& p) { p.gate = GateKind::log2, p.dt_bias = false; },
      [](Problem& p) { p.gate = GateKind::softplus, p.beta_times_two = true; },
      [](Problem& p) { p.gate = GateKind::bounded_no_a; },
      [](Problem& p) { p.varlen = true; },
      [](Problem& p) { p.varlen = true, p.cu_seqlens_type = IndexType::int32; }};
  const Target target = cuda_target("sm_90a").value();
  std::vector<Job> jobs;
  for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                    Operation::gate, Operation::gate_backward})
    for (const auto& option : options) {
      Problem p = production(operation);
      option(p);
      INFO(to_string(p));
      const auto variant = choose(p, target, Sizes{1, 8192, 1});
      REQUIRE(variant);
      jobs.push_back({p, *variant, target.arch});
    }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("every option of a backward in slabs compiles without a spill") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const Target target = cuda_target("sm_90a").value();
  const std::function<void(Problem&)> options[] = {
      [](Problem& p) { p.key_dim = 60, p.value_dim = 100; },
      [](Problem& p) { p.key_dim = 96, p.value_dim = 16; },
      [](Problem& p) { p.key_dim = 16, p.value_dim = 256; },
      [](Problem& p) { p.value_heads = 128, p.varlen = true; },
      [](Problem& p) { p.state_dtype = DType::fp16, p.state_layout = StateLayout::k_v, p.varlen = true; }};
  std::vector<Job> jobs;
  for (const auto& option : options) {
    Problem p = production(Operation::backward);
    option(p);
    const Sizes sizes{1, 8192, 1};
    const std::size_t whole = workspace_layout(p, choose(p, target, sizes).value(), sizes).bytes;
    const auto variant = choose(p, target, sizes, whole / 3);
    REQUIRE(variant);
    REQUIRE(variant->slab != 0);
    jobs.push_back({p, *variant, target.arch});
  }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("every option of the fused forward compiles without a spill") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const Target target = cuda_target("sm_90a").value();
  std::vector<Job> jobs;
  int index = 0;
  for (const GateKind gate :
       {GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded, GateKind::bounded_no_a})
    for (const bool packed : {false, true}) {
      Problem p = production(Operation::forward);
      p.gate = gate;
      p.dt_bias = gate == GateKind::softplus || gate == GateKind::bounded;
      p.varlen = packed;
      p.qk_l2norm = index % 3 != 1;
      p.beta_sigmoid = p.beta_times_two = index % 3 == 2;
      p.state_layout = index % 4 < 2 ? StateLayout::k_v : StateLayout::v_k;
      p.state_dtype = index % 5 == 3 ? DType::bf16 : DType::fp32;
      p.beta_dtype = index % 4 == 1 ? DType::fp32 : DType::bf16;
      p.value_heads = index % 3 == 0 ? 64 : 32;
      ++index;
      // Numbers of segments differ in a constant: one of those above three.
      const int several = std::array{4, 8, 16}[static_cast<std::size_t>(index % 3)];
      for (const Candidate& c : enumerate(p, target))
        if (c.variant.algorithm == Algorithm::fused && c.rejected.empty() &&
            (c.variant.segments <= 3 || c.variant.segments == several))
          jobs.push_back({p, c.variant, target.arch});
    }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("every option of decode compiles for sm_90a without a spill") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const std::function<void(Problem&)> policies[] = {
      [](Problem& p) { p.state_pool = true; },
      [](Problem& p) { p.state_pool = p.every_state = true; },
      [](Problem& p) { p.updates = true; },
      [](Problem& p) { p.state_pool = p.every_state = p.updates = p.tree = true; },
      [](Problem& p) { p.state_pool = p.updates = p.tree = p.varlen = true; },
      [](Problem& p) { p.operation = Operation::replay; },
      [](Problem& p) { p.operation = Operation::replay, p.state_pool = p.tree = p.varlen = true; }};
  const std::function<void(Problem&)> shapes[] = {
      [](Problem&) {}, [](Problem& p) { p.state_dtype = DType::bf16; },
      [](Problem& p) { p.key_dim = p.value_dim = 256, p.state_layout = StateLayout::k_v; },
      [](Problem& p) { p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32, p.gate = GateKind::softplus; }};
  const Target target = cuda_target("sm_90a").value();
  std::vector<Job> jobs;
  for (const auto& policy : policies)
    for (const auto& shape : shapes) {
      Problem p = production(Operation::recurrent);
      policy(p);
      shape(p);
      INFO(to_string(p));
      std::set<std::string> variants;
      for (const Sizes& sizes : {Sizes{1, 4, 1}, Sizes{1, 16384, 4096}, Sizes{1, 4096, 1}}) {
        const Sizes s =
            p.varlen ? sizes : Sizes{sizes.sequences, sizes.tokens / sizes.sequences, sizes.sequences};
        const auto variant = choose(p, target, s);
        REQUIRE(variant);
        if (variants.insert(to_string(*variant)).second) jobs.push_back({p, *variant, target.arch});
      }
    }
  compile_all(*nvrtc, jobs);
}

TEST_CASE("an image precompiled for an architecture is what a device of that architecture loads") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const cache::test::Scratch scratch;
  const auto device = std::make_shared<test::ScriptedBackend>();
  device->compiler_ = nvrtc->identity();
  std::string loaded;
  device->on_load = [&](const SourceUnit&, const Image& image) {
    loaded = image.bytes;
    return Status{};
  };
  EngineOptions options;
  options.cache_directory = scratch.path();
  options.emulator = device;
  if (const char* const path = std::getenv("KDA_JIT_NVRTC")) options.nvrtc = path;
  const Target target = cuda_target("sm_90a").value();
  const Problem p = production(Operation::gate);
  const Variant v = choose(p, target, {1, 64, 1}).value();
  const KernelInfo ahead = Engine::create(options).value().precompile(p, v, target).value();
  CHECK(ahead.origin == Origin::compiled);

  const Engine engine = Engine::create(options).value();
  const KernelInfo here = engine.prepare(engine.plan(p, test::kScripted, {1, 64, 1}).value()).value().info();
  CHECK(here.origin == Origin::disk);
  CHECK(here.key == ahead.key);
  CHECK(here.registers == ahead.registers);
  CHECK(unpack_cubins(loaded).value().front().substr(0, 4) == "\x7f"
                                                              "ELF");
  CHECK(device->compiles == 0);
}

TEST_CASE("each kernel of a unit is a cubin of its own, with nothing but that kernel") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  const Target target = cuda_target("sm_90a").value();
  const Problem p = production(Operation::forward);
  const SourceUnit unit = emit(p, choose(p, target, {1, 8192, 1}).value(), target).value();
  const Image image = nvrtc->compile(unit).value();
  const std::vector<std::string> cubins = unpack_cubins(image.bytes).value();
  REQUIRE(cubins.size() == unit.entries.size());
  REQUIRE(image.kernels.size() == unit.entries.size());
  for (std::size_t i = 0; i < cubins.size(); ++i) {
    CHECK(image.kernels[i].entry == unit.entries[i]);
    for (const std::string& entry : unit.entries)
      CHECK((cubins[i].find(".text." + entry) != std::string::npos) == (entry == unit.entries[i]));
  }
}

TEST_CASE("bytes that are no list of cubins are refused") {
  const std::string image = pack_cubins({"first", "second one"});
  CHECK(unpack_cubins(image).value() == std::vector<std::string>{"first", "second one"});
  for (std::size_t size = 1; size < image.size(); ++size)
    if (size != 8 + 5) CHECK_FALSE(unpack_cubins(image.substr(0, size)));
  CHECK_FALSE(unpack_cubins("an image of yesterday, an ELF file"));
}

TEST_CASE("a fault in a kernel's source comes back annotated") {
  const auto nvrtc = open_nvrtc();
  if (nvrtc == nullptr) return;
  auto unit = emit(production(Operation::gate), Variant{Algorithm::gate, 0, 0, 0, 4, 8, 0},
                   cuda_target("sm_90a").value())
                  .value();
  unit.main += "\nint broken = undeclared_name;\n";
  const auto image = nvrtc->compile(unit);
  REQUIRE_FALSE(image);
  CHECK(image.error().code == ErrorCode::compile_failed);
  CHECK_THAT(image.error().context, Catch::Matchers::Contains("| int broken = undeclared_name;"));
  CHECK_THAT(image.error().context, Catch::Matchers::Contains("struct Config"));
}

TEST_CASE("ptxas figures are read from its log") {
  const auto kernels =
      parse_ptxas_log("ptxas info    : Compiling entry function 'k1' for 'sm_90a'\n"
                      "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
                      "ptxas info    : Used 232 registers, used 2 barriers, 1040 bytes smem\n");
  REQUIRE(kernels.size() == 1);
  CHECK(kernels[0].entry == "k1");
  CHECK(kernels[0].registers == 232);
  CHECK(kernels[0].spill_bytes == 8);
  CHECK(kernels[0].stack_bytes == 16);
  CHECK(kernels[0].shared_bytes == 1040);
}

TEST_CASE("advisories that mean a slow kernel are found in the log, and nothing else is") {
  CHECK(ptxas_advisories("ptxas info    : Used 32 registers\n").empty());
  const std::string serialized = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async "
                                 "instructions are serialized due to ...";
  CHECK(ptxas_advisories("ptxas info    : Used 32 registers\n" + serialized + "\n") == serialized + "\n");
}
