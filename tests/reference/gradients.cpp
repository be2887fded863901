// The adjoint against central finite differences of the recurrence, input by input.
#include "random_case.h"
#include <catch2/catch.hpp>

using namespace kda;
using namespace kda::reference;

namespace {

double loss(const Inputs& in, const OutputGradients& weights) {
  const Outputs out = recurrence(in);
  double sum = 0;
  for (std::size_t i = 0; i < out.o.size(); ++i)
    sum += out.o[i] * weights.d_o[i];
  for (std::size_t i = 0; i < weights.d_final_state.size(); ++i)
    sum += out.final_state[i] * weights.d_final_state[i];
  return sum;
}

Array differences(Inputs in, Array Inputs::*field, const OutputGradients& weights) {
  constexpr double h = 1e-5;
  Array out;
  for (double& x : in.*field) {
    const double at = x;
    x = at + h;
    const double above = loss(in, weights);
    x = at - h;
    out.push_back((above - loss(in, weights)) / (2 * h));
    x = at;
  }
  return out;
}

void check_all(const Inputs& in, const OutputGradients& weights) {
  const Gradients got = adjoint(in, weights);
  const auto check = [&](const char* name, Array Inputs::*field, const Array& gradient) {
    INFO(name);
    const Array expected = differences(in, field, weights);
    REQUIRE(gradient.size() == expected.size());
    CHECK(relative_error(gradient, expected) < 1e-7);
  };
  check("q", &Inputs::q, got.d_q);
  check("k", &Inputs::k, got.d_k);
  check("v", &Inputs::v, got.d_v);
  check("g", &Inputs::g, got.d_g);
  check("beta", &Inputs::beta, got.d_beta);
  check("A_log", &Inputs::A_log, got.d_A_log);
  check("dt_bias", &Inputs::dt_bias, got.d_dt_bias);
  if (!in.initial_state.empty()) check("initial_state", &Inputs::initial_state, got.d_initial_state);
}

} // namespace

TEST_CASE("every gradient equals finite differences, every gate, grouped heads, a batch") {
  for (const GateKind kind :
       {GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded, GateKind::bounded_no_a}) {
    INFO(to_string(kind));
    const Inputs in = random_inputs({2, 4, 4, 3, 2, 5, {}}, kind, 21);
    check_all(in, random_output_gradients(in, 22));
  }
}

TEST_CASE("the same packed, with empty sequences, and over more tokens than a checkpoint segment") {
  const Inputs packed = random_inputs({1, 2, 4, 3, 1, 9, {0, 0, 4, 4, 7}}, GateKind::bounded, 23);
  check_all(packed, random_output_gradients(packed, 24));
  const Inputs longer = random_inputs({1, 1, 3, 2, 1, 70, {}}, GateKind::softplus, 25);
  check_all(longer, random_output_gradients(longer, 26));
}

TEST_CASE("the same with beta times two, raw beta, no norm, no states") {
  Inputs in = random_inputs({1, 2, 4, 3, 1, 6, {}}, GateKind::softplus, 27);
  in.problem.beta_times_two = true;
  check_all(in, random_output_gradients(in, 28));
  in.problem.beta_times_two = in.problem.beta_sigmoid = in.problem.qk_l2norm = false;
  in.problem.dt_bias = false;
  in.dt_bias.clear();
  in.initial_state.clear();
  in.scale = 0.7;
  OutputGradients weights = random_output_gradients(in, 29);
  weights.d_final_state.clear();
  check_all(in, weights);
}

TEST_CASE("an empty sequence hands the final state's gradient to its initial state") {
  const Inputs in = random_inputs({1, 1, 4, 3, 1, 0, {0, 0}}, GateKind::bounded, 30);
  const OutputGradients given = random_output_gradients(in, 31);
  CHECK(adjoint(in, given).d_initial_state == given.d_final_state);
}

TEST_CASE("gate_adjoint alone equals finite differences of gate") {
  for (const GateKind kind :
       {GateKind::log2, GateKind::softplus, GateKind::bounded, GateKind::bounded_no_a}) {
    INFO(to_string(kind));
    Inputs in = random_inputs({1, 2, 4, 3, 1, 6, {}}, kind, 32);
    const Array d_gate = random_inputs({1, 2, 4, 3, 1, 6, {}}, kind, 33).g;
    const Gradients got = gate_adjoint(in, d_gate);
    const auto check = [&](Array Inputs::*field, const Array& gradient) {
      Array expected;
      for (double& x : in.*field) {
        double sum = 0;
        for (const double h : {1e-5, -1e-5}) {
          x += h;
          const Array y = gate(in);
          for (std::size_t i = 0; i < y.size(); ++i)
            sum += d_gate[i] * y[i] / (2 * h);
          x -= h;
        }
        expected.push_back(sum);
      }
      REQUIRE(gradient.size() == expected.size());
      CHECK(relative_error(gradient, expected) < 1e-8);
    };
    check(&Inputs::g, got.d_g);
    check(&Inputs::A_log, got.d_A_log);
    check(&Inputs::dt_bias, got.d_dt_bias);
  }
}
