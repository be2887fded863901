// kda-jit sample: a seeded input file, so that `run` can be tried without a model.
#include "command.h"
#include "kda/case_io.h"
#include <cmath>
#include <fmt/format.h>
#include <random>

namespace kda::tools {
namespace {

struct Options {
  std::string output, gate = "bounded";
  std::int64_t tokens = 512;
  int heads = 4, key_dim = 128, value_dim = 128;
  std::uint32_t seed = 0;
};

/// Numbers of a trained layer: q and k of unit scale (the kernel normalises them), beta logits, and gates
/// that remember for tens to thousands of tokens.
class Generator {
public:
  explicit Generator(std::uint32_t seed) : engine_(seed) {}
  safetensors::Tensor normal(std::vector<std::int64_t> shape, DType dtype, double mean, double deviation) {
    std::normal_distribution<double> distribution(mean, deviation);
    reference::Array values(static_cast<std::size_t>(safetensors::element_count(shape)));
    for (double& x : values)
      x = distribution(engine_);
    return {file_dtype(dtype), std::move(shape), pack(values, dtype)};
  }

private:
  std::mt19937 engine_;
};

Result<safetensors::File> make_file(const Options& o) {
  const auto gate = parse_gate(o.gate);
  if (!gate) return tl::unexpected(gate.error());
  Problem p;
  p.heads = p.value_heads = o.heads;
  p.key_dim = o.key_dim;
  p.value_dim = o.value_dim;
  p.gate = *gate;
  if (const Status ok = validate(p); !ok) return tl::unexpected(ok.error());
  if (o.tokens < 1 || o.tokens > (std::int64_t{1} << 24))
    return fail(ErrorCode::invalid_argument, fmt::format("--tokens is 1 to 2^24, not {}", o.tokens));

  const std::int64_t t = o.tokens, h = o.heads, k = o.key_dim, v = o.value_dim;
  const bool activated = is_bounded(*gate) || reads_a_log(*gate);
  Generator random(o.seed);
  safetensors::File file;
  file.metadata = {{"gate", o.gate},        {"beta_sigmoid", "True"},
                   {"qk_l2norm", "True"},   {"state_layout", "KV"},
                   {"lower_bound", "-5.0"}, {"has_A_log", reads_a_log(*gate) ? "True" : "False"}};
  file.tensors["q"] = random.normal({t, h, k}, DType::bf16, 0, 1);
  file.tensors["k"] = random.normal({t, h, k}, DType::bf16, 0, 1);
  file.tensors["v"] = random.normal({t, h, v}, DType::bf16, 0, 1);
  // Before an activation a gate is a logit; a given decay must be negative and near zero.
  auto g = random.normal({t, h, k}, DType::bf16, activated ? 0 : -4, 1);
  if (!activated) {
    reference::Array decay = unpack(g.data, g.dtype);
    for (double& x : decay)
      x = -std::exp(x);
    g.data = pack(decay, DType::bf16);
  }
  file.tensors["g"] = std::move(g);
  file.tensors["beta"] = random.normal({t, h}, DType::bf16, 0, 1);
  if (reads_a_log(*gate)) file.tensors["A_log"] = random.normal({h}, DType::fp32, 0, 0.3);
  if (activated) file.tensors["dt_bias"] = random.normal({h, k}, DType::fp32, -5, 1);
  file.tensors["initial_state"] = random.normal({1, h, k, v}, DType::fp32, 0, 0.1);
  return file;
}

int sample(const Options& o) {
  const auto file = make_file(o);
  if (!file) return report_error(file.error());
  if (const Status ok = safetensors::write(o.output, *file); !ok) return report_error(ok.error());
  fmt::print("{}: T={} H={} K={} V={} gate={} seed={}\n", o.output, o.tokens, o.heads, o.key_dim, o.value_dim,
             o.gate, o.seed);
  return kOk;
}

} // namespace

void add_sample(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("sample", "Write a seeded input file for `kda-jit run`");
  auto o = std::make_shared<Options>();
  sub->add_option("--output", o->output, "safetensors file to write")->required();
  sub->add_option("--tokens", o->tokens, "T")->capture_default_str();
  sub->add_option("--heads", o->heads, "H = HV")->capture_default_str();
  sub->add_option("--key-dim", o->key_dim, "K")->capture_default_str();
  sub->add_option("--value-dim", o->value_dim, "V")->capture_default_str();
  sub->add_option("--gate", o->gate, "log_e, log2, softplus, bounded or bounded_no_a")->capture_default_str();
  sub->add_option("--seed", o->seed, "the same seed gives the same file")->capture_default_str();
  sub->footer("Example: kda-jit sample --output in.safetensors && kda-jit run --input in.safetensors "
              "--output out.safetensors");
  sub->callback([o, &exit] { exit = sample(*o); });
}

} // namespace kda::tools
