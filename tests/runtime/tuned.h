#pragma once
// A device for tests of the tuner: its kernels are a line of this file and its clock is the test's.
#include "scratch.h"
#include "scripted_backend.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>

namespace kda::test {

inline constexpr Sizes kSizes{1, 1000, 1};

/// The kernel to tune: a decay in base 2 becomes one in base e.
inline Problem gate_problem() {
  Problem p = small_problem(Operation::gate);
  p.gate = GateKind::log2;
  p.gate_dtype = DType::fp32;
  p.dt_bias = false;
  return p;
}
inline Status compute(const KernelArgs& a) {
  const std::int64_t count = a.batch * a.tokens * a.value_heads * gate_problem().key_dim;
  const auto* const g = static_cast<const float*>(a.g.data);
  std::transform(g, g + count, static_cast<float*>(a.o.data), [](float x) { return x * 0.693147181F; });
  return {};
}

/// The variants of the problem by the text that the emitter makes of them.
inline std::map<std::string, std::string> names(const Problem& p, const Target& t) {
  std::map<std::string, std::string> all;
  for (const Candidate& c : enumerate(p, t))
    if (c.rejected.empty()) {
      const SourceUnit unit = emit(p, c.variant, t).value();
      for (const SourceFile& f : unit.files)
        if (f.name == "config.cuh") all[f.text] = to_string(c.variant);
    }
  return all;
}

/// Options of an engine on that backend, to be changed; memory only without a directory. Lines go to `log`.
inline EngineOptions options_on(std::shared_ptr<Backend> backend, const std::filesystem::path& directory = {},
                                std::vector<std::string>* log = nullptr) {
  EngineOptions options;
  options.cache_directory = directory;
  options.emulator = std::move(backend);
  options.threads = 2;
  options.log = [log](std::string_view line) {
    if (log != nullptr) log->emplace_back(line);
  };
  return options;
}

/// A device that computes right and takes `times[variant]` microseconds, 10 if not given.
struct Tuned {
  Problem problem = gate_problem();
  std::shared_ptr<ScriptedBackend> backend = std::make_shared<ScriptedBackend>();
  std::map<std::string, std::string> variants = names(problem, backend->target());
  std::map<std::string, double> times;
  std::string standard = to_string(choose(problem, backend->target(), kSizes).value());

  Tuned() {
    backend->remember_last = true;
    backend->on_launch = [](const SourceUnit&, const Launch&, const KernelArgs& a) { return compute(a); };
    backend->on_time = [this](const SourceUnit& last) {
      const auto it = times.find(variant_of(last));
      return it == times.end() ? 10.0 : it->second;
    };
  }
  Tuned(const Tuned&) = delete;
  Tuned& operator=(const Tuned&) = delete;

  [[nodiscard]] std::string variant_of(const SourceUnit& unit) const {
    for (const SourceFile& f : unit.files)
      if (f.name == "config.cuh") return variants.at(f.text);
    return {};
  }
  /// All variants but the untuned choice.
  [[nodiscard]] std::vector<std::string> others() const {
    std::vector<std::string> all;
    for (const auto& [text, name] : variants)
      if (name != standard) all.push_back(name);
    return all;
  }
  /// Any variant but the untuned choice.
  [[nodiscard]] std::string other() const {
    for (const auto& [text, name] : variants)
      if (name != standard) return name;
    return {};
  }
  [[nodiscard]] TuneReport tune(const Engine& engine) const {
    auto report = engine.tune(problem, kScripted, kSizes);
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    return *report;
  }
};

inline TuneRow row_of(const TuneReport& report, const std::string& variant) {
  for (const TuneRow& row : report.rows)
    if (row.variant == variant) return row;
  FAIL("no row of " << variant);
  return {};
}
inline std::string chosen(const TuneReport& report) {
  std::string name;
  for (const TuneRow& row : report.rows)
    if (row.chosen) name += row.variant;
  return name;
}

} // namespace kda::test
