#pragma once
// Exact cases (random_case.h) of forward, backward and recurrence, for the emulator and for a card.
#include "run_case.h"

namespace kda::test {

/// A relative error: one bit of an output is 1e-8 or more, what float64 loses itself is rounded away.
inline constexpr double kSameBits = 1e-12;

struct ExactCase {
  TestCase test_case;
  Variant variant;
};

inline std::vector<ExactCase> exact_cases() {
  std::vector<ExactCase> all;
  const auto add = [&](Operation operation, DType dtype, const char* variant) {
    CaseOptions o;
    o.problem.operation = operation;
    o.problem.key_dim = o.problem.value_dim = 64;
    o.problem.gate = GateKind::log2;
    o.problem.dtype = dtype;
    o.batch = 4;
    o.tokens = operation == Operation::backward ? 3 : 5; // its products have more bits
    all.push_back({exact_case(o), parse_variant(variant).value()});
  };
  add(Operation::recurrent, DType::fp32, "token sw=1 r=8 st=4");
  add(Operation::recurrent, DType::bf16, "token sw=4 r=16 st=1");
  add(Operation::recurrent, DType::bf16, "token c=4 sw=4 r=16 st=1 l=8 cs=1 pdl=1");
  for (const char* variant : {"chunk c=64 vt=64 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=3",
                              "chunk c=16 vt=16 pw=4 sw=8 st=4"})
    add(Operation::forward, DType::bf16, variant);
  add(Operation::backward, DType::fp32, "token c=16 sw=4 r=4");
  for (const char* variant : {"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=64 pw=8 sw=4 st=2"})
    add(Operation::backward, DType::bf16, variant);
  return all;
}

} // namespace kda::test
