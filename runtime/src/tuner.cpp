// Engine::tune: enumerate, compile in parallel, validate each candidate, time, decide, keep one row a
// candidate.
#include "call_tensors.h"
#include "engine_impl.h"
#include "marshal.h"
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fmt/format.h>
#include <random>
#include <thread>

namespace kda {
namespace {

constexpr const char* kMode = "cold L2, stream"; // how samples are taken; part of a row's key
constexpr int kSamples = 15, kFinalists = 3;
/// A gain below this share of the default's time is noise whatever the spread says.
constexpr double kLeastGain = 0.02;

struct Contestant {
  TuneRow row;
  Variant variant;
  std::shared_ptr<const Kernel::Impl> kernel;
  std::vector<double> samples;
  [[nodiscard]] bool ok() const { return row.status == "ok"; }
};

void summarise(Contestant& c) {
  if (c.samples.empty()) return;
  std::sort(c.samples.begin(), c.samples.end());
  const auto at = [&](double share) {
    return c.samples[static_cast<std::size_t>(share * static_cast<double>(c.samples.size() - 1))];
  };
  c.row.median_us = at(0.5);
  c.row.spread_us = at(0.9) - at(0.1);
}

/// The relative L2 error, and why it is too much (empty when it is not). Non-finite values come first: they
/// say more than an infinite error. The largest single error, over the rms or over the value itself where
/// that is larger, finds the one bad element that the L2 norm of a large tensor hides.
std::pair<double, std::string> compare(const reference::Array& got, const reference::Array& want,
                                       double tolerance) {
  constexpr double kPeak = 50; // largest over L2: far above rounding, so that only a wrong element shows
  const auto bad = std::count_if(got.begin(), got.end(), [](double x) { return !std::isfinite(x); });
  const double error = reference::relative_error(got, want);
  if (bad > 0) return {error, fmt::format("{} non-finite values of {}", bad, got.size())};
  if (!(error <= tolerance)) return {error, fmt::format("error {:.1e}", error)};
  double square = 0, peak = 0;
  for (const double x : want)
    square += x * x;
  const double rms = std::sqrt(square / std::max<double>(static_cast<double>(want.size()), 1));
  for (std::size_t i = 0; i < want.size(); ++i)
    if (const double scale = std::max(rms, std::abs(want[i])); scale > 0)
      peak = std::max(peak, std::abs(got[i] - want[i]) / scale);
  if (peak > kPeak * tolerance) return {error, fmt::format("an element off by {:.1e} of the rms", peak)};
  return {error, {}};
}

/// Compulsory bytes of a call: every input read once, every output written once.
double compulsory_bytes(const Problem& p, const Sizes& s) {
  const double rows = static_cast<double>(s.batch) * static_cast<double>(s.tokens),
               element = size_of(p.dtype);
  const double q = rows * p.heads * p.key_dim * element, v = rows * p.value_heads * p.value_dim * element;
  const double g = rows * p.value_heads * p.key_dim * size_of(p.gate_dtype),
               beta = rows * p.value_heads * size_of(p.beta_dtype);
  const double state =
      static_cast<double>(s.sequences) * p.value_heads * p.key_dim * p.value_dim * size_of(p.state_dtype);
  switch (p.operation) {
  case Operation::gate: return g + rows * p.value_heads * p.key_dim * 4;
  case Operation::gate_backward: return 2 * g + rows * p.value_heads * p.key_dim * 4;
  case Operation::replay:
    return 4 * rows * (p.heads * p.key_dim + p.value_heads * (p.key_dim + p.value_dim)) + 2 * state;
  case Operation::backward: return 2 * (2 * q + v + g + beta) + v + 3 * state;
  default: break;
  }
  const double kept =
      p.updates ? 4 * rows * (p.heads * p.key_dim + p.value_heads * (p.key_dim + p.value_dim)) : 0;
  const double states = p.every_state ? 1 + rows / std::max<double>(1, static_cast<double>(s.sequences))
                        : p.tree      ? 1
                                      : 2;
  return 2 * q + 2 * v + g + beta + kept + states * state;
}

class Tuning {
public:
  Tuning(std::shared_ptr<Engine::Impl> engine, std::shared_ptr<const Backend> backend, const Problem& p,
         Device device, const Sizes& s)
      : engine_(std::move(engine)), backend_(std::move(backend)), p_(p), device_(device), s_(s) {}

  using Progress = std::function<void(const TuneProgress&)>;
  Result<TuneReport> run(const Progress& progress) {
    const auto standard = choose(p_, backend_->target(), s_);
    if (!standard) return tl::unexpected(standard.error());
    standard_ = *standard;
    enter();
    compile(progress);
    if (const Status ok = unless_full(validate(progress)); !ok) return tl::unexpected(ok.error());
    if (const Status ok = unless_full(time_all(progress)); !ok) return tl::unexpected(ok.error());
    decide();
    return keep();
  }

private:
  void enter() {
    for (const Candidate& c : enumerate(p_, backend_->target())) {
      Contestant x;
      x.variant = c.variant;
      x.row.variant = to_string(c.variant);
      x.row.status = c.rejected.empty() ? "ok" : "rejected";
      x.row.reason = c.rejected;
      all_.push_back(std::move(x));
    }
  }

  void compile(const Progress& progress) {
    std::atomic<std::size_t> next{0};
    std::mutex mutex; // of `done` and of the caller's progress
    int done = 0;
    const auto work = [&] {
      for (std::size_t i = next++; i < all_.size(); i = next++) {
        Contestant& c = all_[i];
        if (progress) {
          const std::scoped_lock lock(mutex);
          progress({"compiling", ++done, static_cast<int>(all_.size())});
        }
        if (!c.ok()) continue;
        const auto kernel = engine_->kernel(engine_, Plan::Impl{p_, c.variant, device_, s_, "given"});
        if (!kernel) {
          c.row.status = "failed";
          c.row.reason = kernel.error().message;
          continue;
        }
        c.kernel = *kernel;
        c.row.registers = c.kernel->info.registers;
        c.row.shared_bytes = c.kernel->info.shared_bytes;
        if (c.kernel->info.spill_bytes > 0)
          c.row.reason = fmt::format("spills {} bytes", c.kernel->info.spill_bytes);
      }
    };
    const int threads = engine_->threads();
    std::vector<std::jthread> pool;
    pool.reserve(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i)
      pool.emplace_back(work);
  }

  /// One call on `tensors` with a workspace of its own; waits for it.
  Status call(const Kernel::Impl& k, const CallTensors& tensors, void* workspace,
              void* stream = nullptr) const {
    KernelArgs args;
    Sizes sizes;
    if (Status ok = make_kernel_args(k.problem, tensors.args(), k.host_memory, args, sizes); !ok) return ok;
    return launch_all(*backend_, *k.module, k.problem, k.variant, sizes, args, workspace, stream);
  }
  Status call_alone(const Kernel::Impl& k, const CallTensors& tensors, const Sizes& sizes) const {
    const std::size_t bytes = workspace_of(backend_->target(), k.problem, k.variant, sizes).bytes;
    const auto workspace = backend_->allocate(bytes);
    if (!workspace) return tl::unexpected(workspace.error());
    Status ok = backend_->fill(*workspace, 0xFFFFFFFFU, bytes / 4, nullptr);
    if (ok) ok = tensors.poison();
    if (ok) ok = call(k, tensors, *workspace);
    const Status done = backend_->synchronize();
    backend_->release(*workspace);
    return ok ? done : ok;
  }

  /// Memory that is too small for any candidate is no failure of the tuner: every candidate gets the reason,
  /// none is chosen, and plans keep the untuned choice.
  Status unless_full(const Status& ok) {
    if (ok || ok.error().code != ErrorCode::out_of_memory) return ok;
    drop_all("failed", fmt::format("not timed: {}", ok.error().message));
    engine_->warn(fmt::format("nothing of {} fits in the device's memory; the untuned choice stays: {}",
                              to_string(p_), ok.error().message));
    return {};
  }
  void drop_all(const std::string& status, const std::string& reason) {
    for (Contestant& c : all_)
      if (c.ok()) {
        c.row.status = status;
        c.row.reason = reason;
      }
  }

  /// Every candidate against the device's token kernel on all heads; that kernel first against float64 on
  /// one group of heads (kernel texts do not know head counts), which is small enough for it. 150 tokens are
  /// no whole number of chunks; drafts are a few, each perhaps with a state of its own. The gate has no token
  /// kernel: there the untuned choice stands in.
  Status validate(const Progress& progress) {
    const bool drafts = p_.every_state || p_.tree || p_.operation == Operation::replay;
    const Sizes sizes{p_.varlen ? 1 : 2, drafts ? 33 : 150, p_.varlen ? 3 : 2};
    const auto reference = device_reference(sizes);
    if (!reference) return tl::unexpected(reference.error());
    if (*reference == nullptr) {
      drop_all("failed", "not checked: no reference kernel of this device agrees with float64");
      return {};
    }
    CallTensors tensors(backend_);
    if (Status ok = tensors.create(p_, sizes, std::random_device{}()); !ok) return ok;
    if (const Status ok = call_alone(*(*reference)->kernel, tensors, sizes); !ok) return ok;
    std::map<std::string, reference::Array> expected;
    for (const std::string& name : tensors.outputs()) {
      auto values = tensors.output(name);
      if (!values) return tl::unexpected(values.error());
      expected[name] = std::move(*values);
    }
    int done = 0;
    for (Contestant& c : all_) {
      if (c.ok()) judge(c, *c.kernel, tensors, sizes, expected);
      if (progress) progress({"checking", ++done, static_cast<int>(all_.size())});
    }
    return {};
  }

  /// The token kernel of least estimated time that agrees with float64; null when none does.
  Result<const Contestant*> device_reference(const Sizes& sizes) {
    Problem small = p_;
    small.value_heads = p_.value_heads / p_.heads;
    small.heads = 1;
    CallTensors tensors(backend_);
    if (const Status ok = tensors.create(small, sizes, std::random_device{}()); !ok)
      return tl::unexpected(ok.error());
    const auto expected = expected_outputs(tensors);
    if (!expected) return tl::unexpected(expected.error());
    std::vector<std::pair<double, Contestant*>> order;
    for (Contestant& c : all_)
      if (c.ok() && c.variant.algorithm != Algorithm::chunk)
        order.emplace_back(c.variant == standard_ ? 0 : estimate_us(p_, c.variant, backend_->target(), s_),
                           &c);
    std::stable_sort(order.begin(), order.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [estimate, c] : order) {
      Kernel::Impl kernel = *c->kernel;
      kernel.problem = small;
      judge(*c, kernel, tensors, sizes, *expected);
      if (c->ok()) return c;
    }
    return nullptr;
  }

  void judge(Contestant& c, const Kernel::Impl& kernel, const CallTensors& tensors, const Sizes& sizes,
             const std::map<std::string, reference::Array>& expected) const {
    const auto error = check(kernel, tensors, sizes, expected);
    if (!error) {
      c.row.status = "failed";
      c.row.reason = error.error().message;
      return;
    }
    c.row.error = std::max(c.row.error, error->first);
    if (error->second.empty()) return;
    c.row.status = "wrong";
    c.row.reason = error->second;
  }

  Result<std::map<std::string, reference::Array>> expected_outputs(const CallTensors& tensors) const {
    const auto in = tensors.reference_inputs();
    if (!in) return tl::unexpected(in.error());
    std::map<std::string, reference::Array> e;
    if (p_.operation == Operation::gate) {
      e["o"] = reference::gate(*in);
    } else if (p_.operation == Operation::backward || p_.operation == Operation::gate_backward) {
      const auto g = tensors.reference_output_gradients();
      if (!g) return tl::unexpected(g.error());
      const reference::Gradients d = p_.operation == Operation::backward
                                         ? reference::adjoint(*in, *g)
                                         : reference::gate_adjoint(*in, g->d_o);
      e = {{"d_q", d.d_q},
           {"d_k", d.d_k},
           {"d_v", d.d_v},
           {"d_g", d.d_g},
           {"d_beta", d.d_beta},
           {"d_A_log", d.d_A_log},
           {"d_dt_bias", d.d_dt_bias},
           {"d_initial_state", d.d_initial_state}};
    } else if (p_.operation == Operation::replay) {
      const auto updates = tensors.reference_updates();
      if (!updates) return tl::unexpected(updates.error());
      e["final_state"] = reference::replay(*in, *updates, tensors.accepted(), tensors.parents());
    } else if (p_.updates || p_.every_state) {
      const reference::Verified x = reference::verify(*in, tensors.parents());
      e = {{"o", x.o}, {"update_u", x.u}, {"update_k", x.k}, {"update_decay", x.decay}};
      e["final_state"] = p_.every_state ? x.states : reference::recurrence(*in).final_state;
    } else {
      const reference::Outputs out = reference::recurrence(*in);
      e = {{"o", out.o}, {"final_state", out.final_state}};
    }
    return e;
  }

  /// The largest relative error, and why the candidate is wrong (empty when it is right).
  Result<std::pair<double, std::string>>
  check(const Kernel::Impl& k, const CallTensors& tensors, const Sizes& sizes,
        const std::map<std::string, reference::Array>& expected) const {
    if (const Status ok = call_alone(k, tensors, sizes); !ok) return tl::unexpected(ok.error());
    double worst = 0;
    for (const std::string& name : tensors.outputs()) {
      const auto got = tensors.output(name);
      if (!got) return tl::unexpected(got.error());
      const auto [error, why] = compare(*got, expected.at(name), tolerance(name));
      worst = std::max(worst, error);
      if (!why.empty()) return std::pair{worst, fmt::format("{} has {}", name, why)};
    }
    const auto preserved = tensors.inputs_preserved();
    if (!preserved) return tl::unexpected(preserved.error());
    return std::pair{worst, std::string(*preserved ? "" : "it changed an input")};
  }
  [[nodiscard]] double tolerance(const std::string& name) const {
    const bool backward = name.substr(0, 2) == "d_";
    if (p_.operation == Operation::gate) return 1e-4; // fp32 arithmetic and output
    if (p_.dtype == DType::fp32) return backward ? 1e-2 : 1e-4;
    if (!backward) return 1e-2;
    return name == "d_g" || name == "d_A_log" || name == "d_beta" || name == "d_dt_bias" ? 2e-2 : 1e-2;
  }

  /// One workspace for all that fit; a candidate whose own does not fit is out, with the reason in its row.
  Result<void*> fitting_workspace() {
    for (;;) {
      Contestant* largest = nullptr;
      std::size_t bytes = 0;
      for (Contestant& c : all_) {
        if (!c.ok()) continue;
        const std::size_t own = workspace_of(backend_->target(), p_, c.variant, s_).bytes;
        if (largest == nullptr || own > bytes) {
          largest = &c;
          bytes = own;
        }
      }
      const auto memory = backend_->allocate(std::max<std::size_t>(bytes, 256));
      if (memory || largest == nullptr || memory.error().code != ErrorCode::out_of_memory) return memory;
      largest->row.status = "failed";
      largest->row.reason = fmt::format(
          "its workspace of {} MiB does not fit in the device's memory beside the tensors", bytes >> 20U);
    }
  }

  Status time_all(const Progress& progress) {
    CallTensors tensors(backend_);
    if (Status ok = tensors.create(p_, s_, std::random_device{}()); !ok) return ok;
    // More than any L2; a smaller buffer where memory is short would time warm lines.
    const std::size_t flush_bytes =
        backend_->target().kind == Target::Kind::cuda ? std::size_t{128} << 20U : std::size_t{64} << 20U;
    const auto flush = backend_->allocate(flush_bytes);
    if (!flush) return tl::unexpected(flush.error());
    const auto workspace = fitting_workspace();
    const Status ok = workspace ? measure(tensors, *workspace, *flush, flush_bytes, progress)
                                : Status(tl::unexpected(workspace.error()));
    if (workspace) backend_->release(*workspace);
    backend_->release(*flush);
    return ok;
  }

  Status sample(Contestant& c, const CallTensors& tensors, void* workspace, void* flush,
                std::size_t flush_bytes) const {
    if (const Status ok = backend_->fill(flush, 0, flush_bytes / 4, nullptr); !ok) return ok;
    const auto us =
        backend_->time_us([&](void* stream) { return call(*c.kernel, tensors, workspace, stream); });
    if (!us) return tl::unexpected(us.error());
    c.samples.push_back(*us);
    return {};
  }

  Status measure(const CallTensors& tensors, void* workspace, void* flush, std::size_t flush_bytes,
                 const Progress& progress) {
    const auto fill = [&](void* stream) { return backend_->fill(flush, 1, flush_bytes / 4, stream); };
    double fill_us = 0;
    for (int i = 0; i < 50; ++i) // brings the clocks up
      if (const auto us = backend_->time_us(fill); us) fill_us = *us;
    // A fill only writes; a copy reads and writes at about the same rate of bytes.
    bandwidth_ = fill_us > 0 ? static_cast<double>(flush_bytes) / fill_us : 0;
    const auto began = std::chrono::steady_clock::now();
    const int total =
        static_cast<int>(std::count_if(all_.begin(), all_.end(), [](const Contestant& c) { return c.ok(); }));
    int done = 0;
    for (Contestant& c : all_) {
      if (!c.ok()) continue;
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began;
      // The default is always timed: without it nothing could be chosen.
      if (c.variant != standard_ && spent.count() > engine_->options.tune_budget_seconds) {
        c.row.status = "failed";
        c.row.reason = "not timed: the tuning budget was spent";
      } else {
        for (int i = 0; i < kSamples + 2 && c.ok(); ++i)
          if (const Status ok = sample(c, tensors, workspace, flush, flush_bytes); !ok) {
            c.row.status = "failed";
            c.row.reason = ok.error().message;
          }
        if (c.samples.size() > 2) c.samples.erase(c.samples.begin(), c.samples.begin() + 2); // warm-up
        summarise(c);
      }
      if (progress) progress({"timing", ++done, total});
    }
    return finals(tensors, workspace, flush, flush_bytes);
  }

  /// The fastest few again, interleaved, so that a drift of clocks hits all alike.
  Status finals(const CallTensors& tensors, void* workspace, void* flush, std::size_t flush_bytes) {
    std::vector<Contestant*> order;
    for (Contestant& c : all_)
      if (c.ok()) order.push_back(&c);
    std::stable_sort(order.begin(), order.end(), [](const Contestant* a, const Contestant* b) {
      return a->row.median_us < b->row.median_us;
    });
    std::vector<Contestant*> finalists(
        order.begin(), order.begin() + std::min<std::ptrdiff_t>(kFinalists, std::ssize(order)));
    for (Contestant* c : order)
      if (c->variant == standard_ && std::find(finalists.begin(), finalists.end(), c) == finalists.end())
        finalists.push_back(c);
    for (Contestant* c : finalists)
      c->samples.clear();
    for (int i = 0; i < 2 * kSamples; ++i)
      for (Contestant* c : finalists)
        if (const Status ok = sample(*c, tensors, workspace, flush, flush_bytes); !ok) return ok;
    for (Contestant* c : finalists)
      summarise(*c);
    return {};
  }

  /// The fastest wins; the default stays unless the gain exceeds the noise of both.
  void decide() {
    Contestant* best = nullptr;
    Contestant* keep = nullptr;
    for (Contestant& c : all_) {
      if (!c.ok()) continue;
      if (best == nullptr || c.row.median_us < best->row.median_us) best = &c;
      if (c.variant == standard_) keep = &c;
    }
    if (best == nullptr) return;
    if (keep != nullptr) {
      const double gain = keep->row.median_us - best->row.median_us;
      const double noise =
          std::max({kLeastGain * keep->row.median_us, keep->row.spread_us / 2, best->row.spread_us / 2});
      if (gain <= noise) best = keep;
    }
    best->row.chosen = true;
  }

  Result<TuneReport> keep() {
    TuneReport report{to_string(p_),
                      bucket(s_),
                      backend_->name(),
                      backend_->driver(),
                      backend_->compiler().value_or(""),
                      0,
                      {}};
    report.floor_us = bandwidth_ > 0 ? compulsory_bytes(p_, s_) / bandwidth_ : 0;
    std::vector<cache::TuningRow> rows;
    for (const Contestant& c : all_) {
      report.rows.push_back(c.row);
      cache::TuningRow row;
      row.problem = report.problem;
      row.bucket = report.bucket;
      row.device = report.device;
      row.driver = report.driver;
      row.compiler = report.compiler;
      row.mode = kMode;
      row.variant = c.row.variant;
      row.status = c.row.status;
      row.reason = c.row.reason;
      row.median_us = c.row.median_us;
      row.spread_us = c.row.spread_us;
      row.error = c.row.error;
      row.floor_us = report.floor_us;
      row.registers = c.row.registers;
      row.shared_bytes = c.row.shared_bytes;
      row.chosen = c.row.chosen;
      rows.push_back(std::move(row));
    }
    if (const auto ok = engine_->tuning.put(rows); !ok)
      engine_->warn(fmt::format("tuning rows were not kept: {}", ok.error()));
    return report;
  }

  std::shared_ptr<Engine::Impl> engine_;
  std::shared_ptr<const Backend> backend_;
  Problem p_;
  Device device_;
  Sizes s_;
  Variant standard_;     ///< the untuned choice
  double bandwidth_ = 0; ///< bytes a microsecond
  std::vector<Contestant> all_;
};

} // namespace

Result<TuneReport> tune_device(const std::shared_ptr<Engine::Impl>& engine, const Problem& problem,
                               Device device, const Sizes& sizes,
                               const std::function<void(const TuneProgress&)>& progress,
                               const std::function<bool()>& settled) {
  if (const Status ok = validate(problem); !ok) return tl::unexpected(ok.error());
  if (const Status ok = check_sizes(problem, sizes); !ok) return tl::unexpected(ok.error());
  const auto backend = engine->backend(device);
  if (!backend) return tl::unexpected(backend.error());
  bool waited = false;
  const auto lock = engine->tuning_lock(**backend, [&] {
    waited = true;
    if (progress) progress({"waiting for another tuner of this device", 0, 0});
  });
  if (waited && settled && settled()) return TuneReport{};
  return Tuning(engine, *backend, problem, device, sizes).run(progress);
}

Result<TuneReport> Engine::tune(const Problem& problem, Device device, const Sizes& sizes,
                                const std::function<void(const TuneProgress&)>& progress) const {
  return tune_device(impl_, problem, device, sizes, progress, {});
}

Result<std::vector<TuneReport>> Engine::reports() const {
  if (const Status ok = impl_->usable(); !ok) return tl::unexpected(ok.error());
  std::vector<TuneReport> all;
  for (const cache::TuningRow& row : impl_->tuning.rows()) {
    if (all.empty() || all.back().problem != row.problem || all.back().bucket != row.bucket ||
        all.back().device != row.device)
      all.push_back({row.problem, row.bucket, row.device, row.driver, row.compiler, row.floor_us, {}});
    all.back().rows.push_back({row.variant, row.status, row.reason, row.median_us, row.spread_us, row.error,
                               row.registers, row.shared_bytes, row.chosen});
  }
  return all;
}

} // namespace kda
