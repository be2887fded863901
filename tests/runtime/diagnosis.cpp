// What `kda-jit doctor` says of facts that are given to it: each fault is found, alone, with what to do.
#include "kda/diagnosis.h"
#include "nvml.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <sys/stat.h>

using namespace kda;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// A machine with nothing to complain about.
MachineFacts healthy() {
  MachineFacts m;
  m.driver_version = 13000;
  m.nvrtc_path = "/usr/local/cuda-13.0/lib64/libnvrtc.so.13";
  m.nvrtc_major = 13;
  m.nvrtc_architectures = {75, 80, 86, 89, 90, 100, 120};
  m.nvrtc_found = {m.nvrtc_path};
  m.gpus = {{Device::cuda(0), "H100", "sm_90a", 90, "", 1980, 1980, 1980, {}}};
  m.cache = {"/home/me/.cache/kda-jit/v1", true, false, "", std::uint64_t{1} << 40U, false};
  return m;
}

/// The one bad finding of these facts.
Finding fault_of(const MachineFacts& m) {
  std::vector<Finding> bad;
  for (const Finding& f : diagnose(m)) {
    INFO(f.what << " / " << f.advice);
    CHECK(f.good == f.advice.empty());
    if (!f.good) bad.push_back(f);
  }
  REQUIRE(bad.size() == 1);
  return bad[0];
}

} // namespace

TEST_CASE("a healthy machine has no fault") {
  for (const Finding& f : diagnose(healthy())) {
    INFO(f.what);
    CHECK(f.good);
  }
  CHECK(diagnose(healthy()).size() == 3); // cache, driver, NVRTC
}

TEST_CASE("no driver") {
  MachineFacts m = healthy();
  m.driver_problem = "no CUDA driver (libcuda.so.1 was not found)";
  m.driver_version = 0;
  m.gpus.clear();
  CHECK_THAT(fault_of(m).what, Contains("libcuda.so.1"));
  CHECK_THAT(fault_of(m).advice, Contains("install NVIDIA's driver"));
}

TEST_CASE("a driver older than the images that NVRTC makes") {
  MachineFacts m = healthy();
  m.driver_version = 12080;
  CHECK_THAT(fault_of(m).what, Contains("CUDA 12.8, NVRTC of CUDA 13"));
  CHECK_THAT(fault_of(m).advice, Contains("580") && Contains("libnvrtc.so.12"));
  m.nvrtc_major = 12; // an older NVRTC suits it, a newer driver suits any
  for (const int driver : {12000, 12080, 13000}) {
    m.driver_version = driver;
    for (const Finding& f : diagnose(m))
      CHECK(f.good);
  }
}

TEST_CASE("no NVRTC") {
  MachineFacts m = healthy();
  m.nvrtc_problem = "NVRTC was not found";
  m.nvrtc_path.clear();
  m.nvrtc_major = 0;
  m.nvrtc_architectures.clear();
  m.nvrtc_found.clear();
  CHECK_THAT(fault_of(m).advice, Contains("KDA_JIT_NVRTC"));
}

TEST_CASE("NVRTC too old for the card, or too new") {
  MachineFacts m = healthy();
  m.nvrtc_architectures = {70, 80, 86};
  CHECK_THAT(fault_of(m).what, Contains("cuda:0") && Contains("sm_90a"));
  CHECK_THAT(fault_of(m).advice, Contains("too old for the card"));
  m.nvrtc_architectures = {100, 120};
  CHECK_THAT(fault_of(m).advice, Contains("older toolkit"));
  m.nvrtc_architectures.clear(); // it does not say: no reason to warn
  for (const Finding& f : diagnose(m))
    CHECK(f.good);
}

TEST_CASE("several toolkits, of which nobody chose one") {
  MachineFacts m = healthy();
  m.nvrtc_found.emplace_back("/usr/local/cuda-12.4/lib64/libnvrtc.so.12");
  CHECK_THAT(fault_of(m).what, Contains("cuda-12.4") && Contains("used is /usr/local/cuda-13.0"));
  CHECK_THAT(fault_of(m).advice, Contains("KDA_JIT_NVRTC"));
  m.nvrtc_given = true;
  for (const Finding& f : diagnose(m))
    CHECK(f.good);
}

TEST_CASE("no cache, one that cannot be written, is full, is foreign or open to others") {
  MachineFacts m = healthy();
  SECTION("none") {
    m.cache = {};
    CHECK_THAT(fault_of(m).advice, Contains("KDA_JIT_CACHE_DIR"));
  }
  SECTION("unwritable") {
    m.cache.unwritable = "Read-only file system";
    CHECK_THAT(fault_of(m).what, Contains("v1 cannot be written: Read-only file system"));
  }
  SECTION("full") {
    m.cache.free_bytes = 3U << 20U;
    CHECK_THAT(fault_of(m).what, Contains("has 3 MB of disk left"));
    CHECK_THAT(fault_of(m).advice, Contains("KDA_JIT_CACHE_MAX_MB"));
  }
  SECTION("foreign") {
    m.cache.ours = false;
    CHECK_THAT(fault_of(m).what, Contains("belongs to another user"));
    CHECK_THAT(fault_of(m).advice, Contains("KDA_JIT_CACHE_READONLY_DIRS"));
  }
  SECTION("open") {
    m.cache.others_write = true;
    CHECK_THAT(fault_of(m).what, Contains("can be written by others"));
    CHECK_THAT(fault_of(m).advice, Contains("chmod go-w"));
  }
  SECTION("a pack") {
    m.bad_packs = {"ignoring the pack 'x'"};
    CHECK(fault_of(m).what == "ignoring the pack 'x'");
  }
}

TEST_CASE("wrong clocks: held by application clocks, or down against the user's will") {
  MachineFacts m = healthy();
  m.gpus[0].application_clock = 1410;
  CHECK_THAT(fault_of(m).what, Contains("1410 of 1980 MHz"));
  CHECK_THAT(fault_of(m).advice, Contains("nvidia-smi -rac"));
  m = healthy();
  m.gpus[0].clock = 345;
  for (const Finding& f : diagnose(m)) // idle, not slow
    CHECK(f.good);
  m.gpus[0].slowed_by = slowdowns(0x40 | 0x1);
  CHECK_THAT(fault_of(m).what, Contains("hardware thermal slowdown") && Contains("345 of 1980"));
  CHECK(slowdowns(0x1 | 0x2 | 0x4 | 0x10).empty()); // idle, application clocks, power cap, sync boost
  CHECK(slowdowns(0xe8).size() == 4);
}

TEST_CASE("without NVML nothing is said about clocks") {
  MachineFacts m = healthy();
  m.gpus[0].clock = m.gpus[0].application_clock = m.gpus[0].largest_clock = 0;
  CHECK(diagnose(m).size() == 3);
  GpuFacts gpu;
  read_clocks("GPU-00000000-0000-0000-0000-000000000000", gpu); // nobody has this one
  CHECK(gpu.clock == 0);
}

TEST_CASE("the facts of this machine: its cache and its packs") {
  const cache::test::Scratch scratch;
  EngineOptions options;
  options.cache_directory = scratch.path();
  options.cache_packs = {scratch.path() / "absent.kdapack"};
  options.log = [](std::string_view) {};
  const Engine engine = Engine::create(options).value();
  MachineFacts m = gather_facts(engine, options);
  CHECK(m.cache.directory == engine.cache_directory());
  CHECK(m.cache.ours);
  CHECK_FALSE(m.cache.others_write);
  CHECK(m.cache.unwritable.empty());
  CHECK(m.cache.free_bytes > 0);
  REQUIRE(m.bad_packs.size() == 1);
  CHECK_THAT(m.bad_packs[0], Contains("absent.kdapack"));
  fs::permissions(scratch.path(), fs::perms::others_write, fs::perm_options::add);
  CHECK(gather_facts(engine, options).cache.others_write);
  fs::remove_all(engine.cache_directory());
  CHECK_FALSE(gather_facts(engine, options).cache.unwritable.empty());
}
