#include "call_tensors.h"
#include "kda/case_io.h"
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

namespace kda {
namespace {

/// Random values of a prime count: a large tensor repeats them, which costs no time to make and keeps rows
/// different.
constexpr std::int64_t kBlock = 1'000'003;

} // namespace

CallTensors::~CallTensors() {
  for (const auto& [name, buffer] : buffers_)
    backend_->release(buffer.tensor.data);
  if (cu_data_ != nullptr) backend_->release(cu_data_);
  if (slots_ != nullptr) backend_->release(slots_);
}

Status CallTensors::add(const std::string& name, Tensor& slot, DType dtype,
                        std::initializer_list<std::int64_t> shape, bool output, bool state, double mean,
                        double deviation) {
  Buffer b;
  b.output = output;
  b.state = state;
  b.tensor = contiguous(nullptr, dtype, shape);
  std::int64_t count = 1;
  for (const std::int64_t n : shape)
    count *= n;
  b.bytes = static_cast<std::size_t>(count) * static_cast<std::size_t>(size_of(dtype));
  const auto data = backend_->allocate((b.bytes + 3) / 4 * 4);
  if (!data) return tl::unexpected(data.error());
  b.tensor.data = *data;
  if (!output) {
    std::mt19937_64 engine(seed_ + std::hash<std::string>{}(name));
    std::normal_distribution<double> normal(mean, deviation);
    reference::Array block(static_cast<std::size_t>(std::min(count, kBlock)));
    // A raw beta is a weight in (0, 1); a precomputed decay is not positive.
    const bool weight = name == "beta" && !problem_.beta_sigmoid;
    const bool decay = name == "g" && (problem_.gate == GateKind::log_e || problem_.gate == GateKind::log2);
    for (double& x : block) {
      x = normal(engine);
      if (weight) x = std::min(std::abs(x), 1.0);
      if (decay) x = -std::abs(x);
    }
    const std::vector<std::byte> packed = pack(block, dtype);
    b.before.resize(b.bytes);
    for (std::size_t at = 0; at < b.bytes; at += packed.size())
      std::memcpy(b.before.data() + at, packed.data(), std::min(packed.size(), b.bytes - at));
    if (Status ok = backend_->copy_to_device(b.tensor.data, b.before.data(), b.bytes); !ok) {
      backend_->release(b.tensor.data);
      return ok;
    }
  }
  slot = b.tensor;
  buffers_.emplace(name, std::move(b));
  return {};
}

Status CallTensors::create(const Problem& p, const Sizes& s, std::uint64_t seed) {
  problem_ = p;
  sizes_ = s;
  seed_ = seed;
  const std::int64_t hv = p.value_heads, h = p.heads, k = p.key_dim, v = p.value_dim;
  const bool v_k = p.state_layout == StateLayout::v_k, gate = p.operation == Operation::gate;
  const bool gate_only = gate || p.operation == Operation::gate_backward,
             backward = p.operation == Operation::backward;
  const double unit = p.qk_l2norm ? 1.0 : 1.0 / std::sqrt(static_cast<double>(k));
  struct Spec {
    const char* name;
    Tensor* slot;
    DType dtype;
    std::initializer_list<std::int64_t> shape;
    bool wanted, output, state;
    double mean, deviation;
  };
  const std::initializer_list<std::int64_t> keys{s.batch, s.tokens, h, k}, gates{s.batch, s.tokens, hv, k},
      values{s.batch, s.tokens, hv, v}, betas{s.batch, s.tokens, hv},
      states{s.sequences, hv, v_k ? v : k, v_k ? k : v}, per_head{hv}, per_channel{hv, k};
  const bool full = !gate_only, forward = full && !backward,
             gradients = backward || p.operation == Operation::gate_backward;
  const Spec specs[] = {
      {"g", &args_.g, p.gate_dtype, gates, true, false, false, -1, 1.5},
      {"q", &args_.q, p.dtype, keys, full, false, false, 0, unit},
      {"k", &args_.k, p.dtype, keys, full, false, false, 0, unit},
      {"v", &args_.v, p.dtype, values, full, false, false, 0, 1},
      {"beta", &args_.beta, p.beta_dtype, betas, full, false, false, 0, 1},
      {"A_log", &args_.A_log, DType::fp32, per_head, reads_a_log(p.gate), false, false, 0.3, 0.5},
      {"dt_bias", &args_.dt_bias, DType::fp32, per_channel, p.dt_bias, false, false, -1, 1},
      {"initial_state", &args_.initial_state, p.state_dtype, states, full, false, true, 0, 0.5},
      {"o", &args_.o, gate ? DType::fp32 : p.dtype, gate ? gates : values, forward || gate, true, false, 0,
       0},
      {"final_state", &args_.final_state, p.state_dtype, states, forward, true, true, 0, 0},
      {"d_o", &args_.d_o, backward ? p.dtype : DType::fp32, backward ? values : gates, gradients, false,
       false, 0, 1},
      {"d_final_state", &args_.d_final_state, p.state_dtype, states, backward, false, true, 0, 0.5},
      {"d_q", &args_.d_q, p.dtype, keys, backward, true, false, 0, 0},
      {"d_k", &args_.d_k, p.dtype, keys, backward, true, false, 0, 0},
      {"d_v", &args_.d_v, p.dtype, values, backward, true, false, 0, 0},
      {"d_g", &args_.d_g, p.gate_dtype, gates, gradients, true, false, 0, 0},
      {"d_beta", &args_.d_beta, p.beta_dtype, betas, backward, true, false, 0, 0},
      {"d_A_log", &args_.d_A_log, DType::fp32, per_head, gradients && reads_a_log(p.gate), true, false, 0, 0},
      {"d_dt_bias", &args_.d_dt_bias, DType::fp32, per_channel, gradients && p.dt_bias, true, false, 0, 0},
      {"d_initial_state", &args_.d_initial_state, p.state_dtype, states, backward, true, true, 0, 0}};
  for (const Spec& x : specs)
    if (x.wanted)
      if (Status ok = add(x.name, *x.slot, x.dtype, x.shape, x.output, x.state, x.mean, x.deviation); !ok)
        return ok;
  if (p.state_pool)
    if (Status ok = add_slots(); !ok) return ok;
  if (!p.varlen) return {};
  for (std::int64_t n = 0; n <= s.sequences; ++n)
    cu_seqlens_.push_back(s.tokens * n / std::max<std::int64_t>(s.sequences, 1));
  std::vector<std::int32_t> narrow(cu_seqlens_.begin(), cu_seqlens_.end());
  const bool wide = p.cu_seqlens_type == IndexType::int64;
  const std::size_t bytes = cu_seqlens_.size() * (wide ? 8 : 4);
  const auto data = backend_->allocate(bytes);
  if (!data) return tl::unexpected(data.error());
  cu_data_ = *data;
  args_.cu_seqlens = {cu_data_, p.cu_seqlens_type, static_cast<std::int64_t>(cu_seqlens_.size())};
  return backend_->copy_to_device(cu_data_,
                                  wide ? static_cast<const void*>(cu_seqlens_.data()) : narrow.data(), bytes);
}

/// The state of sequence n in slot n.
Status CallTensors::add_slots() {
  std::vector<std::int32_t> slots(static_cast<std::size_t>(sizes_.sequences));
  std::iota(slots.begin(), slots.end(), 0);
  const std::size_t bytes = slots.size() * sizeof(std::int32_t);
  const auto data = backend_->allocate(bytes);
  if (!data) return tl::unexpected(data.error());
  slots_ = *data;
  args_.read_slots = args_.write_slots = contiguous_table(slots_, IndexType::int32, {sizes_.sequences});
  return backend_->copy_to_device(slots_, slots.data(), bytes);
}

Status CallTensors::poison() const {
  for (const auto& [name, b] : buffers_)
    if (b.output)
      if (Status ok = backend_->fill(b.tensor.data, 0xFFFFFFFFU, (b.bytes + 3) / 4, nullptr); !ok) return ok;
  return {};
}

Result<reference::Array> CallTensors::read(const std::string& name) const {
  const auto found = buffers_.find(name);
  if (found == buffers_.end()) return reference::Array{};
  const Buffer& b = found->second;
  std::vector<std::byte> bytes(b.bytes);
  if (const Status ok = backend_->copy_from_device(bytes.data(), b.tensor.data, b.bytes); !ok)
    return tl::unexpected(ok.error());
  const reference::Array values = unpack(bytes, file_dtype(b.tensor.dtype));
  return b.state && problem_.state_layout == StateLayout::v_k
             ? transposed(values, problem_.value_dim, problem_.key_dim)
             : values;
}

Result<reference::Array> CallTensors::output(const std::string& name) const {
  return read(name);
}

std::vector<std::string> CallTensors::outputs() const {
  std::vector<std::string> names;
  for (const auto& [name, b] : buffers_)
    if (b.output) names.push_back(name);
  return names;
}

Result<reference::Inputs> CallTensors::reference_inputs() const {
  reference::Inputs in;
  in.problem = problem_;
  in.sizes = sizes_;
  in.cu_seqlens = cu_seqlens_;
  const std::pair<const char*, reference::Array*> arrays[] = {{"q", &in.q},
                                                              {"k", &in.k},
                                                              {"v", &in.v},
                                                              {"g", &in.g},
                                                              {"beta", &in.beta},
                                                              {"A_log", &in.A_log},
                                                              {"dt_bias", &in.dt_bias},
                                                              {"initial_state", &in.initial_state}};
  for (const auto& [name, array] : arrays) {
    auto values = read(name);
    if (!values) return tl::unexpected(values.error());
    *array = std::move(*values);
  }
  return in;
}

Result<reference::OutputGradients> CallTensors::reference_output_gradients() const {
  auto d_o = read("d_o"), d_final = read("d_final_state");
  if (!d_o) return tl::unexpected(d_o.error());
  if (!d_final) return tl::unexpected(d_final.error());
  return reference::OutputGradients{std::move(*d_o), std::move(*d_final)};
}

Result<bool> CallTensors::inputs_preserved() const {
  for (const auto& [name, b] : buffers_) {
    if (b.output) continue;
    std::vector<std::byte> now(b.bytes);
    if (const Status ok = backend_->copy_from_device(now.data(), b.tensor.data, b.bytes); !ok)
      return tl::unexpected(ok.error());
    if (now != b.before) return false;
  }
  return true;
}

} // namespace kda
