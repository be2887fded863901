// The chunk form against the token recurrence, hand-made cases, and gates at their extremes.
#include "random_case.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <numbers>

using namespace kda;
using namespace kda::reference;

namespace {

constexpr GateKind kGates[] = {GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded,
                               GateKind::bounded_no_a};

bool all_finite(const Array& x) {
  return std::all_of(x.begin(), x.end(), [](double y) { return std::isfinite(y); });
}

} // namespace

TEST_CASE("one token: decay, delta, write, read") {
  // K = V = 1: S = e^g S0 = 2; u = beta (v - S k) = 0.5 (7 - 2*3) = 0.5; S = 2 + 3*0.5 = 3.5; o = 0.25*5*3.5.
  Inputs in;
  in.problem.key_dim = in.problem.value_dim = 1;
  in.sizes = {1, 1, 1};
  in.scale = 0.25;
  in.q = {5};
  in.k = {3};
  in.v = {7};
  in.g = {std::log(0.5)};
  in.beta = {0.5};
  in.initial_state = {4};
  const Outputs out = recurrence(in);
  CHECK(out.final_state[0] == Approx(3.5).epsilon(1e-14));
  CHECK(out.o[0] == Approx(4.375).epsilon(1e-14));
}

TEST_CASE("gates are what their formulas say") {
  Inputs in;
  in.problem.key_dim = 1;
  in.problem.dt_bias = true;
  in.g = {0.75};
  in.dt_bias = {-0.25};
  in.A_log = {std::log(3.0)};
  in.lower_bound = -5;
  const auto value = [&](GateKind kind) {
    in.problem.gate = kind;
    return gate(in)[0];
  };
  CHECK(value(GateKind::softplus) == Approx(-3 * std::log1p(std::exp(0.5))).epsilon(1e-14));
  CHECK(value(GateKind::bounded) == Approx(-5 / (1 + std::exp(-1.5))).epsilon(1e-14));
  CHECK(value(GateKind::bounded_no_a) == Approx(-5 / (1 + std::exp(-0.5))).epsilon(1e-14));
  in.problem.dt_bias = false;
  CHECK(value(GateKind::log_e) == 0.75);
  CHECK(value(GateKind::log2) == Approx(0.75 * std::numbers::ln2).epsilon(1e-14));
}

TEST_CASE("the chunk form equals the recurrence for every gate and length") {
  for (const GateKind kind : kGates)
    for (const std::int64_t tokens : {1, 15, 16, 17, 64, 131}) {
      const Inputs in = random_inputs({2, 4, 20, 12, 2, tokens, {}}, kind, 7);
      const Outputs expected = recurrence(in);
      for (const int chunk : {16, 32, 64, 5}) {
        INFO(to_string(kind) << " T=" << tokens << " C=" << chunk);
        const Outputs got = chunked(in, chunk);
        CHECK(relative_error(got.o, expected.o) < 1e-12);
        CHECK(relative_error(got.final_state, expected.final_state) < 1e-12);
      }
    }
}

TEST_CASE("packed sequences are independent, an empty one keeps its state, rows beyond the last are zero") {
  Shape shape{1, 2, 12, 10, 1, 40, {0, 5, 5, 21, 37}};
  const Inputs in = random_inputs(shape, GateKind::softplus, 3);
  const Outputs packed = recurrence(in);
  CHECK(relative_error(chunked(in, 16).o, packed.o) < 1e-12);

  const std::size_t state = 2 * 12 * 10, row = 2 * 10;
  for (std::size_t n = 0; n < 4; ++n) {
    const auto begin = static_cast<std::size_t>(shape.cu_seqlens[n]);
    const auto end = static_cast<std::size_t>(shape.cu_seqlens[n + 1]);
    const auto part = [&](const Array& x, std::size_t width) {
      return Array(x.begin() + static_cast<std::ptrdiff_t>(begin * width),
                   x.begin() + static_cast<std::ptrdiff_t>(end * width));
    };
    const auto state_of = [&](const Array& x) {
      return Array(x.begin() + static_cast<std::ptrdiff_t>(n * state),
                   x.begin() + static_cast<std::ptrdiff_t>((n + 1) * state));
    };
    Inputs one = in;
    one.problem.varlen = false;
    one.cu_seqlens.clear();
    one.sizes = {1, static_cast<std::int64_t>(end - begin), 1};
    one.q = part(in.q, 12);
    one.k = part(in.k, 12);
    one.v = part(in.v, row);
    one.g = part(in.g, 24);
    one.beta = part(in.beta, 2);
    one.initial_state = state_of(in.initial_state);
    const Outputs alone = recurrence(one);
    CHECK(alone.o == part(packed.o, row));
    CHECK(alone.final_state == state_of(packed.final_state));
  }
  CHECK(std::all_of(packed.o.begin() + 37 * static_cast<std::ptrdiff_t>(row), packed.o.end(),
                    [](double x) { return x == 0; }));
}

TEST_CASE("gates of -inf and -1e4 forget everything and never give NaN") {
  for (const double extreme : {-std::numeric_limits<double>::infinity(), -1e4}) {
    Inputs in = random_inputs({1, 2, 12, 10, 1, 37, {}}, GateKind::log_e, 11);
    for (std::size_t i = 0; i < in.g.size(); i += 3)
      in.g[i] = extreme;
    const Outputs expected = recurrence(in);
    REQUIRE(all_finite(expected.o));
    CHECK(relative_error(chunked(in, 16).o, expected.o) < 1e-12);
    CHECK(relative_error(chunked(in, 16).final_state, expected.final_state) < 1e-12);
    const Gradients gradients = adjoint(in, random_output_gradients(in, 12));
    for (const Array* x :
         {&gradients.d_q, &gradients.d_k, &gradients.d_v, &gradients.d_g, &gradients.d_initial_state})
      CHECK(all_finite(*x));
    for (std::size_t i = 0; i < in.g.size(); i += 3)
      CHECK(gradients.d_g[i] == 0);

    // When every channel forgets at the first token, the initial state does not matter.
    std::fill(in.g.begin(), in.g.begin() + 24, extreme);
    const Outputs with_state = recurrence(in);
    in.initial_state.clear();
    CHECK(recurrence(in).o == with_state.o);
  }
}

TEST_CASE("activated gates survive infinite inputs in both directions") {
  for (const GateKind kind : {GateKind::softplus, GateKind::bounded, GateKind::bounded_no_a}) {
    Inputs in = random_inputs({1, 2, 12, 10, 1, 9, {}}, kind, 5);
    for (std::size_t i = 0; i < in.g.size(); i += 5)
      in.g[i] = (i % 2 == 0 ? 1 : -1) * std::numeric_limits<double>::infinity();
    CHECK(all_finite(recurrence(in).o));
    const Gradients gradients = adjoint(in, random_output_gradients(in, 6));
    CHECK(all_finite(gradients.d_g));
    CHECK(all_finite(gradients.d_A_log));
    CHECK(all_finite(gradients.d_dt_bias));
  }
}

TEST_CASE("relative_error sees what is not finite and what has another size") {
  CHECK(relative_error({3, 4}, {3, 4}) == 0);
  CHECK(relative_error({0, 4}, {3, 4}) == Approx(0.6));
  CHECK(relative_error({3, 4}, {0, 0}) == Approx(5));
  CHECK(std::isinf(relative_error({std::nan(""), 4}, {3, 4})));
  CHECK(std::isinf(relative_error({3}, {3, 4})));
}
