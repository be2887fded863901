#pragma once
// Decode calls through the public arguments: q, k, v, gate and beta are views of one packed buffer, as a
// fused projection leaves them, with a pitch larger than their sum. What one call leaves is compared to the
// bit with what others leave, and with float64.
#include "kda/case_io.h"
#include "marshal.h"
#include "random_case.h"
#include "run_case.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>

namespace kda::test {

/// A batch of `options.batch` sequences of `options.tokens` tokens; q, k, v, g and beta have one dtype.
class Decode {
public:
  using Bytes = std::vector<std::byte>;
  struct State {
    void* data;
  };

  Decode(const Backend& backend, const CaseOptions& options)
      : backend_(backend), case_(random_case(options)), p_(options.problem), b_(options.batch),
        t_(options.tokens) {
    const std::int64_t h = p_.heads, hv = p_.value_heads, k = p_.key_dim, v = p_.value_dim;
    const auto padded_to_16_bytes = [](std::int64_t n) { return (n + 7) / 8 * 8; };
    const std::int64_t parts[] = {h * k, h * k, hv * v, hv * k, padded_to_16_bytes(hv)};
    std::int64_t at = 8; // the row begins with what is nobody's
    for (int i = 0; i < 5; ++i) {
      offset_[i] = at;
      at += padded_to_16_bytes(parts[i]);
    }
    pitch_ = at + 24;
    reference::Array packed(static_cast<std::size_t>(b_ * t_ * pitch_), std::nan(""));
    const reference::Array* const arrays[] = {&case_.inputs.q, &case_.inputs.k, &case_.inputs.v,
                                              &case_.inputs.g, &case_.inputs.beta};
    for (int i = 0; i < 5; ++i) {
      const auto width = static_cast<std::ptrdiff_t>(arrays[i]->size()) / std::max<std::int64_t>(b_ * t_, 1);
      for (std::int64_t row = 0; row < b_ * t_; ++row)
        std::copy_n(arrays[i]->begin() + row * width, width, packed.begin() + row * pitch_ + offset_[i]);
    }
    const Bytes bytes = pack(packed, p_.dtype);
    packed_ = upload(bytes);
    const Bytes poison(static_cast<std::size_t>(b_ * t_ * hv * v) * 4, std::byte{0xFF});
    o_ = upload(poison);
    const auto fp32 = [&](const reference::Array& x) {
      return x.empty() ? nullptr : upload(pack(x, DType::fp32));
    };
    a_log_ = fp32(case_.inputs.A_log);
    dt_bias_ = fp32(case_.inputs.dt_bias);
    for (const std::int64_t width : {hv * v, h * k, hv * k})
      updates_.push_back(upload(Bytes(static_cast<std::size_t>(b_ * t_ * width) * 4, std::byte{0xFF})));
  }
  Decode(const Decode&) = delete;
  Decode& operator=(const Decode&) = delete;
  ~Decode() {
    for (void* data : all_)
      backend_.release(data);
  }

  [[nodiscard]] std::size_t state_bytes() const {
    return static_cast<std::size_t>(b_ * p_.value_heads * p_.key_dim * p_.value_dim *
                                    size_of(p_.state_dtype));
  }
  /// The initial states of the case, in memory of their own.
  State initial() {
    const reference::Array x = p_.state_layout == StateLayout::v_k
                                   ? transposed(case_.inputs.initial_state, p_.key_dim, p_.value_dim)
                                   : case_.inputs.initial_state;
    return {upload(pack(x, p_.state_dtype))};
  }
  Bytes state(State s) const { return download(s.data, state_bytes()); }
  Bytes output() const {
    return download(o_,
                    static_cast<std::size_t>(b_ * t_ * p_.value_heads * p_.value_dim * size_of(p_.dtype)));
  }

  /// Tokens [first, first + count) from `from` to `to` (null: no state is kept). Empty, or what went wrong.
  std::string call(const Variant& variant, std::int64_t first, std::int64_t count, State from, State to) {
    return run(p_, variant, first, count, from, to, {});
  }
  /// All tokens, keeping updates and no state; with parents [batch, tokens] as a tree.
  std::string keep(const Variant& variant, State from, const std::vector<std::int32_t>& parents = {}) {
    Problem p = p_;
    p.updates = true;
    p.tree = !parents.empty();
    return run(p, variant, 0, t_, from, {}, parents);
  }
  std::string replay(const Variant& variant, State from, State to, const std::vector<std::int32_t>& accepted,
                     const std::vector<std::int32_t>& parents = {}) {
    Problem p = p_;
    p.operation = Operation::replay;
    p.tree = !parents.empty();
    return run(p, variant, 0, t_, from, to, parents, accepted);
  }
  /// Largest relative errors of o and of the states after all tokens.
  std::pair<double, double> errors(State after) const {
    const reference::Outputs expected = reference::recurrence(case_.inputs);
    const reference::Array s = unpack(state(after), file_dtype(p_.state_dtype));
    return {reference::relative_error(unpack(output(), file_dtype(p_.dtype)), expected.o),
            reference::relative_error(
                p_.state_layout == StateLayout::v_k ? transposed(s, p_.value_dim, p_.key_dim) : s,
                expected.final_state)};
  }

private:
  void* upload(const Bytes& bytes) {
    void* const to = backend_.allocate(std::max<std::size_t>(bytes.size(), 4)).value();
    all_.push_back(to);
    if (!backend_.copy_to_device(to, bytes.data(), bytes.size())) std::abort();
    return to;
  }
  Bytes download(const void* data, std::size_t bytes) const {
    Bytes x(bytes);
    if (!backend_.copy_from_device(x.data(), data, bytes)) std::abort();
    return x;
  }
  /// Part `i` of the packed buffer from token `first` on.
  Tensor view(int i, std::int64_t first, std::int64_t count, int heads, int dim) const {
    Tensor x =
        contiguous(static_cast<std::byte*>(packed_) + (first * pitch_ + offset_[i]) * size_of(p_.dtype),
                   p_.dtype, {b_, count, heads, dim});
    const std::int64_t strides[] = {t_ * pitch_, pitch_, dim, 1};
    std::copy_n(strides, 4, x.stride);
    return x;
  }
  Tensor rows(void* data, DType dtype, std::int64_t first, std::int64_t count, int heads, int dim) const {
    Tensor x = contiguous(static_cast<std::byte*>(data) + first * heads * dim * size_of(dtype), dtype,
                          {b_, count, heads, dim});
    const std::int64_t strides[] = {t_ * heads * dim, heads * dim, dim, 1};
    std::copy_n(strides, 4, x.stride);
    return x;
  }
  Tensor states(State s) const {
    const bool v_k = p_.state_layout == StateLayout::v_k;
    return contiguous(s.data, p_.state_dtype,
                      {b_, p_.value_heads, v_k ? p_.value_dim : p_.key_dim, v_k ? p_.key_dim : p_.value_dim});
  }
  IndexTable table(const std::vector<std::int32_t>& numbers, bool by_token) {
    Bytes bytes(numbers.size() * 4);
    std::memcpy(bytes.data(), numbers.data(), bytes.size());
    void* const data = upload(bytes);
    return by_token ? contiguous_table(data, IndexType::int32, {b_, t_})
                    : contiguous_table(data, IndexType::int32, {b_});
  }

  std::string run(const Problem& p, const Variant& variant, std::int64_t first, std::int64_t count,
                  State from, State to, const std::vector<std::int32_t>& parents,
                  const std::vector<std::int32_t>& accepted = {}) {
    if (const Status ok = validate(p); !ok) return ok.error().message;
    Args a;
    a.lower_bound = static_cast<float>(case_.inputs.lower_bound);
    a.scale = static_cast<float>(case_.inputs.scale);
    if (from.data != nullptr) a.initial_state = states(from);
    if (to.data != nullptr) a.final_state = states(to);
    if (p.operation == Operation::recurrent) {
      a.q = view(0, first, count, p.heads, p.key_dim);
      a.k = view(1, first, count, p.heads, p.key_dim);
      a.v = view(2, first, count, p.value_heads, p.value_dim);
      a.g = view(3, first, count, p.value_heads, p.key_dim);
      a.beta = view(4, first, count, p.value_heads, 1);
      a.beta.rank = 3;
      a.o = rows(o_, p.dtype, first, count, p.value_heads, p.value_dim);
      if (a_log_ != nullptr) a.A_log = contiguous(a_log_, DType::fp32, {p.value_heads});
      if (dt_bias_ != nullptr) a.dt_bias = contiguous(dt_bias_, DType::fp32, {p.value_heads, p.key_dim});
    }
    if (p.updates || p.operation == Operation::replay) {
      a.update_u = rows(updates_[0], DType::fp32, first, count, p.value_heads, p.value_dim);
      a.update_k = rows(updates_[1], DType::fp32, first, count, p.heads, p.key_dim);
      a.update_decay = rows(updates_[2], DType::fp32, first, count, p.value_heads, p.key_dim);
    }
    if (!parents.empty()) a.parents = table(parents, true);
    if (!accepted.empty()) a.accepted = table(accepted, false);
    KernelArgs args;
    Sizes sizes;
    if (const Status ok = make_kernel_args(p, a, false, args, sizes); !ok) return ok.error().message;
    const SourceUnit unit = emit(p, variant, backend_.target()).value();
    auto& module = modules_[to_string(p) + to_string(variant)];
    if (module == nullptr) {
      const auto image = backend_.compile(unit);
      if (!image) return image.error().message + "\n" + image.error().context;
      const auto loaded = backend_.load(unit, *image);
      if (!loaded) return loaded.error().message;
      module = *loaded;
    }
    const LaunchList list = launches(p, variant, backend_.target(), sizes);
    for (int i = 0; i < list.count; ++i)
      if (const Status ok = module->launch(list.items[static_cast<std::size_t>(i)], args, nullptr); !ok)
        return ok.error().message;
    const Status ok = backend_.synchronize();
    return ok ? "" : ok.error().message;
  }

  const Backend& backend_;
  TestCase case_;
  Problem p_;
  std::int64_t b_, t_, pitch_ = 0, offset_[5] = {};
  void *packed_ = nullptr, *o_ = nullptr, *a_log_ = nullptr, *dt_bias_ = nullptr;
  std::vector<void*> updates_, all_;
  std::map<std::string, std::shared_ptr<const Module>> modules_;
};

/// What fp32 arithmetic and one rounding of the result leave.
inline double decode_tolerance(DType type) {
  return type == DType::fp32 ? 2e-6 : type == DType::fp16 ? 4e-4 : 2.5e-3;
}

/// T chained calls equal one call of T tokens to the bit (an fp32 state; a 16-bit one is rounded between
/// calls), and both agree with float64. Empty, or what is wrong.
inline std::string run_chained_decode(const Backend& backend, const CaseOptions& o, const Variant& variant) {
  Decode d(backend, o);
  const Decode::State once = d.initial(), chained = d.initial(); // in place
  if (std::string wrong = d.call(variant, 0, o.tokens, once, once); !wrong.empty()) return wrong;
  const auto [o_error, state_error] = d.errors(once);
  if (!(o_error <= decode_tolerance(o.problem.dtype))) return "o is off by " + std::to_string(o_error);
  if (!(state_error <= decode_tolerance(o.problem.state_dtype)))
    return "the state is off by " + std::to_string(state_error);
  if (o.problem.state_dtype != DType::fp32) return {};
  const Decode::Bytes first = d.output();
  for (std::int64_t t = 0; t < o.tokens; ++t)
    if (std::string wrong = d.call(variant, t, 1, chained, chained); !wrong.empty()) return wrong;
  if (d.output() != first) return "o of chained calls has other bits";
  return d.state(chained) == d.state(once) ? "" : "the state of chained calls has other bits";
}

/// What the state must be right to, fp32 all through: 1e-6 after one token, 1e-5 after 4,096. Empty, or what
/// is wrong.
inline std::string run_long_decode(const Backend& backend, StateLayout layout, int dim,
                                   const Variant& variant) {
  CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::recurrent;
  p.key_dim = p.value_dim = dim;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.state_layout = layout;
  p.gate = GateKind::softplus;
  p.qk_l2norm = p.beta_sigmoid = true;
  o.regime = Regime::slow; // a state that remembers
  for (const std::int64_t tokens : {1, 4096}) {
    o.tokens = tokens;
    Decode d(backend, o);
    const Decode::State s = d.initial();
    if (std::string wrong = d.call(variant, 0, tokens, s, s); !wrong.empty()) return wrong;
    if (const double error = d.errors(s).second; !(error <= (tokens == 1 ? 1e-6 : 1e-5)))
      return std::to_string(tokens) + " tokens: the state is off by " + std::to_string(error * 1e6) + "e-6";
  }
  return {};
}

/// Keeping updates and replaying the first tokens leaves the bits of a call of those tokens; every token of a
/// tree the bits of the chain of its ancestors.
inline std::string run_replayed_decode(const Backend& backend, CaseOptions o, const Variant& variant,
                                       const Variant& replays) {
  o.batch = 2;
  o.tokens = 6;
  Decode d(backend, o);
  const Decode::State start = d.initial(), replayed = d.initial(), straight = d.initial();
  if (std::string wrong = d.keep(variant, start); !wrong.empty()) return wrong;
  if (std::string wrong = d.replay(replays, replayed, replayed, {4, 4}); !wrong.empty()) return wrong;
  if (std::string wrong = d.call(variant, 0, 4, straight, straight); !wrong.empty()) return wrong;
  if (d.state(replayed) != d.state(straight)) return "a replay has other bits";

  const std::vector<std::int32_t> parents{-1, 0, 0, 2, 1, 2, -1, 0, 0, 2, 1, 2};
  if (std::string wrong = d.keep(variant, start, parents); !wrong.empty()) return wrong;
  const Decode::Bytes tree = d.output();
  const Decode::State path = d.initial(), branch = d.initial();
  for (const std::int64_t token : {0, 2, 5})
    if (std::string wrong = d.call(variant, token, 1, path, path); !wrong.empty()) return wrong;
  const Decode::Bytes chain = d.output();
  const std::size_t row = chain.size() / 12;
  for (const std::size_t token : {0, 2, 5, 6, 8, 11})
    if (!std::equal(chain.begin() + static_cast<std::ptrdiff_t>(token * row),
                    chain.begin() + static_cast<std::ptrdiff_t>((token + 1) * row),
                    tree.begin() + static_cast<std::ptrdiff_t>(token * row)))
      return "o of token " + std::to_string(token) + " of a tree has other bits";
  if (std::string wrong = d.replay(replays, branch, branch, {6, 6}, parents); !wrong.empty()) return wrong;
  return d.state(branch) == d.state(path) ? "" : "the replay of a path has other bits";
}

/// A few calls in which every head count, every size of K and V, every number of tokens up to 16, every dtype
/// and layout of a state occurs. `large` also takes the head counts that an emulator is slow with.
inline std::vector<CaseOptions> decode_cases(bool large) {
  constexpr int kSizes[] = {32, 64, 96, 128, 256}, kCounts[] = {1, 3, 6, 12, 20, 24, 48, 256};
  constexpr DType kTypes[] = {DType::fp32, DType::bf16, DType::fp16};
  constexpr GateKind kGates[] = {GateKind::softplus, GateKind::bounded, GateKind::log_e,
                                 GateKind::bounded_no_a};
  std::vector<CaseOptions> all;
  for (int i = 0; i < 16; ++i) {
    CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::recurrent;
    const int count = kCounts[i % 8];
    const bool many = count > 6; // then small matrices, where each element costs
    p.heads = i % 5 == 3 && count % 3 == 0 ? count / 3 : count;
    p.value_heads = count;
    p.key_dim = many && !large ? kSizes[i % 2] : kSizes[i % 5];
    p.value_dim = many && !large ? 32 : kSizes[(i * 2 + i / 5) % 5];
    p.dtype = p.gate_dtype = p.beta_dtype = kTypes[(i + i / 3) % 3];
    p.state_dtype = kTypes[(i % 4 == 3) ? 1 + i / 8 : 0];
    p.state_layout = i % 2 == 0 ? StateLayout::v_k : StateLayout::k_v;
    p.gate = kGates[i % 4];
    p.dt_bias = p.gate != GateKind::log_e;
    p.beta_sigmoid = p.qk_l2norm = true;
    o.batch = count > 48 ? 1 : 2;
    o.tokens = many && !large ? 1 + i % 4 : 16 - i;
    o.seed = static_cast<std::uint64_t>(100 + i);
    all.push_back(o);
  }
  return all;
}

} // namespace kda::test
