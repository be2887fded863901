#include "run_case.h"
#include "kda/case_io.h"
#include "marshal.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>
#include <functional>
#include <map>

namespace kda::test {
namespace {

using Bytes = std::vector<std::byte>;
using Shape = std::array<std::int64_t, 4>;

/// A tensor [n0, n1, n2, n3] in a buffer of its own; gaps hold 0xFF.
struct Buffer {
  std::string name;
  DType dtype = DType::fp32;
  Shape shape{1, 1, 1, 1}, stride{0, 0, 0, 1};
  void* data = nullptr;
  Bytes before{}; ///< what it held before the call

  [[nodiscard]] std::int64_t elements() const { return shape[0] * shape[1] * shape[2] * shape[3]; }
  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(size_of(dtype)); }
  [[nodiscard]] std::size_t offset(std::int64_t i) const {
    std::int64_t at = 0;
    for (std::size_t axis = 4; axis-- > 0; i /= shape[axis])
      at += i % shape[axis] * stride[axis];
    return static_cast<std::size_t>(at) * size();
  }
  [[nodiscard]] Bytes storage() const {
    return Bytes(elements() == 0 ? 0 : static_cast<std::size_t>(shape[0] * stride[0]) * size(),
                 std::byte{0xFF});
  }
};

/// Strides whose gaps keep rows 16-byte aligned.
void set_strides(Buffer& b, std::int64_t gap) {
  b.stride[2] = b.shape[3] + gap;
  b.stride[1] = b.shape[2] * b.stride[2] + gap;
  b.stride[0] = b.shape[1] * b.stride[1] + 2 * gap;
}

reference::Array transposed_state(const Problem& p, const reference::Array& x, bool to_v_k) {
  return to_v_k ? transposed(x, p.key_dim, p.value_dim) : transposed(x, p.value_dim, p.key_dim);
}

/// "[n0,n1,n2,n3]" of element i.
std::string coordinates(std::int64_t i, const Shape& shape) {
  Shape at{};
  for (std::size_t axis = 4; axis-- > 0; i /= shape[axis])
    at[axis] = i % shape[axis];
  return fmt::format("[{}]", fmt::join(at, ","));
}

/// The buffers and arguments of one call.
class Call {
public:
  Call(const Backend& backend, const TestCase& c, RunOptions options)
      : backend_(backend), case_(c), p_(c.inputs.problem), s_(c.inputs.sizes), options_(options) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (const Buffer& b : inputs_)
      backend_.release(b.data);
    for (const auto& [name, b] : outputs_)
      backend_.release(b.data);
    for (void* data : workspace_)
      backend_.release(data);
  }

  Status prepare(const Variant& variant) {
    scalars();
    Status ok = forward_inputs();
    if (ok) ok = parameters();
    if (ok) ok = gradient_inputs();
    if (ok) ok = tables();
    for (const Expected& e : case_.expected)
      if (ok) ok = output(e);
    if (ok) ok = workspace(variant);
    return ok;
  }

  [[nodiscard]] const KernelArgs& args() const { return args_; }
  void set(const Slabs& slabs) { set_slabs(slabs, args_); }

  [[nodiscard]] Status check_inputs() const {
    for (const Buffer& b : inputs_) {
      Bytes now(b.before.size());
      if (Status ok = backend_.copy_from_device(now.data(), b.data, now.size()); !ok) return ok;
      if (now != b.before)
        return fail(ErrorCode::device_error, fmt::format("the input {} was written", b.name));
    }
    return {};
  }

  [[nodiscard]] Result<TensorReport> compare(const Expected& e) const {
    const Buffer& b = outputs_.at(e.name);
    Bytes now(b.before.size());
    if (Status ok = backend_.copy_from_device(now.data(), b.data, now.size()); !ok)
      return tl::unexpected(ok.error());
    Bytes dense(static_cast<std::size_t>(b.elements()) * b.size());
    for (std::int64_t i = 0; i < b.elements(); ++i) {
      auto* const from = now.data() + b.offset(i);
      std::copy_n(from, b.size(), dense.data() + static_cast<std::size_t>(i) * b.size());
      std::fill_n(from, b.size(), std::byte{0xFF});
    }
    if (now != b.before)
      return fail(ErrorCode::device_error, fmt::format("a gap between the rows of {} was written", e.name));
    reference::Array x = unpack(dense, file_dtype(b.dtype));
    if (is_state(e.name) && p_.state_layout == StateLayout::v_k) x = transposed_state(p_, x, false);
    const Shape state{s_.sequences, p_.value_heads, p_.key_dim, p_.value_dim};
    return report(e, is_state(e.name) ? state : b.shape, x);
  }
  [[nodiscard]] bool writes(const std::string& name) const { return outputs_.count(name) != 0; }

private:
  static bool is_state(const std::string& name) { return name.find("state") != std::string::npos; }

  void scalars() {
    args_.tokens = s_.tokens;
    args_.batch = static_cast<int>(s_.batch);
    args_.sequences = static_cast<int>(s_.sequences);
    args_.heads = p_.heads;
    args_.value_heads = p_.value_heads;
    args_.head_reciprocal = head_reciprocal(p_.value_heads);
    const double scale = case_.inputs.scale;
    args_.scale = static_cast<float>(scale == 0 ? 1 / std::sqrt(static_cast<double>(p_.key_dim)) : scale);
    args_.lower_bound = static_cast<float>(case_.inputs.lower_bound);
  }

  Result<void*> put(const Bytes& bytes) {
    auto data = backend_.allocate(bytes.size());
    if (!data) return data;
    if (Status ok = backend_.copy_to_device(*data, bytes.data(), bytes.size()); !ok)
      return tl::unexpected(ok.error());
    return data;
  }
  Status upload(Buffer& b, const reference::Array* values) {
    b.before = b.storage();
    if (values != nullptr) {
      const Bytes dense = pack(*values, b.dtype);
      for (std::int64_t i = 0; i < b.elements(); ++i)
        std::copy_n(dense.data() + static_cast<std::size_t>(i) * b.size(), b.size(),
                    b.before.data() + b.offset(i));
    }
    const auto data = put(b.before);
    if (!data) return tl::unexpected(data.error());
    b.data = *data;
    return {};
  }
  Status keep(Buffer b, const reference::Array* values) {
    if (Status ok = upload(b, values); !ok) return ok;
    if (values != nullptr)
      inputs_.push_back(std::move(b));
    else
      outputs_.emplace(b.name, std::move(b));
    return {};
  }

  // Each of these places one tensor; `values` null: an output.
  Status token(std::string name, TokenTensor& arg, DType dtype, std::int64_t heads, std::int64_t dim,
               const reference::Array* values) {
    Buffer b{std::move(name), dtype, {s_.batch, s_.tokens, heads, dim}};
    set_strides(b, options_.strided ? 16 / size_of(dtype) : 0);
    return place(std::move(b), arg, values);
  }
  Status beta(std::string name, TokenTensor& arg, const reference::Array* values) {
    Buffer b{std::move(name), p_.beta_dtype, {s_.batch, s_.tokens, p_.value_heads, 1}};
    set_strides(b, options_.strided ? 1 : 0);
    return place(std::move(b), arg, values);
  }
  Status place(Buffer b, TokenTensor& arg, const reference::Array* values) {
    const Shape stride = b.stride;
    const std::string name = b.name;
    if (Status ok = keep(std::move(b), values); !ok) return ok;
    arg = {data_of(name, values), stride[0], stride[1], stride[2]};
    return {};
  }
  Status state(const std::string& name, StateTensor& arg, const reference::Array* values) {
    return state(name, arg, values, s_.sequences);
  }
  Status state(const std::string& name, StateTensor& arg, const reference::Array* values,
               std::int64_t count) {
    const bool v_k = p_.state_layout == StateLayout::v_k;
    Buffer b{name, p_.state_dtype, {1, count, p_.value_heads, p_.key_dim * p_.value_dim}};
    set_strides(b, options_.strided ? 16 / size_of(p_.state_dtype) : 0);
    const Shape stride = b.stride;
    reference::Array turned;
    if (values != nullptr && v_k) turned = transposed_state(p_, *values, true);
    if (Status ok = keep(std::move(b), values != nullptr && v_k ? &turned : values); !ok) return ok;
    arg = {data_of(name, values), stride[1], stride[2]};
    return {};
  }
  template <class T>
  Status flat(const std::string& name, T*& arg, std::int64_t count, const reference::Array* values) {
    Buffer b{name, DType::fp32, {1, 1, 1, count}};
    set_strides(b, 0);
    if (Status ok = keep(std::move(b), values); !ok) return ok;
    arg = static_cast<T*>(data_of(name, values));
    return {};
  }
  [[nodiscard]] void* data_of(const std::string& name, const reference::Array* values) const {
    return values != nullptr ? inputs_.back().data : outputs_.at(name).data;
  }

  Status forward_inputs() {
    const reference::Inputs& in = case_.inputs;
    if (Status ok = token("g", args_.g, p_.gate_dtype, p_.value_heads, p_.key_dim, &in.g); !ok) return ok;
    if (p_.operation == Operation::gate || p_.operation == Operation::gate_backward) return {};
    if (Status ok = token("q", args_.q, p_.dtype, p_.heads, p_.key_dim, &in.q); !ok) return ok;
    if (Status ok = token("k", args_.k, p_.dtype, p_.heads, p_.key_dim, &in.k); !ok) return ok;
    if (Status ok = token("v", args_.v, p_.dtype, p_.value_heads, p_.value_dim, &in.v); !ok) return ok;
    if (Status ok = beta("beta", args_.beta, &in.beta); !ok) return ok;
    if (in.initial_state.empty()) return {};
    return state("initial_state", args_.initial_state, &in.initial_state);
  }
  Status parameters() {
    const reference::Inputs& in = case_.inputs;
    if (!in.A_log.empty())
      if (Status ok = flat("A_log", args_.A_log, p_.value_heads, &in.A_log); !ok) return ok;
    if (!in.dt_bias.empty())
      if (Status ok = flat("dt_bias", args_.dt_bias, p_.value_heads * p_.key_dim, &in.dt_bias); !ok)
        return ok;
    if (!p_.varlen) return {};
    Buffer b;
    b.name = "cu_seqlens";
    for (const std::int64_t x : in.cu_seqlens) {
      const auto narrow = static_cast<std::int32_t>(x);
      const auto* bytes = p_.cu_seqlens_type == IndexType::int32 ? reinterpret_cast<const std::byte*>(&narrow)
                                                                 : reinterpret_cast<const std::byte*>(&x);
      b.before.insert(b.before.end(), bytes, bytes + (p_.cu_seqlens_type == IndexType::int32 ? 4 : 8));
    }
    const auto data = put(b.before);
    if (!data) return tl::unexpected(data.error());
    args_.cu_seqlens = b.data = *data;
    inputs_.push_back(std::move(b));
    return {};
  }
  Status gradient_inputs() {
    const reference::OutputGradients& g = case_.gradients;
    if (p_.operation == Operation::gate_backward)
      return token("d_o", args_.d_o, DType::fp32, p_.value_heads, p_.key_dim, &case_.d_gate);
    if (p_.operation != Operation::backward) return {};
    if (Status ok = token("d_o", args_.d_o, p_.dtype, p_.value_heads, p_.value_dim, &g.d_o); !ok) return ok;
    if (p_.saved_interval != 0)
      if (Status ok = state("interior_states", args_.interior_states, &case_.saved, case_.interior_states);
          !ok)
        return ok;
    if (g.d_final_state.empty()) return {};
    return state("d_final_state", args_.d_final_state, &g.d_final_state);
  }
  Status table(NumberTable& arg, const std::vector<std::int64_t>& numbers, std::int64_t columns) {
    if (numbers.empty()) return {};
    Buffer b;
    b.name = "a table";
    for (const std::int64_t x : numbers) {
      const auto narrow = static_cast<std::int32_t>(x);
      const auto* bytes = reinterpret_cast<const std::byte*>(&narrow);
      b.before.insert(b.before.end(), bytes, bytes + sizeof narrow);
    }
    const auto data = put(b.before);
    if (!data) return tl::unexpected(data.error());
    b.data = *data;
    arg = {b.data, columns, 1, static_cast<int>(columns), 0};
    inputs_.push_back(std::move(b));
    return {};
  }
  Status tables() {
    args_.interior_interval = static_cast<int>(case_.interior_interval);
    args_.interior_pool = case_.interior_states;
    const std::int64_t columns =
        static_cast<std::int64_t>(case_.interior_slots.size()) / std::max<std::int64_t>(s_.sequences, 1);
    if (Status ok = table(args_.interior_slots, case_.interior_slots, columns); !ok) return ok;
    return table(args_.has_initial_state, case_.has_initial_state, 1);
  }

  Status output(const Expected& e) {
    const bool gate = p_.operation == Operation::gate;
    const std::int64_t hv = p_.value_heads, h = p_.heads, k = p_.key_dim, v = p_.value_dim;
    if (e.name == "o") return token("o", args_.o, gate ? DType::fp32 : p_.dtype, hv, gate ? k : v, nullptr);
    if (e.name == "d_q") return token("d_q", args_.d_q, p_.dtype, h, k, nullptr);
    if (e.name == "d_k") return token("d_k", args_.d_k, p_.dtype, h, k, nullptr);
    if (e.name == "d_v") return token("d_v", args_.d_v, p_.dtype, hv, v, nullptr);
    if (e.name == "d_g") return token("d_g", args_.d_g, p_.gate_dtype, hv, k, nullptr);
    if (e.name == "d_beta") return beta("d_beta", args_.d_beta, nullptr);
    if (!options_.optional_outputs) return {};
    if (e.name == "final_state") return state(e.name, args_.final_state, nullptr);
    if (e.name == "interior_states")
      return state(e.name, args_.interior_states, nullptr, case_.interior_states);
    if (e.name == "d_initial_state") return state(e.name, args_.d_initial_state, nullptr);
    if (e.name == "d_A_log") return flat(e.name, args_.d_A_log, hv, nullptr);
    return flat(e.name, args_.d_dt_bias, hv * k, nullptr);
  }

  Status workspace(const Variant& variant) {
    const WorkspaceLayout layout = workspace_layout(p_, variant, s_);
    for (int i = 0; i < layout.count; ++i) {
      const auto slot = static_cast<std::size_t>(i);
      const std::size_t end = i + 1 < layout.count ? layout.offset[slot + 1] : layout.bytes;
      const auto data = put(Bytes(end - layout.offset[slot], std::byte{0xFF}));
      if (!data) return tl::unexpected(data.error());
      workspace_.push_back(args_.workspace[i] = *data);
    }
    return {};
  }

  static TensorReport report(const Expected& e, const Shape& shape, const reference::Array& x) {
    TensorReport r;
    r.name = e.name;
    r.error = reference::relative_error(x, e.values);
    bool found = false;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const bool finite = std::isfinite(x[i]);
      if (!finite) ++r.not_finite;
      const double difference =
          finite ? std::abs(x[i] - e.values[i]) : std::numeric_limits<double>::infinity();
      if (found && difference <= r.largest) continue;
      found = true;
      r.largest = difference;
      r.place = fmt::format("{} is {:.6g}, expected {:.6g}", coordinates(static_cast<std::int64_t>(i), shape),
                            x[i], e.values[i]);
    }
    r.values = x;
    return r;
  }

  const Backend& backend_;
  const TestCase& case_;
  const Problem& p_;
  const Sizes& s_;
  RunOptions options_;
  KernelArgs args_{};
  std::vector<Buffer> inputs_;
  std::map<std::string, Buffer> outputs_;
  std::vector<void*> workspace_;
};

} // namespace

Result<RunReport> run_case(const Backend& backend, const TestCase& c, const Variant& variant,
                           RunOptions options) {
  const auto unit = emit(c.inputs.problem, variant, backend.target());
  if (!unit) return tl::unexpected(unit.error());
  return run_unit(backend, *unit, c, variant, options);
}

Result<RunReport> run_unit(const Backend& backend, const SourceUnit& unit, const TestCase& c,
                           const Variant& variant, RunOptions options) {
  const auto image = backend.compile(unit);
  if (!image) return tl::unexpected(image.error());
  return run_image(backend, unit, *image, c, variant, options);
}

Result<RunReport> run_image(const Backend& backend, const SourceUnit& unit, const Image& image,
                            const TestCase& c, const Variant& variant, RunOptions options) {
  const Problem& p = c.inputs.problem;
  const auto module = backend.load(unit, image);
  if (!module) return tl::unexpected(module.error());

  Call call(backend, c, options);
  if (Status ok = call.prepare(variant); !ok) return tl::unexpected(ok.error());
  const LaunchList list = launches(p, variant, backend.target(), c.inputs.sizes);
  call.set(list.slabs);
  RunReport report;
  report.launches = list.count;
  const auto work = [&](void* stream) -> Status {
    for (int i = 0; i < list.count; ++i)
      if (Status ok = (*module)->launch(list.items[static_cast<std::size_t>(i)], call.args(), stream); !ok)
        return ok;
    return {};
  };
  const auto time = backend.time_us(work, Replay::eager); // waits for it
  if (!time) return tl::unexpected(time.error());
  report.milliseconds = *time / 1000;
  if (Status ok = call.check_inputs(); !ok) return tl::unexpected(ok.error());
  for (const Expected& e : c.expected) {
    if (!call.writes(e.name)) continue;
    auto tensor = call.compare(e);
    if (!tensor) return tl::unexpected(tensor.error());
    report.tensors.push_back(std::move(*tensor));
  }
  return report;
}

double tolerance(const Problem& p, const Variant& v, const std::string& name) {
  const bool small =
      name == "d_A_log" || name == "d_dt_bias" || (name == "o" && p.operation == Operation::gate);
  DType type = small ? DType::fp32 : p.dtype;
  if (name == "d_g") type = p.gate_dtype;
  if (name == "d_beta") type = p.beta_dtype;
  if (name.find("state") != std::string::npos) type = p.state_dtype;
  // fp32 arithmetic, and one rounding of the output.
  if (!is_chunked(v.algorithm)) return type == DType::fp32 ? 2e-5 : type == DType::fp16 ? 4e-4 : 2.5e-3;
  // fp16 operands, and one rounding of the output.
  if (v.algorithm == Algorithm::fused) return type == DType::bf16 ? 2.5e-3 : 1e-3;
  if (name == "o") return 5e-3;
  if (name == "final_state" || name == "interior_states") return 4e-3;
  return name == "d_g" || name == "d_A_log" || name == "d_beta" ? 2e-2 : 1e-2;
}

std::string to_string(const RunReport& report) {
  std::string text =
      fmt::format("{:<16}{:>12}{:>12}{:>14}  where\n", "tensor", "error", "not finite", "largest");
  for (const TensorReport& t : report.tensors)
    text += fmt::format("{:<16}{:>12.3e}{:>12}{:>14.3e}  {}\n", t.name, t.error, t.not_finite, t.largest,
                        t.place);
  return text;
}

} // namespace kda::test
