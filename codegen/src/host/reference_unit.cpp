#include "codegen/reference_unit.h"
#include <charconv>
#include <fmt/format.h>

namespace kda {
namespace {

/// Calls `visit(name, field)` for every field of a problem.
template <class P, class Visit>
void each_field(P& p, const Visit& visit) {
  visit("operation", p.operation);
  visit("heads", p.heads);
  visit("value_heads", p.value_heads);
  visit("key_dim", p.key_dim);
  visit("value_dim", p.value_dim);
  visit("dtype", p.dtype);
  visit("gate_dtype", p.gate_dtype);
  visit("beta_dtype", p.beta_dtype);
  visit("state_dtype", p.state_dtype);
  visit("state_layout", p.state_layout);
  visit("gate", p.gate);
  visit("dt_bias", p.dt_bias);
  visit("beta_sigmoid", p.beta_sigmoid);
  visit("beta_times_two", p.beta_times_two);
  visit("qk_l2norm", p.qk_l2norm);
  visit("varlen", p.varlen);
  visit("cu_seqlens_type", p.cu_seqlens_type);
}

} // namespace

SourceUnit reference_unit(const Problem& p) {
  SourceUnit unit;
  unit.name = "reference";
  unit.entries = {"float64 reference"};
  each_field(p, [&](const char* name, auto field) {
    unit.options.push_back(fmt::format("{}={}", name, static_cast<int>(field)));
  });
  return unit;
}

std::optional<Problem> reference_problem(const SourceUnit& unit) {
  if (!unit.main.empty() || unit.name != "reference") return std::nullopt;
  Problem p;
  std::size_t next = 0;
  bool good = true;
  each_field(p, [&](const char* name, auto& field) {
    const std::string prefix = fmt::format("{}=", name);
    const std::string option = next < unit.options.size() ? unit.options[next] : std::string();
    ++next;
    int value = 0;
    const char* const end = option.data() + option.size();
    good = good && option.compare(0, prefix.size(), prefix) == 0 &&
           std::from_chars(option.data() + prefix.size(), end, value).ptr == end;
    field = static_cast<std::remove_reference_t<decltype(field)>>(value);
  });
  if (!good || !validate(p)) return std::nullopt;
  return p;
}

} // namespace kda
