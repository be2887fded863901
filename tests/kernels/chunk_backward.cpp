// chunk_backward.cu on the emulator against the float64 adjoint.
#include "emulator.h"
#include "kda/case_io.h"
#include "option_matrix.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
#include <catch2/catch.hpp>
#include <set>

using namespace kda;

namespace {

Variant variant(const std::string& text) {
  return parse_variant(text).value();
}

void check_case(const test::TestCase& c, const Variant& v, test::RunOptions run = {},
                std::uint64_t thread_order = 0) {
  const Problem& p = c.inputs.problem;
  CAPTURE(to_string(p), to_string(v), run.strided, run.optional_outputs);
  emulator::Options order;
  order.seed = thread_order;
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  const auto report = test::run_case(**backend, c, v, run);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  CHECK(report->tensors.size() >= 5);
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= test::tolerance(p, v, t.name));
  }
}

test::CaseOptions backward_case(int key_dim, int value_dim, std::int64_t tokens, test::Regime regime) {
  test::CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::backward;
  p.key_dim = key_dim;
  p.value_dim = value_dim;
  p.gate = regime == test::Regime::unbounded ? GateKind::softplus : GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  o.tokens = tokens;
  o.regime = regime;
  return o;
}

constexpr std::array<std::array<int, 2>, 4> kDims{{{64, 64}, {60, 100}, {48, 32}, {96, 60}}};
constexpr std::array kTypes{DType::bf16, DType::fp16};
constexpr std::array kAllTypes{DType::fp32, DType::bf16, DType::fp16};
constexpr std::array kVariants{"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=3",
                               "chunk c=16 vt=16 pw=4 sw=8 st=2", "chunk c=32 vt=16 pw=4 sw=4 st=2"};
enum Shape { fixed, packed_int32, packed_int64, shapes };

void set_shape(test::CaseOptions& o, Shape shape) {
  o.batch = 2;
  o.tokens = 83; // neither a whole number of tiles nor of chunks
  if (shape == fixed) return;
  o.batch = 1;
  o.problem.varlen = true;
  o.problem.cu_seqlens_type = shape == packed_int32 ? IndexType::int32 : IndexType::int64;
  o.lengths = {0, 64, 1, 0, 0, 71, 17};
  o.padding = shape == packed_int32 ? 7 : 0;
}

} // namespace

TEST_CASE("chunk backward: every two options together") {
  const std::vector<int> sizes{4, 2, 3, 3, 3, 2, 5, 2, 3, 2, 3, shapes, 2, 2, 2, 4, 4};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    p.key_dim = kDims[at(0)][0];
    p.value_dim = kDims[at(0)][1];
    p.dtype = kTypes[at(1)];
    p.gate_dtype = kAllTypes[at(2)];
    p.beta_dtype = kAllTypes[at(3)];
    p.state_dtype = kAllTypes[at(4)];
    test::set_flags(o, row);
    set_shape(o, static_cast<Shape>(row[11]));
    o.seed = index + 1;
    check_case(test::random_case(o), variant(kVariants[at(16)]), test::run_of(row), index % 4);
    ++index;
  }
}

TEST_CASE("chunk backward: every regime at K = V = 128, in several orders of threads") {
  for (const test::Regime regime : {test::Regime::fast, test::Regime::slow, test::Regime::unbounded})
    for (const std::uint64_t order : {0, 2}) {
      check_case(test::random_case(backward_case(128, 128, 150, regime)),
                 variant("chunk c=64 vt=64 pw=8 sw=4 st=2"), {}, order);
      check_case(test::random_case(backward_case(128, 128, 70, regime)),
                 variant("chunk c=32 vt=64 pw=8 sw=8 st=2"), {}, order);
    }
}

TEST_CASE("chunk backward: golden cases") {
  std::set<std::filesystem::path> files;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(KDA_JIT_GOLDEN_DIR, missing))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path());
  if (files.empty()) {
    WARN("SKIPPED: no golden files in " KDA_JIT_GOLDEN_DIR "; set the CMake variable KDA_JIT_GOLDEN_DIR");
    return;
  }
  for (const auto& path : files) {
    const Case golden = read_case(path).value();
    test::TestCase c;
    c.inputs = reference_inputs(golden);
    c.gradients = reference_output_gradients(golden);
    Problem& p = c.inputs.problem;
    p.operation = Operation::backward;
    p.dtype = p.gate_dtype = p.beta_dtype = DType::bf16; // which hold the inputs exactly
    for (const auto& [ours, theirs] : {std::pair{"d_q", "dq"},
                                       {"d_k", "dk"},
                                       {"d_v", "dv"},
                                       {"d_g", "dg"},
                                       {"d_beta", "dbeta"},
                                       {"d_initial_state", "dinitial_state"},
                                       {"d_A_log", "dA_log"},
                                       {"d_dt_bias", "ddt_bias"}})
      if (std::vector<double> x = values(golden, theirs); !x.empty())
        c.expected.push_back({ours, std::move(x)});
    for (const char* text : {"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=2"}) {
      INFO(golden.name);
      for (const Candidate& candidate : enumerate(p, cuda_target("sm_90a").value()))
        if (candidate.variant == variant(text) && candidate.rejected.empty()) check_case(c, variant(text));
    }
  }
}
