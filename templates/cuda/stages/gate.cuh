#pragma once
// Gate, beta and q/k norm of one element, with their derivatives, in fp32. Every kernel uses these, so that
// all of them agree. Relative error at most 1e-6; a finite or infinite input never gives NaN.
#include "config.cuh"

namespace kda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kFloatMax = 3.402823466e38f;
/// Above this softplus(x) is x, as in PyTorch.
constexpr float kSoftplusThreshold = 20.f;
constexpr float kNormEpsilon = 1e-6f;
/// The gate reads A_log.
constexpr bool kReadsA = Config::gate == GateKind::softplus || Config::gate == GateKind::bounded;

/// e^x for x clamped to +-87, where e^x is a normal number. ex2 takes y = x*log2(e) rounded, which would cost
/// |x| * 2^-24; the remainder x - y*ln2, with ln2 in two pieces, puts that back.
KDA_DEVICE float exp_clamped(float x) {
  constexpr float kLn2Low = -1.904654299957768e-9f;
  x = min(max(x, -87.f), 87.f);
  const float y = x * kLog2E;
  const float rest = fma(y, -kLn2Low, fma(y, -kLn2, x));
  const float e = exp2_fast(y);
  return fma(e, rest, e);
}
KDA_DEVICE float sigmoid(float x) {
  return rcp_fast(1.f + exp_clamped(-x));
}
/// sigmoid(x) * (1 - sigmoid(x)) without the cancellation of 1 - sigmoid.
KDA_DEVICE float sigmoid_derivative(float x) {
  const float e = exp_clamped(-max(x, -x));
  const float s = rcp_fast(1.f + e);
  return e * s * s;
}
KDA_DEVICE float softplus(float x) {
  const float y = log1p_accurate(exp_clamped(x));
  return x > kSoftplusThreshold ? x : y;
}

/// Base-2 logarithm of the decay, <= 0 (-inf possible) for a gate that decays. `bias` is dt_bias (0 when
/// absent), `a` is exp(A_log) of the value head (1 when unused); both are ignored by precomputed gates.
KDA_DEVICE float gate_log2(float raw, float bias, float a, float lower_bound) {
  if constexpr (Config::gate == GateKind::log_e) return raw * kLog2E;
  if constexpr (Config::gate == GateKind::log2) return raw;
  if constexpr (Config::gate == GateKind::softplus) return (-a * kLog2E) * softplus(raw + bias);
  if constexpr (Config::gate == GateKind::bounded) return (lower_bound * kLog2E) * sigmoid(a * (raw + bias));
  return (lower_bound * kLog2E) * sigmoid(raw + bias);
}
/// The same as a natural logarithm, what fla's gate functions return.
KDA_DEVICE float gate_natural(float raw, float bias, float a, float lower_bound) {
  if constexpr (Config::gate == GateKind::log_e) return raw;
  if constexpr (Config::gate == GateKind::log2) return raw * kLn2;
  if constexpr (Config::gate == GateKind::softplus) return -a * softplus(raw + bias);
  if constexpr (Config::gate == GateKind::bounded) return lower_bound * sigmoid(a * (raw + bias));
  return lower_bound * sigmoid(raw + bias);
}

/// Derivatives of the natural-log decay; both are finite. d g = dy * raw (also what one token adds to
/// d dt_bias), d A_log = sum over tokens and channels of dy * a_log (0 where A_log is not read).
struct GateDerivative {
  float raw, a_log;
};
KDA_DEVICE GateDerivative gate_derivative(float raw, float bias, float a, float lower_bound) {
  if constexpr (Config::gate == GateKind::log_e) return {1.f, 0.f};
  if constexpr (Config::gate == GateKind::log2) return {kLn2, 0.f};
  const float x = raw + bias;
  if constexpr (Config::gate == GateKind::softplus)
    return {-a * sigmoid(x), max(-a * softplus(x), -kFloatMax)};
  if constexpr (Config::gate == GateKind::bounded) {
    // d/dA_log of sigmoid(exp(A_log) x) is sigmoid' * a x; sigmoid' vanishes long before a x is clamped.
    const float ax = min(max(a * x, -kFloatMax), kFloatMax);
    const float d = lower_bound * sigmoid_derivative(ax);
    return {d * a, d * min(max(ax, -87.f), 87.f)};
  }
  return {lower_bound * sigmoid_derivative(x), 0.f};
}

/// beta as the recurrence uses it, from what the tensor holds.
KDA_DEVICE float beta_value(float raw) {
  if constexpr (!Config::beta_sigmoid) return raw;
  return Config::beta_times_two ? 2.f * sigmoid(raw) : sigmoid(raw);
}
KDA_DEVICE float beta_derivative(float raw) {
  if constexpr (!Config::beta_sigmoid) return 1.f;
  return Config::beta_times_two ? 2.f * sigmoid_derivative(raw) : sigmoid_derivative(raw);
}

/// The factor that normalises a q or k row of this sum of squares.
KDA_DEVICE float l2norm_factor(float sum_of_squares) {
  return rsqrt_fast(sum_of_squares + kNormEpsilon);
}

} // namespace kda
