// What `kda-jit precompile --model` compiles is all that the model asks for: the device is scripted, the
// plans, kernels and keys are those of a real one.
#include "kernel_jobs.h"
#include "problem_options.h"
#include "scratch.h"
#include "scripted_backend.h"
#include <catch2/catch.hpp>
#include <random>

using namespace kda;
using namespace kda::test;

namespace {

/// Log-uniform over the whole range, so that short and long, single and many come as often.
std::int64_t random_extent(std::mt19937& random, std::int64_t most) {
  const double log = std::uniform_real_distribution<double>(0, std::log2(static_cast<double>(most)))(random);
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::exp2(log)));
}

Sizes random_sizes(std::mt19937& random, const Problem& p) {
  const std::int64_t rows = random_extent(random, kMostSequences);
  if (p.varlen) return {1, random_extent(random, kMostTokens), rows};
  return {rows, random_extent(random, kMostTokens / rows), rows};
}

Engine warmed(const std::shared_ptr<ScriptedBackend>& backend, const std::vector<Problem>& problems) {
  const Engine engine = engine_on(backend);
  const auto jobs = tools::kernel_jobs(problems, backend->target(), false).value();
  for (const auto& job : jobs)
    REQUIRE(engine.prepare(engine.plan(job.problem, kScripted, {1, 1, 1}, job.variant).value()));
  return engine;
}

} // namespace

TEST_CASE("a model compiles nothing after its kernels were precompiled, whatever batch, length and options") {
  const auto backend = std::make_shared<ScriptedBackend>();
  std::mt19937 random(7);
  for (const std::string& model : tools::model_names()) {
    const int ranks = std::array{1, 2, 4, 8}[random() % 4];
    const auto problems = tools::model_problems(model, ranks).value();
    const Engine engine = warmed(backend, problems);
    const std::int64_t warm = engine.compile_count();
    CHECK(warm > 100);
    for (int step = 0; step < 400; ++step) {
      const Problem& p = problems[random() % problems.size()];
      const Sizes sizes = random_sizes(random, p);
      const Plan plan = engine.plan(p, kScripted, sizes).value();
      REQUIRE(engine.prepare(plan));
      INFO(model << " on " << ranks << " ranks: " << plan.explain() << ", B=" << sizes.batch
                 << " T=" << sizes.tokens << " N=" << sizes.sequences);
      REQUIRE(engine.compile_count() == warm);
    }
  }
}

TEST_CASE("the kernels of one model are not those of another one, nor those of other options") {
  const auto backend = std::make_shared<ScriptedBackend>();
  const Engine engine = warmed(backend, tools::model_problems("kimi-k3", 8).value());
  const std::int64_t warm = engine.compile_count();
  Problem other = tools::model_problems("kimi-linear-48b", 8).value().front(); // its gate is another
  REQUIRE(engine.prepare(engine.plan(other, kScripted, {1, 64, 1}).value()));
  CHECK(engine.compile_count() == warm + 1);
}

TEST_CASE("the kernels of a model that tunes are a superset") {
  const Target target = cuda_target("sm_90a").value();
  const auto problems = tools::model_problems("kimi-k3", 8).value();
  const auto chosen = tools::kernel_jobs(problems, target, false).value();
  const auto all = tools::kernel_jobs(problems, target, true).value();
  CHECK(all.size() > 2 * chosen.size());
  for (const auto& job : chosen)
    CHECK(std::any_of(all.begin(), all.end(), [&](const tools::KernelJob& other) {
      return other.problem == job.problem && other.variant == job.variant;
    }));
}

TEST_CASE("a model has every way to serve and train") {
  const auto problems = tools::model_problems("kimi-k3", 8).value();
  const auto has = [&](const auto& what) { return std::any_of(problems.begin(), problems.end(), what); };
  for (const Operation operation :
       {Operation::forward, Operation::backward, Operation::recurrent, Operation::replay})
    for (const IndexType index : {IndexType::int32, IndexType::int64})
      CHECK(has([&](const Problem& p) {
        return p.operation == operation && p.varlen && p.cu_seqlens_type == index;
      }));
  CHECK(has([](const Problem& p) { return p.state_pool && p.every_state; }));
  CHECK(has([](const Problem& p) { return p.state_pool && p.updates && p.tree; }));
  CHECK(has([](const Problem& p) { return p.operation == Operation::replay && p.state_pool && p.tree; }));
}
