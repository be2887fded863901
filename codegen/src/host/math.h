#pragma once
// Functions of the gate in IR, on float or a vector of float; relative error at most 4e-7 unless said
// otherwise, and never NaN for a finite or infinite input.
#include "codegen/problem.h"
#include "ir.h"

namespace kda::host {

/// 2^x; 0 below -127, and x is cut at 127.
Value exp2(Ir&, const Value& x);
/// e^x for x cut to +-87.
Value exp(Ir&, const Value& x);
Value sigmoid(Ir&, const Value& x);
/// log(1 + e^x), x itself above 20.
Value softplus(Ir&, const Value& x);
/// Base-2 logarithm of the decay. `bias` is dt_bias, `a` exp(A_log), both ignored by gates without them;
/// `bound` is the lower bound.
Value gate_log2(Ir&, const Problem&, const Value& raw, const Value& bias, const Value& a, const Value& bound);
/// The same as a natural logarithm.
Value gate_natural(Ir&, const Problem&, const Value& raw, const Value& bias, const Value& a,
                   const Value& bound);
/// Derivatives of the natural-log decay, both finite: with respect to raw (and dt_bias), and to A_log, which
/// is empty where the gate does not read it.
struct GateDerivative {
  Value raw, a_log;
};
GateDerivative gate_derivative(Ir&, const Problem&, const Value& raw, const Value& bias, const Value& a,
                               const Value& bound);
/// beta as the recurrence uses it.
Value beta_value(Ir&, const Problem&, const Value& raw);

// Rows in memory. `count` (i64) is a multiple of 4, so four elements at a time reach its end.
/// Widens to fp32 at `to`.
void load_row(Ir&, DType, const Value& from, const Value& to, const Value& count);
/// Rounds to nearest even.
void store_row(Ir&, DType, const Value& from, const Value& to, const Value& count);
/// One element, and what LLVM calls its type in memory.
Value load_element(Ir&, DType, const Value& from);
[[nodiscard]] const char* element_type(DType);
/// Between `count` elements as they lie in memory and float.
Value widen(Ir&, DType, const Value& raw);
Value narrow(Ir&, DType, const Value& value);

} // namespace kda::host
