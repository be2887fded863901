#include "host_reference.h"
#include "kda/case_io.h"
#include <algorithm>
#include <cstring>
#include <new>

namespace kda {
namespace {

using reference::Array;

/// One call: strided typed tensors to float64 arrays and back. Rows that no sequence covers are neither read
/// nor computed; they are zero in every output.
class ReferenceCall {
public:
  /// As in every kernel, the call has the head counts: only their ratio is the problem's.
  ReferenceCall(const Problem& p, const KernelArgs& args) : p_(p), args_(args) {
    p_.heads = args.heads;
    p_.value_heads = args.value_heads;
  }

  Status run() {
    if (Status ok = fill_sizes(); !ok) return ok;
    backward();
    return {};
  }

private:
  Status fill_sizes() {
    in_.problem = p_;
    in_.sizes = {args_.batch, args_.tokens, args_.sequences};
    in_.scale = args_.scale;
    in_.lower_bound = args_.lower_bound;
    covered_ = args_.tokens;
    if (!p_.varlen) return {};
    for (std::int64_t n = 0; n <= args_.sequences; ++n)
      in_.cu_seqlens.push_back(p_.cu_seqlens_type == IndexType::int32
                                   ? static_cast<const std::int32_t*>(args_.cu_seqlens)[n]
                                   : static_cast<const std::int64_t*>(args_.cu_seqlens)[n]);
    covered_ = in_.cu_seqlens.back();
    if (in_.cu_seqlens.front() != 0 || covered_ > args_.tokens ||
        !std::is_sorted(in_.cu_seqlens.begin(), in_.cu_seqlens.end()))
      return fail(ErrorCode::invalid_argument,
                  "cu_seqlens must start at 0, not decrease, and end at or before the number of tokens");
    return {};
  }

  // --- tensors ---------------------------------------------------------------------------------------------
  /// Calls `visit(row, address)` for each row of `dim` elements that a sequence covers, or for the others.
  template <class Visit>
  void each_row(const TokenTensor& x, std::int64_t heads, DType type, bool covered,
                const Visit& visit) const {
    for (std::int64_t b = 0; b < args_.batch; ++b)
      for (std::int64_t t = covered ? 0 : covered_; t < (covered ? covered_ : args_.tokens); ++t)
        for (std::int64_t h = 0; h < heads; ++h)
          visit(static_cast<std::size_t>((b * args_.tokens + t) * heads + h),
                static_cast<std::byte*>(x.data) +
                    (b * x.stride_batch + t * x.stride_token + h * x.stride_head) * size_of(type));
  }
  [[nodiscard]] Array read(const TokenTensor& x, std::int64_t heads, std::int64_t dim, DType type) const {
    const auto bytes = static_cast<std::size_t>(dim * size_of(type));
    std::vector<std::byte> dense(static_cast<std::size_t>(args_.batch * args_.tokens * heads) * bytes);
    each_row(x, heads, type, true, [&](std::size_t row, const std::byte* at) {
      std::memcpy(dense.data() + row * bytes, at, bytes);
    });
    return unpack(dense, file_dtype(type));
  }
  void write(const TokenTensor& x, std::int64_t heads, std::int64_t dim, DType type,
             const Array& values) const {
    const std::vector<std::byte> dense = pack(values, type);
    const auto bytes = static_cast<std::size_t>(dim * size_of(type));
    each_row(x, heads, type, true,
             [&](std::size_t row, std::byte* at) { std::memcpy(at, dense.data() + row * bytes, bytes); });
    each_row(x, heads, type, false, [&](std::size_t, std::byte* at) { std::memset(at, 0, bytes); });
  }

  template <class Visit>
  void each_state(const StateTensor& x, const Visit& visit) const {
    const std::size_t bytes = state_bytes();
    for (std::int64_t n = 0; n < args_.sequences; ++n)
      for (std::int64_t h = 0; h < p_.value_heads; ++h)
        visit(static_cast<std::size_t>(n * p_.value_heads + h) * bytes,
              static_cast<std::byte*>(x.data) +
                  (n * x.stride_sequence + h * x.stride_head) * size_of(p_.state_dtype));
  }
  [[nodiscard]] std::size_t state_bytes() const {
    return static_cast<std::size_t>(p_.key_dim) * static_cast<std::size_t>(p_.value_dim) *
           static_cast<std::size_t>(size_of(p_.state_dtype));
  }
  /// Empty when the state is absent.
  [[nodiscard]] Array read(const StateTensor& x) const {
    if (x.data == nullptr) return {};
    std::vector<std::byte> dense(static_cast<std::size_t>(args_.sequences * p_.value_heads) * state_bytes());
    each_state(x, [&](std::size_t offset, const std::byte* at) {
      std::memcpy(dense.data() + offset, at, state_bytes());
    });
    Array values = unpack(dense, file_dtype(p_.state_dtype));
    return p_.state_layout == StateLayout::v_k ? transposed(values, p_.value_dim, p_.key_dim) : values;
  }
  void write(const StateTensor& x, Array values) const {
    if (x.data == nullptr) return;
    if (p_.state_layout == StateLayout::v_k) values = transposed(values, p_.key_dim, p_.value_dim);
    const std::vector<std::byte> dense = pack(values, p_.state_dtype);
    each_state(
        x, [&](std::size_t offset, std::byte* at) { std::memcpy(at, dense.data() + offset, state_bytes()); });
  }
  static void write(float* to, const Array& values) {
    if (to != nullptr)
      std::transform(values.begin(), values.end(), to, [](double x) { return static_cast<float>(x); });
  }

  // --- the operation
  // -----------------------------------------------------------------------------------------
  void read_inputs() {
    in_.q = read(args_.q, p_.heads, p_.key_dim, p_.dtype);
    in_.k = read(args_.k, p_.heads, p_.key_dim, p_.dtype);
    in_.v = read(args_.v, p_.value_heads, p_.value_dim, p_.dtype);
    in_.g = read(args_.g, p_.value_heads, p_.key_dim, p_.gate_dtype);
    in_.beta = read(args_.beta, p_.value_heads, 1, p_.beta_dtype);
    in_.initial_state = read(args_.initial_state);
    if (reads_a_log(p_.gate)) in_.A_log.assign(args_.A_log, args_.A_log + p_.value_heads);
    if (p_.dt_bias) in_.dt_bias.assign(args_.dt_bias, args_.dt_bias + p_.value_heads * p_.key_dim);
  }

  void backward() {
    read_inputs();
    const reference::OutputGradients given{read(args_.d_o, p_.value_heads, p_.value_dim, p_.dtype),
                                           read(args_.d_final_state)};
    const reference::Gradients out = reference::adjoint(in_, given);
    write(args_.d_q, p_.heads, p_.key_dim, p_.dtype, out.d_q);
    write(args_.d_k, p_.heads, p_.key_dim, p_.dtype, out.d_k);
    write(args_.d_v, p_.value_heads, p_.value_dim, p_.dtype, out.d_v);
    write(args_.d_beta, p_.value_heads, 1, p_.beta_dtype, out.d_beta);
    write(args_.d_initial_state, out.d_initial_state);
    write(args_.d_g, p_.value_heads, p_.key_dim, p_.gate_dtype, out.d_g);
    write(args_.d_A_log, out.d_A_log);
    write(args_.d_dt_bias, out.d_dt_bias);
  }

  Problem p_;
  const KernelArgs& args_;
  reference::Inputs in_;
  std::int64_t covered_ = 0; ///< tokens that some sequence covers
};

class ReferenceModule : public Module {
public:
  explicit ReferenceModule(const Problem& p) : p_(p) {}

  Status launch(const Launch&, const KernelArgs& args, void*) const override {
    try {
      return ReferenceCall(p_, args).run();
    } catch (const std::bad_alloc&) {
      return fail(ErrorCode::out_of_memory,
                  "the float64 reference does not fit into memory; use fewer tokens or a GPU");
    }
  }

private:
  Problem p_;
};

} // namespace

std::shared_ptr<const Module> make_reference_module(const Problem& p) {
  return std::make_shared<ReferenceModule>(p);
}

} // namespace kda
