#include "random_case.h"
#include "kda/case_io.h"
#include <algorithm>
#include <array>
#include <cmath>
#include <fmt/format.h>
#include <limits>
#include <random>

namespace kda::test {
namespace {

using reference::Array;

class Random {
public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform(double low, double high) { return low + (high - low) * unit_(engine_); }
  Array normal(std::size_t count, double deviation) {
    Array x(count);
    for (double& value : x)
      value = deviation * normal();
    return x;
  }

private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> unit_;
};

Array rounded(const Array& x, DType type) {
  return unpack(pack(x, type), file_dtype(type));
}

/// Rows of norm 1: without the norm in the kernel the delta rule needs |k| <= 1.
void normalise_rows(Array& x, int dim) {
  for (std::size_t row = 0; row < x.size(); row += static_cast<std::size_t>(dim)) {
    double sum = 0;
    for (int i = 0; i < dim; ++i)
      sum += x[row + i] * x[row + i];
    for (int i = 0; i < dim; ++i)
      x[row + i] /= std::sqrt(sum);
  }
}

/// Natural-log decay of one token and channel.
double decay(Random& random, Regime regime) {
  const auto log_uniform = [&](double low, double high) {
    return -std::exp(random.uniform(std::log(low), std::log(high)));
  };
  switch (regime) {
  case Regime::fast: return -5 / (1 + std::exp(-random.normal()));
  case Regime::unbounded: return log_uniform(1e-3, 60);
  case Regime::spikes: {
    const double spike = random.uniform(0, 1);
    if (spike < 0.01) return -std::numeric_limits<double>::infinity();
    if (spike < 0.03) return -1e4;
    break;
  }
  case Regime::slow: break;
  }
  return random.uniform(0, 1) < 0.1 ? random.uniform(-5, -1) : log_uniform(1e-4, 0.05);
}

/// What g holds for a natural-log decay: the inverse of the gate.
double raw_gate(const Problem& p, double decay, double a, double bias, double lower_bound) {
  const auto logit = [&] {
    const double share = std::clamp(decay / lower_bound, 1e-5, 1 - 1e-3);
    return std::log(share / (1 - share));
  };
  switch (p.gate) {
  case GateKind::log_e: return decay;
  case GateKind::log2: return decay / std::log(2.0);
  case GateKind::softplus: {
    const double y = std::min(-decay, 1e4) / a;
    return (y > 20 ? y : std::log(std::expm1(y))) - bias;
  }
  case GateKind::bounded: return logit() / a - bias;
  case GateKind::bounded_no_a: return logit() - bias;
  }
  return 0;
}

void fill_gate(reference::Inputs& in, Regime regime, Random& random) {
  const Problem& p = in.problem;
  const auto heads = static_cast<std::size_t>(p.value_heads), dim = static_cast<std::size_t>(p.key_dim);
  if (reads_a_log(p.gate)) in.A_log = rounded(random.normal(heads, 0.3), DType::fp32);
  if (p.dt_bias) in.dt_bias = rounded(random.normal(heads * dim, 0.5), DType::fp32);
  in.g.resize(static_cast<std::size_t>(in.sizes.batch * in.sizes.tokens) * heads * dim);
  for (std::size_t i = 0; i < in.g.size(); ++i) {
    const std::size_t channel = i % (heads * dim);
    const double a = in.A_log.empty() ? 1 : std::exp(in.A_log[channel / dim]);
    const double bias = in.dt_bias.empty() ? 0 : in.dt_bias[channel];
    in.g[i] = raw_gate(p, decay(random, regime), a, bias, in.lower_bound);
  }
  in.g = rounded(in.g, p.gate_dtype);
}

void fill_sizes(reference::Inputs& in, const CaseOptions& o) {
  in.problem = o.problem;
  in.sizes = {o.batch, o.tokens, o.batch};
  if (!o.problem.varlen) return;
  in.cu_seqlens = {0};
  for (const std::int64_t length : o.lengths)
    in.cu_seqlens.push_back(in.cu_seqlens.back() + length);
  in.sizes = {1, in.cu_seqlens.back() + o.padding, static_cast<std::int64_t>(o.lengths.size())};
}

constexpr std::int64_t kNoSlot = std::int64_t{1} << 30; ///< -1 is what the emulator takes for unwritten

std::vector<Expected> expect_gradients(const reference::Gradients& g) {
  std::vector<Expected> all = {{"d_q", g.d_q},
                               {"d_k", g.d_k},
                               {"d_v", g.d_v},
                               {"d_g", g.d_g},
                               {"d_beta", g.d_beta},
                               {"d_A_log", g.d_A_log},
                               {"d_dt_bias", g.d_dt_bias},
                               {"d_initial_state", g.d_initial_state}};
  all.erase(std::remove_if(all.begin(), all.end(), [](const Expected& e) { return e.values.empty(); }),
            all.end());
  return all;
}

/// Zeros the rows behind the last packed sequence: nobody's tokens, which every kernel leaves out.
Array without_padding(const reference::Inputs& in, Array x) {
  if (in.cu_seqlens.empty()) return x;
  const std::size_t row = x.size() / static_cast<std::size_t>(in.sizes.tokens);
  std::fill(x.begin() + static_cast<std::ptrdiff_t>(row * static_cast<std::size_t>(in.cu_seqlens.back())),
            x.end(), 0);
  return x;
}

/// Fills the table: slots in falling order, every third state is not kept, and two columns reach behind the
/// longest sequence. Returns the kept states.
Array place_interior_states(TestCase& c, const reference::Inputs& in) {
  const Problem& p = in.problem;
  const auto bounds = [&](std::int64_t n) {
    const auto i = static_cast<std::size_t>(n);
    return in.cu_seqlens.empty() ? std::pair{n * in.sizes.tokens, (n + 1) * in.sizes.tokens}
                                 : std::pair{in.cu_seqlens[i], in.cu_seqlens[i + 1]};
  };
  const std::int64_t columns = in.sizes.tokens / c.interior_interval + 2;
  c.interior_slots.assign(static_cast<std::size_t>(in.sizes.sequences * columns), 0);
  std::vector<std::int64_t> rows;
  for (std::int64_t n = 0, i = 0; n < in.sizes.sequences; ++n)
    for (std::int64_t j = 0; j < columns; ++j, ++i) {
      const auto [begin, end] = bounds(n);
      const std::int64_t row = begin + (j + 1) * c.interior_interval - 1;
      if (row >= end) continue;
      const bool kept = i % 3 != 2;
      c.interior_slots[static_cast<std::size_t>(i)] =
          kept ? -2 - static_cast<std::int64_t>(rows.size()) : kNoSlot;
      if (kept) rows.push_back(row);
    }
  c.interior_states = static_cast<std::int64_t>(rows.size());
  for (std::int64_t& slot : c.interior_slots)
    if (slot < -1) slot += c.interior_states + 1;
  const Array all = reference::verify(in).states;
  const auto size = static_cast<std::ptrdiff_t>(p.value_heads) * p.key_dim * p.value_dim;
  Array kept;
  for (auto row = rows.rbegin(); row != rows.rend(); ++row)
    kept.insert(kept.end(), all.begin() + *row * size, all.begin() + (*row + 1) * size);
  return kept;
}

std::vector<Expected> expect_forward(TestCase& c) {
  reference::Inputs in = c.inputs;
  for (std::size_t n = 0; n < c.has_initial_state.size(); ++n) {
    const auto size = in.initial_state.size() / c.has_initial_state.size();
    const auto first = in.initial_state.begin() + static_cast<std::ptrdiff_t>(n * size);
    if (c.has_initial_state[n] == 0) std::fill_n(first, in.initial_state.empty() ? 0 : size, 0);
  }
  reference::Outputs out = reference::recurrence(in);
  std::vector<Expected> all = {{"o", std::move(out.o)}, {"final_state", std::move(out.final_state)}};
  if (c.interior_interval > 0) all.push_back({"interior_states", place_interior_states(c, in)});
  return all;
}

/// What a forward would have saved: slots in falling order, and one column behind the longest sequence.
void place_saved_states(TestCase& c) {
  const reference::Inputs& in = c.inputs;
  const Problem& p = in.problem;
  const std::int64_t interval = c.interior_interval = p.saved_interval,
                     columns = in.sizes.tokens / interval + 1;
  const auto size = static_cast<std::ptrdiff_t>(p.value_heads) * p.key_dim * p.value_dim;
  std::vector<std::int64_t> rows; // after which a state is saved
  c.interior_slots.assign(static_cast<std::size_t>(in.sizes.sequences * columns), -1);
  for (std::int64_t n = 0; n < in.sizes.sequences; ++n) {
    const auto i = static_cast<std::size_t>(n);
    const std::int64_t begin = p.varlen ? in.cu_seqlens[i] : n * in.sizes.tokens,
                       end = p.varlen ? in.cu_seqlens[i + 1] : begin + in.sizes.tokens;
    for (std::int64_t j = 0; begin + (j + 1) * interval <= end; ++j) {
      c.interior_slots[static_cast<std::size_t>(n * columns + j)] =
          -1 - static_cast<std::int64_t>(rows.size());
      rows.push_back(begin + (j + 1) * interval - 1);
    }
    for (std::int64_t j = (end - begin) / interval; j < columns; ++j)
      c.interior_slots[static_cast<std::size_t>(n * columns + j)] = kNoSlot;
  }
  c.interior_states = static_cast<std::int64_t>(rows.size());
  for (std::int64_t& slot : c.interior_slots)
    if (slot != kNoSlot) slot += c.interior_states;
  const Array all = reference::verify(in).states;
  for (auto row = rows.rbegin(); row != rows.rend(); ++row)
    c.saved.insert(c.saved.end(), all.begin() + *row * size, all.begin() + (*row + 1) * size);
}

std::vector<Expected> expect(TestCase& c) {
  switch (c.inputs.problem.operation) {
  case Operation::forward:
  case Operation::recurrent: return expect_forward(c);
  case Operation::backward: return expect_gradients(reference::adjoint(c.inputs, c.gradients));
  case Operation::gate: return {{"o", without_padding(c.inputs, reference::gate(c.inputs))}};
  case Operation::gate_backward:
  case Operation::replay: break; // tests/support/pool.h has the replays
  }
  return expect_gradients(reference::gate_adjoint(c.inputs, without_padding(c.inputs, c.d_gate)));
}

} // namespace

Result<Regime> parse_regime(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Regime>, 4> kNames{{{"fast", Regime::fast},
                                                                       {"slow", Regime::slow},
                                                                       {"unbounded", Regime::unbounded},
                                                                       {"spikes", Regime::spikes}}};
  for (const auto& [text, regime] : kNames)
    if (text == name) return regime;
  return fail(ErrorCode::invalid_argument,
              fmt::format("unknown regime '{}'; choose fast, slow, unbounded or spikes", name));
}

TestCase random_case(const CaseOptions& o) {
  TestCase c;
  Random random(o.seed);
  reference::Inputs& in = c.inputs;
  fill_sizes(in, o);
  const Problem& p = in.problem;
  const auto rows = static_cast<std::size_t>(in.sizes.batch * in.sizes.tokens);
  const auto keys = rows * static_cast<std::size_t>(p.heads * p.key_dim);
  const auto values = rows * static_cast<std::size_t>(p.value_heads * p.value_dim);
  const auto states = static_cast<std::size_t>(in.sizes.sequences * p.value_heads * p.key_dim * p.value_dim);
  fill_gate(in, o.regime, random);
  if (p.operation == Operation::gate_backward) c.d_gate = rounded(random.normal(in.g.size(), 1), DType::fp32);
  for (Array* x : {&in.q, &in.k}) {
    *x = random.normal(keys, 1);
    if (!p.qk_l2norm) normalise_rows(*x, p.key_dim);
    *x = rounded(*x, p.dtype);
  }
  in.v = rounded(random.normal(values, 1), p.dtype);
  in.beta.resize(rows * static_cast<std::size_t>(p.value_heads));
  for (double& b : in.beta)
    b = p.beta_sigmoid ? random.normal() : random.uniform(0.05, 0.95);
  in.beta = rounded(in.beta, p.beta_dtype);
  for (std::int64_t n = 0; o.mask && n < in.sizes.sequences; ++n)
    c.has_initial_state.push_back(n % 2);
  if (p.interior_states) c.interior_interval = o.interior_interval;
  if (o.initial_state) in.initial_state = rounded(random.normal(states, 0.3), p.state_dtype);
  if (p.operation == Operation::backward) {
    c.gradients.d_o = rounded(random.normal(values, 1), p.dtype);
    c.gradients.d_final_state = rounded(random.normal(states, 0.3), p.state_dtype);
    if (p.saved_interval != 0) place_saved_states(c);
  }
  c.expected = expect(c);
  return c;
}

TestCase exact_case(const CaseOptions& o) {
  TestCase c = random_case(o);
  Random random(o.seed);
  const auto integers = [&](Array& x, int magnitude) {
    for (double& value : x)
      value = std::round(random.uniform(-magnitude, magnitude));
  };
  const auto dim = static_cast<std::size_t>(c.inputs.problem.key_dim);
  for (Array* x : {&c.inputs.q, &c.inputs.k}) {
    std::fill(x->begin(), x->end(), 0);
    for (std::size_t row = 0; row < x->size(); row += dim)
      // A few channels, so that tokens meet.
      (*x)[row + static_cast<std::size_t>(random.uniform(0, 4)) * (dim / 4)] =
          random.uniform(0, 1) < 0.5 ? -1 : 1;
  }
  for (Array* x : {&c.inputs.v, &c.inputs.initial_state, &c.gradients.d_o, &c.gradients.d_final_state})
    integers(*x, 2);
  for (double& g : c.inputs.g)
    g = random.uniform(0, 1) < 0.5 ? 0 : -1;
  for (double& b : c.inputs.beta)
    b = random.uniform(0, 1) < 0.5 ? 0.5 : 1;
  c.expected = expect(c);
  const Problem& p = c.inputs.problem;
  for (Expected& e : c.expected)
    e.values = rounded(e.values, e.name.find("state") != std::string::npos ? p.state_dtype
                                 : e.name == "d_g"                         ? p.gate_dtype
                                 : e.name == "d_beta"                      ? p.beta_dtype
                                                                           : p.dtype);
  return c;
}

} // namespace kda::test
