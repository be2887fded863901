#include "math.h"
#include <array>
#include <cstdlib>

namespace kda::host {
namespace {

constexpr float kLog2E = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;
constexpr float kLn2Low = -1.904654299957768e-9F; // ln 2 - kLn2

/// Horner's scheme, highest power first.
template <std::size_t N>
Value polynomial(Ir& ir, const Value& x, const std::array<float, N>& coefficients) {
  Value sum = Ir::constant(x, coefficients[0]);
  for (std::size_t i = 1; i < N; ++i)
    sum = ir.fma(sum, x, Ir::constant(x, coefficients[i]));
  return sum;
}

Value clamp(Ir& ir, const Value& x, float low, float high) {
  return ir.intrinsic("minnum", {ir.intrinsic("maxnum", {x, Ir::constant(x, low)}), Ir::constant(x, high)});
}

std::string integer_type(const Value& like) {
  return vector_of("i32", width_of(like));
}

/// log(w) for a normal w >= 1. Mantissa in [sqrt 1/2, sqrt 2); the polynomial is that of Cephes' logf.
Value log(Ir& ir, const Value& w) {
  const Value bits = ir.cast("bitcast", w, integer_type(w));
  const Value above = ir.op("sub", bits, Ir::integers(w, 0x3F3504F3)); // sqrt 1/2
  const Value exponent = ir.op("ashr", above, Ir::integers(w, 23));
  const Value shifted = ir.op("shl", exponent, Ir::integers(w, 23));
  const Value mantissa = ir.cast("bitcast", ir.op("sub", bits, shifted), w.type);
  const Value e = ir.cast("sitofp", exponent, w.type);
  const Value f = ir.sub(mantissa, Ir::constant(w, 1));
  const Value square = ir.mul(f, f);
  const Value p = polynomial<9>(ir, f,
                                {7.0376836292e-2F, -1.1514610310e-1F, 1.1676998740e-1F, -1.2420140846e-1F,
                                 1.4249322787e-1F, -1.6668057665e-1F, 2.0000714765e-1F, -2.4999993993e-1F,
                                 3.3333331174e-1F});
  Value y = ir.mul(ir.mul(f, square), p);
  y = ir.fma(e, Ir::constant(w, -2.12194440e-4F), y); // ln 2 in two pieces
  y = ir.fma(square, Ir::constant(w, -0.5F), y);
  return ir.fma(e, Ir::constant(w, 0.693359375F), ir.add(f, y));
}

} // namespace

Value exp2(Ir& ir, const Value& x) {
  const Value y = clamp(ir, x, -127, 127);
  const Value whole = ir.intrinsic("rint", {y});
  const Value f = ir.sub(y, whole);
  // 2^f on [-1/2, 1/2], Cephes' exp2f.
  const Value p = polynomial<7>(ir, f,
                                {1.535336188319500e-4F, 1.339887440266574e-3F, 9.618437357674640e-3F,
                                 5.550332471162809e-2F, 2.402264791363012e-1F, 6.931472028550421e-1F, 1});
  const Value n = ir.cast("fptosi", whole, integer_type(x));
  const Value biased = ir.op("add", n, Ir::integers(x, 127)); // 0 for -127: the factor is 0
  return ir.mul(p, ir.cast("bitcast", ir.op("shl", biased, Ir::integers(x, 23)), x.type));
}

Value exp(Ir& ir, const Value& x) {
  // x * log2(e) is rounded, which would cost |x| * 2^-24; the remainder puts that back.
  const Value c = clamp(ir, x, -87, 87);
  const Value y = ir.mul(c, Ir::constant(x, kLog2E));
  const Value rest = ir.fma(y, Ir::constant(x, -kLn2Low), ir.fma(y, Ir::constant(x, -kLn2), c));
  const Value e = exp2(ir, y);
  return ir.fma(e, rest, e);
}

Value sigmoid(Ir& ir, const Value& x) {
  const Value one = Ir::constant(x, 1);
  return ir.div(one, ir.add(one, exp(ir, ir.sub(Ir::constant(x, 0), x))));
}

Value softplus(Ir& ir, const Value& x) {
  const Value e = exp(ir, x), one = Ir::constant(x, 1);
  const Value w = ir.add(one, e);
  const Value lost = ir.sub(e, ir.sub(w, one)); // of e, when 1 + e was rounded
  const Value y = ir.add(log(ir, w), ir.div(lost, w));
  return ir.select(ir.compare("fcmp ogt", x, Ir::constant(x, 20)), x, y);
}

/// `unit`: of the logarithm, 1 for natural ones.
static Value gate(Ir& ir, const Problem& p, const Value& raw, const Value& bias, const Value& a,
                  const Value& bound, float unit) {
  if (p.gate == GateKind::log_e) return ir.mul(raw, Ir::constant(raw, unit));
  if (p.gate == GateKind::log2) return ir.mul(raw, Ir::constant(raw, unit == 1 ? kLn2 : 1));
  Value x = p.dt_bias ? ir.add(raw, bias) : raw;
  if (p.gate == GateKind::softplus) {
    const Value factor = ir.mul(a, Ir::constant(raw, -unit));
    return ir.mul(factor, softplus(ir, x));
  }
  if (p.gate == GateKind::bounded) x = ir.mul(a, x);
  return ir.mul(ir.mul(bound, Ir::constant(raw, unit)), sigmoid(ir, x));
}

Value gate_log2(Ir& ir, const Problem& p, const Value& raw, const Value& bias, const Value& a,
                const Value& bound) {
  return gate(ir, p, raw, bias, a, bound, kLog2E);
}

Value gate_natural(Ir& ir, const Problem& p, const Value& raw, const Value& bias, const Value& a,
                   const Value& bound) {
  return gate(ir, p, raw, bias, a, bound, 1);
}

/// sigmoid(x) (1 - sigmoid(x)) without the cancellation of 1 - sigmoid.
static Value sigmoid_derivative(Ir& ir, const Value& x) {
  const Value one = Ir::constant(x, 1);
  const Value e = exp(ir, ir.sub(Ir::constant(x, 0), ir.intrinsic("fabs", {x})));
  const Value s = ir.div(one, ir.add(one, e));
  return ir.mul(ir.mul(e, s), s);
}

GateDerivative gate_derivative(Ir& ir, const Problem& p, const Value& raw, const Value& bias, const Value& a,
                               const Value& bound) {
  constexpr float kFloatMax = 3.402823466e38F;
  if (p.gate == GateKind::log_e) return {Ir::constant(raw, 1), {}};
  if (p.gate == GateKind::log2) return {Ir::constant(raw, kLn2), {}};
  const Value x = p.dt_bias ? ir.add(raw, bias) : raw;
  if (p.gate == GateKind::softplus) {
    const Value minus_a = ir.sub(Ir::constant(a, 0), a);
    return {ir.mul(minus_a, sigmoid(ir, x)),
            ir.intrinsic("maxnum", {ir.mul(minus_a, softplus(ir, x)), Ir::constant(x, -kFloatMax)})};
  }
  if (p.gate == GateKind::bounded_no_a) return {ir.mul(bound, sigmoid_derivative(ir, x)), {}};
  // d/dA_log of sigmoid(a x) is sigmoid' a x; sigmoid' vanishes long before a x is cut.
  const Value ax = ir.mul(a, x);
  const Value d = ir.mul(bound, sigmoid_derivative(ir, ax));
  return {ir.mul(d, a), ir.mul(d, clamp(ir, ax, -87, 87))};
}

Value beta_value(Ir& ir, const Problem& p, const Value& raw) {
  if (!p.beta_sigmoid) return raw;
  const Value s = sigmoid(ir, raw);
  return p.beta_times_two ? ir.add(s, s) : s;
}

const char* element_type(DType type) {
  switch (type) {
  case DType::bf16: return "i16"; // converted by integer arithmetic, which every CPU has
  case DType::fp16: return "half";
  case DType::fp32: break;
  }
  return "float";
}

Value widen(Ir& ir, DType type, const Value& raw) {
  const int count = width_of(raw);
  const std::string floats = vector_of("float", count);
  if (type == DType::fp32) return raw;
  if (type == DType::fp16) return ir.cast("fpext", raw, floats);
  const Value wide = ir.cast("zext", raw, vector_of("i32", count));
  return ir.cast("bitcast", ir.op("shl", wide, Ir::integers(wide, 16)), floats);
}

Value narrow(Ir& ir, DType type, const Value& x) {
  const int count = width_of(x);
  if (type == DType::fp32) return x;
  if (type == DType::fp16) return ir.cast("fptrunc", x, vector_of("half", count));
  const Value bits = ir.cast("bitcast", x, integer_type(x));
  const Value odd = ir.op("and", ir.op("lshr", bits, Ir::integers(x, 16)), Ir::integers(x, 1));
  const Value rounded = ir.op("add", bits, ir.op("add", odd, Ir::integers(x, 0x7FFF)));
  // The sum would turn some NaNs into infinity or zero.
  const Value safe = ir.select(ir.compare("fcmp uno", x, x), Ir::integers(x, 0x7FC00000), rounded);
  return ir.cast("trunc", ir.op("lshr", safe, Ir::integers(x, 16)), vector_of("i16", count));
}

/// Elements at a time: as many as divide a count that is known, LLVM splits them where registers are shorter.
static int group_of(const Value& count) {
  if (count.name[0] == '%') return 4;
  const int n = std::atoi(count.name.c_str());
  return n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : 4;
}

void load_row(Ir& ir, DType type, const Value& from, const Value& to, const Value& count) {
  const int group = group_of(count);
  ir.loop(i64(0), count, group, [&](const Value& i) {
    const char* const element = element_type(type);
    const Value raw = ir.load(vector_of(element, group), ir.at(from, element, i), size_of(type));
    ir.store(widen(ir, type, raw), ir.at(to, "float", i), 16);
  });
}

void store_row(Ir& ir, DType type, const Value& from, const Value& to, const Value& count) {
  const int group = group_of(count);
  ir.loop(i64(0), count, group, [&](const Value& i) {
    const Value x = ir.load(vector_of("float", group), ir.at(from, "float", i), 16);
    ir.store(narrow(ir, type, x), ir.at(to, element_type(type), i), size_of(type));
  });
}

Value load_element(Ir& ir, DType type, const Value& from) {
  return widen(ir, type, ir.load(element_type(type), from, size_of(type)));
}

} // namespace kda::host
