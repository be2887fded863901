// The recurrence token by token as LLVM IR. An item is a slice of V columns of one head of one sequence,
// whose state lies in scratch as [K][columns]. Per token one pass over it: the update of the token before, S
// <- S + k' u, then S <- d S, a = k.S and b = q.S; u = beta (v - a) and o = b + (q.k) u need no second pass.
#include "cuda/kernel_args.cuh"
#include "emit.h"
#include "kernel.h"
#include <algorithm>
#include <fmt/format.h>

namespace kda {
namespace {

using host::f32;
using host::i64;
using host::Value;
using host::Values;

class Recurrent : host::Kernel {
public:
  Recurrent(const Problem& p, const Variant& v, const Target& t)
      : Kernel("kda_host_recurrent", p, t.vector_bytes), columns_(v.rows),
        slices_((p.value_dim + v.rows - 1) / v.rows) {}

  std::string text() {
    allocate();
    ir_.loop(Value{"i64", "%begin"}, Value{"i64", "%end"}, 1, [&](const Value& item) { run_item(item); });
    return ir_.finish();
  }

private:
  Rows rows(std::size_t offset, DType type, const Value& head) {
    return Kernel::rows(offset, type, batch_, head);
  }

  // --- scratch ---------------------------------------------------------------------------------------------
  void allocate() {
    const int keys = padded(p_.key_dim);
    state_ = ir_.scratch(static_cast<std::int64_t>(p_.key_dim) * columns_);
    for (Value* x : {&q_, &gate_, &bias_, &keys_[0], &keys_[1]})
      *x = ir_.scratch(keys);
    for (Value* x : {&v_, &u_, &o_})
      *x = ir_.scratch(columns_);
    // What lies behind K and V stays zero and adds nothing to a sum.
    for (const Value& x : {q_, gate_, bias_, keys_[0], keys_[1]})
      zero(x, keys);
    zero(v_, columns_);
  }
  Value state_row(const Value& k) { return ir_.at(state_, "float", ir_.mul(k, i64(columns_))); }

  // --- an item ---------------------------------------------------------------------------------------------
  void run_item(const Value& item) {
    const Value slice = ir_.op("srem", item, i64(slices_));
    const Value rest = ir_.div(item, i64(slices_));
    head_ = ir_.op("srem", rest, i64(p_.value_heads));
    sequence_ = ir_.div(rest, i64(p_.value_heads));
    column_ = ir_.mul(slice, i64(columns_));
    const Value left = ir_.sub(i64(p_.value_dim), column_);
    valid_ = ir_.select(ir_.compare("icmp slt", left, i64(columns_)), left, i64(columns_));
    if (!p_.varlen) {
      batch_ = sequence_;
      return run_in_place(i64(0), field("i64", offsetof(KernelArgs, tokens)));
    }
    // The sequence after the last one is the padding behind the packed tokens.
    batch_ = i64(0);
    const Value begin = boundary(sequence_);
    const Value real = ir_.compare("icmp slt", sequence_, count(offsetof(KernelArgs, sequences)));
    ir_.branch(
        real, [&] { run_in_place(begin, boundary(ir_.add(sequence_, i64(1)))); },
        [&] { zero_output(begin, field("i64", offsetof(KernelArgs, tokens))); });
  }

  Value output_row(const Rows& o, const Value& t) { return ir_.at(row(o, t), o.element, column_); }

  void zero_output(const Value& begin, const Value& end) {
    const Rows o = rows(offsetof(KernelArgs, o), p_.dtype, head_);
    zero(o_, columns_);
    ir_.loop(begin, end, 1,
             [&](const Value& t) { host::store_row(ir_, p_.dtype, o_, output_row(o, t), valid_); });
  }

  // --- the state pool --------------------------------------------------------------------------------------
  Value is_present(std::size_t offset) {
    return ir_.compare("icmp ne", field("ptr", offset), {"ptr", "null"});
  }
  Value both(const Value& a, const Value& b) { return ir_.op("and", a, b); }
  Value either(const Value& a, const Value& b) { return ir_.op("or", a, b); }
  Value is_padding(const Value& slot) {
    const Value policy = count(offsetof(KernelArgs, padding));
    const auto skips = [&](Padding bit) {
      return ir_.compare("icmp ne", ir_.op("and", policy, i64(bit)), i64(0));
    };
    return either(both(skips(kSkipNegative), ir_.compare("icmp slt", slot, i64(0))),
                  both(skips(kSkipZero), ir_.compare("icmp eq", slot, i64(0))));
  }
  /// This sequence's number, or kNowhere without a table.
  Value number(std::size_t table, const Value& present) {
    const Value wide = ir_.compare("icmp ne", count(table + offsetof(NumberTable, wide)), i64(0));
    // Without a table some words that are there are read, and not used.
    const Value data = ir_.select(present, field("ptr", table + offsetof(NumberTable, data)), o_);
    Value words = ir_.mul(sequence_, field("i64", table + offsetof(NumberTable, stride_sequence)));
    words = ir_.select(present, ir_.select(wide, ir_.add(words, words), words), i64(0));
    const auto word = [&](const Value& at) { return ir_.load("i32", ir_.at(data, "i32", at), 4); };
    const Value low = word(words), high = word(ir_.select(wide, ir_.add(words, i64(1)), words));
    const Value both_words =
        ir_.op("or", ir_.op("shl", ir_.cast("zext", high, "i64"), i64(32)), ir_.cast("zext", low, "i64"));
    return ir_.select(present, ir_.select(wide, both_words, ir_.cast("sext", low, "i64")), i64(kNowhere));
  }
  Value outside(const Value& slot, std::size_t slots) {
    return ir_.compare("icmp uge", slot, field("i64", slots));
  }

  /// Finds where the states lie, and runs the sequence unless it is padding or refused: find_places of
  /// recurrent.cu.
  void run_in_place(const Value& begin, const Value& end) {
    read_ = write_ = sequence_;
    if (!p_.state_pool) return run_sequence(begin, end);
    constexpr std::size_t kRead = offsetof(KernelArgs, read_slots),
                          kWrite = offsetof(KernelArgs, write_slots);
    const Value reads = is_present(offsetof(KernelArgs, initial_state)),
                writes = is_present(offsetof(KernelArgs, final_state));
    read_ = number(kRead, reads);
    const Value write = number(kWrite, writes), skipped = is_padding(write);
    const Value padding = ir_.select(reads, is_padding(read_), both(writes, skipped));
    const Value keeps = both(writes, ir_.op("xor", skipped, {"i1", "true"}));
    const Value refused = either(both(reads, outside(read_, offsetof(KernelArgs, read_pool))),
                                 both(keeps, outside(write, offsetof(KernelArgs, write_pool))));
    write_ = ir_.select(keeps, write, i64(kNowhere));
    ir_.branch(
        either(padding, refused),
        [&] {
          zero_output(begin, end);
          ir_.branch(
              padding, [] {}, [&] { report(); });
        },
        [&] { run_sequence(begin, end); });
  }
  /// One of the items of a refused sequence raises the error word.
  void report() {
    const Value word = field("ptr", offsetof(KernelArgs, slot_error));
    const Value first = ir_.compare("icmp eq", ir_.add(head_, column_), i64(0));
    ir_.branch(
        both(first, ir_.compare("icmp ne", word, {"ptr", "null"})),
        [&] {
          const Value number = ir_.cast("trunc", ir_.add(sequence_, i64(1)), "i32");
          ir_.emit("i32", fmt::format("atomicrmw max ptr {}, i32 {} monotonic", word.name, number.name));
        },
        [] {});
  }

  void run_sequence(const Value& begin, const Value& end) {
    load_state();
    load_head();
    zero(keys_[1], padded(p_.key_dim)); // before the first token: no update
    zero(u_, columns_);
    const Values last = ir_.loop(begin, end, 1, {keys_[0], keys_[1]}, [&](const Value& t, const Values& k) {
      const Token token = prepare(t, k[0]);
      for (int c = 0; c < columns_; c += 4 * width_)
        step(token, k[0], k[1], c, std::min(4 * width_, columns_ - c) / width_);
      host::store_row(ir_, p_.dtype, o_, output_row(o_rows_, t), valid_);
      return Values{k[1], k[0]};
    });
    store_state(last[1]);
  }

  // --- states ----------------------------------------------------------------------------------------------
  /// Calls `body` with this head's matrix when the tensor is present and `place` is one of its states.
  void with_state(std::size_t offset, const Value& place,
                  const std::function<void(const Value& matrix)>& body) {
    const Value data = field("ptr", offset);
    Value wanted = is_present(offset);
    if (p_.state_pool) wanted = both(wanted, ir_.compare("icmp ne", place, i64(kNowhere)));
    ir_.branch(
        wanted,
        [&] {
          const Value n = ir_.mul(place, field("i64", offset + offsetof(StateTensor, stride_sequence)));
          const Value h = ir_.mul(head_, field("i64", offset + offsetof(StateTensor, stride_head)));
          body(ir_.at(data, host::element_type(p_.state_dtype), ir_.add(n, h)));
        },
        [] {});
  }
  /// Row k of a [K,V] matrix, from this slice's first column on.
  Value matrix_row(const Value& matrix, const Value& k) {
    return ir_.at(matrix, host::element_type(p_.state_dtype),
                  ir_.add(ir_.mul(k, i64(p_.value_dim)), column_));
  }
  /// Calls `body` for each element of a [V,K] matrix, with its address there and in scratch. Sixteen columns
  /// at a time: their lines stay in the L1 cache while k runs along them.
  void transpose(const Value& matrix,
                 const std::function<void(const Value& there, const Value& here)>& body) {
    const char* const element = host::element_type(p_.state_dtype);
    ir_.loop(i64(0), valid_, 16, [&](const Value& first) {
      const Value behind = ir_.add(first, i64(16));
      const Value end = ir_.select(ir_.compare("icmp slt", behind, valid_), behind, valid_);
      ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& k) {
        const Value line = state_row(k), column = ir_.at(matrix, element, k);
        ir_.loop(first, end, 1, [&](const Value& c) {
          const Value offset = ir_.mul(ir_.add(column_, c), i64(p_.key_dim));
          body(ir_.at(column, element, offset), ir_.at(line, "float", c));
        });
      });
    });
  }

  void load_state() {
    zero(state_, static_cast<std::int64_t>(p_.key_dim) * columns_);
    with_state(offsetof(KernelArgs, initial_state), read_, [&](const Value& matrix) {
      if (p_.state_layout == StateLayout::v_k)
        return transpose(matrix, [&](const Value& there, const Value& here) {
          ir_.store(host::load_element(ir_, p_.state_dtype, there), here, 4);
        });
      ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& k) {
        host::load_row(ir_, p_.state_dtype, matrix_row(matrix, k), state_row(k), valid_);
      });
    });
  }

  /// `k`: the keys of the last token, whose update is still due.
  void store_state(const Value& k) {
    with_state(offsetof(KernelArgs, final_state), write_, [&](const Value& matrix) {
      ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& d) {
        const Value key = ir_.splat(ir_.load("float", ir_.at(k, "float", d), 4), width_);
        ir_.loop(i64(0), i64(columns_), width_, [&](const Value& c) {
          put(ir_.fma(key, vector_at(u_, c), vector_at(state_row(d), c)), state_row(d), c);
        });
        if (p_.state_layout == StateLayout::k_v)
          host::store_row(ir_, p_.state_dtype, state_row(d), matrix_row(matrix, d), valid_);
      });
      if (p_.state_layout == StateLayout::v_k)
        transpose(matrix, [&](const Value& there, const Value& here) {
          ir_.store(host::narrow(ir_, p_.state_dtype, ir_.load("float", here, 4)), there,
                    size_of(p_.state_dtype));
        });
    });
  }

  // --- a token ---------------------------------------------------------------------------------------------
  void load_head() {
    const Value key_head = ir_.div(head_, i64(p_.value_heads / p_.heads));
    q_rows_ = rows(offsetof(KernelArgs, q), p_.dtype, key_head);
    k_rows_ = rows(offsetof(KernelArgs, k), p_.dtype, key_head);
    v_rows_ = rows(offsetof(KernelArgs, v), p_.dtype, head_);
    o_rows_ = rows(offsetof(KernelArgs, o), p_.dtype, head_);
    g_rows_ = rows(offsetof(KernelArgs, g), p_.gate_dtype, head_);
    beta_rows_ = rows(offsetof(KernelArgs, beta), p_.beta_dtype, head_);
    bound_ = field("float", offsetof(KernelArgs, lower_bound));
    scale_ = field("float", offsetof(KernelArgs, scale));
    a_ = f32(1);
    if (reads_a_log(p_.gate)) {
      const Value a_log = field("ptr", offsetof(KernelArgs, A_log));
      a_ = host::exp(ir_, ir_.load("float", ir_.at(a_log, "float", head_), 4));
    }
    if (p_.dt_bias) {
      const Value bias = field("ptr", offsetof(KernelArgs, dt_bias));
      host::load_row(ir_, DType::fp32, ir_.at(bias, "float", ir_.mul(head_, i64(p_.key_dim))), bias_,
                     i64(p_.key_dim));
    }
  }

  struct Token {
    Value beta, qk; ///< beta activated; q.k
  };
  /// Fills q_ (normalised and scaled), `k` (normalised), gate_ (the decay) and v_.
  Token prepare(const Value& t, const Value& k) {
    const Value keys = i64(p_.key_dim);
    host::load_row(ir_, p_.dtype, row(q_rows_, t), q_, keys);
    host::load_row(ir_, p_.dtype, row(k_rows_, t), k, keys);
    host::load_row(ir_, p_.gate_dtype, row(g_rows_, t), gate_, keys);
    host::load_row(ir_, p_.dtype, ir_.at(row(v_rows_, t), v_rows_.element, column_), v_, valid_);
    const Value a = ir_.splat(a_, width_), bound = ir_.splat(bound_, width_);
    const Value none = zeros();
    const Values sums = ir_.loop(
        i64(0), i64(padded(p_.key_dim)), width_, {none, none, none}, [&](const Value& i, const Values& s) {
          const Value q = vector_at(q_, i), key = vector_at(k, i);
          const Value bias = p_.dt_bias ? vector_at(bias_, i) : none;
          const Value decay = host::gate_log2(ir_, p_, vector_at(gate_, i), bias, a, bound);
          put(host::exp2(ir_, decay), gate_, i);
          return Values{ir_.fma(q, q, s[0]), ir_.fma(key, key, s[1]), ir_.fma(q, key, s[2])};
        });
    Value q_factor = scale_, k_factor = f32(1);
    if (p_.qk_l2norm) {
      q_factor = ir_.mul(scale_, norm_factor(sums[0]));
      k_factor = norm_factor(sums[1]);
    }
    const Value q_wide = ir_.splat(q_factor, width_), k_wide = ir_.splat(k_factor, width_);
    ir_.loop(i64(0), i64(padded(p_.key_dim)), width_, [&](const Value& i) {
      put(ir_.mul(vector_at(q_, i), q_wide), q_, i);
      if (p_.qk_l2norm) put(ir_.mul(vector_at(k, i), k_wide), k, i);
    });
    const Value beta = host::load_element(ir_, p_.beta_dtype, row(beta_rows_, t));
    return {host::beta_value(ir_, p_, beta), ir_.mul(ir_.mul(horizontal(sums[2]), q_factor), k_factor)};
  }

  Value horizontal(const Value& x) {
    const Value zero = f32(-0.0F);
    const std::string name = fmt::format("llvm.vector.reduce.fadd.v{}f32", width_);
    // `reassoc` lets it add in a tree; the order is the same in every run.
    return ir_.call("float", name, {zero, x}, "reassoc ");
  }
  Value norm_factor(const Value& squares) {
    constexpr float kEpsilon = 1e-6F;
    return ir_.div(f32(1), ir_.intrinsic("sqrt", {ir_.add(horizontal(squares), f32(kEpsilon))}));
  }

  /// `vectors` vectors of columns from `first` on: the update of the last token (`before`, u_), then this
  /// one.
  void step(const Token& token, const Value& k, const Value& before, int first, int vectors) {
    const auto column = [&](int n) { return i64(first + n * width_); };
    Values u;
    for (int n = 0; n < vectors; ++n)
      u.push_back(vector_at(u_, column(n)));
    constexpr int kUnroll = 4; // K is a multiple of it
    const auto many = static_cast<std::size_t>(vectors);
    const Values sums = ir_.loop(i64(0), i64(p_.key_dim), kUnroll, Values(2 * many, zeros()),
                                 [&](const Value& d, const Values& carried) {
                                   Values s = carried;
                                   for (int j = 0; j < kUnroll; ++j) {
                                     const Value at = ir_.add(d, i64(j));
                                     const auto element = [&](const Value& x) {
                                       return ir_.splat(ir_.load("float", ir_.at(x, "float", at), 4), width_);
                                     };
                                     const Value key = element(k), q = element(q_), decay = element(gate_),
                                                 last = element(before);
                                     const Value line = state_row(at);
                                     for (std::size_t n = 0; n < many; ++n) {
                                       const Value c = column(static_cast<int>(n));
                                       const Value x =
                                           ir_.mul(ir_.fma(last, u[n], vector_at(line, c)), decay);
                                       put(x, line, c);
                                       s[n] = ir_.fma(key, x, s[n]);
                                       s[many + n] = ir_.fma(q, x, s[many + n]);
                                     }
                                   }
                                   return s;
                                 });
    const Value beta = ir_.splat(token.beta, width_), qk = ir_.splat(token.qk, width_);
    for (std::size_t n = 0; n < many; ++n) {
      const Value c = column(static_cast<int>(n));
      const Value next = ir_.mul(beta, ir_.sub(vector_at(v_, c), sums[n]));
      put(next, u_, c);
      put(ir_.fma(qk, next, sums[many + n]), o_, c);
    }
  }

  static constexpr int kNowhere = -1; ///< no slot
  int columns_, slices_;
  Value state_, q_, gate_, bias_, keys_[2], v_, u_, o_; // scratch
  Value sequence_, batch_, head_, column_, valid_;      // of the item
  Value read_, write_;                                  // of the sequence: its states in the two tensors
  Value a_, bound_, scale_;                             // of the head
  Rows q_rows_, k_rows_, v_rows_, o_rows_, g_rows_, beta_rows_;
};

} // namespace

SourceUnit host::emit_recurrent(const Problem& p, const Variant& v, const Target& t) {
  SourceUnit unit;
  unit.name = "host_recurrent.ll";
  unit.main = Recurrent(p, v, t).text();
  unit.options = {t.arch, t.features};
  unit.entries = {"kda_host_recurrent"};
  return unit;
}

} // namespace kda
