#include "call_tensors.h"
#include "kda/case_io.h"
#include <algorithm>
#include <cstring>
#include <fmt/format.h>
#include <numeric>
#include <random>

namespace kda {
namespace {

/// Random values of a prime count: a large tensor repeats them, which costs no time to make and keeps rows
/// different.
constexpr std::int64_t kBlock = 1'000'003;
constexpr std::int64_t kInterval = 64; ///< of interior states

} // namespace

CallTensors::~CallTensors() {
  for (const auto& [name, buffer] : buffers_)
    backend_->release(buffer.tensor.data);
  for (void* const table : tables_)
    backend_->release(table);
}

Result<void*> CallTensors::allocate(std::size_t bytes) {
  if (most_bytes_ > 0 && bytes_ + bytes > most_bytes_)
    return fail(ErrorCode::out_of_memory,
                fmt::format("the tensors need more than the {:.1f} MiB that a tuner may hold",
                            static_cast<double>(most_bytes_) / 0x1p20));
  auto data = backend_->allocate(bytes);
  if (data) bytes_ += bytes;
  return data;
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
  const auto data = allocate((b.bytes + 3) / 4 * 4);
  if (!data) return tl::unexpected(data.error());
  b.tensor.data = *data;
  if (!output) {
    std::mt19937_64 engine(seed_ + std::hash<std::string>{}(name));
    std::normal_distribution<double> normal(mean, deviation);
    const bool gate = name == "g";
    const std::int64_t most = gate ? kBlock / problem_.key_dim * problem_.key_dim : kBlock;
    reference::Array block(static_cast<std::size_t>(std::min(count, most)));
    // A raw beta is a weight in (0, 1); a precomputed decay is not positive.
    const bool weight = name == "beta" && !problem_.beta_sigmoid;
    const bool decay = gate && (problem_.gate == GateKind::log_e || problem_.gate == GateKind::log2);
    const bool factor = name == "update_decay";
    for (double& x : block) {
      x = normal(engine);
      if (factor) x = std::exp2(-std::abs(x));
      if (weight) x = std::min(std::abs(x), 1.0);
      if (decay) x = -std::abs(x);
    }
    // A channel that hardly forgets, as trained models have them: a form that is fast only where all of the
    // state is forgotten must not win here.
    for (std::size_t i = 0; gate && i < block.size(); i += static_cast<std::size_t>(problem_.key_dim))
      block[i] = decay ? -1e-3 : -30;
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
  cu_seqlens_.clear();
  if (p.varlen)
    for (std::int64_t n = 0; n <= s.sequences; ++n)
      cu_seqlens_.push_back(s.tokens * n / std::max<std::int64_t>(s.sequences, 1));
  interior_.clear();
  for (std::int64_t n = 0; p.interior_states && n < s.sequences; ++n)
    for (std::int64_t t = kInterval; t <= length(n); t += kInterval)
      interior_.push_back(first_token(n) + t - 1);
  const std::int64_t hv = p.value_heads, h = p.heads, k = p.key_dim, v = p.value_dim;
  const bool v_k = p.state_layout == StateLayout::v_k, gate = p.operation == Operation::gate;
  const bool gate_only = gate || p.operation == Operation::gate_backward,
             backward = p.operation == Operation::backward, replay = p.operation == Operation::replay,
             updates = replay || p.updates;
  const SavedStates saved = saved_states(p, s, p.saved_interval).value();
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
      states{s.sequences, hv, v_k ? v : k, v_k ? k : v},
      interiors{backward ? saved.slots : static_cast<std::int64_t>(interior_.size()), hv, v_k ? v : k,
                v_k ? k : v},
      finals{p.every_state ? s.batch * s.tokens : s.sequences, hv, v_k ? v : k, v_k ? k : v}, per_head{hv},
      per_channel{hv, k};
  const bool full = !gate_only && !replay, forward = full && !backward,
             last = !p.tree || p.every_state || replay,
             gradients = backward || p.operation == Operation::gate_backward;
  const Spec specs[] = {
      {"g", &args_.g, p.gate_dtype, gates, !replay, false, false, -1, 1.5},
      {"q", &args_.q, p.dtype, keys, full, false, false, 0, unit},
      {"k", &args_.k, p.dtype, keys, full, false, false, 0, unit},
      {"v", &args_.v, p.dtype, values, full, false, false, 0, 1},
      {"beta", &args_.beta, p.beta_dtype, betas, full, false, false, 0, 1},
      {"A_log", &args_.A_log, DType::fp32, per_head, reads_a_log(p.gate) && !replay, false, false, 0.3, 0.5},
      {"dt_bias", &args_.dt_bias, DType::fp32, per_channel, p.dt_bias && !replay, false, false, -1, 1},
      {"initial_state", &args_.initial_state, p.state_dtype, states, full || replay, false, true, 0, 0.5},
      {"o", &args_.o, gate ? DType::fp32 : p.dtype, gate ? gates : values, forward || gate, true, false, 0,
       0},
      {"update_u", &args_.update_u, DType::fp32, values, updates, !replay, false, 0, 1},
      {"update_k", &args_.update_k, DType::fp32, keys, updates, !replay, false, 0, 1 / std::sqrt(k)},
      {"update_decay", &args_.update_decay, DType::fp32, gates, updates, !replay, false, 0, 1},
      {"final_state", &args_.final_state, p.state_dtype, finals, (forward || replay) && last, true, true, 0,
       0},
      {"interior_states", &args_.interior_states, p.state_dtype, interiors,
       !interior_.empty() || saved.slots > 0, !backward, true, 0, backward ? 0.5 : 0},
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
  if (Status ok = add_tables(); !ok) return ok;
  if (!p.varlen) return {};
  const auto data = upload(cu_seqlens_, p.cu_seqlens_type);
  if (!data) return tl::unexpected(data.error());
  args_.cu_seqlens = {*data, p.cu_seqlens_type, static_cast<std::int64_t>(cu_seqlens_.size())};
  return {};
}

Result<void*> CallTensors::upload(const std::vector<std::int64_t>& numbers, IndexType type) {
  const bool wide = type == IndexType::int64;
  const std::vector<std::int32_t> narrow(numbers.begin(), numbers.end());
  const std::size_t bytes = numbers.size() * (wide ? 8 : 4);
  const auto data = allocate(bytes);
  if (!data) return data;
  tables_.push_back(*data);
  const void* const from = wide ? static_cast<const void*>(numbers.data()) : narrow.data();
  if (const Status ok = backend_->copy_to_device(*data, from, bytes); !ok) return tl::unexpected(ok.error());
  return data;
}

std::int64_t CallTensors::first_token(std::int64_t n) const {
  return problem_.varlen ? cu_seqlens_[static_cast<std::size_t>(n)] : n * sizes_.tokens;
}
std::int64_t CallTensors::length(std::int64_t n) const {
  return problem_.varlen ? first_token(n + 1) - first_token(n) : sizes_.tokens;
}

/// The state of sequence n in slot n, the state after token t (counted over all rows) in slot t; a binary
/// tree of tokens; all tokens are accepted.
Status CallTensors::add_tables() {
  const Problem& p = problem_;
  const std::int64_t n = sizes_.sequences;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(n)), first(slots), places;
  std::iota(slots.begin(), slots.end(), 0);
  std::int64_t columns = 1;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    first[i] = first_token(static_cast<std::int64_t>(i));
    const std::int64_t tokens = length(static_cast<std::int64_t>(i));
    accepted_.push_back(tokens);
    columns = std::max(columns, tokens);
    if (p.operation == Operation::replay && tokens == 0)
      return fail(ErrorCode::invalid_argument, "a replay is tried with one token a sequence or more");
  }
  std::vector<std::int64_t> parents;
  for (const std::int64_t begin : first)
    for (std::int64_t t = 0; t < columns; ++t) {
      places.push_back(begin + t);
      parents.push_back(t == 0 ? -1 : (t - 1) / 2);
    }
  const auto give = [&](bool wanted, IndexTable& table, const std::vector<std::int64_t>& numbers,
                        bool by_token) -> Status {
    if (!wanted) return {};
    const auto data = upload(numbers, IndexType::int32);
    if (!data) return tl::unexpected(data.error());
    table = by_token ? contiguous_table(*data, IndexType::int32, {n, columns})
                     : contiguous_table(*data, IndexType::int32, {n});
    return {};
  };
  if (p.tree) {
    for (std::size_t i = 0; i < first.size(); ++i)
      for (std::int64_t t = 0; t < accepted_[i]; ++t)
        parents_.push_back(parents[i * static_cast<std::size_t>(columns) + static_cast<std::size_t>(t)]);
    parents_.resize(static_cast<std::size_t>(sizes_.batch * sizes_.tokens), -1);
  }
  if (!interior_.empty()) {
    std::vector<std::int64_t> numbers(static_cast<std::size_t>(n * (columns / kInterval)), -1);
    for (std::size_t slot = 0, i = 0; i < first.size(); ++i)
      for (std::int64_t t = kInterval; t <= accepted_[i]; t += kInterval)
        numbers[i * static_cast<std::size_t>(columns / kInterval) +
                static_cast<std::size_t>(t / kInterval - 1)] = static_cast<std::int64_t>(slot++);
    const auto data = upload(numbers, IndexType::int32);
    if (!data) return tl::unexpected(data.error());
    args_.interior_slots = contiguous_table(*data, IndexType::int32, {n, columns / kInterval});
    args_.interior_interval = kInterval;
  }
  if (p.saved_interval != 0 && args_.interior_states.data != nullptr) {
    const SavedStates saved = saved_states(p, sizes_, p.saved_interval).value();
    std::vector<std::int64_t> numbers;
    for (std::size_t i = 0; i < first.size(); ++i)
      for (std::int64_t j = 0; j < saved.columns; ++j)
        numbers.push_back((j + 1) * saved.interval <= accepted_[i] ? first[i] / saved.interval + j : -1);
    const auto data = upload(numbers, IndexType::int32);
    if (!data) return tl::unexpected(data.error());
    args_.interior_slots = contiguous_table(*data, IndexType::int32, {n, saved.columns});
  }
  if (p.saved_interval != 0) args_.interior_interval = p.saved_interval;
  if (Status ok = give(p.state_pool, args_.read_slots, slots, false); !ok) return ok;
  if (Status ok = give(p.state_pool && args_.final_state.data != nullptr, args_.write_slots,
                       p.every_state ? places : slots, p.every_state);
      !ok)
    return ok;
  if (Status ok = give(p.operation == Operation::replay, args_.accepted, accepted_, false); !ok) return ok;
  return give(p.tree, args_.parents, parents, true);
}

Status CallTensors::save_states() {
  const auto found = buffers_.find("interior_states");
  if (found == buffers_.end()) return {};
  const auto in = reference_inputs();
  if (!in) return tl::unexpected(in.error());
  const std::int64_t interval = problem_.saved_interval;
  const auto state = static_cast<std::size_t>(problem_.value_heads) *
                     static_cast<std::size_t>(problem_.key_dim * problem_.value_dim);
  reference::Array states(state * static_cast<std::size_t>(found->second.tensor.shape[0]));
  const auto rows = [&](const reference::Array& x, std::int64_t from) {
    const auto width = static_cast<std::ptrdiff_t>(x.size()) / (sizes_.batch * sizes_.tokens);
    return reference::Array(x.begin() + from * width, x.begin() + (from + interval) * width);
  };
  for (std::int64_t n = 0; n < sizes_.sequences; ++n) {
    const std::int64_t begin = problem_.varlen ? cu_seqlens_[static_cast<std::size_t>(n)] : n * sizes_.tokens;
    reference::Inputs part = *in; // of one interval
    part.problem.varlen = false;
    part.cu_seqlens.clear();
    part.sizes = {1, interval, 1};
    const auto start = in->initial_state.begin() + n * static_cast<std::ptrdiff_t>(state);
    part.initial_state.assign(start, start + static_cast<std::ptrdiff_t>(state));
    for (std::int64_t t = 0; t + interval <= accepted_[static_cast<std::size_t>(n)]; t += interval) {
      for (const auto& [to, from] : {std::pair{&part.q, &in->q},
                                     {&part.k, &in->k},
                                     {&part.v, &in->v},
                                     {&part.g, &in->g},
                                     {&part.beta, &in->beta}})
        *to = rows(*from, begin + t);
      part.initial_state = reference::recurrence(part).final_state;
      const std::int64_t slot = begin / interval + t / interval;
      std::copy(part.initial_state.begin(), part.initial_state.end(),
                states.begin() + slot * static_cast<std::ptrdiff_t>(state));
    }
  }
  if (problem_.state_layout == StateLayout::v_k)
    states = transposed(states, problem_.key_dim, problem_.value_dim);
  Buffer& b = found->second;
  b.before = pack(states, b.tensor.dtype);
  return backend_->copy_to_device(b.tensor.data, b.before.data(), b.bytes);
}

Status CallTensors::poison() const {
  for (const auto& [name, b] : buffers_)
    if (b.output)
      if (Status ok = backend_->fill(b.tensor.data, 0xFFFFFFFFU, (b.bytes + 3) / 4, backend_->stream()); !ok)
        return ok;
  return {};
}

Result<std::vector<std::byte>> CallTensors::bytes_of(const std::string& name) const {
  const auto found = buffers_.find(name);
  if (found == buffers_.end()) return std::vector<std::byte>{};
  const Buffer& b = found->second;
  std::vector<std::byte> bytes(b.bytes);
  if (const Status ok = backend_->copy_from_device(bytes.data(), b.tensor.data, b.bytes); !ok)
    return tl::unexpected(ok.error());
  return bytes;
}

reference::Array CallTensors::values_of(const std::string& name, const std::vector<std::byte>& bytes) const {
  const auto found = buffers_.find(name);
  if (found == buffers_.end()) return {};
  const Buffer& b = found->second;
  reference::Array values = unpack(bytes, file_dtype(b.tensor.dtype));
  return b.state && problem_.state_layout == StateLayout::v_k
             ? transposed(values, problem_.value_dim, problem_.key_dim)
             : values;
}

Result<reference::Array> CallTensors::output(const std::string& name) const {
  const auto bytes = bytes_of(name);
  if (!bytes) return tl::unexpected(bytes.error());
  return values_of(name, *bytes);
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
    auto values = output(name);
    if (!values) return tl::unexpected(values.error());
    *array = std::move(*values);
  }
  return in;
}

Result<reference::OutputGradients> CallTensors::reference_output_gradients() const {
  auto d_o = output("d_o"), d_final = output("d_final_state");
  if (!d_o) return tl::unexpected(d_o.error());
  if (!d_final) return tl::unexpected(d_final.error());
  return reference::OutputGradients{std::move(*d_o), std::move(*d_final)};
}

Result<reference::Verified> CallTensors::reference_updates() const {
  auto u = output("update_u"), k = output("update_k"), decay = output("update_decay");
  for (const auto* x : {&u, &k, &decay})
    if (!*x) return tl::unexpected(x->error());
  return reference::Verified{{}, {}, std::move(*u), std::move(*k), std::move(*decay)};
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
