// A case's tensors in a device's memory, as the arguments of one call.
#include "kda/case_io.h"
#include <algorithm>
#include <fmt/format.h>

namespace kda {
namespace {

/// One tensor of a call: where it stands in Args, its type, and how its file calls it.
struct Slot {
  const char* name;
  Tensor Args::*field;
  DType dtype;
  std::vector<std::int64_t> shape;
  bool state = false; ///< in the problem's layout on the device
};

class Slots {
public:
  Slots(const Case& c, const Problem& p) : p_(p), s_(c.sizes) {}

  [[nodiscard]] std::vector<Slot> inputs() const {
    std::vector<Slot> out = {{"q", &Args::q, p_.dtype, token(p_.heads, p_.key_dim)},
                             {"k", &Args::k, p_.dtype, token(p_.heads, p_.key_dim)},
                             {"v", &Args::v, p_.dtype, token(p_.value_heads, p_.value_dim)},
                             {"g", &Args::g, p_.gate_dtype, token(p_.value_heads, p_.key_dim)},
                             {"beta", &Args::beta, p_.beta_dtype, beta()},
                             state("initial_state", &Args::initial_state)};
    if (reads_a_log(p_.gate)) out.push_back({"A_log", &Args::A_log, DType::fp32, {p_.value_heads}});
    if (p_.dt_bias) out.push_back({"dt_bias", &Args::dt_bias, DType::fp32, {p_.value_heads, p_.key_dim}});
    if (p_.operation == Operation::backward) {
      out.push_back({"do", &Args::d_o, p_.dtype, token(p_.value_heads, p_.value_dim)});
      out.push_back(state("dht", &Args::d_final_state));
    }
    return out;
  }

  [[nodiscard]] std::vector<Slot> outputs(bool initial_state) const {
    if (p_.operation != Operation::backward)
      return {{"o", &Args::o, p_.dtype, token(p_.value_heads, p_.value_dim)},
              state("final_state", &Args::final_state)};
    std::vector<Slot> out = {{"dq", &Args::d_q, p_.dtype, token(p_.heads, p_.key_dim)},
                             {"dk", &Args::d_k, p_.dtype, token(p_.heads, p_.key_dim)},
                             {"dv", &Args::d_v, p_.dtype, token(p_.value_heads, p_.value_dim)},
                             {"dg", &Args::d_g, p_.gate_dtype, token(p_.value_heads, p_.key_dim)},
                             {"dbeta", &Args::d_beta, p_.beta_dtype, beta()}};
    if (reads_a_log(p_.gate)) out.push_back({"dA_log", &Args::d_A_log, DType::fp32, {p_.value_heads}});
    if (p_.dt_bias) out.push_back({"ddt_bias", &Args::d_dt_bias, DType::fp32, {p_.value_heads, p_.key_dim}});
    if (initial_state) out.push_back(state("dinitial_state", &Args::d_initial_state));
    return out;
  }

private:
  [[nodiscard]] std::vector<std::int64_t> token(std::int64_t heads, std::int64_t dim) const {
    return {s_.batch, s_.tokens, heads, dim};
  }
  [[nodiscard]] std::vector<std::int64_t> beta() const { return {s_.batch, s_.tokens, p_.value_heads}; }
  [[nodiscard]] Slot state(const char* name, Tensor Args::*field) const {
    const bool k_v = p_.state_layout == StateLayout::k_v;
    return {name,
            field,
            p_.state_dtype,
            {s_.sequences, p_.value_heads, k_v ? p_.key_dim : p_.value_dim, k_v ? p_.value_dim : p_.key_dim},
            true};
  }

  const Problem& p_;
  const Sizes& s_;
};

/// The bytes that the device wants: the file's own when dtype and layout agree, else through float64.
std::vector<std::byte> device_bytes(const Case& c, const Problem& p, const Slot& slot) {
  const safetensors::Tensor& t = c.file.tensors.at(slot.name);
  const bool same_layout = !slot.state || p.state_layout == c.problem.state_layout;
  if (t.dtype == file_dtype(slot.dtype) && same_layout) return t.data;
  reference::Array x = values(c, slot.name);
  if (slot.state && p.state_layout == StateLayout::v_k) x = transposed(x, p.key_dim, p.value_dim);
  return pack(x, slot.dtype);
}

Tensor view(void* data, const Slot& slot) {
  Tensor t;
  t.data = data;
  t.dtype = slot.dtype;
  t.rank = static_cast<int>(slot.shape.size());
  std::copy(slot.shape.begin(), slot.shape.end(), t.shape);
  return t;
}

std::size_t byte_count(const Slot& slot) {
  return static_cast<std::size_t>(safetensors::element_count(slot.shape)) *
         static_cast<std::size_t>(size_of(slot.dtype));
}

} // namespace

struct DeviceCase::Memory {
  Engine engine;
  Device device;
  Problem problem;
  std::vector<Slot> outputs;
  std::vector<void*> owned;

  Memory(Engine e, Device d, const Problem& p) : engine(std::move(e)), device(d), problem(p) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* data : owned)
      engine.release(device, data);
  }

  Result<void*> put(const std::vector<std::byte>& bytes) {
    auto data = engine.allocate(device, std::max<std::size_t>(bytes.size(), 16)); // empty is not absent
    if (!data) return data;
    owned.push_back(*data);
    if (bytes.empty()) return data;
    if (const Status ok = engine.copy_to_device(device, *data, bytes.data(), bytes.size()); !ok)
      return tl::unexpected(ok.error());
    return data;
  }
};

Result<DeviceCase> DeviceCase::upload(const Engine& engine, Device device, const Case& c, const Problem& p) {
  if (p.operation == Operation::gate || p.operation == Operation::gate_backward)
    return fail(ErrorCode::invalid_argument, "a case runs forward, recurrent or backward");
  if (p.operation == Operation::backward && c.file.tensors.count("do") == 0)
    return fail(ErrorCode::invalid_argument, "tensor do is missing; backward needs the gradient of o");
  DeviceCase out;
  out.memory_ = std::make_shared<Memory>(engine, device, p);
  Memory& memory = *out.memory_;
  const Slots slots(c, p);
  for (const Slot& slot : slots.inputs()) {
    if (c.file.tensors.count(slot.name) == 0) continue; // optional: make_case has checked the others
    auto data = memory.put(device_bytes(c, p, slot));
    if (!data) return tl::unexpected(data.error());
    out.args_.*slot.field = view(*data, slot);
  }
  memory.outputs = slots.outputs(c.file.tensors.count("initial_state") != 0);
  for (const Slot& slot : memory.outputs) { // all bits set is NaN in every dtype: what is not written shows
    auto data = memory.put(std::vector<std::byte>(byte_count(slot), std::byte{0xFF}));
    if (!data) return tl::unexpected(data.error());
    out.args_.*slot.field = view(*data, slot);
  }
  if (p.varlen) {
    auto data = memory.put(c.file.tensors.at("cu_seqlens").data);
    if (!data) return tl::unexpected(data.error());
    out.args_.cu_seqlens = {*data, c.problem.cu_seqlens_type, static_cast<std::int64_t>(c.cu_seqlens.size())};
  }
  out.args_.scale = static_cast<float>(c.scale);
  out.args_.lower_bound = static_cast<float>(c.lower_bound);
  return out;
}

std::vector<std::string> DeviceCase::output_names() const {
  std::vector<std::string> names;
  for (const Slot& slot : memory_->outputs)
    names.emplace_back(slot.name);
  return names;
}

Result<safetensors::Tensor> DeviceCase::output_tensor(const std::string& name) const {
  const auto slot = std::find_if(memory_->outputs.begin(), memory_->outputs.end(),
                                 [&](const Slot& s) { return s.name == name; });
  if (slot == memory_->outputs.end())
    return fail(ErrorCode::invalid_argument, fmt::format("the call writes no tensor {}", name));
  safetensors::Tensor t{file_dtype(slot->dtype), slot->shape, std::vector<std::byte>(byte_count(*slot))};
  if (Status ok = memory_->engine.synchronize(memory_->device); !ok) return tl::unexpected(ok.error());
  if (t.data.empty()) return t;
  const void* const from = (args_.*slot->field).data;
  if (Status ok = memory_->engine.copy_from_device(memory_->device, t.data.data(), from, t.data.size()); !ok)
    return tl::unexpected(ok.error());
  return t;
}

Result<reference::Array> DeviceCase::output(const std::string& name) const {
  const auto t = output_tensor(name);
  if (!t) return tl::unexpected(t.error());
  reference::Array x = unpack(t->data, t->dtype);
  const Problem& p = memory_->problem;
  const bool state = name == "final_state" || name == "dinitial_state";
  return state && p.state_layout == StateLayout::v_k ? transposed(x, p.value_dim, p.key_dim) : x;
}

} // namespace kda
