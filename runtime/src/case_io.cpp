// Safetensors file -> Problem, Sizes and float64 arrays. Every refusal names the tensor or option.
#include "kda/case_io.h"
#include <algorithm>
#include <charconv>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

using Shape = std::vector<std::int64_t>;

tl::unexpected<Error> wrong(std::string why) {
  return fail(ErrorCode::invalid_argument, std::move(why));
}

std::string shape_text(const Shape& shape) {
  return fmt::format("[{}]", fmt::join(shape, ","));
}

Result<bool> read_bool(const Case& c, const char* key) {
  const auto it = c.file.metadata.find(key);
  if (it == c.file.metadata.end()) return false;
  if (it->second == "True" || it->second == "true" || it->second == "1") return true;
  if (it->second == "False" || it->second == "false" || it->second == "0") return false;
  return wrong(fmt::format("option {} is '{}'; True or False are understood", key, it->second));
}

Result<double> read_number(const Case& c, const char* key, double otherwise) {
  const auto it = c.file.metadata.find(key);
  if (it == c.file.metadata.end()) return otherwise;
  const std::string& text = it->second;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !std::isfinite(value))
    return wrong(fmt::format("option {} is '{}', not a number", key, text));
  return value;
}

/// Reads the problem out of a file, one group of tensors a step; each step relies on the ones before.
class Reader {
public:
  explicit Reader(Case& c) : c_(c), p_(c.problem) {}

  Status run() {
    for (const auto step : {&Reader::options, &Reader::gate_kind, &Reader::token_tensors,
                            &Reader::gate_tensors, &Reader::sequences, &Reader::states})
      if (Status ok = (this->*step)(); !ok) return ok;
    return validate(p_);
  }

private:
  [[nodiscard]] const safetensors::Tensor* find(const char* name) const {
    const auto it = c_.file.tensors.find(name);
    return it == c_.file.tensors.end() ? nullptr : &it->second;
  }

  Result<const safetensors::Tensor*> need(const char* name, const char* why = "every problem has one") const {
    const auto* t = find(name);
    if (t == nullptr) return wrong(fmt::format("tensor {} is missing; {}", name, why));
    return t;
  }

  Status expect_shape(const char* name, const safetensors::Tensor& t, const Shape& expected) const {
    if (t.shape == expected) return {};
    return wrong(fmt::format("tensor {} has shape {}; {} is expected here", name, shape_text(t.shape),
                             shape_text(expected)));
  }

  Status expect_dtype(const char* name, const safetensors::Tensor& t, DType& dtype) const {
    switch (t.dtype) {
    case safetensors::DType::bf16: dtype = DType::bf16; return {};
    case safetensors::DType::f16: dtype = DType::fp16; return {};
    case safetensors::DType::f32: dtype = DType::fp32; return {};
    default:
      return wrong(fmt::format("tensor {} has dtype {}; BF16, F16 and F32 are supported", name,
                               safetensors::to_string(t.dtype)));
    }
  }

  Status options() {
    struct Flag {
      const char* key;
      bool& field;
    };
    for (const Flag flag : {Flag{"beta_sigmoid", p_.beta_sigmoid},
                            Flag{"allow_neg_eigval", p_.beta_times_two}, Flag{"qk_l2norm", p_.qk_l2norm}}) {
      const auto value = read_bool(c_, flag.key);
      if (!value) return tl::unexpected(value.error());
      flag.field = *value;
    }
    const auto scale = read_number(c_, "scale", 0), bound = read_number(c_, "lower_bound", -5);
    if (!scale) return tl::unexpected(scale.error());
    if (!bound) return tl::unexpected(bound.error());
    c_.scale = *scale;
    c_.lower_bound = *bound;
    const auto layout = c_.file.metadata.find("state_layout");
    if (layout == c_.file.metadata.end() || layout->second == "KV" || layout->second == "k_v")
      p_.state_layout = StateLayout::k_v;
    else if (layout->second == "VK" || layout->second == "v_k")
      p_.state_layout = StateLayout::v_k;
    else
      return wrong(fmt::format("option state_layout is '{}'; choose KV or VK", layout->second));
    return {};
  }

  Status gate_kind() {
    const auto gate = c_.file.metadata.find("gate");
    if (gate == c_.file.metadata.end())
      return wrong("the file's metadata has no gate; choose one of precomputed, log2, softplus, bounded, "
                   "bounded_no_a");
    const auto kind = parse_gate(gate->second == "precomputed" ? "log_e" : gate->second);
    if (!kind) return tl::unexpected(kind.error());
    p_.gate = *kind;
    const auto has_a = read_bool(c_, "has_A_log");
    if (!has_a) return tl::unexpected(has_a.error());
    const bool says_no = c_.file.metadata.count("has_A_log") != 0 && !*has_a;
    if (p_.gate == GateKind::bounded && says_no) p_.gate = GateKind::bounded_no_a;
    return {};
  }

  /// q, k, v: they define B, T, H, HV, K, V and the dtype.
  Status token_tensors() {
    const auto q = need("q"), k = need("k"), v = need("v");
    for (const auto* t : {&q, &k, &v})
      if (!*t) return tl::unexpected(t->error());
    const std::size_t rank = (*q)->shape.size();
    if (rank != 3 && rank != 4)
      return wrong(
          fmt::format("tensor q has shape {}; [T,H,K] or [B,T,H,K] is expected", shape_text((*q)->shape)));
    prefix_.assign((*q)->shape.begin(), (*q)->shape.end() - 2);
    const Shape& vs = (*v)->shape;
    if (vs.size() != rank || !std::equal(prefix_.begin(), prefix_.end(), vs.begin()))
      return wrong(fmt::format("tensor v has shape {}; its first {} extents must be those of q, {}",
                               shape_text(vs), rank - 2, shape_text((*q)->shape)));
    for (const std::int64_t extent :
         {(*q)->shape[rank - 2], (*q)->shape[rank - 1], vs[rank - 2], vs[rank - 1]})
      if (extent > 1 << 20) return wrong(fmt::format("an extent of {} is not supported", extent));
    p_.heads = static_cast<int>((*q)->shape[rank - 2]);
    p_.key_dim = static_cast<int>((*q)->shape[rank - 1]);
    p_.value_heads = static_cast<int>(vs[rank - 2]);
    p_.value_dim = static_cast<int>(vs[rank - 1]);
    c_.sizes = {rank == 4 ? prefix_[0] : 1, prefix_.back(), rank == 4 ? prefix_[0] : 1};
    if (Status ok = expect_shape("k", **k, (*q)->shape); !ok) return ok;
    if (Status ok = expect_dtype("q", **q, p_.dtype); !ok) return ok;
    for (const auto& [name, t] : {std::pair{"k", *k}, std::pair{"v", *v}})
      if (t->dtype != (*q)->dtype)
        return wrong(fmt::format("tensor {} has dtype {} and q has {}; q, k and v must agree", name,
                                 safetensors::to_string(t->dtype), safetensors::to_string((*q)->dtype)));
    return {};
  }

  Status gate_tensors() {
    const auto g = need("g"), beta = need("beta");
    if (!g) return tl::unexpected(g.error());
    if (!beta) return tl::unexpected(beta.error());
    if (Status ok = expect_shape("g", **g, per_token({p_.value_heads, p_.key_dim})); !ok) return ok;
    if (Status ok = expect_dtype("g", **g, p_.gate_dtype); !ok) return ok;
    if (Status ok = expect_shape("beta", **beta, per_token({p_.value_heads})); !ok) return ok;
    if (Status ok = expect_dtype("beta", **beta, p_.beta_dtype); !ok) return ok;
    if (reads_a_log(p_.gate)) {
      const auto a = need("A_log", "the gates softplus and bounded need it (bounded_no_a does not)");
      if (!a) return tl::unexpected(a.error());
      if (Status ok = parameter("A_log", **a, {p_.value_heads}); !ok) return ok;
    }
    const auto* bias = find("dt_bias");
    p_.dt_bias = bias != nullptr;
    return bias == nullptr ? Status() : parameter("dt_bias", *bias, {p_.value_heads, p_.key_dim});
  }

  Status parameter(const char* name, const safetensors::Tensor& t, const Shape& shape) const {
    if (t.dtype != safetensors::DType::f32)
      return wrong(
          fmt::format("tensor {} has dtype {}; F32 is supported", name, safetensors::to_string(t.dtype)));
    return expect_shape(name, t, shape);
  }

  Status sequences() {
    const auto* cu = find("cu_seqlens");
    p_.varlen = cu != nullptr;
    if (cu == nullptr) return {};
    if (c_.sizes.batch != 1)
      return wrong(
          fmt::format("cu_seqlens packs sequences into one batch row, and q has {}", c_.sizes.batch));
    if (cu->shape.size() != 1 || cu->shape[0] < 2)
      return wrong(fmt::format("cu_seqlens has shape {}; [N+1] is expected", shape_text(cu->shape)));
    if (cu->dtype != safetensors::DType::i64 && cu->dtype != safetensors::DType::i32)
      return wrong(fmt::format("cu_seqlens has dtype {}; I64 and I32 are supported",
                               safetensors::to_string(cu->dtype)));
    p_.cu_seqlens_type = cu->dtype == safetensors::DType::i64 ? IndexType::int64 : IndexType::int32;
    for (const double x : unpack(cu->data, cu->dtype))
      c_.cu_seqlens.push_back(static_cast<std::int64_t>(x));
    c_.sizes.sequences = cu->shape[0] - 1;
    const bool increasing = std::is_sorted(c_.cu_seqlens.begin(), c_.cu_seqlens.end());
    if (c_.cu_seqlens.front() != 0 || c_.cu_seqlens.back() > c_.sizes.tokens || !increasing)
      return wrong(
          fmt::format("cu_seqlens must start at 0, never decrease and end at or before T = {}; it is {}",
                      c_.sizes.tokens, shape_text(c_.cu_seqlens)));
    return {};
  }

  Status states() {
    const Shape state = p_.state_layout == StateLayout::k_v
                            ? Shape{c_.sizes.sequences, p_.value_heads, p_.key_dim, p_.value_dim}
                            : Shape{c_.sizes.sequences, p_.value_heads, p_.value_dim, p_.key_dim};
    if (const auto* t = find("initial_state")) {
      if (Status ok = expect_shape("initial_state", *t, state); !ok) return ok;
      if (Status ok = expect_dtype("initial_state", *t, p_.state_dtype); !ok) return ok;
    }
    if (const auto* t = find("dht"))
      if (Status ok = expect_shape("dht", *t, state); !ok) return ok;
    if (const auto* t = find("do")) return expect_shape("do", *t, (*need("v"))->shape);
    return {};
  }

  [[nodiscard]] Shape per_token(std::initializer_list<std::int64_t> rest) const {
    Shape shape = prefix_;
    shape.insert(shape.end(), rest);
    return shape;
  }

  Case& c_;
  Problem& p_;
  Shape prefix_; ///< [T] or [B,T]
};

bool is_state(const std::string& name) {
  return name == "initial_state" || name == "final_state" || name == "dht" || name == "dinitial_state";
}

} // namespace

Result<Case> make_case(safetensors::File file) {
  Case c;
  c.file = std::move(file);
  if (const auto it = c.file.metadata.find("name"); it != c.file.metadata.end()) c.name = it->second;
  if (const Status ok = Reader(c).run(); !ok) return tl::unexpected(ok.error());
  return c;
}

Result<Case> read_case(const std::filesystem::path& path) {
  auto file = safetensors::read(path);
  if (!file) return tl::unexpected(file.error());
  auto c = make_case(std::move(*file));
  if (!c)
    return fail(c.error().code, fmt::format("{}: {}", path.string(), c.error().message), c.error().context);
  if (c->name.empty()) c->name = path.stem().string();
  return c;
}

reference::Array values(const Case& c, const std::string& name) {
  const auto it = c.file.tensors.find(name);
  if (it == c.file.tensors.end()) return {};
  reference::Array x = unpack(it->second.data, it->second.dtype);
  if (is_state(name) && c.problem.state_layout == StateLayout::v_k)
    return transposed(x, c.problem.value_dim, c.problem.key_dim);
  return x;
}

reference::Inputs reference_inputs(const Case& c) {
  reference::Inputs in;
  in.problem = c.problem;
  in.sizes = c.sizes;
  in.scale = c.scale;
  in.lower_bound = c.lower_bound;
  in.cu_seqlens = c.cu_seqlens;
  in.q = values(c, "q");
  in.k = values(c, "k");
  in.v = values(c, "v");
  in.g = values(c, "g");
  in.beta = values(c, "beta");
  in.A_log = values(c, "A_log");
  in.dt_bias = values(c, "dt_bias");
  in.initial_state = values(c, "initial_state");
  return in;
}

reference::OutputGradients reference_output_gradients(const Case& c) {
  return {values(c, "do"), values(c, "dht")};
}

} // namespace kda
