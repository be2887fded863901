// The host against the golden vectors: fp32 arithmetic forward, the float64 reference backward.
#include "host_backend.h"
#include "kda/case_io.h"
#include "run_case.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

using namespace kda;

namespace {

std::set<std::filesystem::path> golden_files() {
  std::set<std::filesystem::path> files;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(KDA_JIT_GOLDEN_DIR, missing))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path());
  return files;
}

/// The case with fp32 tensors, so that no rounding of an output hides an error.
test::TestCase golden_case(const Case& c, Operation operation) {
  test::TestCase out;
  out.inputs = reference_inputs(c);
  Problem& p = out.inputs.problem;
  p.operation = operation;
  p.dtype = p.gate_dtype = p.beta_dtype = p.state_dtype = DType::fp32;
  if (operation == Operation::forward) {
    out.expected = {{"o", values(c, "o")}, {"final_state", values(c, "final_state")}};
    return out;
  }
  out.gradients = reference_output_gradients(c);
  for (const auto& [name, in_file] : {std::pair{"d_q", "dq"},
                                      {"d_k", "dk"},
                                      {"d_v", "dv"},
                                      {"d_g", "dg"},
                                      {"d_beta", "dbeta"},
                                      {"d_A_log", "dA_log"},
                                      {"d_dt_bias", "ddt_bias"},
                                      {"d_initial_state", "dinitial_state"}})
    if (c.file.tensors.count(in_file) != 0) out.expected.push_back({name, values(c, in_file)});
  return out;
}

} // namespace

TEST_CASE("host: every golden case, forward in fp32 and every gradient, to 2e-5") {
  const auto files = golden_files();
  if (files.empty()) {
    WARN("SKIPPED: no golden files in " KDA_JIT_GOLDEN_DIR "; set the CMake variable KDA_JIT_GOLDEN_DIR");
    return;
  }
  const auto backend = make_host_backend(2).value();
  double worst = 0;
  for (const auto& path : files) {
    const auto file = read_case(path);
    REQUIRE(file.has_value());
    for (const Operation operation : {Operation::forward, Operation::backward}) {
      const test::TestCase c = golden_case(*file, operation);
      const Problem& p = c.inputs.problem;
      INFO(file->name << ": " << to_string(p));
      const Variant v = choose(p, backend->target(), c.inputs.sizes).value();
      const auto report = test::run_case(*backend, c, v);
      if (!report) FAIL(report.error().message << "\n" << report.error().context);
      CHECK(report->tensors.size() == c.expected.size());
      for (const test::TensorReport& t : report->tensors) {
        CAPTURE(t.name, t.place);
        CHECK(t.not_finite == 0);
        CHECK(t.error <= 2e-5);
        if (operation == Operation::forward) worst = std::max(worst, t.error);
      }
    }
  }
  INFO("largest forward error " << worst);
  CHECK(worst > 0); // nothing compared would be 0
}
