#include "roofline.h"
#include <algorithm>

namespace kda {

double compulsory_bytes(const Problem& p, const Sizes& s) {
  const double rows = static_cast<double>(s.batch) * static_cast<double>(s.tokens),
               element = size_of(p.dtype);
  const double q = rows * p.heads * p.key_dim * element, v = rows * p.value_heads * p.value_dim * element;
  const double g = rows * p.value_heads * p.key_dim * size_of(p.gate_dtype),
               beta = rows * p.value_heads * size_of(p.beta_dtype);
  const double state =
      static_cast<double>(s.sequences) * p.value_heads * p.key_dim * p.value_dim * size_of(p.state_dtype);
  switch (p.operation) {
  case Operation::gate: return g + rows * p.value_heads * p.key_dim * 4;
  case Operation::gate_backward: return 2 * g + rows * p.value_heads * p.key_dim * 4;
  case Operation::replay:
    return 4 * rows * (p.heads * p.key_dim + p.value_heads * (p.key_dim + p.value_dim)) + 2 * state;
  case Operation::backward: return 2 * (2 * q + v + g + beta) + v + 3 * state;
  default: break;
  }
  const double kept =
      p.updates ? 4 * rows * (p.heads * p.key_dim + p.value_heads * (p.key_dim + p.value_dim)) : 0;
  const double states = p.every_state ? 1 + rows / std::max<double>(1, static_cast<double>(s.sequences))
                        : p.tree      ? 1
                                      : 2;
  return 2 * q + 2 * v + g + beta + kept + states * state;
}

double recurrence_flop(const Problem& p, const Sizes& s) {
  const double rows = static_cast<double>(s.batch) * static_cast<double>(s.tokens);
  const double unit = rows * p.value_heads * p.key_dim * p.value_dim;
  // An outer product added to a matrix, and a matrix times a vector, are 2 K V each; a decay is one.
  switch (p.operation) {
  case Operation::gate:
  case Operation::gate_backward: return 0;
  case Operation::replay:
    return 3 * unit; // S = a S + k u'
  // The states again: a S, S'k, + k u'. Then of o = S'q: S do, + q do'; of + k u': dS'k, dS u; of S'k: - k
  // du', S du; of a S: a dS and the sum of dS S along V.
  case Operation::backward: return (5 + 4 + 4 + 4 + 3) * unit;
  case Operation::forward:
  case Operation::recurrent: break;
  }
  return 7 * unit; // a S; S'k; + k u'; S'q
}

} // namespace kda
