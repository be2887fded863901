// Compiles: how many at a time, what a failing one leaves behind, and dumps.
#include "compile_slots.h"
#include "nvrtc.h"
#include "scratch.h"
#include "scripted_backend.h"
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;
using cache::test::slurp;
using cache::test::spill;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

constexpr Sizes kSizes{1, 64, 1};

/// The most slots that eight threads hold at a time. A holder waits until `expected` have one, however busy
/// the machine is, then a little for one too many.
int peak(CompileSlots& slots, int expected) {
  std::atomic<int> running{0}, most{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 8; ++i)
      threads.emplace_back([&] {
        for (int round = 0; round < 5; ++round) {
          const CompileSlots::Slot slot(slots);
          const int now = ++running;
          for (int before = most; now > before && !most.compare_exchange_weak(before, now);) {
          }
          for (int wait = 0; wait < 5000 && most < expected; ++wait)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
          --running;
        }
      });
  }
  return most;
}

void write(const fs::path& file, const std::string& text) {
  fs::create_directories(file.parent_path());
  spill(file, text);
}

EngineOptions options_on(std::shared_ptr<Backend> backend, const fs::path& directory) {
  EngineOptions options;
  options.cache_directory = directory;
  options.emulator = std::move(backend);
  options.log = [](std::string_view) {};
  return options;
}

Result<Kernel> prepared(const Engine& engine) {
  return engine.prepare(engine.plan(small_problem(), kScripted, kSizes).value());
}

std::vector<fs::path> files_in(const fs::path& directory) {
  std::vector<fs::path> all;
  if (fs::exists(directory))
    for (const auto& entry : fs::directory_iterator(directory))
      all.push_back(entry.path());
  return all;
}

} // namespace

TEST_CASE("as many compile at a time as there are threads, fewer where memory is short, always one") {
  constexpr std::uint64_t kOne = CompileSlots::kBytesPerCompile;
  CompileSlots many(3, [] { return 100 * kOne; });
  CHECK(peak(many, 3) == 3);
  CompileSlots two(8, [] { return 2 * kOne + 1; });
  CHECK(peak(two, 2) == 2);
  CompileSlots none(8, [] { return std::uint64_t{0}; });
  CHECK(peak(none, 1) == 1);
}

TEST_CASE("memory that other processes give back is used") {
  std::atomic<std::uint64_t> available{0};
  CompileSlots slots(4, [&] { return available.load(); });
  CHECK(peak(slots, 1) == 1);
  available = 100 * CompileSlots::kBytesPerCompile;
  CHECK(peak(slots, 4) == 4);
}

TEST_CASE("what is available is the system's memory within the limits of the control groups") {
  const Scratch scratch;
  const fs::path root = scratch.path();
  CHECK(available_memory(root) > std::uint64_t{1} << 60U); // nothing can be read: no limit
  write(root / "proc/meminfo", "MemTotal:       2000 kB\nMemFree: 5 kB\nMemAvailable:       1000 kB\n");
  CHECK(available_memory(root) == 1000 * 1024);
  SECTION("version 2: every group above counts, idle page cache is free") {
    write(root / "proc/self/cgroup", "0::/a/b\n");
    write(root / "sys/fs/cgroup/a/b/memory.max", "max\n");
    write(root / "sys/fs/cgroup/a/b/memory.current", "700\n");
    CHECK(available_memory(root) == 1000 * 1024);
    write(root / "sys/fs/cgroup/a/memory.max", "9000\n");
    write(root / "sys/fs/cgroup/a/memory.current", "7000\n");
    CHECK(available_memory(root) == 2000);
    write(root / "sys/fs/cgroup/a/memory.stat", "anon 5000\ninactive_file 1500\n");
    CHECK(available_memory(root) == 3500);
    write(root / "sys/fs/cgroup/memory.max", "600\n");
    write(root / "sys/fs/cgroup/memory.current", "9999\n");
    CHECK(available_memory(root) == 0);
  }
  SECTION("version 1") {
    write(root / "proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/c\n");
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n");
    write(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
    CHECK(available_memory(root) == 4000);
  }
  CHECK(available_memory() > 0); // of this machine
}

TEST_CASE("a kernel that does not compile leaves one file that shows it, in the cache directory or with the "
          "dumps") {
  const Scratch scratch;
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_compile = [](const SourceUnit&) -> Result<Image> {
    return fail(ErrorCode::compile_failed, "refused", "chunk_forward.cu(3): error: no\nsecond line");
  };
  EngineOptions options = options_on(backend, scratch.path() / "cache");
  fs::path directory = scratch.path() / "cache" / "v1" / "failed";
  SECTION("cache") {}
  SECTION("dumps") {
    options.dump_directory = directory = scratch.path() / "dumps";
  }
  const auto kernel = prepared(Engine::create(options).value());
  REQUIRE_FALSE(kernel);
  const auto files = files_in(directory);
  REQUIRE(files.size() == 1);
  CHECK_THAT(kernel.error().context, Contains("reproducer: " + files[0].string()));
  CHECK_THAT(kernel.error().context, Contains("error: no"));
  const std::string text = slurp(files[0]);
  CHECK(text.rfind("// arch: sm_90a\n// compiler: scripted 1.0\n// options: --gpu-architecture=sm_90a", 0) ==
        0);
  CHECK_THAT(text, Contains("// chunk_forward.cu(3): error: no\n// second line\n"));
  CHECK_THAT(text, Contains("#line 1 \"config.cuh\"") && Contains("static constexpr int K = 64"));
  // The same failure again is the same file.
  (void)prepared(Engine::create(options).value());
  CHECK(files_in(directory).size() == 1);
}

TEST_CASE("without a directory, or with one that cannot be written, the error says so and stays") {
  const Scratch scratch;
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_compile = [](const SourceUnit&) -> Result<Image> {
    return fail(ErrorCode::compile_failed, "refused", "the log");
  };
  EngineOptions options = options_on(backend, "");
  const auto kernel = prepared(Engine::create(options).value());
  CHECK_THAT(kernel.error().context, Contains("KDA_JIT_DUMP") && Contains("the log"));
  spill(scratch.path() / "file", "no directory");
  options.dump_directory = scratch.path() / "file";
  const auto again = prepared(Engine::create(options).value());
  CHECK(again.error().message == "refused");
  CHECK_THAT(again.error().context, Contains("cannot write") && Contains("the log"));
}

TEST_CASE("on request the source, the log and the code of every kernel are written, also of those found") {
  const Scratch scratch;
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_compile = [](const SourceUnit& unit) -> Result<Image> {
    return Image{pack_cubins(std::vector<std::string>(unit.entries.size(), "cubin")), "log of it", {}};
  };
  EngineOptions options = options_on(backend, scratch.path() / "cache");
  REQUIRE(prepared(Engine::create(options).value()));
  options.dump_directory = scratch.path() / "dumps";
  REQUIRE(prepared(Engine::create(options).value()));
  const KernelInfo info = prepared(Engine::create(options).value()).value().info();
  CHECK(info.origin == Origin::disk);
  CHECK(backend->compiles == 2); // with line info: an entry of its own
  const SourceUnit unit =
      emit(small_problem(), parse_variant(info.variant).value(), backend->target()).value();
  const auto dumped = [&](const std::string& name) {
    return slurp(options.dump_directory / (info.key + "." + name));
  };
  CHECK(dumped("log") == "log of it");
  CHECK_THAT(dumped(unit.name), Contains("#line 1 \"" + unit.name + "\""));
  for (const std::string& entry : unit.entries)
    CHECK(dumped(entry + ".cubin") == "cubin");
  CHECK(files_in(options.dump_directory).size() == 2 + unit.entries.size());
}

TEST_CASE("dumps that cannot be written are said once and cost nothing else") {
  const Scratch scratch;
  spill(scratch.path() / "file", "no directory");
  EngineOptions options = options_on(std::make_shared<ScriptedBackend>(), "");
  options.dump_directory = scratch.path() / "file";
  int lines = 0;
  options.log = [&](std::string_view line) {
    lines += line.find("cannot write dumps") != std::string_view::npos;
  };
  const Engine engine = Engine::create(options).value();
  CHECK(prepared(engine));
  CHECK(engine.prepare(engine.plan(small_problem(Operation::recurrent), kScripted, kSizes).value()));
  CHECK(lines == 1);
}
