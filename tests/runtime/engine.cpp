// Plans, the cache behind them, and what the engine refuses.
#include "kda/engine.h"
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <unistd.h>

using namespace kda;
namespace fs = std::filesystem;

namespace {

struct TempDir {
  fs::path path = fs::temp_directory_path() / ("kda engine ü " + std::to_string(getpid()));
  TempDir() { fs::create_directories(path); }
  ~TempDir() { fs::remove_all(path); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
};

Engine engine_at(const fs::path& path) {
  EngineOptions o;
  o.cache_directory = path;
  o.log = [](std::string_view) {};
  return Engine::create(std::move(o)).value();
}

Problem decode() {
  Problem p;
  p.operation = Operation::recurrent;
  p.heads = p.value_heads = 2;
  p.key_dim = p.value_dim = 32;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  return p;
}

} // namespace

TEST_CASE("a kernel is compiled once, then comes from memory, then from disk in another engine") {
  const TempDir dir;
  const Sizes sizes{1, 4, 1};
  {
    const Engine engine = engine_at(dir.path);
    const auto first = engine.prepare(engine.plan(decode(), Device::host(), sizes).value());
    if (!first && first.error().code == ErrorCode::unavailable) {
      WARN("SKIPPED, no host backend: " << first.error().message);
      return;
    }
    REQUIRE(first);
    CHECK(first->info().origin == Origin::compiled);
    const auto second = engine.prepare(engine.plan(decode(), Device::host(), Sizes{1, 4000, 1}).value());
    REQUIRE(second);
    CHECK(second->info().origin == Origin::memory);
    CHECK(engine.compile_count() == 1);
    Problem more_heads = decode();
    more_heads.heads = more_heads.value_heads = 7;
    REQUIRE(engine.prepare(engine.plan(more_heads, Device::host(), sizes).value()));
  }
  const Engine engine = engine_at(dir.path);
  const auto again = engine.prepare(engine.plan(decode(), Device::host(), sizes).value());
  REQUIRE(again);
  CHECK(again->info().origin == Origin::disk);
  CHECK(engine.compile_count() == 0);
}

TEST_CASE("a damaged image is compiled again") {
  const TempDir dir;
  const Sizes sizes{1, 4, 1};
  {
    const Engine engine = engine_at(dir.path);
    if (!engine.prepare(engine.plan(decode(), Device::host(), sizes).value())) {
      WARN("SKIPPED, no host backend");
      return;
    }
  }
  int damaged = 0;
  for (const auto& file : fs::recursive_directory_iterator(dir.path))
    if (file.is_regular_file() && file.file_size() > 1000 &&
        file.path().filename().string().find("sqlite") == std::string::npos) {
      std::fstream f(file.path(), std::ios::in | std::ios::out | std::ios::binary);
      f.seekp(static_cast<std::streamoff>(file.file_size() / 2));
      f.put('\x5a');
      ++damaged;
    }
  REQUIRE(damaged > 0);
  const Engine engine = engine_at(dir.path);
  const auto kernel = engine.prepare(engine.plan(decode(), Device::host(), sizes).value());
  REQUIRE(kernel);
  CHECK(kernel->info().origin == Origin::compiled);
}

TEST_CASE("the engine refuses with a sentence") {
  const Engine engine = engine_at({});
  Problem bad = decode();
  bad.key_dim = 17;
  CHECK(engine.plan(bad, Device::host(), {1, 4, 1}).error().code == ErrorCode::invalid_argument);
  CHECK(engine.plan(decode(), Device::host(), {2, 4, 1}).error().code == ErrorCode::invalid_argument);
  CHECK(engine.plan(decode(), Device{Device::Kind::emulator, 0}, {1, 4, 1}).error().code ==
        ErrorCode::unavailable);
  Variant nonsense;
  nonsense.rows = 12345;
  CHECK_THAT(engine.plan(decode(), Device::host(), {1, 4, 1}, nonsense).error().message,
             Catch::Matchers::Contains("cannot run"));
  CHECK_THAT(parse_device("moon").error().message, Catch::Matchers::Contains("cuda:N"));
}

TEST_CASE("the environment is read once, checked, and unknown names are refused when strict") {
  setenv("KDA_JIT_TUNE", "sometimes", 1);
  CHECK_THAT(EngineOptions::from_environment().error().message, Catch::Matchers::Contains("KDA_JIT_TUNE"));
  setenv("KDA_JIT_TUNE", "off", 1);
  CHECK(EngineOptions::from_environment().value().tune == TuneMode::off);
  unsetenv("KDA_JIT_TUNE");
  setenv("KDA_JIT_CACHE_DRI", "/nowhere", 1);
  CHECK(EngineOptions::from_environment().has_value());
  CHECK_THAT(EngineOptions::from_environment(true).error().message,
             Catch::Matchers::Contains("KDA_JIT_CACHE_DRI"));
  unsetenv("KDA_JIT_CACHE_DRI");
}

TEST_CASE("a precompiled image is found by the next engine") {
  const TempDir dir;
  const Target target = cuda_target("sm_90a").value();
  const Variant variant = choose(decode(), target, {1, 1, 1}).value();
  const auto first = engine_at(dir.path).precompile(decode(), variant, target);
  if (!first) {
    REQUIRE(first.error().code == ErrorCode::unavailable);
    WARN("SKIPPED, no NVRTC: " << first.error().message);
    return;
  }
  CHECK(first->origin == Origin::compiled);
  CHECK(first->registers > 0);
  const auto second = engine_at(dir.path).precompile(decode(), variant, target);
  REQUIRE(second);
  CHECK(second->origin == Origin::disk);
  CHECK(second->registers == first->registers);
}
