#include "codegen/problem.h"
#include <array>
#include <fmt/format.h>
#include <utility>

namespace kda {
namespace {

constexpr std::int64_t kMostInterval = 1 << 20;

template <class E, std::size_t n>
using Names = std::array<std::pair<E, const char*>, n>;

constexpr Names<Operation, 6> kOperations{{{Operation::forward, "forward"},
                                           {Operation::backward, "backward"},
                                           {Operation::recurrent, "recurrent"},
                                           {Operation::gate, "gate"},
                                           {Operation::gate_backward, "gate_backward"},
                                           {Operation::replay, "replay"}}};
constexpr Names<DType, 3> kDTypes{{{DType::bf16, "bf16"}, {DType::fp16, "fp16"}, {DType::fp32, "fp32"}}};
constexpr Names<IndexType, 2> kIndexTypes{{{IndexType::int32, "int32"}, {IndexType::int64, "int64"}}};
constexpr Names<StateLayout, 2> kLayouts{{{StateLayout::k_v, "k_v"}, {StateLayout::v_k, "v_k"}}};
constexpr Names<GateKind, 5> kGates{{{GateKind::log_e, "log_e"},
                                     {GateKind::log2, "log2"},
                                     {GateKind::softplus, "softplus"},
                                     {GateKind::bounded, "bounded"},
                                     {GateKind::bounded_no_a, "bounded_no_a"}}};

template <class E, std::size_t n>
const char* name_of(const Names<E, n>& names, E value) {
  for (const auto& [e, name] : names)
    if (e == value) return name;
  return "?";
}

template <class E, std::size_t n>
Result<E> parse(const Names<E, n>& names, std::string_view text, const char* what) {
  std::string all;
  for (const auto& [e, name] : names) {
    if (text == name) return e;
    all += all.empty() ? name : fmt::format(", {}", name);
  }
  return fail(ErrorCode::invalid_argument, fmt::format("unknown {} '{}'; choose one of {}", what, text, all));
}

/// Why states cannot lie so many tokens apart; empty when they can.
std::string interval_fault(std::int64_t interval) {
  if (interval >= 0 && interval <= kMostInterval && interval % 64 == 0) return {};
  return fmt::format("is {}; multiples of 64 up to 2^20 are supported, and 0 for no states: they lie between "
                     "chunks",
                     interval);
}

bool supported_dim(int dim) {
  return dim >= 16 && dim <= 256 && dim % 4 == 0;
}

} // namespace

const char* to_string(ErrorCode code) {
  constexpr Names<ErrorCode, 9> names{{{ErrorCode::invalid_argument, "invalid_argument"},
                                       {ErrorCode::not_prepared, "not_prepared"},
                                       {ErrorCode::compile_failed, "compile_failed"},
                                       {ErrorCode::load_failed, "load_failed"},
                                       {ErrorCode::device_error, "device_error"},
                                       {ErrorCode::unavailable, "unavailable"},
                                       {ErrorCode::out_of_memory, "out_of_memory"},
                                       {ErrorCode::io_error, "io_error"},
                                       {ErrorCode::internal, "internal"}}};
  return name_of(names, code);
}
const char* to_string(Operation x) {
  return name_of(kOperations, x);
}
const char* to_string(DType x) {
  return name_of(kDTypes, x);
}
const char* to_string(IndexType x) {
  return name_of(kIndexTypes, x);
}
const char* to_string(StateLayout x) {
  return name_of(kLayouts, x);
}
const char* to_string(GateKind x) {
  return name_of(kGates, x);
}
Result<Operation> parse_operation(std::string_view s) {
  return parse(kOperations, s, "operation");
}
Result<DType> parse_dtype(std::string_view s) {
  return parse(kDTypes, s, "dtype");
}
Result<GateKind> parse_gate(std::string_view s) {
  return parse(kGates, s, "gate");
}
Result<StateLayout> parse_state_layout(std::string_view s) {
  return parse(kLayouts, s, "state layout");
}

std::string to_string(const Problem& p) {
  std::string s = fmt::format("{} H={} HV={} K={} V={} {} gate={}/{} beta={}/{} state={}/{}",
                              to_string(p.operation), p.heads, p.value_heads, p.key_dim, p.value_dim,
                              to_string(p.dtype), to_string(p.gate), to_string(p.gate_dtype),
                              p.beta_times_two ? "sigmoid2" : (p.beta_sigmoid ? "sigmoid" : "raw"),
                              to_string(p.beta_dtype), to_string(p.state_dtype), to_string(p.state_layout));
  if (p.dt_bias) s += " dt_bias";
  if (p.qk_l2norm) s += " l2norm";
  if (p.varlen) s += fmt::format(" varlen/{}", to_string(p.cu_seqlens_type));
  if (p.state_pool) s += " pool";
  if (p.every_state) s += " every_state";
  if (p.updates) s += " updates";
  if (p.tree) s += " tree";
  if (p.interior_states) s += " interior_states";
  if (p.batch_invariant) s += " batch_invariant";
  if (p.saved_interval != 0) s += fmt::format(" saved={}", p.saved_interval);
  return s;
}

Status validate(const Problem& p) {
  const auto refuse = [](std::string why) {
    return Status(fail(ErrorCode::invalid_argument, std::move(why)));
  };
  if (p.heads < 1 || p.heads > 4096)
    return refuse(fmt::format("heads is {}; 1 to 4096 are supported", p.heads));
  if (p.value_heads < 1 || p.value_heads > 4096 || p.value_heads % p.heads != 0)
    return refuse(fmt::format(
        "value_heads is {} and heads is {}; value_heads must be a positive multiple of heads, at most 4096",
        p.value_heads, p.heads));
  if (!supported_dim(p.key_dim))
    return refuse(fmt::format("key_dim is {}; multiples of 4 from 16 to 256 are supported", p.key_dim));
  if (!supported_dim(p.value_dim))
    return refuse(fmt::format("value_dim is {}; multiples of 4 from 16 to 256 are supported", p.value_dim));
  if (p.dt_bias && (p.gate == GateKind::log_e || p.gate == GateKind::log2))
    return refuse(
        fmt::format("dt_bias goes with an activated gate (softplus, bounded, bounded_no_a), not with {}",
                    to_string(p.gate)));
  if (p.beta_times_two && !p.beta_sigmoid)
    return refuse(
        "beta_times_two doubles a sigmoid and needs beta_sigmoid; double an activated beta before the call");
  const bool recurrent = p.operation == Operation::recurrent, replay = p.operation == Operation::replay;
  if (p.state_pool && !recurrent && !replay)
    return refuse(
        fmt::format("a state pool goes with the operations recurrent and replay, not with {}; copy the "
                    "states out of the pool and back",
                    to_string(p.operation)));
  if (p.every_state && !(recurrent && p.state_pool))
    return refuse(
        "every_state goes with the operation recurrent and a state pool, whose slots take the states");
  if (p.updates && !recurrent) return refuse("updates are kept by the operation recurrent alone");
  if (p.tree && !replay && !p.updates)
    return refuse(
        "a tree goes with replay, and with recurrent where updates are kept: branches start from them");
  if (p.interior_states && p.operation != Operation::forward)
    return refuse(fmt::format("interior_states goes with the operation forward, not with {}; recurrent has "
                              "every_state",
                              to_string(p.operation)));
  if (p.batch_invariant && p.operation != Operation::forward)
    return refuse(
        fmt::format("batch_invariant goes with the operation forward, not with {}", to_string(p.operation)));
  if (p.saved_interval != 0 && p.operation != Operation::backward)
    return refuse(
        fmt::format("saved_interval says what a backward is given and goes with that operation, not "
                    "with {}",
                    to_string(p.operation)));
  if (const std::string why = interval_fault(p.saved_interval); !why.empty())
    return refuse("saved_interval " + why);
  return {};
}

Result<SavedStates> saved_states(const Problem& p, const Sizes& s, std::int64_t interval) {
  if (const std::string why = interval_fault(interval); !why.empty())
    return fail(ErrorCode::invalid_argument, "the interval of saved states " + why);
  if (s.batch < 0 || s.tokens < 0 || s.sequences < 0)
    return fail(ErrorCode::invalid_argument, "batch, tokens and sequences must not be negative");
  if (interval == 0) return SavedStates{};
  SavedStates saved;
  saved.interval = interval;
  saved.columns = s.tokens / interval;
  saved.slots = s.batch * saved.columns;
  const std::int64_t state = std::int64_t{p.value_heads} * p.key_dim * p.value_dim * size_of(p.state_dtype);
  saved.bytes = saved.slots * state + s.sequences * saved.columns * 4;
  return saved;
}

} // namespace kda
