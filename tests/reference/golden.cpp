// The reference against the golden vectors: outputs and gradients that automatic differentiation of another
// implementation produced. They are stored in fp32, so 1e-6 is the limit.
#include "kda/case_io.h"
#include <catch2/catch.hpp>
#include <set>

using namespace kda;

namespace {

std::vector<std::filesystem::path> golden_files() {
  std::set<std::filesystem::path> files;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(KDA_JIT_GOLDEN_DIR, missing))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path());
  return {files.begin(), files.end()};
}

} // namespace

TEST_CASE("recurrence, chunk form and adjoint reproduce every golden case") {
  const auto files = golden_files();
  if (files.empty()) {
    WARN("SKIPPED: no golden files in " KDA_JIT_GOLDEN_DIR "; set the CMake variable KDA_JIT_GOLDEN_DIR");
    return;
  }
  CHECK(files.size() == 16);
  for (const auto& path : files) {
    const auto c = read_case(path);
    REQUIRE(c.has_value());
    INFO(c->name << ": " << to_string(c->problem));
    const reference::Inputs in = reference_inputs(*c);
    const auto same = [&](const char* name, const reference::Array& got) {
      INFO(name);
      CHECK(reference::relative_error(got, values(*c, name)) < 1e-6);
    };
    const reference::Outputs out = reference::recurrence(in);
    same("o", out.o);
    same("final_state", out.final_state);
    for (const int chunk : {16, 64}) {
      const reference::Outputs chunked = reference::chunked(in, chunk);
      CHECK(reference::relative_error(chunked.o, out.o) < 1e-12);
      CHECK(reference::relative_error(chunked.final_state, out.final_state) < 1e-12);
    }
    const reference::Gradients gradients = reference::adjoint(in, reference_output_gradients(*c));
    same("dq", gradients.d_q);
    same("dk", gradients.d_k);
    same("dv", gradients.d_v);
    same("dg", gradients.d_g);
    same("dbeta", gradients.d_beta);
    same("dA_log", gradients.d_A_log);
    same("ddt_bias", gradients.d_dt_bias);
    if (!in.initial_state.empty()) same("dinitial_state", gradients.d_initial_state);
  }
}
