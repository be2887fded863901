#include "marshal.h"
#include <array>
#include <cmath>
#include <cstdint>
#include <fmt/format.h>

namespace kda {
namespace {

using Shape = std::array<std::int64_t, 4>;
constexpr std::int64_t kMostColumns = 1 << 20;                ///< of a table
constexpr std::int64_t kMostInterval = std::int64_t{1} << 30; ///< tokens of a call
constexpr std::int64_t kMostTreeTokens = 64; ///< the kernels keep a path in the bits of a word

tl::unexpected<Error> refuse(const char* name, std::string_view why) {
  return fail(ErrorCode::invalid_argument, fmt::format("{} {}", name, why));
}

Status check_tensor(const char* name, const Tensor& t, DType dtype, int rank, const Shape& shape) {
  if (t.data == nullptr) return refuse(name, "is required and absent");
  if (t.dtype != dtype)
    return refuse(name, fmt::format("is {}, the problem says {}", to_string(t.dtype), to_string(dtype)));
  if (t.rank != rank) return refuse(name, fmt::format("has rank {}, expected {}", t.rank, rank));
  for (int i = 0; i < rank; ++i)
    if (t.shape[i] != shape[static_cast<std::size_t>(i)])
      return refuse(name, fmt::format("has size {} in dimension {}, expected {}", t.shape[i], i,
                                      shape[static_cast<std::size_t>(i)]));
  return {};
}

/// Strides as given, or contiguous ones when all are 0.
Shape strides_of(const Tensor& t) {
  Shape stride{t.stride[0], t.stride[1], t.stride[2], t.stride[3]};
  bool given = false;
  for (int i = 0; i < t.rank; ++i)
    given |= t.stride[i] != 0;
  if (given) return stride;
  std::int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    stride[static_cast<std::size_t>(i)] = step;
    step *= t.shape[i];
  }
  return stride;
}

/// Rows of `row_bytes` are read in vectors of 16 bytes where they are a multiple of that, else of 8.
Status check_alignment(const char* name, const void* data, const Shape& stride, int outer, int row_bytes,
                       int element) {
  const int vector = row_bytes % 16 == 0 ? 16 : 8;
  if (reinterpret_cast<std::uintptr_t>(data) % static_cast<unsigned>(vector) != 0)
    return refuse(name, fmt::format("is at an address that is not a multiple of {} bytes", vector));
  for (int i = 0; i < outer; ++i)
    if (stride[static_cast<std::size_t>(i)] * element % vector != 0)
      return refuse(name, fmt::format("has stride {} in dimension {}, which is not a multiple of {} bytes",
                                      stride[static_cast<std::size_t>(i)], i, vector));
  return {};
}

/// The walk over the tensors of one call; the first fault stops it.
class Marshal {
public:
  Marshal(const Problem& p, const Args& a, bool host_memory, KernelArgs& out, Sizes& sizes)
      : p_(p), a_(a), host_memory_(host_memory), out_(out), s_(sizes) {}

  Status run() {
    if (Status ok = read_sizes(); !ok) return ok;
    fill_scalars();
    if (Status ok = inputs(); !ok) return ok;
    if (Status ok = parameters(); !ok) return ok;
    if (Status ok = pool(); !ok) return ok;
    if (Status ok = drafts(); !ok) return ok;
    if (Status ok = updates(); !ok) return ok;
    if (Status ok = p_.saved_interval != 0 ? saved() : interior(); !ok) return ok;
    if (Status ok = mask(); !ok) return ok;
    return p_.operation == Operation::backward || p_.operation == Operation::gate_backward ? gradients()
                                                                                           : outputs();
  }

private:
  [[nodiscard]] bool gate_only() const {
    return p_.operation == Operation::gate || p_.operation == Operation::gate_backward;
  }

  /// T and B come from g, which every operation has but replay: there from the decay.
  Status read_sizes() {
    const bool replay = p_.operation == Operation::replay;
    const char* const name = replay ? "update_decay" : "g";
    const Tensor& g = replay ? a_.update_decay : a_.g;
    if (g.data == nullptr && (g.rank != 4 || g.shape[1] != 0)) return refuse(name, "is required and absent");
    if (g.rank != 4) return refuse(name, fmt::format("has rank {}, expected 4: [B, T, HV, K]", g.rank));
    s_.batch = g.shape[0];
    s_.tokens = g.shape[1];
    s_.sequences = s_.batch;
    if (!p_.varlen) {
      if (a_.cu_seqlens.data != nullptr)
        return refuse("cu_seqlens", "is given, but the problem is not packed (varlen)");
      return check_sizes(p_, s_);
    }
    if (a_.cu_seqlens.data == nullptr)
      return refuse("cu_seqlens", "is required by a packed problem and absent");
    if (a_.cu_seqlens.dtype != p_.cu_seqlens_type)
      return refuse("cu_seqlens", fmt::format("is {}, the problem says {}", to_string(a_.cu_seqlens.dtype),
                                              to_string(p_.cu_seqlens_type)));
    if (a_.cu_seqlens.size < 1) return refuse("cu_seqlens", "needs N+1 elements, at least one");
    s_.sequences = a_.cu_seqlens.size - 1;
    if (Status ok = check_sizes(p_, s_); !ok) return ok;
    return host_memory_ ? check_cu_seqlens() : Status{};
  }

  /// Only where it can be read: on a device it is never read back, and the kernels clamp nothing.
  Status check_cu_seqlens() {
    std::int64_t before = 0;
    for (std::int64_t i = 0; i < a_.cu_seqlens.size; ++i) {
      const std::int64_t x = p_.cu_seqlens_type == IndexType::int32
                                 ? static_cast<const std::int32_t*>(a_.cu_seqlens.data)[i]
                                 : static_cast<const std::int64_t*>(a_.cu_seqlens.data)[i];
      if (i == 0 && x != 0) return refuse("cu_seqlens", fmt::format("starts at {}, expected 0", x));
      if (x < before)
        return refuse("cu_seqlens", fmt::format("decreases from {} to {} at element {}", before, x, i));
      if (x > s_.tokens)
        return refuse("cu_seqlens", fmt::format("reaches {} with only {} tokens", x, s_.tokens));
      before = x;
    }
    return {};
  }

  void fill_scalars() {
    out_ = {};
    out_.tokens = s_.tokens;
    out_.batch = static_cast<int>(s_.batch);
    out_.sequences = static_cast<int>(s_.sequences);
    out_.heads = p_.heads;
    out_.value_heads = p_.value_heads;
    out_.head_reciprocal = head_reciprocal(p_.value_heads);
    out_.scale = a_.scale == 0 ? 1.0F / std::sqrt(static_cast<float>(p_.key_dim)) : a_.scale;
    out_.lower_bound = a_.lower_bound;
    out_.cu_seqlens = a_.cu_seqlens.data;
  }

  Status tokens(const char* name, const Tensor& t, DType dtype, int heads, int dim, TokenTensor& out) {
    if (t.data == nullptr && s_.batch * s_.tokens == 0) return {};
    if (Status ok = check_tensor(name, t, dtype, 4, {s_.batch, s_.tokens, heads, dim}); !ok) return ok;
    const Shape stride = strides_of(t);
    if (stride[3] != 1) return refuse(name, "must be contiguous in its last dimension");
    if (Status ok = check_alignment(name, t.data, stride, 3, dim * size_of(dtype), size_of(dtype)); !ok)
      return ok;
    out = {t.data, stride[0], stride[1], stride[2]};
    return {};
  }
  Status beta(const char* name, const Tensor& t, TokenTensor& out) {
    if (t.data == nullptr && s_.batch * s_.tokens == 0) return {};
    if (Status ok = check_tensor(name, t, p_.beta_dtype, 3, {s_.batch, s_.tokens, p_.value_heads, 0}); !ok)
      return ok;
    if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<unsigned>(size_of(p_.beta_dtype)) != 0)
      return refuse(name, "is at an address that is not a multiple of its element size");
    const Shape stride = strides_of(t);
    out = {t.data, stride[0], stride[1], stride[2]};
    return {};
  }
  Status state(const char* name, const Tensor& t, StateTensor& out, bool slots = false) {
    if (t.data == nullptr) return {};
    const bool v_k = p_.state_layout == StateLayout::v_k;
    const std::int64_t rows = v_k ? p_.value_dim : p_.key_dim, columns = v_k ? p_.key_dim : p_.value_dim;
    const std::int64_t states = p_.state_pool || slots ? t.shape[0] : s_.sequences;
    if (Status ok = check_tensor(name, t, p_.state_dtype, 4, {states, p_.value_heads, rows, columns}); !ok)
      return ok;
    const Shape stride = strides_of(t);
    if (stride[3] != 1 || stride[2] != columns) return refuse(name, "must have a contiguous inner matrix");
    const int bytes = static_cast<int>(columns) * size_of(p_.state_dtype);
    if (Status ok = check_alignment(name, t.data, stride, 2, bytes, size_of(p_.state_dtype)); !ok) return ok;
    out = {t.data, stride[0], stride[1]};
    return {};
  }
  Status table(const char* name, const IndexTable& t, bool columns, NumberTable& out) {
    const bool wide = t.dtype == IndexType::int64;
    if (!wide && t.dtype != IndexType::int32) return refuse(name, "must be int32 or int64");
    if (t.rank != 1 && !(columns && t.rank == 2))
      return refuse(name, fmt::format("has rank {}, expected {}", t.rank,
                                      columns ? "1 or 2: [N] or [N, columns]" : "1: [N]"));
    if (t.shape[0] != s_.sequences)
      return refuse(name,
                    fmt::format("has {} elements, expected {}: one a sequence", t.shape[0], s_.sequences));
    if (t.rank == 2 && (t.shape[1] < 1 || t.shape[1] > kMostColumns))
      return refuse(name, fmt::format("has {} columns, expected 1 to {}", t.shape[1], kMostColumns));
    for (int i = 0; i < t.rank; ++i)
      if (t.stride[i] == 0 && t.shape[i] > 1)
        return refuse(name, "has stride 0: give every element a place of its own, and contiguous numbers "
                            "stride 1");
    if (reinterpret_cast<std::uintptr_t>(t.data) % (wide ? 8U : 4U) != 0)
      return refuse(name, "is at an address that is not a multiple of its element size");
    const bool matrix = t.rank == 2;
    out = {t.data, t.stride[0], matrix ? t.stride[1] : 0, matrix ? static_cast<int>(t.shape[1]) : 1,
           wide ? 1 : 0};
    return {};
  }
  /// A table by token: a batch row of T tokens needs T columns. (Packed lengths are the kernel's to check.)
  Status token_columns(const char* name, const NumberTable& t) {
    if (p_.varlen || s_.sequences == 0 || t.columns >= s_.tokens) return {};
    return refuse(name, fmt::format("has {} columns for {} tokens a sequence", t.columns, s_.tokens));
  }
  /// The slot numbers that go with `state`.
  Status slots(const char* name, const IndexTable& t, bool columns, const Tensor& state, NumberTable& out,
               long long& pool) {
    if (state.data == nullptr)
      return t.data == nullptr ? Status{} : refuse(name, "is given without its states");
    pool = state.shape[0];
    if (t.data != nullptr) return table(name, t, columns, out);
    return s_.sequences == 0 ? Status{} : refuse(name, "is required by a state pool and absent");
  }
  Status pool() {
    if (!p_.state_pool) {
      const char* const given = a_.read_slots.data != nullptr       ? "read_slots"
                                : a_.write_slots.data != nullptr    ? "write_slots"
                                : a_.padding != PaddingPolicy::none ? "padding"
                                                                    : nullptr;
      return given == nullptr ? Status{} : refuse(given, "is given, but the problem has no state pool");
    }
    constexpr int kBits[] = {0, kSkipNegative, kSkipZero, kSkipNegative | kSkipZero};
    if (a_.padding > PaddingPolicy::both)
      return refuse("padding", "is not one of none, negative, zero and both");
    out_.padding = kBits[static_cast<int>(a_.padding)];
    const bool replay = p_.operation == Operation::replay;
    if (Status ok =
            slots("read_slots", a_.read_slots, !replay, a_.initial_state, out_.read_slots, out_.read_pool);
        !ok)
      return ok;
    if (out_.read_slots.columns > 1 && a_.accepted.data == nullptr)
      return refuse("accepted", "is required to choose among the columns of read_slots");
    if (Status ok = slots("write_slots", a_.write_slots, p_.every_state, a_.final_state, out_.write_slots,
                          out_.write_pool);
        !ok)
      return ok;
    if (!p_.every_state || a_.final_state.data == nullptr) return {};
    return token_columns("write_slots", out_.write_slots);
  }
  /// Accepted counts, parents, and the word for what a kernel refuses.
  Status drafts() {
    const bool replay = p_.operation == Operation::replay;
    if (a_.accepted.data != nullptr) {
      if (!replay && (!p_.state_pool || a_.read_slots.data == nullptr))
        return refuse("accepted", "is given, but there are no read_slots to choose from");
      if (Status ok = table("accepted", a_.accepted, false, out_.accepted); !ok) return ok;
    } else if (replay && s_.sequences != 0) {
      return refuse("accepted", "is required by replay and absent");
    }
    if (!p_.tree && a_.parents.data != nullptr)
      return refuse("parents", "is given, but the problem is not a tree");
    if (p_.tree && s_.sequences != 0) {
      if (a_.parents.data == nullptr) return refuse("parents", "is required by a tree and absent");
      if (Status ok = table("parents", a_.parents, true, out_.parents); !ok) return ok;
      if (Status ok = token_columns("parents", out_.parents); !ok) return ok;
      if (!p_.varlen && s_.tokens > kMostTreeTokens)
        return refuse("parents",
                      fmt::format("describes {} tokens; a tree has at most {}", s_.tokens, kMostTreeTokens));
    }
    if (p_.tree && !replay && !p_.every_state && a_.final_state.data != nullptr)
      return refuse("final_state", "is given, but a tree has no last state: ask for every_state, or replay");
    if (a_.slot_error == nullptr) return {};
    if (!p_.state_pool && !p_.tree && !replay && p_.saved_interval == 0)
      return refuse("slot_error", "is given, but the problem has no table that could be wrong");
    if (reinterpret_cast<std::uintptr_t>(a_.slot_error) % 4 != 0)
      return refuse("slot_error", "is at an address that is not a multiple of 4 bytes");
    out_.slot_error = a_.slot_error;
    return {};
  }
  Status interior() {
    if (!p_.interior_states) {
      const bool given = a_.interior_states.data != nullptr || a_.interior_slots.data != nullptr;
      return given
                 ? refuse("interior_states", "or interior_slots is given, but the problem has none: set its "
                                             "interior_states, or the saved_interval of a backward")
                 : Status{};
    }
    if (a_.interior_states.data == nullptr) return {};
    if (Status ok = state("interior_states", a_.interior_states, out_.interior_states, true); !ok) return ok;
    out_.interior_pool = a_.interior_states.shape[0];
    if (a_.interior_interval < 64 || a_.interior_interval > kMostInterval || a_.interior_interval % 64 != 0)
      return refuse("interior_interval",
                    fmt::format("is {}, expected a multiple of 64 up to 2^30: states lie between chunks",
                                a_.interior_interval));
    out_.interior_interval = static_cast<int>(a_.interior_interval);
    if (s_.sequences == 0) return {};
    if (a_.interior_slots.data == nullptr)
      return refuse("interior_slots", "is required by interior_states and absent");
    return table("interior_slots", a_.interior_slots, true, out_.interior_slots);
  }
  Status mask() {
    if (a_.has_initial_state.data == nullptr) return {};
    if (p_.state_pool || (p_.operation != Operation::forward && p_.operation != Operation::recurrent))
      return refuse("has_initial_state",
                    "goes with the operations forward and recurrent without a state pool");
    return table("has_initial_state", a_.has_initial_state, false, out_.has_initial_state);
  }
  /// What the forward saved.
  Status saved() {
    if (a_.interior_interval != p_.saved_interval)
      return refuse("interior_interval",
                    fmt::format("is {}, the problem says {}", a_.interior_interval, p_.saved_interval));
    out_.interior_interval = p_.saved_interval;
    if (!p_.varlen && s_.tokens < p_.saved_interval) return {}; // no sequence has such a state
    if (s_.sequences == 0) return {};
    if (a_.interior_states.data == nullptr || a_.interior_slots.data == nullptr)
      return refuse(a_.interior_states.data == nullptr ? "interior_states" : "interior_slots",
                    "is required by saved_interval and absent");
    if (Status ok = state("interior_states", a_.interior_states, out_.interior_states, true); !ok) return ok;
    out_.interior_pool = a_.interior_states.shape[0];
    if (Status ok = table("interior_slots", a_.interior_slots, true, out_.interior_slots); !ok) return ok;
    const std::int64_t columns = s_.tokens / p_.saved_interval;
    if (p_.varlen || out_.interior_slots.columns >= columns) return {};
    return refuse("interior_slots",
                  fmt::format("has {} columns; {} tokens have {} saved states, one every {}",
                              out_.interior_slots.columns, s_.tokens, columns, p_.saved_interval));
  }
  Status updates() {
    if (!p_.updates && p_.operation != Operation::replay) {
      if (a_.update_u.data == nullptr && a_.update_k.data == nullptr && a_.update_decay.data == nullptr)
        return {};
      return refuse("update_u", "or update_k or update_decay is given, but the problem keeps no updates");
    }
    if (Status ok = tokens("update_u", a_.update_u, DType::fp32, p_.value_heads, p_.value_dim, out_.update_u);
        !ok)
      return ok;
    if (Status ok = tokens("update_k", a_.update_k, DType::fp32, p_.heads, p_.key_dim, out_.update_k); !ok)
      return ok;
    return tokens("update_decay", a_.update_decay, DType::fp32, p_.value_heads, p_.key_dim,
                  out_.update_decay);
  }
  template <class T>
  Status vector(const char* name, const Tensor& t, bool needed, bool per_channel, T*& out) {
    if (t.data == nullptr && !needed) return {};
    const Shape shape{p_.value_heads, p_.key_dim, 0, 0};
    if (Status ok = check_tensor(name, t, DType::fp32, per_channel ? 2 : 1, shape); !ok) return ok;
    const Shape stride = strides_of(t);
    if (stride[per_channel ? 1 : 0] != 1 || (per_channel && stride[0] != p_.key_dim))
      return refuse(name, "must be contiguous");
    if (reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0)
      return refuse(name, "is at an address that is not a multiple of 16 bytes");
    out = static_cast<T*>(t.data);
    return {};
  }

  Status inputs() {
    if (p_.operation == Operation::replay)
      return state("initial_state", a_.initial_state, out_.initial_state);
    if (Status ok = tokens("g", a_.g, p_.gate_dtype, p_.value_heads, p_.key_dim, out_.g); !ok) return ok;
    if (gate_only()) return {};
    if (Status ok = tokens("q", a_.q, p_.dtype, p_.heads, p_.key_dim, out_.q); !ok) return ok;
    if (Status ok = tokens("k", a_.k, p_.dtype, p_.heads, p_.key_dim, out_.k); !ok) return ok;
    if (Status ok = tokens("v", a_.v, p_.dtype, p_.value_heads, p_.value_dim, out_.v); !ok) return ok;
    if (Status ok = beta("beta", a_.beta, out_.beta); !ok) return ok;
    return state("initial_state", a_.initial_state, out_.initial_state);
  }
  Status parameters() {
    if (p_.operation == Operation::replay) return {};
    if (Status ok = vector("A_log", a_.A_log, reads_a_log(p_.gate), false, out_.A_log); !ok) return ok;
    if (!p_.dt_bias && a_.dt_bias.data != nullptr)
      return refuse("dt_bias", "is given, but the problem has no dt_bias");
    return vector("dt_bias", a_.dt_bias, p_.dt_bias, true, out_.dt_bias);
  }
  Status outputs() {
    if (p_.operation == Operation::gate)
      return tokens("o", a_.o, DType::fp32, p_.value_heads, p_.key_dim, out_.o);
    if (p_.operation == Operation::replay) {
      if (a_.final_state.data == nullptr && s_.sequences != 0)
        return refuse("final_state", "is required by replay and absent");
    } else if (Status ok = tokens("o", a_.o, p_.dtype, p_.value_heads, p_.value_dim, out_.o); !ok) {
      return ok;
    }
    return state("final_state", a_.final_state, out_.final_state);
  }
  Status gradients() {
    if (Status ok = tokens("d_g", a_.d_g, p_.gate_dtype, p_.value_heads, p_.key_dim, out_.d_g); !ok)
      return ok;
    if (Status ok = vector("d_A_log", a_.d_A_log, false, false, out_.d_A_log); !ok) return ok;
    if (Status ok = vector("d_dt_bias", a_.d_dt_bias, false, true, out_.d_dt_bias); !ok) return ok;
    if (p_.operation == Operation::gate_backward)
      return tokens("d_o", a_.d_o, DType::fp32, p_.value_heads, p_.key_dim, out_.d_o);
    if (Status ok = tokens("d_o", a_.d_o, p_.dtype, p_.value_heads, p_.value_dim, out_.d_o); !ok) return ok;
    if (Status ok = tokens("d_q", a_.d_q, p_.dtype, p_.heads, p_.key_dim, out_.d_q); !ok) return ok;
    if (Status ok = tokens("d_k", a_.d_k, p_.dtype, p_.heads, p_.key_dim, out_.d_k); !ok) return ok;
    if (Status ok = tokens("d_v", a_.d_v, p_.dtype, p_.value_heads, p_.value_dim, out_.d_v); !ok) return ok;
    if (Status ok = beta("d_beta", a_.d_beta, out_.d_beta); !ok) return ok;
    if (Status ok = state("d_final_state", a_.d_final_state, out_.d_final_state); !ok) return ok;
    return state("d_initial_state", a_.d_initial_state, out_.d_initial_state);
  }

  const Problem& p_;
  const Args& a_;
  bool host_memory_;
  KernelArgs& out_;
  Sizes& s_;
};

} // namespace

Status check_sizes(const Problem& p, const Sizes& s) {
  // Kernels count tokens, chunks and sequences in 32 bits and elements in 64.
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (s.batch < 0 || s.tokens < 0 || s.sequences < 0)
    return fail(ErrorCode::invalid_argument, "batch, tokens and sequences must not be negative");
  if (s.batch > kMost || s.sequences > kMost || (s.batch > 0 && s.tokens > kMost / s.batch))
    return fail(ErrorCode::invalid_argument,
                "at most 2^30 sequences and 2^30 tokens in a call are supported");
  if (p.varlen && s.batch != 1)
    return fail(ErrorCode::invalid_argument, fmt::format("a packed problem has batch 1, not {}", s.batch));
  if (!p.varlen && s.sequences != s.batch)
    return fail(
        ErrorCode::invalid_argument,
        fmt::format("{} sequences in a batch of {}; they are equal unless the problem is packed (varlen)",
                    s.sequences, s.batch));
  return {};
}

Status make_kernel_args(const Problem& p, const Args& a, bool host_memory, KernelArgs& out, Sizes& sizes) {
  return Marshal(p, a, host_memory, out, sizes).run();
}

} // namespace kda
