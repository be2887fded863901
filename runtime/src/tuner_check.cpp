// Every candidate against the device's token kernel on all heads; that kernel first against float64 on one
// group of heads (kernel texts do not know head counts), which is small enough for it.
#include "marshal.h"
#include "tuning.h"
#include <algorithm>
#include <cmath>
#include <deque>
#include <fmt/format.h>
#include <future>
#include <random>

namespace kda {
namespace {

constexpr int kMostPending = 16; // comparisons; each holds the outputs of a call

/// The relative L2 error, and why it is too much (empty when it is not). Non-finite values come first: they
/// say more than an infinite error. The largest single error, over the rms or over the value itself where
/// that is larger, finds the one bad element that the L2 norm of a large tensor hides.
std::pair<double, std::string> difference(const reference::Array& got, const reference::Array& want,
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

} // namespace

Status Tuning::call(const Kernel::Impl& k, const CallTensors& tensors, void* workspace, void* stream) const {
  KernelArgs args;
  Sizes sizes;
  if (Status ok = make_kernel_args(k.problem, tensors.args(), k.host_memory, args, sizes); !ok) return ok;
  return launch_all(*backend_, *k.module, k.problem, k.variant, sizes, args, workspace, stream);
}

Result<void*> Tuning::allocate(const CallTensors& tensors, std::size_t others, std::size_t bytes) const {
  const std::uint64_t most = engine_->options.tune_memory_bytes;
  if (most > 0 && tensors.bytes() + others + bytes > most)
    return fail(
        ErrorCode::out_of_memory,
        fmt::format(
            "{:.1f} MiB beside the tensors' {:.1f} are more than the {:.1f} MiB that a tuner may hold",
            static_cast<double>(others + bytes) / 0x1p20, static_cast<double>(tensors.bytes()) / 0x1p20,
            static_cast<double>(most) / 0x1p20));
  return backend_->allocate(bytes);
}

Status Tuning::call_alone(const Kernel::Impl& k, const CallTensors& tensors, const Sizes& sizes) const {
  const std::size_t bytes = workspace_of(backend_->target(), k.problem, k.variant, sizes).bytes;
  const auto workspace = allocate(tensors, 0, bytes);
  if (!workspace) return tl::unexpected(workspace.error());
  void* const stream = backend_->stream();
  Status ok = backend_->fill(*workspace, 0xFFFFFFFFU, bytes / 4, stream);
  if (ok) ok = tensors.poison();
  if (ok) ok = call(k, tensors, *workspace, stream);
  const Status done = backend_->wait(stream);
  backend_->release(*workspace);
  return ok ? done : ok;
}

/// 150 tokens are no whole number of chunks; drafts are a few, each perhaps with a state of its own. The gate
/// has no token kernel: there the untuned choice stands in.
Status Tuning::check_all() {
  const bool drafts = p_.every_state || p_.tree || p_.operation == Operation::replay;
  // Interior states lie 64 tokens apart.
  const Sizes sizes{p_.varlen ? 1 : 2,
                    drafts                            ? 33
                    : p_.varlen && p_.interior_states ? 450
                                                      : 150,
                    p_.varlen ? 3 : 2};
  tell_preparing();
  const auto reference = device_reference(sizes);
  if (!reference) return tl::unexpected(reference.error());
  if (broken_) return {};
  if (*reference == nullptr) {
    drop_rest("failed", "not checked: no reference kernel of this device agrees with float64");
    return {};
  }
  tell_preparing();
  CallTensors tensors(backend_, engine_->options.tune_memory_bytes);
  if (Status ok = tensors.create(p_, sizes, std::random_device{}()); !ok) return ok;
  if (const Status ok = call_alone(*(*reference)->kernel, tensors, sizes); !ok) {
    if (ok.error().code == ErrorCode::out_of_memory) return ok;
    fault(**reference, ok.error());
    drop_rest("failed", "not checked: the reference kernel did not run");
    return {};
  }
  std::map<std::string, reference::Array> expected;
  for (const std::string& name : tensors.outputs()) {
    auto values = tensors.output(name);
    if (!values) return tl::unexpected(values.error());
    expected[name] = std::move(*values);
  }
  // Comparing costs the host 30 ns an element, more than the call costs the device: it goes on beside the
  // next ones.
  std::deque<std::pair<Contestant*, std::future<Verdict>>> pending;
  const auto settle = [&] {
    accept(*pending.front().first, pending.front().second.get());
    pending.pop_front();
  };
  const auto most = static_cast<std::size_t>(std::min(engine_->threads(), kMostPending));
  std::size_t done = 0;
  for (Contestant& c : all_) {
    ++done;
    if (!c.runs()) continue;
    if (!c.always && past(0.75)) {
      c.out("skipped", "not checked: three quarters of " + budget_text());
      continue;
    }
    tell("checking", done, all_.size(), c);
    auto outputs = run_alone(c, *c.kernel, tensors, sizes);
    if (!outputs) continue;
    if (pending.size() == most) settle();
    pending.emplace_back(&c, std::async(std::launch::async, [&, outputs = std::move(*outputs)] {
      return compare(tensors, outputs, expected);
    }));
  }
  while (!pending.empty())
    settle();
  return check_slabs(**reference);
}

/// The calls of check_all fit one slab, which reads no saved state. Variants in slabs run once more in
/// several.
Status Tuning::check_slabs(const Contestant& reference) {
  const auto wanted = [&](const Contestant& c) { return c.variant.slab != 0 && c.runs() && !past(0.75); };
  if (std::none_of(all_.begin(), all_.end(), wanted)) return {};
  const Problem small = with_heads(4); // d A_log of one head may be little beside its terms
  const Sizes sizes = p_.varlen ? Sizes{1, 3300, 3} : Sizes{2, 1100, 2};
  tell_preparing();
  CallTensors tensors(backend_, engine_->options.tune_memory_bytes);
  if (Status ok = tensors.create(small, sizes, std::random_device{}()); !ok) return ok;
  if (Status ok = tensors.save_states(); !ok) return ok;
  Kernel::Impl kernel = *reference.kernel;
  kernel.problem = small;
  if (Status ok = call_alone(kernel, tensors, sizes); !ok) return ok;
  std::map<std::string, reference::Array> expected;
  for (const std::string& name : tensors.outputs()) {
    auto values = tensors.output(name);
    if (!values) return tl::unexpected(values.error());
    expected[name] = std::move(*values);
  }
  std::size_t done = 0;
  for (Contestant& c : all_) {
    ++done;
    if (!wanted(c)) {
      if (c.variant.slab != 0 && c.runs())
        c.out("skipped", "not checked in slabs: three quarters of " + budget_text());
      continue;
    }
    tell("checking", done, all_.size(), c);
    kernel = *c.kernel;
    kernel.problem = small;
    if (const auto outputs = run_alone(c, kernel, tensors, sizes))
      accept(c, compare(tensors, *outputs, expected));
  }
  return {};
}

Problem Tuning::with_heads(int heads) const {
  Problem small = p_;
  small.heads = std::min(p_.heads, heads);
  small.value_heads = p_.value_heads / p_.heads * small.heads;
  return small;
}

/// The token kernel of least estimated time that agrees with float64; null when none does. The gate's: the
/// untuned choice.
Result<Contestant*> Tuning::device_reference(const Sizes& sizes) {
  const Problem small = with_heads(1);
  CallTensors tensors(backend_, engine_->options.tune_memory_bytes);
  if (const Status ok = tensors.create(small, sizes, std::random_device{}()); !ok)
    return tl::unexpected(ok.error());
  const auto expected = expected_outputs(tensors);
  if (!expected) return tl::unexpected(expected.error());
  for (Contestant& c : all_) { // in order of the estimate
    if (is_chunked(c.variant.algorithm) || !(c.runs() || (c.always && c.kernel != nullptr))) continue;
    tell("checking", 0, all_.size(), c);
    Kernel::Impl kernel = *c.kernel;
    kernel.problem = small;
    if (const auto outputs = run_alone(c, kernel, tensors, sizes);
        outputs && accept(c, compare(tensors, *outputs, *expected)))
      return &c;
    if (broken_) break;
  }
  return nullptr;
}

std::optional<Tuning::Outputs> Tuning::run_alone(Contestant& c, const Kernel::Impl& kernel,
                                                 const CallTensors& tensors, const Sizes& sizes) {
  const auto run = [&]() -> Result<Outputs> {
    if (const Status ok = call_alone(kernel, tensors, sizes); !ok) return tl::unexpected(ok.error());
    Outputs outputs;
    for (const std::string& name : tensors.outputs()) {
      auto bytes = tensors.bytes_of(name);
      if (!bytes) return tl::unexpected(bytes.error());
      outputs.bytes.emplace(name, std::move(*bytes));
    }
    const auto preserved = tensors.inputs_preserved();
    if (!preserved) return tl::unexpected(preserved.error());
    outputs.inputs_preserved = *preserved;
    return outputs;
  };
  auto outputs = run();
  if (outputs) return std::move(*outputs);
  fault(c, outputs.error());
  return std::nullopt;
}

Tuning::Verdict Tuning::compare(const CallTensors& tensors, const Outputs& outputs,
                                const std::map<std::string, reference::Array>& expected) const {
  Verdict verdict;
  for (const auto& [name, bytes] : outputs.bytes) {
    const auto [error, why] = difference(tensors.values_of(name, bytes), expected.at(name), tolerance(name));
    verdict.error = std::max(verdict.error, error);
    if (why.empty()) continue;
    verdict.wrong = fmt::format("{} has {}", name, why);
    return verdict;
  }
  if (!outputs.inputs_preserved) verdict.wrong = "it changed an input";
  return verdict;
}

bool Tuning::accept(Contestant& c, const Verdict& verdict) {
  c.row.error = std::max(c.row.error, verdict.error);
  if (verdict.wrong.empty()) return true;
  c.out("wrong", verdict.wrong);
  return false;
}

namespace {
reference::Array states_after(const reference::Inputs& in, const std::vector<std::int64_t>& rows) {
  const reference::Array all = reference::verify(in).states;
  const auto size =
      static_cast<std::int64_t>(in.problem.value_heads) * in.problem.key_dim * in.problem.value_dim;
  reference::Array some;
  for (const std::int64_t row : rows)
    some.insert(some.end(), all.begin() + row * size, all.begin() + (row + 1) * size);
  return some;
}
} // namespace

Result<std::map<std::string, reference::Array>> Tuning::expected_outputs(const CallTensors& tensors) const {
  const auto in = tensors.reference_inputs();
  if (!in) return tl::unexpected(in.error());
  std::map<std::string, reference::Array> e;
  if (p_.operation == Operation::gate) {
    e["o"] = reference::gate(*in);
  } else if (p_.operation == Operation::backward || p_.operation == Operation::gate_backward) {
    const auto g = tensors.reference_output_gradients();
    if (!g) return tl::unexpected(g.error());
    const reference::Gradients d = p_.operation == Operation::backward ? reference::adjoint(*in, *g)
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
    if (p_.interior_states) e["interior_states"] = states_after(*in, tensors.interior());
  }
  return e;
}

double Tuning::tolerance(const std::string& name) const {
  const bool backward = name.substr(0, 2) == "d_";
  if (p_.operation == Operation::gate) return 1e-4; // fp32 arithmetic and output
  if (p_.dtype == DType::fp32) return backward ? 1e-2 : 1e-4;
  if (!backward) return 1e-2;
  return name == "d_g" || name == "d_A_log" || name == "d_beta" || name == "d_dt_bias" ? 2e-2 : 1e-2;
}

} // namespace kda
