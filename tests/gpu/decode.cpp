// Decode as a server calls it, on the GPU: the calls on a state pool and the verifies that the emulator runs,
// with variants that they take turns at, and a CUDA graph whose tables change between replays.
#include "decode.h"
#include "gpu.h"
#include "pool_cases.h"
#include "reported_cases.h"
#include <fmt/format.h>

using namespace kda;
using namespace kda::test;

namespace {

/// The variants of a problem in turn, so that all calls together try most of them.
class Turns {
public:
  explicit Turns(Target target) : target_(std::move(target)) {}
  Variant next(const Problem& p) {
    std::vector<Variant> all;
    for (const Candidate& c : enumerate(p, target_))
      if (c.rejected.empty()) all.push_back(c.variant);
    REQUIRE_FALSE(all.empty());
    return all[(turn_ += 7) % all.size()];
  }

private:
  Target target_;
  std::size_t turn_ = 0;
};

void check(const std::vector<NamedPoolCall>& calls) {
  const auto backend = gpu();
  if (backend == nullptr) return;
  Turns turns(backend->target());
  for (const NamedPoolCall& c : calls) {
    const Problem& p = c.call.options.problem;
    const Variant v = turns.next(p);
    CAPTURE(c.name, to_string(p), to_string(v));
    CHECK(run_pool(*backend, c.call, v) == "");
  }
}

} // namespace

TEST_CASE("states in the slots of a pool on the GPU", "[gpu]") {
  check(pool_calls());
}
TEST_CASE("drafts verified by every state, by updates and replay, as trees on the GPU", "[gpu]") {
  check(verify_calls());
}

TEST_CASE("chained calls have the bits of one on the GPU, whatever the sizes", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  Turns turns(backend->target());
  for (const CaseOptions& o : decode_cases(true)) {
    const Variant v = turns.next(o.problem);
    CAPTURE(to_string(o.problem), o.tokens, to_string(v));
    CHECK(run_chained_decode(*backend, o, v) == "");
  }
}

TEST_CASE("a replay and a tree have the bits of plain calls on the GPU", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  CaseOptions o;
  o.problem = production(Operation::recurrent, 2);
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k}) {
    o.problem.state_layout = layout;
    CAPTURE(to_string(o.problem));
    CHECK(run_replayed_decode(*backend, o, parse_variant("token sw=4 r=8 st=1 pdl=1").value(),
                              parse_variant("token sw=1 r=16 st=1 cs=1 pdl=1").value()) == "");
  }
}

TEST_CASE("inputs that users reported elsewhere, on the GPU", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  Turns turns(backend->target());
  for (const ReportedCase& c : reported_cases(true)) {
    const Problem& p = c.options.problem;
    const Variant v = turns.next(p);
    CAPTURE(c.name, to_string(p), c.options.tokens, to_string(v));
    const auto report = run_case(*backend, random_case(c.options), v, c.run);
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    for (const TensorReport& t : report->tensors)
      CHECK(t.error <= tolerance(p, v, t.name));
  }
  for (const char* variant : {"token sw=4 r=32 st=1", "token c=4 sw=4 r=16 st=1"})
    CHECK(run_in_pieces(*backend, parse_variant(variant).value()) == "");
}

TEST_CASE("slots beyond 2^31 elements on the GPU", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const FarSlot& far : far_slots()) {
      CAPTURE(to_string(layout), far.heads, far.slot);
      void* const memory = backend->allocate(far.bytes()).value(); // 10 GB, of which little is touched
      CHECK(run_far_slot(*backend, parse_variant("token sw=4 r=32 st=1").value(), layout, far, memory) == "");
      backend->release(memory);
    }
}

TEST_CASE("state error on the GPU: 1e-6 after one token, 1e-5 after 4,096", "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const char* variant :
         {"token sw=4 r=16 st=1", "token sw=4 r=16 st=4", "token c=16 sw=4 r=16 st=1"}) {
      CAPTURE(to_string(layout), variant);
      CHECK(run_long_decode(*backend, layout, 128, parse_variant(variant).value()) == "");
    }
}

TEST_CASE("a replay of a CUDA graph reads slot numbers, accepted counts and padding of its own time",
          "[gpu]") {
  const auto backend = gpu();
  if (backend == nullptr) return;
  Problem p = production(Operation::recurrent, 4);
  p.state_pool = p.every_state = true;
  const Engine engine = gpu_engine();
  const Call call(engine, backend, p, {4, 3, 4}); // four sequences of three drafts; four states to start from

  struct Numbers {
    std::int32_t read[4][2], accepted[4];
  };
  const auto device = [&](std::size_t bytes) { return backend->allocate(bytes).value(); };
  auto* const numbers = static_cast<Numbers*>(device(sizeof(Numbers)));
  Args args = call.tensors.args();
  args.read_slots = contiguous_table(numbers->read, IndexType::int32, {4, 2});
  args.accepted = contiguous_table(numbers->accepted, IndexType::int32, {4});
  args.padding = PaddingPolicy::negative;
  args.slot_error = static_cast<std::int32_t*>(device(4));
  const auto execute = [&](void* stream) {
    return call.kernel.execute(args, call.workspace, call.bytes, stream);
  };
  // All that a call leaves; NaN where it wrote nothing, so compared by its bytes.
  const auto result = [&](const auto& run) {
    REQUIRE(call.tensors.poison());
    REQUIRE(backend->fill(args.slot_error, 0, 1, nullptr));
    REQUIRE(backend->synchronize());
    run();
    REQUIRE(backend->synchronize());
    reference::Array all = call.output("o");
    const reference::Array states = call.output("final_state");
    all.insert(all.end(), states.begin(), states.end());
    std::int32_t word = 0;
    REQUIRE(backend->copy_from_device(&word, args.slot_error, sizeof word));
    all.push_back(word);
    return std::string(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(double));
  };

  const Numbers first{{{0, 1}, {1, 2}, {2, 3}, {3, 0}}, {1, 1, 1, 1}};
  REQUIRE(backend->copy_to_device(numbers, &first, sizeof first));
  REQUIRE(execute(nullptr));
  REQUIRE(backend->synchronize());
  const Graph graph(execute);
  std::vector<std::string> seen;
  for (const Numbers& now : {first, Numbers{{{3, 1}, {1, 2}, {0, 3}, {2, 0}}, {1, 1, 1, 1}}, // other slots
                             Numbers{{{3, 1}, {1, 2}, {0, 3}, {2, 0}}, {2, 1, 2, 1}},        // other counts
                             Numbers{{{3, 1}, {1, 2}, {0, 3}, {2, 0}}, {2, 0, 2, 1}},        // none accepted
                             Numbers{{{-1, -1}, {1, 2}, {0, 3}, {-1, -1}}, {1, 1, 2, 1}},    // padding
                             Numbers{{{3, 1}, {1, 4}, {0, 3}, {2, 0}}, {1, 2, 1, 1}}}) {     // past the pool
    CAPTURE(seen.size());
    REQUIRE(backend->copy_to_device(numbers, &now, sizeof now));
    const std::string expected = result([&] { REQUIRE(execute(nullptr)); });
    CHECK(result([&] { graph.launch(); }) == expected);
    for (const std::string& before : seen)
      CHECK(before != expected);
    seen.push_back(expected);
  }
  backend->release(args.slot_error);
  backend->release(numbers);
}
