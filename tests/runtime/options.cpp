// EngineOptions from the environment, and the names of devices.
#include "kda/engine.h"
#include <catch2/catch.hpp>
#include <cstdlib>

using namespace kda;

namespace {

/// Sets a variable for one test.
class Variable {
public:
  Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

private:
  const char* name_;
};

void check_refused(const char* name, const char* value, const char* sentence) {
  const Variable variable(name, value);
  const auto options = EngineOptions::from_environment();
  REQUIRE_FALSE(options);
  CHECK(options.error().code == ErrorCode::invalid_argument);
  CHECK_THAT(options.error().message, Catch::Matchers::Contains(name) && Catch::Matchers::Contains(sentence));
}

} // namespace

TEST_CASE("every variable reaches its option") {
  const Variable a("KDA_JIT_CACHE_DIR", "/a b"), b("KDA_JIT_CACHE_READONLY_DIRS", "/x::/y"),
      c("KDA_JIT_TUNE", "force"), d("KDA_JIT_TUNE_BUDGET_MS", "1500"), e("KDA_JIT_THREADS", "3"),
      f("KDA_JIT_NVRTC", "/lib/nvrtc"), g("KDA_JIT_CACHE_MAX_MB", "1.5"),
      memory("KDA_JIT_CACHE_MEMORY_MB", "3"), h("KDA_JIT_TUNE_PINS", "/p q.json:/r.json"),
      i("KDA_JIT_TUNE_MEMORY_MB", "64"), j("KDA_JIT_TUNE_TIMING", "warm-graph"),
      k("KDA_JIT_TUNE_WORKER", "/bin/kda-jit"), l("KDA_JIT_CACHE_PACKS", "/a b.kdapack:/c.kdapack"),
      m("KDA_JIT_DUMP", "/d d");
  const auto options = EngineOptions::from_environment().value();
  CHECK(options.cache_directory == std::filesystem::path("/a b"));
  CHECK(options.read_only_caches == std::vector<std::filesystem::path>{"/x", "/y"});
  CHECK(options.cache_packs == std::vector<std::filesystem::path>{"/a b.kdapack", "/c.kdapack"});
  CHECK(options.dump_directory == std::filesystem::path("/d d"));
  CHECK(options.cache_max_bytes == 1536 * 1024);
  CHECK(options.cache_memory_bytes == 3 << 20U);
  CHECK(options.tune == TuneMode::force);
  CHECK(options.tune_budget_seconds == 1.5);
  CHECK(options.threads == 3);
  CHECK(options.nvrtc == std::filesystem::path("/lib/nvrtc"));
  CHECK(options.tune_pins == std::vector<std::filesystem::path>{"/p q.json", "/r.json"});
  CHECK(options.tune_memory_bytes == 64U << 20U);
  CHECK(options.tune_timing == TuneTiming{true, true});
  CHECK(options.tune_worker == std::filesystem::path("/bin/kda-jit"));
  const Variable mode("KDA_JIT_TUNE", "pinned");
  CHECK(EngineOptions::from_environment().value().tune == TuneMode::pinned);
}

TEST_CASE("a limit of the cache may be anything from nothing to more than there is") {
  for (const auto& [text, bytes] : {std::pair<const char*, std::uint64_t>{"0", 0},
                                    {"1", 1U << 20U},
                                    {"1e-9", 1},
                                    {"9223372036854775808", std::uint64_t{1} << 63U}}) {
    const Variable variable("KDA_JIT_CACHE_MAX_MB", text);
    CHECK(EngineOptions::from_environment().value().cache_max_bytes == bytes);
  }
}

TEST_CASE("a malformed value is an error that names the variable and the choices") {
  check_refused("KDA_JIT_TUNE", "fast", "off, cached, on, force or pinned");
  check_refused("KDA_JIT_TUNE_BUDGET_MS", "-1", "not negative");
  check_refused("KDA_JIT_TUNE_BUDGET_MS", "nan", "not negative");
  check_refused("KDA_JIT_CACHE_MAX_MB", "1G", "number");
  check_refused("KDA_JIT_CACHE_MEMORY_MB", "-1", "number");
  check_refused("KDA_JIT_TUNE_MEMORY_MB", "much", "number");
  check_refused("KDA_JIT_TUNE_TIMING", "cold", "cold-eager, cold-graph, warm-eager or warm-graph");
  check_refused("KDA_JIT_THREADS", "two", "number");
  check_refused("KDA_JIT_THREADS", "2.5", "whole number");
  check_refused("KDA_JIT_LOG", "yes", "0 or 1");
}

TEST_CASE("an unknown variable is refused when strict, and only then") {
  const Variable typo("KDA_JIT_CACHE_DIRR", "/x");
  CHECK(EngineOptions::from_environment(false));
  const auto strict = EngineOptions::from_environment(true);
  REQUIRE_FALSE(strict);
  CHECK_THAT(strict.error().message, Catch::Matchers::Contains("KDA_JIT_CACHE_DIRR"));
}

TEST_CASE("the list of variables is what strict accepts") {
  for (const EnvironmentVariable& v : environment_variables()) {
    const Variable variable(v.name, "");
    CHECK(EngineOptions::from_environment(true));
  }
}

TEST_CASE("device names parse back") {
  for (const char* name : {"host", "emulator", "cuda:0", "cuda:13"})
    CHECK(to_string(parse_device(name).value()) == name);
  for (const char* name : {"", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:1x", "Host"}) {
    INFO(name);
    const auto device = parse_device(name);
    REQUIRE_FALSE(device);
    CHECK_THAT(device.error().message, Catch::Matchers::Contains("choose host"));
  }
}
