#pragma once
// A sequence of fp32 tokens in calls of a few tokens each, the final state of a call in place of its initial
// one: how a server decodes. A variant must give the same bits however the tokens are cut into calls.
#include "marshal.h"
#include "random_case.h"
#include "run_case.h"
#include <algorithm>
#include <array>
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

enum class Memory : std::uint8_t {
  separate, ///< a buffer a tensor
  packed, ///< q, k, v, g and beta are views of one buffer, a row of it a token, as a fused projection leaves
          ///< them
};

/// q, k, v, g and beta of `c` on the device.
inline void set_tokens(KernelArgs& args, const TestCase& c, Memory memory, DeviceCopies& copies) {
  struct Part {
    TokenTensor* tensor;
    const reference::Array* values;
    int heads, dim;
  };
  const Problem& p = c.inputs.problem;
  const std::array<Part, 5> parts{{{&args.q, &c.inputs.q, p.heads, p.key_dim},
                                   {&args.k, &c.inputs.k, p.heads, p.key_dim},
                                   {&args.v, &c.inputs.v, p.value_heads, p.value_dim},
                                   {&args.g, &c.inputs.g, p.value_heads, p.key_dim},
                                   {&args.beta, &c.inputs.beta, p.value_heads, 1}}};
  const auto tokens = static_cast<std::size_t>(c.inputs.sizes.tokens);
  const std::size_t rows = tokens * static_cast<std::size_t>(c.inputs.sizes.batch);
  if (memory == Memory::separate) {
    for (const Part& x : parts) {
      const long long row = static_cast<long long>(x.heads) * x.dim;
      *x.tensor = {copies.upload(*x.values), static_cast<long long>(tokens) * row, row, x.dim};
    }
    return;
  }
  std::size_t width = 0;
  for (const Part& x : parts)
    width += static_cast<std::size_t>(x.heads * x.dim);
  width = (width + 3) / 4 * 4; // rows of 16 bytes
  reference::Array all(rows * width, std::nan(""));
  std::array<std::size_t, parts.size()> places{};
  std::size_t place = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto row = static_cast<std::size_t>(parts[i].heads) * static_cast<std::size_t>(parts[i].dim);
    for (std::size_t r = 0; r < rows; ++r)
      std::copy_n(&(*parts[i].values)[r * row], row, &all[r * width + place]);
    places[i] = place;
    place += row;
  }
  float* const data = copies.upload(all);
  for (std::size_t i = 0; i < parts.size(); ++i)
    *parts[i].tensor = {data + places[i], static_cast<long long>(tokens * width),
                        static_cast<long long>(width), parts[i].dim};
}

/// o and the last state of `c`, whose dtypes are all fp32, in calls of `step` tokens; `step` divides the
/// tokens. Every call runs the same image.
inline Bits in_steps(const Backend& backend, const TestCase& c, const Variant& v, std::int64_t step,
                     Memory memory = Memory::separate) {
  const Problem& p = c.inputs.problem;
  const std::int64_t tokens = c.inputs.sizes.tokens, batch = c.inputs.sizes.batch;
  const SourceUnit unit = emit(p, v, backend.target()).value();
  const auto module = backend.load(unit, backend.compile(unit).value()).value();
  const Sizes sizes{batch, step, batch};
  const LaunchList list = launches(p, v, backend.target(), sizes);

  DeviceCopies copies(backend);
  KernelArgs args{};
  set_tokens(args, c, memory, copies);
  const long long row = static_cast<long long>(p.value_heads) * p.value_dim;
  args.o = {copies.upload(reference::Array(c.inputs.v.size(), std::nan(""))), tokens * row, row, p.value_dim};
  if (!c.inputs.A_log.empty()) args.A_log = copies.upload(c.inputs.A_log);
  if (!c.inputs.dt_bias.empty()) args.dt_bias = copies.upload(c.inputs.dt_bias);
  const long long matrix = static_cast<long long>(p.key_dim) * p.value_dim;
  float* const state = copies.upload(c.inputs.initial_state);
  args.initial_state = args.final_state = {state, matrix * p.value_heads, matrix};
  args.tokens = step;
  args.batch = args.sequences = static_cast<int>(batch);
  args.heads = p.heads;
  args.value_heads = p.value_heads;
  args.head_reciprocal = head_reciprocal(p.value_heads);
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
