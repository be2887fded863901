#include "problem_options.h"
#include <fmt/format.h>
#include <fstream>
#include <nlohmann/json.hpp>

namespace kda::tools {
namespace {

/// A published model: KDA layers with H = HV heads of K = V = 128; bf16 tensors, raw gate with dt_bias, beta
/// logits, l2norm, fp32 state stored [V, K].
struct Model {
  const char* name;
  int heads;
  GateKind gate;
};
constexpr Model kModels[] = {{"kimi-linear-48b", 32, GateKind::softplus},
                             {"kimi-k3", 96, GateKind::bounded},
                             {"glm-5.3-flash", 64, GateKind::bounded},
                             {"ling-3.0-flash", 32, GateKind::bounded}};

Result<IndexType> parse_index_type(const std::string& text) {
  if (text == "int32") return IndexType::int32;
  if (text == "int64") return IndexType::int64;
  return fail(ErrorCode::invalid_argument,
              fmt::format("unknown cu_seqlens type '{}'; choose int32 or int64", text));
}

Status read_fields(const nlohmann::json& object, ProblemOptions& o) {
  for (const auto& [key, value] : object.items()) {
    if (key == "operation")
      o.operation = value.get<std::string>();
    else if (key == "dtype")
      o.dtype = value.get<std::string>();
    else if (key == "gate_dtype")
      o.gate_dtype = value.get<std::string>();
    else if (key == "beta_dtype")
      o.beta_dtype = value.get<std::string>();
    else if (key == "state_dtype")
      o.state_dtype = value.get<std::string>();
    else if (key == "state_layout")
      o.state_layout = value.get<std::string>();
    else if (key == "gate")
      o.gate = value.get<std::string>();
    else if (key == "cu_seqlens")
      o.cu_seqlens = value.get<std::string>();
    else if (key == "heads")
      o.heads = value.get<int>();
    else if (key == "value_heads")
      o.value_heads = value.get<int>();
    else if (key == "key_dim")
      o.key_dim = value.get<int>();
    else if (key == "value_dim")
      o.value_dim = value.get<int>();
    else if (key == "dt_bias")
      o.dt_bias = value.get<bool>();
    else if (key == "beta_sigmoid")
      o.beta_sigmoid = value.get<bool>();
    else if (key == "beta_times_two")
      o.beta_times_two = value.get<bool>();
    else if (key == "qk_l2norm")
      o.qk_l2norm = value.get<bool>();
    else if (key == "varlen")
      o.varlen = value.get<bool>();
    else if (key == "state_pool")
      o.state_pool = value.get<bool>();
    else if (key == "every_state")
      o.every_state = value.get<bool>();
    else if (key == "updates")
      o.updates = value.get<bool>();
    else if (key == "tree")
      o.tree = value.get<bool>();
    else if (key == "interior_states")
      o.interior_states = value.get<bool>();
    else if (key == "batch_invariant")
      o.batch_invariant = value.get<bool>();
    else if (key == "saved_interval")
      o.saved_interval = value.get<int>();
    else
      return fail(ErrorCode::invalid_argument, fmt::format("unknown key '{}' in a problem", key));
  }
  return {};
}

} // namespace

void ProblemOptions::add_to(CLI::App& app) {
  app.add_option("--operation", operation, "forward, backward, recurrent, gate, gate_backward or replay")
      ->capture_default_str();
  app.add_option("--heads", heads, "query/key heads H")->capture_default_str();
  app.add_option("--value-heads", value_heads, "value heads HV, a multiple of H (default: H)");
  app.add_option("--key-dim", key_dim, "K, a multiple of 4 from 16 to 256")->capture_default_str();
  app.add_option("--value-dim", value_dim, "V, a multiple of 4 from 16 to 256")->capture_default_str();
  app.add_option("--dtype", dtype, "q, k, v, o: bf16, fp16 or fp32")->capture_default_str();
  app.add_option("--gate-dtype", gate_dtype, "g (default: --dtype)");
  app.add_option("--beta-dtype", beta_dtype, "beta (default: --dtype)");
  app.add_option("--state-dtype", state_dtype, "states: fp32, bf16 or fp16")->capture_default_str();
  app.add_option("--state-layout", state_layout, "k_v or v_k")->capture_default_str();
  app.add_option("--gate", gate, "log_e, log2, softplus, bounded or bounded_no_a")->capture_default_str();
  app.add_option("--cu-seqlens", cu_seqlens, "int32 or int64")->capture_default_str();
  app.add_flag("--dt-bias", dt_bias, "add dt_bias to g before the activation");
  app.add_flag("--beta-sigmoid", beta_sigmoid, "beta holds logits");
  app.add_flag("--beta-times-two", beta_times_two, "2*sigmoid(beta)");
  app.add_flag("--qk-l2norm", qk_l2norm, "normalise q and k in the kernel");
  app.add_flag("--varlen", varlen, "packed sequences through cu_seqlens");
  app.add_flag("--state-pool", state_pool, "recurrent, replay: states lie in the slots of a pool");
  app.add_flag("--every-state", every_state, "recurrent with a pool: keep the state after every token");
  app.add_flag("--updates", updates, "recurrent: keep u, k and decay of every token, for replay");
  app.add_flag("--tree", tree, "recurrent with updates, replay: tokens continue from a parent");
  app.add_flag("--interior-states", interior_states, "forward: keep states within the sequences, too");
  app.add_flag("--batch-invariant", batch_invariant,
               "forward: one variant for all sizes, the same bits in any batch");
  app.add_option("--saved-interval", saved_interval,
                 "backward: tokens from one state that the forward saved to the next, a multiple of 64");
  app.add_option("--batch", batch, "B")->capture_default_str();
  app.add_option("--tokens", tokens, "T of a batch row, or all tokens when packed")->capture_default_str();
  app.add_option("--sequences", sequences, "N when packed (default: B)");
}

Result<Problem> ProblemOptions::problem() const {
  Problem p;
  const auto assign = [](auto parsed, auto& field) -> Status {
    if (!parsed) return tl::unexpected(parsed.error());
    field = *parsed;
    return {};
  };
  for (const Status& status :
       {assign(parse_operation(operation), p.operation), assign(parse_dtype(dtype), p.dtype),
        assign(parse_dtype(gate_dtype.empty() ? dtype : gate_dtype), p.gate_dtype),
        assign(parse_dtype(beta_dtype.empty() ? dtype : beta_dtype), p.beta_dtype),
        assign(parse_dtype(state_dtype), p.state_dtype),
        assign(parse_state_layout(state_layout), p.state_layout), assign(parse_gate(gate), p.gate),
        assign(parse_index_type(cu_seqlens), p.cu_seqlens_type)})
    if (!status) return tl::unexpected(status.error());
  p.heads = heads;
  p.value_heads = value_heads > 0 ? value_heads : heads;
  p.key_dim = key_dim;
  p.value_dim = value_dim;
  p.dt_bias = dt_bias;
  p.beta_sigmoid = beta_sigmoid;
  p.beta_times_two = beta_times_two;
  p.qk_l2norm = qk_l2norm;
  p.varlen = varlen;
  p.state_pool = state_pool;
  p.every_state = every_state;
  p.updates = updates;
  p.tree = tree;
  p.interior_states = interior_states;
  p.batch_invariant = batch_invariant;
  p.saved_interval = saved_interval;
  if (const Status ok = validate(p); !ok) return tl::unexpected(ok.error());
  return p;
}

Result<std::vector<Problem>> read_problems(const std::string& path) {
  std::ifstream file(path);
  if (!file) return fail(ErrorCode::invalid_argument, fmt::format("cannot open {}", path));
  std::vector<Problem> problems;
  try {
    for (const auto& object : nlohmann::json::parse(file)) {
      ProblemOptions options;
      if (const Status ok = read_fields(object, options); !ok)
        return fail(ErrorCode::invalid_argument, fmt::format("{}: {}", path, ok.error().message));
      auto problem = options.problem();
      if (!problem)
        return fail(ErrorCode::invalid_argument, fmt::format("{}: {}", path, problem.error().message));
      problems.push_back(*problem);
    }
  } catch (const nlohmann::json::exception& error) {
    return fail(ErrorCode::invalid_argument,
                fmt::format("{} is not an array of problems: {}", path, error.what()));
  }
  if (problems.empty()) return fail(ErrorCode::invalid_argument, fmt::format("{} holds no problem", path));
  return problems;
}

Result<std::vector<Problem>> model_problems(const std::string& name, int tensor_parallel) {
  const Model* model = nullptr;
  for (const Model& m : kModels)
    if (name == m.name) model = &m;
  if (model == nullptr)
    return fail(ErrorCode::invalid_argument,
                fmt::format("unknown model '{}'; choose one of {}", name, fmt::join(model_names(), ", ")));
  if (tensor_parallel < 1 || model->heads % tensor_parallel != 0)
    return fail(ErrorCode::invalid_argument,
                fmt::format("{} has {} heads, which {} ranks cannot share evenly; use 1, 2, 4 or 8", name,
                            model->heads, tensor_parallel));
  Problem p;
  p.heads = p.value_heads = model->heads / tensor_parallel;
  p.gate = model->gate;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  p.state_layout = StateLayout::v_k;
  std::vector<Problem> problems;
  // Prefill and training: packed and fixed batches. Decode: one token a row, also from a pool; drafts
  // verified by every policy, as chains and as trees, and replayed. validate() knows which flags go together.
  for (const Operation operation :
       {Operation::forward, Operation::recurrent, Operation::replay, Operation::backward})
    for (const auto& [varlen, index] :
         {std::pair{false, IndexType::int64}, {true, IndexType::int32}, {true, IndexType::int64}})
      for (unsigned flags = 0; flags < 16; ++flags) {
        p.operation = operation;
        p.varlen = varlen;
        p.cu_seqlens_type = index;
        p.state_pool = (flags & 1U) != 0;
        p.every_state = (flags & 2U) != 0;
        p.updates = (flags & 4U) != 0;
        p.tree = (flags & 8U) != 0;
        if (validate(p)) problems.push_back(p);
      }
  return problems;
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const Model& m : kModels)
    names.emplace_back(m.name);
  return names;
}

} // namespace kda::tools
