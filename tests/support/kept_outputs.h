#pragma once
// Outputs of some kernels on the emulator, kept in files so that a machine with a card and without a host
// compiler can compare its own with them: test_kernels writes, test_gpu reads.
#include "run_case.h"
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace kda::test {

struct KeptCase {
  std::string name;
  TestCase test_case;
  Variant variant;
};

inline std::vector<KeptCase> kept_cases() {
  std::vector<KeptCase> all;
  const auto add = [&](Operation operation, DType dtype, const char* variant) {
    CaseOptions o;
    o.problem.operation = operation;
    o.problem.heads = o.problem.value_heads = 2;
    o.problem.gate = GateKind::bounded;
    o.problem.dtype = dtype;
    o.problem.dt_bias = o.problem.beta_sigmoid = o.problem.qk_l2norm = true;
    all.push_back({to_string(operation), random_case(o), parse_variant(variant).value()});
  };
  add(Operation::recurrent, DType::fp32, "token sw=1 r=4 st=4");
  add(Operation::forward, DType::bf16, "chunk c=64 vt=64 pw=4 sw=4 st=2");
  add(Operation::backward, DType::bf16, "chunk c=32 vt=64 pw=8 sw=4 st=2");
  add(Operation::gate, DType::bf16, "gate sw=4 r=8");
  return all;
}

/// In the folder KDA_EMULATOR_OUTPUTS of the environment, or of the build.
inline std::filesystem::path kept_file(const std::string& name, const std::string& tensor) {
  const char* const folder = std::getenv("KDA_EMULATOR_OUTPUTS");
  return std::filesystem::path(folder != nullptr ? folder : KDA_EMULATOR_OUTPUTS) /
         (name + "-" + tensor + ".f64");
}
inline void keep(const std::filesystem::path& path, const reference::Array& values) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(double)));
}
/// Empty where there is none.
inline reference::Array kept(const std::filesystem::path& path) {
  std::error_code missing;
  const auto bytes = std::filesystem::file_size(path, missing);
  if (missing) return {};
  reference::Array values(bytes / sizeof(double));
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(bytes));
  return values;
}

} // namespace kda::test
