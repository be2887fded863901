#pragma once
// A sequence of fp32 tokens in calls of a few tokens each, the final state of a call in place of its initial
// one: how a server decodes. A variant must give the same bits however the tokens are cut into calls.
#include "random_case.h"
#include "run_case.h"
#include <cmath>
#include <cstdlib>

namespace kda::test {

struct Bits {
  std::vector<float> o, state;
  bool operator==(const Bits&) const = default;
};

/// Device copies of a case's tensors; freed with the object.
class DeviceCopies {
public:
  explicit DeviceCopies(const Backend& backend) : backend_(backend) {}
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;
  ~DeviceCopies() {
    for (void* data : all_)
      backend_.release(data);
  }
  [[nodiscard]] float* upload(const reference::Array& x) {
    const std::vector<float> narrow(x.begin(), x.end());
    void* data = backend_.allocate(narrow.size() * sizeof(float)).value();
    all_.push_back(data);
    if (!backend_.copy_to_device(data, narrow.data(), narrow.size() * sizeof(float))) std::abort();
    return static_cast<float*>(data);
  }
  [[nodiscard]] std::vector<float> download(const float* data, std::size_t size) const {
    std::vector<float> x(size);
    if (!backend_.copy_from_device(x.data(), data, size * sizeof(float))) std::abort();
    return x;
  }

private:
  const Backend& backend_;
  std::vector<void*> all_;
};

/// o and the last state of `c`, whose dtypes are all fp32, in calls of `step` tokens; `step` divides the
/// tokens. Every call runs the same image.
inline Bits in_steps(const Backend& backend, const TestCase& c, const Variant& v, std::int64_t step) {
  const Problem& p = c.inputs.problem;
  const std::int64_t tokens = c.inputs.sizes.tokens, batch = c.inputs.sizes.batch;
  const SourceUnit unit = emit(p, v, backend.target()).value();
  const auto module = backend.load(unit, backend.compile(unit).value()).value();
  const Sizes sizes{batch, step, batch};
  const LaunchList list = launches(p, v, backend.target(), sizes);

  DeviceCopies copies(backend);
  const auto tensor = [&](const reference::Array& x, int heads, int dim) {
    const long long row = static_cast<long long>(heads) * dim;
    return TokenTensor{copies.upload(x), tokens * row, row, dim};
  };
  KernelArgs args{};
  args.q = tensor(c.inputs.q, p.heads, p.key_dim);
  args.k = tensor(c.inputs.k, p.heads, p.key_dim);
  args.v = tensor(c.inputs.v, p.value_heads, p.value_dim);
  args.g = tensor(c.inputs.g, p.value_heads, p.key_dim);
  args.beta = tensor(c.inputs.beta, p.value_heads, 1);
  args.o = tensor(reference::Array(c.inputs.v.size(), std::nan("")), p.value_heads, p.value_dim);
  if (!c.inputs.A_log.empty()) args.A_log = copies.upload(c.inputs.A_log);
  if (!c.inputs.dt_bias.empty()) args.dt_bias = copies.upload(c.inputs.dt_bias);
  const long long matrix = static_cast<long long>(p.key_dim) * p.value_dim;
  float* const state = copies.upload(c.inputs.initial_state);
  args.initial_state = args.final_state = {state, matrix * p.value_heads, matrix};
  args.tokens = step;
  args.batch = args.sequences = static_cast<int>(batch);
  args.heads = p.heads;
  args.value_heads = p.value_heads;
  args.scale = static_cast<float>(1 / std::sqrt(p.key_dim));
  args.lower_bound = -5;

  const float* const o = static_cast<const float*>(args.o.data);
  for (std::int64_t done = 0; done < tokens; done += step) {
    for (int i = 0; i < list.count; ++i)
      if (!module->launch(list.items[i], args, nullptr)) std::abort();
    for (TokenTensor* x : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.o})
      x->data = static_cast<float*>(x->data) + step * x->stride_token;
  }
  if (!backend.synchronize()) std::abort();
  return {copies.download(o, c.inputs.v.size()), copies.download(state, c.inputs.initial_state.size())};
}

/// 16 tokens of two sequences, decoded from a state, in fp32.
inline CaseOptions chained_case(StateLayout layout) {
  CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::recurrent;
  p.value_heads = 2;
  p.key_dim = 44;
  p.value_dim = 36;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.gate = GateKind::softplus;
  p.qk_l2norm = p.beta_sigmoid = p.dt_bias = true;
  p.state_layout = layout;
  o.batch = 2;
  o.tokens = 16;
  return o;
}

} // namespace kda::test
