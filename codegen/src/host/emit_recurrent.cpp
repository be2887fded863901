// The recurrence token by token on states [K,V], as LLVM IR: V lies along the vectors. An item is a slice of
// V columns of one head of one sequence, whose state lies in scratch as [K][columns] from the first token on.
// Per token one pass over it: the update of the token before, S <- S + k' u, then S <- d S, a = k.S and
// b = q.S; u = beta (v - a) and o = b + (q.k) u need no second pass.
#include "emit.h"
#include "recurrence.h"
#include <algorithm>

namespace kda {
namespace {

using host::i64;
using host::Value;
using host::Values;

class Columns : host::Recurrence {
public:
  Columns(const Problem& p, const Variant& v, const Target& t)
      : Recurrence(p, v, t), direct_(p.state_dtype == DType::fp32 && p.value_dim % v.rows == 0 && !p.tree &&
                                     p.operation != Operation::replay) {}

  std::string text() {
    allocate();
    return Recurrence::text({[&](const Value& begin, const Value& end) { run_sequence(begin, end); },
                             [&](const Value& begin) { run_replay(begin); }});
  }

private:
  void allocate() {
    Recurrence::allocate();
    state_ = ir_.scratch(static_cast<std::int64_t>(p_.key_dim) * columns_);
    for (Value* x : {&q_, &gate_, &keys_[0], &keys_[1]})
      *x = zeroed(padded(p_.key_dim));
    v_ = zeroed(columns_);
    if (direct_) none_ = zeroed(columns_);
    u_ = ir_.scratch(columns_);
  }
  Value state_row(const Value& k) { return ir_.at(state_, "float", ir_.mul(k, i64(columns_))); }
  Token prepare(const Value& t, const Value& k) { return Recurrence::prepare(t, q_, k, gate_, v_); }

  void run_sequence(const Value& begin, const Value& end) {
    const Lines first = origin(ir_.compare("icmp slt", begin, end));
    load_head();
    zero(keys_[1], padded(p_.key_dim)); // before the first token: no update
    zero(u_, columns_);
    const Values last = ir_.loop(begin, end, 1, {keys_[0], keys_[1]}, [&](const Value& t, const Values& k) {
      const Value i = ir_.sub(t, begin);
      if (p_.tree) follow_parent(begin, i, k[0]);
      const Token token = prepare(t, k[0]);
      const Value fresh = ir_.compare("icmp eq", t, begin);
      const Lines from{ir_.select(fresh, first.data, state_), ir_.select(fresh, first.step, i64(columns_))};
      for (int c = 0; c < columns_; c += 4 * width_)
        step(token, k[0], k[1], from, c, std::min(4 * width_, columns_ - c) / width_);
      host::store_row(ir_, p_.dtype, o_, output_row(o_rows_, t), valid_);
      if (p_.updates) keep_update(t, k[0]);
      if (p_.every_state) store_state(offsetof(KernelArgs, final_state), k[0], place_after(i));
      if (p_.interior_states) store_state(offsetof(KernelArgs, interior_states), k[0], interior_after(i));
      return Values{k[1], k[0]};
    });
    if (!p_.every_state) store_state(offsetof(KernelArgs, final_state), last[1], write_);
  }

  /// Keeps u_, and by one of a head's slices the keys and the decay; keys are those of a group's first head.
  void keep_update(const Value& t, const Value& k) {
    const Update x = update(t);
    host::store_row(ir_, DType::fp32, u_, x.u, valid_);
    const Value first = ir_.compare("icmp eq", column_, i64(0)), keys = i64(p_.key_dim);
    ir_.branch(
        first, [&] { host::store_row(ir_, DType::fp32, gate_, x.decay, keys); }, [] {});
    const Value leads = ir_.compare("icmp eq", ir_.op("srem", head_, i64(p_.value_heads / p_.heads)), i64(0));
    ir_.branch(
        both(first, leads), [&] { host::store_row(ir_, DType::fp32, k, x.k, keys); }, [] {});
  }
  /// S <- diag(gate_) S + k u^T, with the bits that step and store_state leave.
  void apply_update(const Value& k) {
    ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& d) {
      const auto element = [&](const Value& x) {
        return ir_.splat(ir_.load("float", ir_.at(x, "float", d), 4), width_);
      };
      const Value key = element(k), decay = element(gate_), line = state_row(d);
      ir_.loop(i64(0), i64(columns_), width_, [&](const Value& c) {
        put(ir_.fma(key, vector_at(u_, c), ir_.mul(vector_at(line, c), decay)), line, c);
      });
    });
  }
  /// A token of a tree whose parent is not the token before it starts again from the initial state and the
  /// updates on the way to the parent. Keys and decays of those tokens are prepared again: other items write
  /// them.
  void follow_parent(const Value& begin, const Value& i, const Value& k) {
    const Value parent = parent_of(i);
    ir_.branch(
        ir_.compare("icmp eq", ir_.add(parent, i64(1)), i), [] {},
        [&] {
          load_state();
          const Value path = path_to(parent);
          ir_.loop(i64(0), ir_.add(parent, i64(1)), 1, [&](const Value& j) {
            ir_.branch(
                in_path(path, j),
                [&] {
                  const Value t = ir_.add(begin, j);
                  prepare(t, k);
                  host::load_row(ir_, DType::fp32, update(t).u, u_, valid_);
                  apply_update(k);
                },
                [] {});
          });
          zero(u_, columns_);
        });
  }
  /// The accepted tokens' updates.
  void run_replay(const Value& begin) {
    load_state();
    const Value path = p_.tree ? path_to(ir_.sub(steps_, i64(1))) : i64(-1);
    ir_.loop(i64(0), steps_, 1, [&](const Value& i) {
      const auto apply = [&] {
        const Update x = update(ir_.add(begin, i));
        host::load_row(ir_, DType::fp32, x.u, u_, valid_);
        host::load_row(ir_, DType::fp32, x.k, keys_[0], i64(p_.key_dim));
        host::load_row(ir_, DType::fp32, x.decay, gate_, i64(p_.key_dim));
        apply_update(keys_[0]);
      };
      if (p_.tree)
        ir_.branch(in_path(path, i), apply, [] {});
      else
        apply();
    });
    zero(u_, columns_);
    store_state(offsetof(KernelArgs, final_state), keys_[0], write_);
  }

  // --- states ----------------------------------------------------------------------------------------------
  /// Row k of a [K,V] matrix, from this slice's first column on.
  Value matrix_row(const Value& matrix, const Value& k) {
    return ir_.at(matrix, host::element_type(p_.state_dtype),
                  ir_.add(ir_.mul(k, i64(p_.value_dim)), column_));
  }
  /// Row d of K begins at data + d * step.
  struct Lines {
    Value data, step;
  };
  /// Where the first token reads the state: where it lies, if it can, else in scratch.
  Lines origin(const Value& has_tokens) {
    const Lines scratch{state_, i64(columns_)};
    if (!direct_) {
      load_state();
      return scratch;
    }
    ir_.branch(
        has_tokens, [] {}, [&] { load_state(); });
    const Place from = place(offsetof(KernelArgs, initial_state), read_, column_, none_);
    return {from.data, ir_.select(from.wanted, i64(p_.value_dim), i64(0))};
  }
  void load_state() {
    zero(state_, static_cast<std::int64_t>(p_.key_dim) * columns_);
    with_state(offsetof(KernelArgs, initial_state), read_, [&](const Value& matrix) {
      ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& k) {
        host::load_row(ir_, p_.state_dtype, matrix_row(matrix, k), state_row(k), valid_);
      });
    });
  }

  /// `k`: the keys of the last token, whose update is still due, and is not when the state has been stored.
  void store_state(std::size_t tensor, const Value& k, const Value& place) {
    with_state(tensor, place, [&](const Value& matrix) {
      ir_.loop(i64(0), i64(p_.key_dim), 1, [&](const Value& d) {
        const Value key = ir_.splat(ir_.load("float", ir_.at(k, "float", d), 4), width_);
        ir_.loop(i64(0), i64(columns_), width_, [&](const Value& c) {
          const Value x = ir_.fma(key, vector_at(u_, c), vector_at(state_row(d), c));
          if (direct_) ir_.store(x, ir_.at(matrix_row(matrix, d), "float", c), 4);
          if (!direct_ || p_.every_state || p_.interior_states) put(x, state_row(d), c);
        });
        if (!direct_) host::store_row(ir_, p_.state_dtype, state_row(d), matrix_row(matrix, d), valid_);
      });
      zero(u_, columns_); // the update is in the state now
    });
  }

  // --- a token ---------------------------------------------------------------------------------------------
  /// `vectors` vectors of columns from `first` on: the update of the last token (`before`, u_), then this
  /// one. The state is read from `from` and left in scratch.
  void step(const Token& token, const Value& k, const Value& before, const Lines& from, int first,
            int vectors) {
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
                                     const Value source = ir_.at(from.data, "float", ir_.mul(at, from.step));
                                     for (std::size_t n = 0; n < many; ++n) {
                                       const Value c = column(static_cast<int>(n));
                                       const Value s0 = ir_.load(vector_, ir_.at(source, "float", c), 4);
                                       const Value x = ir_.mul(ir_.fma(last, u[n], s0), decay);
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
  bool direct_; ///< the first token reads the state where it lies, and the last one leaves it there
  Value state_, none_, q_, gate_, keys_[2], v_, u_; // scratch
};

} // namespace

SourceUnit host::emit_recurrent(const Problem& p, const Variant& v, const Target& t) {
  SourceUnit unit;
  unit.name = "host_recurrent.ll";
  unit.main = p.state_layout == StateLayout::v_k ? rows_text(p, v, t) : Columns(p, v, t).text();
  unit.options = {t.arch, t.features};
  unit.entries = {"kda_host_recurrent"};
  return unit;
}

} // namespace kda
