#include "random_case.h"
#include <random>

namespace kda::reference {
namespace {

Array normal(std::mt19937_64& random, std::int64_t size, double scale = 1, double shift = 0) {
  std::normal_distribution<double> distribution;
  Array out(static_cast<std::size_t>(size));
  for (double& x : out)
    x = shift + scale * distribution(random);
  return out;
}

} // namespace

Inputs random_inputs(const Shape& s, GateKind gate, unsigned seed) {
  std::mt19937_64 random(seed);
  Inputs in;
  Problem& p = in.problem;
  p.heads = s.heads;
  p.value_heads = s.value_heads;
  p.key_dim = s.key_dim;
  p.value_dim = s.value_dim;
  p.gate = gate;
  p.dt_bias = gate != GateKind::log_e && gate != GateKind::log2;
  p.beta_sigmoid = p.qk_l2norm = true;
  p.varlen = !s.cu_seqlens.empty();
  in.cu_seqlens = s.cu_seqlens;
  const std::int64_t sequences = p.varlen ? static_cast<std::int64_t>(s.cu_seqlens.size()) - 1 : s.batch;
  in.sizes = {s.batch, s.tokens, sequences};
  const std::int64_t rows = s.batch * s.tokens;
  in.q = normal(random, rows * s.heads * s.key_dim);
  in.k = normal(random, rows * s.heads * s.key_dim);
  in.v = normal(random, rows * s.value_heads * s.value_dim);
  in.g = normal(random, rows * s.value_heads * s.key_dim);
  if (!p.dt_bias)
    for (double& g : in.g)
      g = -std::min(2.0, std::abs(g));
  in.beta = normal(random, rows * s.value_heads);
  if (reads_a_log(gate)) in.A_log = normal(random, s.value_heads, 0.3);
  if (p.dt_bias) in.dt_bias = normal(random, s.value_heads * s.key_dim, 0.5, -1);
  in.initial_state = normal(random, sequences * s.value_heads * s.key_dim * s.value_dim, 0.5);
  return in;
}

OutputGradients random_output_gradients(const Inputs& in, unsigned seed) {
  std::mt19937_64 random(seed);
  const Problem& p = in.problem;
  return {normal(random, static_cast<std::int64_t>(in.v.size())),
          normal(random, in.sizes.sequences * p.value_heads * p.key_dim * p.value_dim)};
}

} // namespace kda::reference
