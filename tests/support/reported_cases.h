#pragma once
// Inputs that broke other implementations of the recurrence, as users reported them; tests/README.md has the
// table.
#include "decode.h"
#include <sys/mman.h>
#include <utility>

namespace kda::test {

struct ReportedCase {
  const char* name;
  CaseOptions options;
  RunOptions run;
};

/// Calls of run_case, which also finds an input that was written, and whatever lies between rows. `large`:
/// the sizes of the reports; else those where an emulator is slow are cut.
inline std::vector<ReportedCase> reported_cases(bool large) {
  std::vector<ReportedCase> all;
  const auto add = [&](const char* name, int heads, int value_heads, int key_dim, int value_dim,
                       std::int64_t tokens, const std::function<void(ReportedCase&)>& change) {
    ReportedCase c{name, {}, {}};
    Problem& p = c.options.problem;
    p.operation = Operation::recurrent;
    p.heads = heads;
    p.value_heads = value_heads;
    p.key_dim = key_dim;
    p.value_dim = value_dim;
    p.gate = GateKind::softplus;
    p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true; // dt_bias: other numbers in every channel (B42)
    c.options.tokens = tokens;
    c.options.regime = Regime::slow;
    change(c);
    all.push_back(std::move(c));
  };
  const auto nothing = [](ReportedCase&) {};
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    add("B13: a state that is not square", 1, 1, 64, 128, 256,
        [&](ReportedCase& c) { c.options.problem.state_layout = layout; });
  add("B37: two value heads a head", large ? 16 : 2, large ? 32 : 4, 128, 128, large ? 256 : 12, nothing);
  for (const int dim : {100, 60, 96})
    add("B38: K that is no power of two, NaN behind every row", 2, 2, dim, dim, 5,
        [](ReportedCase& c) { c.run.strided = true; });
  for (const std::int64_t tokens : {31, 32, 33, 95})
    add("B39: lengths around the blocks of a kernel", 1, 1, 32, 32, tokens, nothing);
  for (const int dim : {16, 64, 256})
    add("B41: every head size that is allowed", 1, 1, dim, dim, 2, nothing);
  for (const int heads : {1, 3, 6, 12, 20})
    add("B47: beta in bf16 whose rows are no multiple of 16 bytes", heads, heads, 32, 32, 3, nothing);
  add("B51: a batch of D=64", large ? 16 : 4, large ? 16 : 4, 64, 64, large ? 1024 : 40,
      [](ReportedCase& c) { c.options.batch = 2; });
  return all;
}

/// B14: 16 tokens of 12 heads at once and in four pieces, to the bit. Empty, or what is wrong.
inline std::string run_in_pieces(const Backend& backend, const Variant& variant) {
  CaseOptions o;
  o.problem.operation = Operation::recurrent;
  o.problem.heads = o.problem.value_heads = 12;
  o.problem.qk_l2norm = o.problem.beta_sigmoid = true;
  o.regime = Regime::slow;
  o.tokens = 16;
  Decode d(backend, o);
  const Decode::State once = d.initial(), pieces = d.initial();
  if (std::string wrong = d.call(variant, 0, 16, once, once); !wrong.empty()) return wrong;
  const Decode::Bytes output = d.output();
  for (std::int64_t t = 0; t < 16; t += 4)
    if (std::string wrong = d.call(variant, t, 4, pieces, pieces); !wrong.empty()) return wrong;
  if (d.output() != output) return "o of four pieces has other bits";
  return d.state(pieces) == d.state(once) ? "" : "the state after four pieces has other bits";
}

/// What a call leaves when all its tensors lie in one region with these strides, in elements: o of two tokens
/// of two heads, then the states. The region is host memory that a kernel can read, only touched pages of it
/// exist.
inline std::pair<std::string, std::vector<float>> run_strides(const Backend& backend, const Variant& variant,
                                                              std::int64_t token, std::int64_t head) {
  constexpr std::int64_t kTokens = 2, kHeads = 2, kDim = 32;
  CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::recurrent;
  p.heads = p.value_heads = kHeads;
  p.key_dim = p.value_dim = kDim;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.state_layout = StateLayout::v_k;
  o.tokens = kTokens;
  const TestCase c = random_case(o);
  const std::int64_t part = kTokens * kHeads * kDim; // no tensor begins within another's rows
  const std::int64_t last = (kTokens - 1) * token + (kHeads - 1) * head + kDim;
  const auto bytes = static_cast<std::size_t>(6 * part + last) * sizeof(float);
  void* const map =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return {"no address space", {}};
  auto* const base = static_cast<float*>(map);
  const auto place = [&](int i, const reference::Array* values, std::int64_t dim) {
    float* const data = base + i * part;
    for (std::int64_t t = 0; t < kTokens && values != nullptr; ++t)
      for (std::int64_t h = 0; h < kHeads; ++h)
        for (std::int64_t d = 0; d < dim; ++d)
          data[t * token + h * head + d] =
              static_cast<float>((*values)[static_cast<std::size_t>((t * kHeads + h) * dim + d)]);
    Tensor x = contiguous(data, DType::fp32, {1, kTokens, kHeads, dim});
    const std::int64_t strides[] = {kTokens * token, token, head, 1};
    std::copy_n(strides, 4, x.stride);
    return x;
  };
  Args a;
  a.q = place(0, &c.inputs.q, kDim);
  a.k = place(1, &c.inputs.k, kDim);
  a.v = place(2, &c.inputs.v, kDim);
  a.g = place(3, &c.inputs.g, kDim);
  a.beta = place(4, &c.inputs.beta, 1);
  a.beta.rank = 3;
  a.o = place(5, nullptr, kDim);
  std::vector<float> state(c.inputs.initial_state.begin(), c.inputs.initial_state.end());
  a.initial_state = a.final_state = contiguous(state.data(), DType::fp32, {1, kHeads, kDim, kDim});
  KernelArgs args;
  Sizes sizes;
  std::string wrong;
  if (const Status ok = make_kernel_args(p, a, false, args, sizes); !ok) wrong = ok.error().message;
  if (wrong.empty()) {
    const SourceUnit unit = emit(p, variant, backend.target()).value();
    const auto module = backend.load(unit, backend.compile(unit).value()).value();
    const LaunchList list = launches(p, variant, backend.target(), sizes);
    if (const Status ok = module->launch(list.items[0], args, nullptr); !ok) wrong = ok.error().message;
  }
  std::vector<float> result;
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t h = 0; h < kHeads; ++h)
      result.insert(result.end(), base + 5 * part + t * token + h * head,
                    base + 5 * part + t * token + h * head + kDim);
  result.insert(result.end(), state.begin(), state.end());
  munmap(map, bytes);
  return {wrong, result};
}
/// B49: heads before tokens, as after a transpose. B50: rows 2^31 elements apart. Empty, or what is wrong.
inline std::string run_other_strides(const Backend& backend, const Variant& variant) {
  const auto [wrong, plain] = run_strides(backend, variant, 64, 32);
  if (!wrong.empty()) return wrong;
  constexpr std::int64_t kFar = (std::int64_t{1} << 31U) + 1024;
  for (const auto& [token, head] : {std::pair<std::int64_t, std::int64_t>{32, 64}, {kFar, 32}, {32, kFar}}) {
    const auto [why, other] = run_strides(backend, variant, token, head);
    if (!why.empty()) return why;
    if (other != plain) return "token stride " + std::to_string(token) + " gives other bits";
  }
  return {};
}

} // namespace kda::test
