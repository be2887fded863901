// Runs one kernel variant on the emulator and prints how every output compares with float64: the first thing
// to do with a new or broken kernel. See docs/debugging-a-kernel.md.
#include "emulator.h"
#include "run_case.h"
#include <CLI/CLI.hpp>
#include <cmath>
#include <fmt/format.h>

namespace {

using namespace kda;

struct Arguments {
  std::string operation = "forward", variant, dtype = "bf16", gate_dtype, beta_dtype, state_dtype = "fp32";
  std::string gate = "bounded", layout = "k_v", regime = "fast", arch = "sm_90a";
  int key_dim = 64, value_dim = 64, heads = 1, value_heads = 0;
  test::CaseOptions options;
  bool int32 = false, no_initial_state = false, early = false, strided = false, no_optional = false;
  bool checked = false;
  std::vector<std::uint64_t> seeds = {0};
  int optimize = 1, threads = 2;
  bool dt_bias = false, sigmoid = false, times_two = false, l2norm = false, list = false;
};

void add_options(CLI::App& app, Arguments& a) {
  app.add_option("operation", a.operation, "forward, backward, recurrent, gate, gate_backward");
  app.add_option("--variant", a.variant,
                 "e.g. \"chunk c=64 vt=32 pw=4 sw=4 st=2\" (default: the cost model's)");
  app.add_flag("--list", a.list, "print every variant of the problem, rejected ones with the reason");
  app.add_option("--K", a.key_dim);
  app.add_option("--V", a.value_dim);
  app.add_option("--H", a.heads);
  app.add_option("--HV", a.value_heads, "default: H");
  app.add_option("--B", a.options.batch);
  app.add_option("--T", a.options.tokens);
  app.add_option("--varlen", a.options.lengths, "lengths of packed sequences, e.g. 1,16,0,47")
      ->delimiter(',');
  app.add_option("--padding", a.options.padding, "tokens behind the last packed sequence");
  app.add_option("--dtype", a.dtype);
  app.add_option("--gate-dtype", a.gate_dtype, "default: dtype");
  app.add_option("--beta-dtype", a.beta_dtype, "default: dtype");
  app.add_option("--state-dtype", a.state_dtype);
  app.add_option("--layout", a.layout, "k_v or v_k");
  app.add_option("--gate", a.gate, "log_e, log2, softplus, bounded, bounded_no_a");
  app.add_option("--regime", a.regime, "fast, slow, unbounded, spikes");
  app.add_flag("--dt-bias", a.dt_bias);
  app.add_flag("--sigmoid", a.sigmoid, "beta holds logits");
  app.add_flag("--times-two", a.times_two, "2*sigmoid(beta)");
  app.add_flag("--l2norm", a.l2norm);
  app.add_flag("--int32", a.int32, "cu_seqlens");
  app.add_flag("--no-initial-state", a.no_initial_state);
  app.add_flag("--no-optional", a.no_optional, "leave optional outputs out");
  app.add_flag("--strided", a.strided, "gaps between heads, tokens and states");
  app.add_option("--data-seed", a.options.seed);
  app.add_option("--seeds", a.seeds, "orders in which threads run: 0 ascending, 1 descending, others random")
      ->delimiter(',');
  app.add_flag("--early", a.early, "cp.async completes at once, not at the wait");
  app.add_flag("--checked", a.checked, "find races, missing waits and reads of what nobody wrote");
  app.add_option("--arch", a.arch);
  app.add_option("-O", a.optimize, "optimisation of the kernel; 0 for a debugger");
  app.add_option("--threads", a.threads, "CTAs at a time; 1 for a debugger");
}

template <class T>
T value_or_exit(Result<T> result) {
  if (result) return std::move(*result);
  fmt::print(stderr, "{}: {}\n{}\n", to_string(result.error().code), result.error().message,
             result.error().context);
  std::exit(1);
}

Problem make_problem(const Arguments& a) {
  Problem p;
  p.operation = value_or_exit(parse_operation(a.operation));
  p.heads = a.heads;
  p.value_heads = a.value_heads > 0 ? a.value_heads : a.heads;
  p.key_dim = a.key_dim;
  p.value_dim = a.value_dim;
  p.dtype = value_or_exit(parse_dtype(a.dtype));
  p.gate_dtype = a.gate_dtype.empty() ? p.dtype : value_or_exit(parse_dtype(a.gate_dtype));
  p.beta_dtype = a.beta_dtype.empty() ? p.dtype : value_or_exit(parse_dtype(a.beta_dtype));
  p.state_dtype = value_or_exit(parse_dtype(a.state_dtype));
  p.state_layout = value_or_exit(parse_state_layout(a.layout));
  p.gate = value_or_exit(parse_gate(a.gate));
  p.dt_bias = a.dt_bias;
  p.beta_sigmoid = a.sigmoid || a.times_two;
  p.beta_times_two = a.times_two;
  p.qk_l2norm = a.l2norm;
  p.varlen = !a.options.lengths.empty();
  p.cu_seqlens_type = a.int32 ? IndexType::int32 : IndexType::int64;
  if (const Status ok = validate(p); !ok) value_or_exit<int>(tl::unexpected(ok.error()));
  return p;
}

int run(Arguments& a) {
  a.options.problem = make_problem(a);
  const Problem& p = a.options.problem;
  a.options.regime = value_or_exit(test::parse_regime(a.regime));
  a.options.initial_state = !a.no_initial_state;
  emulator::Options options;
  options.arch = a.arch;
  options.copies = a.early ? emulator::Copies::early : emulator::Copies::late;
  options.optimize = a.optimize;
  options.threads = a.threads;
  options.checked = a.checked;
  const Target target = value_or_exit(cuda_target(a.arch));
  fmt::print("{}\n", to_string(p));
  if (a.list) {
    for (const Candidate& c : enumerate(p, target))
      fmt::print("{}{}{}\n", to_string(c.variant), c.rejected.empty() ? "" : "  rejected: ", c.rejected);
    return 0;
  }
  const test::TestCase c = test::random_case(a.options);
  const Variant variant =
      value_or_exit(a.variant.empty() ? choose(p, target, c.inputs.sizes) : parse_variant(a.variant));
  fmt::print("{}\n", to_string(variant));
  int bad = 0;
  for (const std::uint64_t seed : a.seeds) {
    options.seed = seed;
    const auto backend = value_or_exit(emulator::make_backend(options));
    const test::RunReport report =
        value_or_exit(test::run_case(*backend, c, variant, {a.strided, !a.no_optional}));
    fmt::print("seed {}: {} launches, {:.0f} ms\n{}", seed, report.launches, report.milliseconds,
               to_string(report));
    for (const test::TensorReport& t : report.tensors)
      bad += t.not_finite != 0 || !(t.error < test::tolerance(p, variant, t.name)) ? 1 : 0;
  }
  return bad == 0 ? 0 : 1;
}

} // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs one kernel variant on the emulator and compares it with float64.");
  Arguments arguments;
  add_options(app, arguments);
  CLI11_PARSE(app, argc, argv);
  return run(arguments);
}
