// Production lengths, where float64 on the CPU would take minutes: the untuned choice against the token form.
#include "gpu.h"
#include <algorithm>

using namespace kda;
using namespace kda::test;

namespace {

/// o and the final state of the untuned choice and of the token form, on the same tensors.
void compare(const Problem& p, const Sizes& s) {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call chosen(engine, backend, p, s);
  REQUIRE(engine.plan(p, kGpu, s).value().variant().algorithm != Algorithm::token);
  Problem q = p;
  q.operation = Operation::recurrent;
  const Call token(engine, backend, q, s);
  REQUIRE(chosen.execute());
  REQUIRE(token.execute());
  REQUIRE(backend->synchronize());
  // The token form rounds o to bf16 too: 2e-3 of what is allowed.
  CHECK(reference::relative_error(chosen.output("o"), token.output("o")) < 5e-3);
  CHECK(reference::relative_error(chosen.output("final_state"), token.output("final_state")) < 4e-3);
  CHECK(chosen.tensors.inputs_preserved().value());
}

} // namespace

TEST_CASE("8,192 tokens of 32 heads agree with the token form", "[gpu]") {
  compare(production(Operation::forward, 32), {1, 8192, 1});
}

TEST_CASE("a batch and grouped value heads agree with the token form", "[gpu]") {
  Problem p = production(Operation::forward, 8);
  p.value_heads = 32;
  compare(p, {3, 2047, 3});
}

TEST_CASE("hundreds of packed sequences agree with the token form", "[gpu]") {
  Problem p = production(Operation::forward, 16);
  p.varlen = true;
  compare(p, {1, 20'000, 333});
}

TEST_CASE("the gradients of a long sequence have the same bits in every run", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, production(Operation::backward, 4), {1, 2000, 1});
  const auto run = [&] {
    REQUIRE(call.tensors.poison());
    REQUIRE(backend->fill(call.workspace, 0xFFFFFFFF, call.bytes / 4, nullptr));
    REQUIRE(backend->synchronize());
    REQUIRE(call.execute());
    REQUIRE(backend->synchronize());
    std::vector<reference::Array> all;
    for (const std::string& name : call.tensors.outputs()) {
      all.push_back(call.output(name));
      CHECK(std::all_of(all.back().begin(), all.back().end(), [](double x) { return std::isfinite(x); }));
    }
    return all;
  };
  const auto first = run();
  for (int i = 0; i < 3; ++i)
    CHECK(run() == first);
}
