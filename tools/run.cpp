// kda-jit run: KDA on the tensors of a safetensors file.
#include "command.h"
#include "kda/case_io.h"
#include <algorithm>
#include <chrono>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kda::tools {
namespace {

struct Options {
  std::string input, output, device, variant;
  bool json = false;
};

struct Outcome {
  KernelInfo info;
  double prepare_ms = 0, call_us = 0, o_error = -1, state_error = -1; ///< errors: -1 where not compared
};

double since_us(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

/// The median of repeated calls, each waited for: what a caller without a stream sees.
Result<double> time_calls(const Engine& engine, Device device, const Kernel& kernel, const Args& args,
                          void* workspace, std::size_t bytes) {
  std::vector<double> samples;
  const auto begin = std::chrono::steady_clock::now();
  while (samples.size() < 21 && (samples.empty() || since_us(begin) < 1e6)) {
    const auto start = std::chrono::steady_clock::now();
    if (const Status ok = kernel.execute(args, workspace, bytes); !ok) return tl::unexpected(ok.error());
    if (const Status ok = engine.synchronize(device); !ok) return tl::unexpected(ok.error());
    samples.push_back(since_us(start));
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

/// Float64 work beyond which the comparison would take minutes.
bool worth_comparing(const Case& c) {
  return static_cast<double>(c.sizes.batch) * static_cast<double>(c.sizes.tokens) * c.problem.value_heads *
             c.problem.key_dim * c.problem.value_dim <
         4e9;
}

Result<Outcome> run_once(const Engine& engine, Device device, const Case& c,
                         const std::optional<Variant>& variant, safetensors::File& out) {
  Outcome r;
  const auto begin = std::chrono::steady_clock::now();
  const auto plan = engine.plan(c.problem, device, c.sizes, variant);
  if (!plan) return tl::unexpected(plan.error());
  const auto kernel = engine.prepare(*plan);
  if (!kernel) return tl::unexpected(kernel.error());
  r.prepare_ms = since_us(begin) / 1e3;
  r.info = kernel->info();
  const auto call = DeviceCase::upload(engine, device, c, c.problem);
  if (!call) return tl::unexpected(call.error());
  const auto bytes = kernel->workspace_bytes(c.sizes);
  if (!bytes) return tl::unexpected(bytes.error());
  const auto workspace = engine.allocate(device, *bytes);
  if (!workspace) return tl::unexpected(workspace.error());
  const auto time = time_calls(engine, device, *kernel, call->args(), *workspace, *bytes);
  engine.release(device, *workspace);
  if (!time) return tl::unexpected(time.error());
  r.call_us = *time;
  for (const char* name : {"o", "final_state"}) {
    auto tensor = call->output_tensor(name);
    if (!tensor) return tl::unexpected(tensor.error());
    out.tensors[name] = std::move(*tensor);
  }
  if (worth_comparing(c)) {
    const reference::Outputs want = reference::recurrence(reference_inputs(c));
    const auto o = call->output("o"), state = call->output("final_state");
    if (!o) return tl::unexpected(o.error());
    if (!state) return tl::unexpected(state.error());
    r.o_error = reference::relative_error(*o, want.o);
    r.state_error = reference::relative_error(*state, want.final_state);
  }
  return r;
}

void print(const Case& c, const Outcome& r, const Options& o) {
  const double tokens = static_cast<double>(c.sizes.batch) * static_cast<double>(c.sizes.tokens);
  const bool compared = r.o_error >= 0;
  if (o.json) {
    nlohmann::json out{{"schema", 1},
                       {"problem", to_string(c.problem)},
                       {"device", r.info.device},
                       {"variant", r.info.variant},
                       {"choice", r.info.choice},
                       {"origin", to_string(r.info.origin)},
                       {"prepare_ms", r.prepare_ms},
                       {"call_us", r.call_us},
                       {"output", o.output}};
    if (compared) out.update({{"o_error", r.o_error}, {"state_error", r.state_error}});
    fmt::print("{}\n", out.dump(1));
    return;
  }
  fmt::print("problem  {}\n         {} tokens in {} sequences\n", to_string(c.problem), tokens,
             c.sizes.sequences);
  fmt::print("device   {}\nvariant  {} ({})\n", r.info.device, r.info.variant, r.info.choice);
  fmt::print("kernel   {}, ready in {:.1f} ms\n",
             r.info.origin == Origin::compiled
                 ? "compiled"
                 : fmt::format("from the cache ({}), nothing compiled", to_string(r.info.origin)),
             r.prepare_ms);
  fmt::print("time     {:.1f} us a call, {:.0f} tokens/s\n", r.call_us, tokens / r.call_us * 1e6);
  if (compared)
    fmt::print("error    o {:.1e}, final_state {:.1e} (relative L2 against float64)\n", r.o_error,
               r.state_error);
  else
    fmt::print("error    not compared: the float64 reference would take minutes at this size\n");
  if (!o.output.empty()) fmt::print("wrote    {}\n", o.output);
}

int run(const Options& o) {
  const auto c = read_case(o.input);
  if (!c) return report_error(c.error());
  const auto engine = make_engine_with_emulator();
  if (!engine) return report_error(engine.error());
  const auto device = o.device.empty() ? Result<Device>(engine->best_device()) : parse_device(o.device);
  if (!device) return report_error(device.error());
  std::optional<Variant> variant;
  if (!o.variant.empty()) {
    const auto parsed = parse_variant(o.variant);
    if (!parsed) return report_error(parsed.error());
    variant = *parsed;
  }
  safetensors::File out;
  out.metadata["problem"] = to_string(c->problem);
  const auto outcome = run_once(*engine, *device, *c, variant, out);
  if (!outcome) return report_error(outcome.error());
  if (!o.output.empty())
    if (const Status ok = safetensors::write(o.output, out); !ok) return report_error(ok.error());
  print(*c, *outcome, o);
  return kOk;
}

} // namespace

void add_run(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("run", "Run KDA on the tensors of a safetensors file");
  auto o = std::make_shared<Options>();
  sub->add_option("--input", o->input,
                  "file with q, k, v, g, beta and what the gate needs; metadata says the options")
      ->required();
  sub->add_option("--output", o->output, "file for o and final_state; written only when everything worked")
      ->required();
  sub->add_option("--device", o->device, "host, cuda:N or emulator (default: the best there is)");
  sub->add_option("--variant", o->variant,
                  "e.g. \"chunk c=64 vt=32 pw=4 sw=4 st=2\" (default: tuned, else the cost model's)");
  sub->add_flag("--json", o->json, "JSON on stdout");
  sub->footer("`kda-jit sample --output F` makes an input. Metadata keys: gate (required), beta_sigmoid, "
              "allow_neg_eigval,\n"
              "qk_l2norm, lower_bound, scale, state_layout.");
  sub->callback([o, &exit] { exit = run(*o); });
}

} // namespace kda::tools
