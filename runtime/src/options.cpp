// EngineOptions from the environment, and the names of devices.
#include "kda/engine.h"
#include "tune_worker.h"
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fmt/format.h>

extern char** environ; // NOLINT(readability-redundant-declaration): POSIX names it, no header must

namespace kda {
namespace {

/// The value of a variable; an empty string means unset.
std::optional<std::string> variable(const char* name) {
  const char* const value =
      std::getenv(name); // NOLINT(concurrency-mt-unsafe): nothing here writes the environment
  return value == nullptr || *value == 0 ? std::nullopt : std::optional<std::string>(value);
}

Result<double> number(const char* name, const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= 0) || std::isinf(value))
    return fail(ErrorCode::invalid_argument,
                fmt::format("{} is '{}', expected a number that is not negative", name, text));
  return value;
}

Result<TuneMode> parse_tune_mode(const std::string& text) {
  if (text == "off") return TuneMode::off;
  if (text == "cached") return TuneMode::cached;
  if (text == "on") return TuneMode::on;
  if (text == "force") return TuneMode::force;
  if (text == "pinned") return TuneMode::pinned;
  return fail(ErrorCode::invalid_argument,
              fmt::format("KDA_JIT_TUNE is '{}'; choose off, cached, on, force or pinned", text));
}

Result<TuneTiming> parse_timing(const std::string& text) {
  for (const bool warm : {false, true})
    for (const bool graph : {false, true})
      if (text == fmt::format("{}-{}", warm ? "warm" : "cold", graph ? "graph" : "eager"))
        return TuneTiming{warm, graph};
  return fail(
      ErrorCode::invalid_argument,
      fmt::format("KDA_JIT_TUNE_TIMING is '{}'; choose cold-eager, cold-graph, warm-eager or warm-graph",
                  text));
}

Result<std::uint64_t> megabytes(const char* name, const std::string& text) {
  const auto value = number(name, text);
  if (!value) return tl::unexpected(value.error());
  return static_cast<std::uint64_t>(std::min(std::ceil(*value * 0x1p20), 0x1p63));
}

Status refuse_unknown() {
  constexpr std::string_view kPrefix = "KDA_JIT_";
  const auto known = environment_variables();
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view name = std::string_view(*entry).substr(0, std::string_view(*entry).find('='));
    if (name.substr(0, kPrefix.size()) != kPrefix) continue;
    if (std::none_of(known.begin(), known.end(),
                     [&](const EnvironmentVariable& v) { return name == v.name; }))
      return fail(
          ErrorCode::invalid_argument,
          fmt::format("unknown environment variable {}; `kda-jit env` lists those that are read", name));
  }
  return {};
}

} // namespace

std::vector<std::filesystem::path> parse_paths(std::string_view text) {
  std::vector<std::filesystem::path> all;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(':', begin), text.size());
    if (end > begin) all.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return all;
}

std::vector<EnvironmentVariable> environment_variables() {
  return {
      {"KDA_JIT_CACHE_DIR", "directory of the persistent cache (default: $XDG_CACHE_HOME/kda-jit)"},
      {"KDA_JIT_CACHE_READONLY_DIRS", "further caches that are only read, separated by colons"},
      {"KDA_JIT_CACHE_PACKS", "files of `kda-jit cache pack`, read after the caches, separated by colons"},
      {"KDA_JIT_CACHE_MAX_MB", "megabytes of disk that the cache may take (default: 1024; 0: no limit)"},
      {"KDA_JIT_CACHE_MEMORY_MB", "megabytes of images kept in memory (default: 256; 0: no limit)"},
      {"KDA_JIT_TUNE", "off, cached (default), on, force or pinned"},
      {"KDA_JIT_TUNE_PINS", "files of `kda-jit report --json` that pinned takes, separated by colons"},
      {"KDA_JIT_TUNE_BUDGET_MS", "milliseconds that tuning one problem may take (default: 30000)"},
      {"KDA_JIT_TUNE_MEMORY_MB", "megabytes of the device that a tuner may hold (default: what is free)"},
      {"KDA_JIT_TUNE_TIMING", "cold-eager (default), cold-graph, warm-eager or warm-graph"},
      {"KDA_JIT_TUNE_WORKER", "path of kda-jit: candidates then run in a process of their own"},
      {"KDA_JIT_THREADS", "threads of host kernels and of parallel compiles (default: all)"},
      {"KDA_JIT_LOG", "1: every compile and load on stderr; 0 (default): warnings only"},
      {"KDA_JIT_NVRTC", "path of libnvrtc.so (default: the loader's and the CUDA toolkit's)"},
      {"KDA_JIT_DUMP", "directory for the source, log and code of every kernel that is prepared"},
      {"KDA_JIT_LIBRARY", "path of libkda_jit.so for the Python binding"}};
}

Result<EngineOptions> EngineOptions::from_environment(bool strict) {
  if (strict)
    if (const Status ok = refuse_unknown(); !ok) return tl::unexpected(ok.error());
  EngineOptions options;
  if (const auto text = variable("KDA_JIT_CACHE_DIR")) options.cache_directory = *text;
  if (const auto text = variable("KDA_JIT_CACHE_READONLY_DIRS"))
    options.read_only_caches = parse_paths(*text);
  if (const auto text = variable("KDA_JIT_CACHE_PACKS")) options.cache_packs = parse_paths(*text);
  if (const auto text = variable("KDA_JIT_CACHE_MAX_MB")) {
    const auto bytes = megabytes("KDA_JIT_CACHE_MAX_MB", *text);
    if (!bytes) return tl::unexpected(bytes.error());
    options.cache_max_bytes = *bytes;
  }
  if (const auto text = variable("KDA_JIT_CACHE_MEMORY_MB")) {
    const auto bytes = megabytes("KDA_JIT_CACHE_MEMORY_MB", *text);
    if (!bytes) return tl::unexpected(bytes.error());
    options.cache_memory_bytes = *bytes;
  }
  if (const auto text = variable("KDA_JIT_TUNE")) {
    const auto mode = parse_tune_mode(*text);
    if (!mode) return tl::unexpected(mode.error());
    options.tune = *mode;
  }
  if (const auto text = variable("KDA_JIT_TUNE_BUDGET_MS")) {
    const auto ms = number("KDA_JIT_TUNE_BUDGET_MS", *text);
    if (!ms) return tl::unexpected(ms.error());
    options.tune_budget_seconds = *ms / 1e3;
  }
  if (const auto text = variable("KDA_JIT_TUNE_PINS")) options.tune_pins = parse_paths(*text);
  if (const auto text = variable("KDA_JIT_TUNE_MEMORY_MB")) {
    const auto bytes = megabytes("KDA_JIT_TUNE_MEMORY_MB", *text);
    if (!bytes) return tl::unexpected(bytes.error());
    options.tune_memory_bytes = *bytes;
  }
  if (const auto text = variable("KDA_JIT_TUNE_TIMING")) {
    const auto timing = parse_timing(*text);
    if (!timing) return tl::unexpected(timing.error());
    options.tune_timing = *timing;
  }
  if (const auto text = variable("KDA_JIT_TUNE_WORKER")) options.tune_worker = *text;
  if (const auto text = variable("KDA_JIT_THREADS")) {
    const auto threads = number("KDA_JIT_THREADS", *text);
    if (!threads) return tl::unexpected(threads.error());
    if (*threads != std::floor(*threads))
      return fail(ErrorCode::invalid_argument,
                  fmt::format("KDA_JIT_THREADS is '{}', expected a whole number", *text));
    options.threads = static_cast<int>(std::min(*threads, 4096.0));
  }
  if (const auto text = variable("KDA_JIT_LOG")) {
    if (*text != "0" && *text != "1")
      return fail(ErrorCode::invalid_argument, fmt::format("KDA_JIT_LOG is '{}'; choose 0 or 1", *text));
    if (*text == "1") options.log = [](std::string_view line) { fmt::print(stderr, "kda-jit: {}\n", line); };
  }
  if (const auto text = variable("KDA_JIT_NVRTC")) options.nvrtc = *text;
  if (const auto text = variable("KDA_JIT_DUMP")) options.dump_directory = *text;
  return options;
}

std::vector<std::string> worker_environment(const EngineOptions& o, const std::filesystem::path& cache,
                                            double budget_seconds) {
  constexpr std::string_view kPrefix = "KDA_JIT_";
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (std::string_view(*entry).substr(0, kPrefix.size()) != kPrefix) all.emplace_back(*entry);
  const auto add = [&](const char* name, const auto& value) {
    all.push_back(fmt::format("{}={}", name, value));
  };
  const auto joined = [](const std::vector<std::filesystem::path>& paths) {
    std::string text;
    for (const std::filesystem::path& path : paths)
      text += path.native() + ":";
    return text;
  };
  add("KDA_JIT_CACHE_DIR", cache.native());
  add("KDA_JIT_CACHE_READONLY_DIRS", joined(o.read_only_caches));
  add("KDA_JIT_CACHE_PACKS", joined(o.cache_packs));
  add("KDA_JIT_CACHE_MAX_MB", static_cast<double>(o.cache_max_bytes) / 0x1p20);
  add("KDA_JIT_CACHE_MEMORY_MB", static_cast<double>(o.cache_memory_bytes) / 0x1p20);
  add("KDA_JIT_TUNE_BUDGET_MS", budget_seconds * 1e3);
  add("KDA_JIT_TUNE_MEMORY_MB", static_cast<double>(o.tune_memory_bytes) / 0x1p20);
  add("KDA_JIT_TUNE_TIMING",
      fmt::format("{}-{}", o.tune_timing.warm_l2 ? "warm" : "cold", o.tune_timing.graph ? "graph" : "eager"));
  add("KDA_JIT_THREADS", o.threads);
  if (o.nvrtc) add("KDA_JIT_NVRTC", o.nvrtc->native());
  if (!o.dump_directory.empty()) add("KDA_JIT_DUMP", o.dump_directory.native());
  return all;
}

std::string to_string(const Device& d) {
  switch (d.kind) {
  case Device::Kind::host: return "host";
  case Device::Kind::emulator: return "emulator";
  case Device::Kind::cuda: break;
  }
  return fmt::format("cuda:{}", d.index);
}

Result<Device> parse_device(std::string_view text) {
  if (text == "host") return Device::host();
  if (text == "emulator") return Device{Device::Kind::emulator, 0};
  constexpr std::string_view kCuda = "cuda:";
  if (text.substr(0, kCuda.size()) == kCuda) {
    int index = 0;
    const auto [end, error] = std::from_chars(text.data() + kCuda.size(), text.data() + text.size(), index);
    if (error == std::errc() && end == text.data() + text.size() && index >= 0) return Device::cuda(index);
  }
  return fail(ErrorCode::invalid_argument,
              fmt::format("unknown device '{}'; choose host, emulator or cuda:N", text));
}

const char* to_string(Origin origin) {
  switch (origin) {
  case Origin::compiled: return "compiled";
  case Origin::memory: return "memory";
  case Origin::disk: return "disk";
  case Origin::read_only: return "read-only cache";
  case Origin::pack: break;
  }
  return "pack";
}

Tensor contiguous(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  return t;
}

IndexTable contiguous_table(const void* data, IndexType dtype, std::initializer_list<std::int64_t> shape) {
  IndexTable t;
  t.data = data;
  t.dtype = dtype;
  t.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  t.stride[0] = t.rank == 2 ? t.shape[1] : 1;
  t.stride[1] = t.rank == 2 ? 1 : 0;
  return t;
}

} // namespace kda
