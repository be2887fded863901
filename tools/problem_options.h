#pragma once
// A problem from the command line, from a JSON file, or from a model's published shape.
#include "codegen/variant.h"
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace kda::tools {

/// The fields of Problem and Sizes as options of a sub-command.
struct ProblemOptions {
  std::string operation = "forward", dtype = "bf16", gate_dtype, beta_dtype, state_dtype = "fp32",
              state_layout = "v_k", gate = "bounded", cu_seqlens = "int64";
  int heads = 32, value_heads = 0, key_dim = 128, value_dim = 128, saved_interval = 0;
  bool dt_bias = false, beta_sigmoid = false, beta_times_two = false, qk_l2norm = false, varlen = false,
       state_pool = false, every_state = false, updates = false, tree = false, interior_states = false,
       batch_invariant = false;
  std::int64_t batch = 1, tokens = 8192, sequences = 0;

  void add_to(CLI::App& app);
  [[nodiscard]] Result<Problem> problem() const;
  [[nodiscard]] Sizes sizes() const { return {batch, tokens, sequences > 0 ? sequences : batch}; }
};

/// Problems of a JSON file: an array of objects whose keys are the long option names with underscores, e.g.
/// [{"operation": "forward", "heads": 32, "key_dim": 128, "gate": "bounded", "dt_bias": true}]. Unknown keys
/// are refused.
[[nodiscard]] Result<std::vector<Problem>> read_problems(const std::string& path);

/// Every problem that serving or training the model at this tensor-parallel degree asks for.
[[nodiscard]] Result<std::vector<Problem>> model_problems(const std::string& model, int tensor_parallel);
/// The models that model_problems knows.
[[nodiscard]] std::vector<std::string> model_names();

} // namespace kda::tools
