// The gate and its gradient alone, as LLVM IR.
#include "cuda/kernel_args.cuh"
#include "emit.h"
#include "kernel.h"
#include <fmt/format.h>

namespace kda::host {
namespace {

class Gate : Kernel {
public:
  Gate(const Problem& p, int vector_bytes)
      : Kernel("kda_host_gate", p, vector_bytes), keys_(padded(p.key_dim)),
        doubles_(vector_of("double", width_)) {}

  std::string text() {
    for (Value* x : {&raw_, &bias_, &gradient_, &result_}) {
      *x = ir_.scratch(keys_);
      zero(*x, keys_); // behind K it stays zero
    }
    bias_sum_ = ir_.scratch(2 * keys_); // fp64: sums over all tokens
    a_sum_ = ir_.scratch(2 * width_);
    ir_.loop(Value{"i64", "%begin"}, Value{"i64", "%end"}, 1, [&](const Value& item) {
      if (p_.operation == Operation::gate)
        forward(item);
      else
        backward(item);
    });
    return ir_.finish();
  }

private:
  Value tokens() { return field("i64", offsetof(KernelArgs, tokens)); }
  /// Tokens that some sequence covers; the rows behind them are zero in every output.
  Value covered() { return p_.varlen ? boundary(count(offsetof(KernelArgs, sequences))) : tokens(); }
  Value pick(const char* predicate, const Value& a, const Value& b) {
    return ir_.select(ir_.compare(predicate, a, b), a, b);
  }

  void load_head() {
    bound_ = ir_.splat(field("float", offsetof(KernelArgs, lower_bound)), width_);
    a_ = Ir::constant({vector_, ""}, 1);
    if (reads_a_log(p_.gate)) {
      const Value at = ir_.at(field("ptr", offsetof(KernelArgs, A_log)), "float", head_);
      a_ = exp(ir_, ir_.splat(ir_.load("float", at, 4), width_));
    }
    if (p_.dt_bias) {
      const Value at =
          ir_.at(field("ptr", offsetof(KernelArgs, dt_bias)), "float", ir_.mul(head_, i64(p_.key_dim)));
      load_row(ir_, DType::fp32, at, bias_, i64(p_.key_dim));
    }
  }

  void zero_rows(const Rows& out, DType type, const Value& begin, const Value& end) {
    zero(result_, keys_);
    ir_.loop(begin, end, 1,
             [&](const Value& t) { store_row(ir_, type, result_, row(out, t), i64(p_.key_dim)); });
  }

  void forward(const Value& item) {
    const Value blocks = ir_.div(ir_.add(tokens(), i64(kGateTokens - 1)), i64(kGateTokens));
    const Value rest = ir_.div(item, blocks);
    const Value heads =
        count(offsetof(KernelArgs, value_heads)); // no part of the text: one kernel serves all
    head_ = ir_.op("srem", rest, heads);
    const Value batch = ir_.div(rest, heads);
    const Value first = ir_.mul(ir_.op("srem", item, blocks), i64(kGateTokens));
    const Value end = pick("icmp slt", ir_.add(first, i64(kGateTokens)), tokens());
    const Value limit = covered();
    load_head();
    const Rows g = rows(offsetof(KernelArgs, g), p_.gate_dtype, batch, head_);
    const Rows o = rows(offsetof(KernelArgs, o), DType::fp32, batch, head_);
    ir_.loop(first, pick("icmp slt", end, limit), 1, [&](const Value& t) {
      load_row(ir_, p_.gate_dtype, row(g, t), raw_, i64(p_.key_dim));
      ir_.loop(i64(0), i64(keys_), width_, [&](const Value& i) {
        put(gate_natural(ir_, p_, vector_at(raw_, i), vector_at(bias_, i), a_, bound_), result_, i);
      });
      store_row(ir_, DType::fp32, result_, row(o, t), i64(p_.key_dim));
    });
    zero_rows(o, DType::fp32, pick("icmp sgt", first, limit), end);
  }

  // --- gradient --------------------------------------------------------------------------------------------
  Value sum_at(const Value& base, const Value& i) { return ir_.at(base, "double", i); }
  void add_to(const Value& base, const Value& i, const Value& x) {
    const Value at = sum_at(base, i);
    ir_.store(ir_.add(ir_.load(doubles_, at, 8), ir_.cast("fpext", x, doubles_)), at, 8);
  }

  void backward(const Value& item) {
    head_ = item;
    load_head();
    zero(bias_sum_, 2L * keys_);
    zero(a_sum_, 2L * width_);
    const Value limit = covered();
    ir_.loop(i64(0), count(offsetof(KernelArgs, batch)), 1, [&](const Value& batch) {
      const Rows g = rows(offsetof(KernelArgs, g), p_.gate_dtype, batch, head_);
      const Rows dy = rows(offsetof(KernelArgs, d_o), DType::fp32, batch, head_);
      const Rows dg = rows(offsetof(KernelArgs, d_g), p_.gate_dtype, batch, head_);
      ir_.loop(i64(0), limit, 1, [&](const Value& t) {
        load_row(ir_, p_.gate_dtype, row(g, t), raw_, i64(p_.key_dim));
        load_row(ir_, DType::fp32, row(dy, t), gradient_, i64(p_.key_dim));
        ir_.loop(i64(0), i64(keys_), width_, [&](const Value& i) { element(i); });
        store_row(ir_, p_.gate_dtype, result_, row(dg, t), i64(p_.key_dim));
      });
      zero_rows(dg, p_.gate_dtype, limit, tokens());
    });
    write_sums();
  }

  void element(const Value& i) {
    const Value dy = vector_at(gradient_, i);
    const GateDerivative d = gate_derivative(ir_, p_, vector_at(raw_, i), vector_at(bias_, i), a_, bound_);
    const Value dx = ir_.mul(dy, d.raw);
    put(dx, result_, i);
    if (p_.dt_bias) add_to(bias_sum_, i, dx);
    if (reads_a_log(p_.gate)) add_to(a_sum_, i64(0), ir_.mul(dy, d.a_log));
  }

  /// Calls `body` with the pointer at `offset` unless it is null.
  void when_wanted(std::size_t offset, const std::function<void(const Value& data)>& body) {
    const Value data = field("ptr", offset);
    ir_.branch(
        ir_.compare("icmp ne", data, {"ptr", "null"}), [&] { body(data); }, [] {});
  }

  void write_sums() {
    if (p_.dt_bias)
      when_wanted(offsetof(KernelArgs, d_dt_bias), [&](const Value& data) {
        ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& k) {
          const Value sum = ir_.load("double", sum_at(bias_sum_, k), 8);
          const Value at = ir_.at(data, "float", ir_.add(ir_.mul(head_, i64(p_.key_dim)), k));
          ir_.store(ir_.cast("fptrunc", sum, "float"), at, 4);
        });
      });
    if (reads_a_log(p_.gate))
      when_wanted(offsetof(KernelArgs, d_A_log), [&](const Value& data) {
        const Value lanes = ir_.load(doubles_, a_sum_, 8);
        const Value sum = ir_.call("double", fmt::format("llvm.vector.reduce.fadd.v{}f64", width_),
                                   {{"double", "-0.0"}, lanes});
        ir_.store(ir_.cast("fptrunc", sum, "float"), ir_.at(data, "float", head_), 4);
      });
  }

  int keys_;                                                ///< K, padded
  std::string doubles_;                                     ///< as wide as a vector
  Value raw_, bias_, gradient_, result_, bias_sum_, a_sum_; // scratch
  Value head_, a_, bound_;
};

} // namespace

SourceUnit emit_gate(const Problem& p, const Target& t) {
  SourceUnit unit;
  unit.name = "host_gate.ll";
  unit.main = Gate(p, t.vector_bytes).text();
  unit.options = {t.arch, t.features};
  unit.entries = {"kda_host_gate"};
  return unit;
}

} // namespace kda::host
