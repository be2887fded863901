// The engine on a GPU: cold and warm preparation, images that the driver refuses, tuning, memory.
#include "gpu.h"
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <dlfcn.h>
#include <fmt/format.h>

using namespace kda;
using namespace kda::test;

namespace {

const Problem kProblem = production(Operation::forward, 32);
constexpr Sizes kSizes{1, 8192, 1};

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

/// Bytes of device memory that are free.
std::size_t free_bytes() {
  const auto info = reinterpret_cast<int (*)(std::size_t*, std::size_t*)>(
      dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemGetInfo_v2"));
  const auto driver = CudaDriver::open().value();
  CudaDriver::Handle context = nullptr;
  REQUIRE(driver->primary_retain(&context, 0) == 0);
  driver->context_push(context);
  std::size_t available = 0, total = 0;
  REQUIRE(info(&available, &total) == 0);
  driver->context_pop(&context);
  return available;
}

} // namespace

namespace {

/// What a process of its own does in the test below; milliseconds.
double cold_start(const std::string& what, const std::filesystem::path& cache) {
  const auto begin = std::chrono::steady_clock::now();
  if (what == "context") {
    const auto driver = CudaDriver::open().value();
    CudaDriver::Handle context = nullptr;
    REQUIRE(driver->primary_retain(&context, 0) == 0);
    return milliseconds_since(begin);
  }
  const Engine engine = gpu_engine(cache);
  const Kernel kernel = engine.prepare(engine.plan(kProblem, kGpu, kSizes).value()).value();
  const double ms = milliseconds_since(begin);
  CHECK(kernel.info().origin == (what == "empty" ? Origin::compiled : Origin::disk));
  return ms;
}

/// The same in a new process of this program, which prints it.
double in_new_process(const std::string& what, const std::filesystem::path& cache) {
  const std::string command =
      fmt::format("KDA_TEST_COLD_START={} KDA_TEST_CACHE='{}' '{}' 'untuned: *'", what, cache.string(),
                  std::filesystem::read_symlink("/proc/self/exe").string());
  FILE* const out = ::popen(command.c_str(), "r");
  REQUIRE(out != nullptr);
  double ms = 1e9;
  std::array<char, 256> line{};
  while (std::fgets(line.data(), line.size(), out) != nullptr)
    std::sscanf(line.data(), "cold start: %lf ms", &ms);
  REQUIRE(::pclose(out) == 0);
  return ms;
}

} // namespace

TEST_CASE("untuned: the first call costs a second beyond the context at most, and 60 ms in the next process",
          "[gpu]") {
  if (const char* what = std::getenv("KDA_TEST_COLD_START")) { // this is the new process
    fmt::print("cold start: {:.1f} ms\n", cold_start(what, std::getenv("KDA_TEST_CACHE")));
    return;
  }
  if (gpu() == nullptr) return;
  const cache::test::Scratch scratch;
  const double context = in_new_process("context", scratch.path());
  const double empty = in_new_process("empty", scratch.path());
  const double warm = in_new_process("warm", scratch.path());
  fmt::print("context alone {:.0f} ms; context and forward: {:.0f} ms with an empty cache, {:.0f} ms with a "
             "warm one\n",
             context, empty, warm);
  CHECK(empty - context <= 1000);
  CHECK(warm - context <= 60);
}

TEST_CASE("the GPU is listed with its driver and compiler, and is the best device", "[gpu]") {
  if (gpu() == nullptr) return;
  const Engine engine = gpu_engine();
  const DeviceInfo info = engine.devices().front();
  CHECK(info.device == kGpu);
  CHECK(info.problem.empty());
  CHECK(info.arch.substr(0, 3) == "sm_");
  CHECK(info.driver.find('.') != std::string::npos);
  CHECK(info.compiler.substr(0, 5) == "nvrtc");
  CHECK(engine.best_device() == kGpu);
}

TEST_CASE("an image that the driver refuses is load_failed, and the context survives", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Variant v = choose(kProblem, backend->target(), kSizes).value();
  const SourceUnit unit = emit(kProblem, v, backend->target()).value();
  const Image good = backend->compile(unit).value();
  Image cut = good;
  const auto half = static_cast<std::ptrdiff_t>(cut.bytes.size() / 2);
  std::fill(cut.bytes.begin() + half, cut.bytes.end(), '\0'); // the driver gets no length to check
  Image nonsense = good;
  nonsense.bytes.assign(1000, 'x');
  const Target other = cuda_target("sm_80").value();
  const Variant its = choose(kProblem, other, kSizes).value();
  const Image foreign = backend->compile(emit(kProblem, its, other).value()).value();
  SourceUnit renamed = unit;
  renamed.entries[0] = "no_such_kernel";
  const std::pair<const SourceUnit*, const Image*> bad[] = {
      {&unit, &cut}, {&unit, &nonsense}, {&unit, &foreign}, {&renamed, &good}};
  for (const auto& [u, image] : bad) {
    const auto module = backend->load(*u, *image);
    REQUIRE_FALSE(module);
    CHECK(module.error().code == ErrorCode::load_failed);
  }
  CHECK(backend->load(unit, good));
  CHECK(backend->synchronize());
}

TEST_CASE("memory that does not fit is out_of_memory, and the device goes on", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const auto memory = backend->allocate(std::size_t{1} << 42);
  REQUIRE_FALSE(memory);
  CHECK(memory.error().code == ErrorCode::out_of_memory);
  CHECK_THAT(memory.error().message, Catch::Matchers::Contains(backend->name()));
  CHECK(backend->synchronize());
}

TEST_CASE("tuning checks and times every candidate, remembers the winner and gives its memory back",
          "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const cache::test::Scratch scratch;
  Problem p = production(Operation::recurrent, 8);
  const Sizes sizes{4, 16, 4};
  std::string winner;
  {
    const Engine engine = gpu_engine(scratch.path());
    REQUIRE(engine.prepare(engine.plan(p, kGpu, sizes).value()));
    const std::size_t before = free_bytes();
    const TuneReport report = engine.tune(p, kGpu, sizes).value();
    for (const TuneRow& row : report.rows) {
      INFO(row.variant << ": " << row.status << " " << row.reason);
      CHECK((row.status == "ok" || row.status == "rejected"));
      if (row.status == "ok") CHECK((row.median_us > report.floor_us && row.error < 1e-2));
      if (row.chosen) winner += row.variant;
    }
    CHECK(report.floor_us > 0);
    constexpr std::size_t kCode = std::size_t{64} << 20U; // what the driver keeps for the candidates' code
    CHECK(free_bytes() + kCode >= before);
  }
  const Engine later = gpu_engine(scratch.path());
  const Plan plan = later.plan(p, kGpu, sizes).value();
  CHECK(to_string(plan.variant()) == winner);
  CHECK_THAT(plan.explain(), Catch::Matchers::Contains("tuned"));
}
