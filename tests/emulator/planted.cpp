// Faults planted in the real templates, one at a time: the text that the emitter gives is changed before it
// is compiled, and a checked run must name the kind of fault.
#include "checked.h"
#include "run_case.h"
#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace kda;
using Catch::Matchers::Contains;

namespace {

struct Subject {
  test::TestCase test_case;
  Variant variant;
  SourceUnit unit;
  std::shared_ptr<Backend> backend;
};

Subject subject(const test::CaseOptions& o, const char* variant) {
  Subject s{test::random_case(o), parse_variant(variant).value(), {}, nullptr};
  emulator::Options options = test::checked(0);
  options.optimize = 0; // most of the time is the compiler's
  s.backend = emulator::make_backend(options).value();
  s.unit = emit(o.problem, s.variant, s.backend->target()).value();
  return s;
}

/// 70 tokens: the last chunk is short. Two heads: CTAs have neighbours.
Subject subject(Operation operation, const char* variant) {
  test::CaseOptions o;
  o.problem.operation = operation;
  o.problem.heads = o.problem.value_heads = 2;
  o.problem.key_dim = o.problem.value_dim = 64;
  o.problem.gate = GateKind::bounded;
  o.problem.dt_bias = o.problem.qk_l2norm = o.problem.beta_sigmoid = true;
  return subject(o, variant);
}

Subject chunk_forward() {
  return subject(Operation::forward, "chunk c=32 vt=32 pw=4 sw=4 st=2");
}

std::string& text_of(SourceUnit& unit, const std::string& name) {
  for (SourceFile& file : unit.files)
    if (file.name == name) return file.text;
  FAIL("the kernel has no " << name);
  return unit.main;
}

/// Replaces the one place of `from` in a file.
void plant(Subject& s, const std::string& file, const std::string& from, const std::string& to) {
  std::string& text = text_of(s.unit, file);
  const std::size_t at = text.find(from);
  CAPTURE(file, from);
  REQUIRE(at != std::string::npos);
  REQUIRE(text.find(from, at + 1) == std::string::npos);
  text.replace(at, from.size(), to);
}

/// The message of the launch, "wrong: ..." with the first output beyond its tolerance, or "no fault".
std::string fault_of(const Subject& s) {
  const auto report = test::run_unit(*s.backend, s.unit, s.test_case, s.variant);
  if (!report) return report.error().message + report.error().context;
  for (const test::TensorReport& t : report->tensors)
    if (!(t.error <= test::tolerance(s.test_case.inputs.problem, s.variant, t.name)))
      return fmt::format("wrong: {} is off by {:.1e}", t.name, t.error);
  return "no fault";
}

std::string fault_with(Subject s, const std::string& file, const std::string& from, const std::string& to) {
  plant(s, file, from, to);
  return fault_of(s);
}

/// Every `call` in the templates is taken away in turn; those that nobody misses, as "file number".
std::vector<std::string> not_missed(const Subject& whole, const std::string& call, bool of_schedule = false) {
  std::vector<std::string> calls;
  for (std::size_t f = 0; f < whole.unit.files.size(); ++f) {
    const SourceFile& file = whole.unit.files[f];
    if (file.name.rfind("primitives/", 0) == 0 || (file.name == "stages/schedule.cuh") != of_schedule)
      continue;
    int number = 0;
    for (std::size_t at = file.text.find(call); at != std::string::npos; at = file.text.find(call, at + 1)) {
      Subject s = whole;
      std::string& text = s.unit.files[f].text;
      text.erase(at, text.find(';', at) - at);
      const std::string fault = fault_of(s);
      ++number;
      if (fault.find("race: ") == std::string::npos && fault.find("uninitialised: ") == std::string::npos)
        calls.push_back(fmt::format("{} {}", file.name, number));
    }
  }
  return calls;
}
using Calls = std::vector<std::string>;
const Calls kNone;
/// Between distances: with at most 4 tiles a CTA, a warp keeps its column of X, and a lane reads what it
/// wrote.
const Calls kNotNeeded = {"stages/solve.cuh 2"};

} // namespace

TEST_CASE("planted: nothing") {
  CHECK(fault_of(chunk_forward()) == "no fault");
}

TEST_CASE("planted: each barrier and each wait of the chunk forward is missed when it is away") {
  const Subject s = subject(Operation::forward, "chunk c=64 vt=32 pw=4 sw=4 st=2");
  CHECK(not_missed(s, "sync_block()") == kNotNeeded);
  CHECK(not_missed(s, "sync_warp()") == kNone);
  CHECK(not_missed(s, "wait_copies<") == kNone);
}

TEST_CASE("planted: each barrier and each wait of the chunk backward is missed when it is away") {
  const Subject s = subject(Operation::backward, "chunk c=64 vt=32 pw=8 sw=4 st=2");
  Calls expected = {"chunk_backward/gradients.cuh 4", // multiply_states reads what was there before
                    "chunk_backward/scan.cuh 2"};     // of slabs, below
  expected.insert(expected.end(), kNotNeeded.begin(), kNotNeeded.end());
  CHECK(not_missed(s, "sync_block()") == expected);
  CHECK(not_missed(s, "wait_copies<") == kNone);
}

TEST_CASE("planted: the barrier between sequences that one CTA of a slab walks is missed when it is away") {
  test::CaseOptions o;
  o.problem.operation = Operation::backward;
  o.problem.key_dim = o.problem.value_dim = 64;
  o.problem.varlen = true;
  o.lengths = {10, 16, 10, 10, 16, 10, 10, 10, 600}; // eight in the first slab, of four CTAs a tile and head
  const Subject s = subject(o, "chunk c=16 vt=32 pw=8 sw=4 st=2 sl=128");
  CHECK(fault_of(s) == "no fault");
  CHECK_THAT(fault_with(s, "chunk_backward/scan.cuh",
                        "      sync_block(); // nobody reads the stages any more\n", ""),
             Contains("race: "));
}

TEST_CASE("planted: each barrier, wait and fence of the fused forward is missed when it is away") {
  test::CaseOptions o;
  o.problem.gate = GateKind::bounded;
  o.problem.dt_bias = o.problem.qk_l2norm = o.problem.beta_sigmoid = true;
  o.tokens = 16 * 23 + 3; // twice round the ring
  const Subject s = subject(o, "fused c=16 vt=128 pw=7 sw=8 st=10");
  CHECK(fault_of(s) == "no fault");
  // One that only the compiler heeds, and two that bring lanes together behind a wait.
  CHECK(not_missed(s, "sync_warp()") ==
        Calls{"fused_forward/prepare.cuh 1", "fused_forward/prepare.cuh 7", "fused_forward/state.cuh 2"});
  // A parity that would be that of another round only on a card.
  CHECK(not_missed(s, "mbarrier_wait(") == Calls{"fused_forward/prepare.cuh 1"});
  // The first two leave NaN in registers, which is no race.
  CHECK(not_missed(s, "wgmma_wait<") == Calls{"fused_forward/state.cuh 1", "fused_forward/state.cuh 2"});
  CHECK_THAT(fault_with(s, "fused_forward/prepare.cuh", "    fence_proxy_async();\n", ""),
             Contains("proxy: "));
  CHECK_THAT(fault_with(s, "fused_forward/ring.cuh", "  sync_block();\n}", "}"), Contains("race: "));
  CHECK_THAT(fault_with(s, "fused_forward/load.cuh", "r + row < rows", "true"),
             Contains("out of bounds") || Contains("wrong: "));
}

TEST_CASE("planted: each barrier of the schedule is missed when it is away") {
  test::CaseOptions o;
  o.problem.varlen = true;
  o.problem.key_dim = o.problem.value_dim = 16;
  o.lengths.assign(300, 1);
  CHECK(not_missed(subject(o, "chunk c=16 vt=16 pw=4 sw=4 st=2"), "sync_block()", true) == kNone);
}

TEST_CASE("planted: each barrier of the token backward is missed when it is away") {
  const Subject s = subject(Operation::backward, "token c=16 sw=4 r=4");
  CHECK(not_missed(s, "sync_block()") == kNone);
  CHECK(not_missed(s, "sync_warp()") == kNone);
}

TEST_CASE("planted: rows behind a tail are read") {
  CHECK_THAT(
      fault_with(chunk_forward(), "stages/chunk_load.cuh", "row < span.rows && column < dim", "column < dim"),
      Contains("out of bounds: a read of byte") && Contains("chunk_load.cuh:"));
}

TEST_CASE("planted: rows behind a tail are written") {
  Subject s = chunk_forward();
  std::string& text = text_of(s.unit, "stages/tile.cuh");
  REQUIRE(text.find("r < rows && ") != std::string::npos);
  for (std::size_t at = 0; (at = text.find("r < rows && ", at)) != std::string::npos;)
    text.erase(at, 12);
  CHECK_THAT(fault_of(s), Contains("out of bounds: a write of byte"));
}

TEST_CASE("planted: shared memory that nobody wrote is read") {
  CHECK_THAT(fault_with(chunk_forward(), "chunk/prepare.cuh",
                        "load_beta<kPrepareChunks, kPrepareThreads>(args, spans, head, "
                        "shared_at<float>(PrepareShared::beta));",
                        ""),
             Contains("uninitialised: thread") && Contains("of shared memory"));
}

TEST_CASE("planted: a stage is loaded while it is read") {
  CHECK_THAT(fault_with(chunk_forward(), "chunk_forward/scan.cuh", "load(chunk + Config::stages - 1);",
                        "load(chunk + Config::stages);"),
             Contains("race: ") && Contains("copy_async"));
}

TEST_CASE("planted: a swizzle that its writer does not use") {
  CHECK_THAT(
      fault_with(chunk_forward(), "stages/tile.cuh",
                 "load_matrix_x4(a, x + SwizzledTile<columns>::place(row + (lane & 15), column + (lane >> "
                 "4) * 8));",
                 "load_matrix_x4(a, x + (row + (lane & 15)) * columns + column + (lane >> 4) * 8);"),
      Contains("wrong: o is off"));
}

TEST_CASE("planted: two blocks write the same record") {
  CHECK_THAT(fault_with(chunk_forward(), "chunk/record.cuh", "(chunk * args.value_heads + head)",
                        "(chunk * args.value_heads)"),
             Contains("race: a write of byte") && Contains("another block of this launch"));
}

TEST_CASE("planted: a barrier that one warp does not reach") {
  Subject s = chunk_forward();
  s.backend = emulator::make_backend().value(); // a checked run names the race that comes first
  CHECK_THAT(fault_with(s, "chunk_forward/scan.cuh", "sync_block(); // this",
                        "if (warp_index() != 1) sync_block(); // this"),
             Contains("not every thread of block") && Contains("waits in sync_block at scan.cuh:") &&
                 Contains("warp 1 lanes ffffffff has ended"));
}

TEST_CASE("planted: lanes of a warp part before a shuffle") {
  CHECK_THAT(fault_with(chunk_forward(), "stages/solve.cuh",
                        "  sync_warp();\n  if (lane_index() < kTileRows) {",
                        "  if (lane_index() < kTileRows) {\n  sync_warp();"),
             Contains("not every thread") || Contains("diverge"));
}
