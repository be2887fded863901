// The recurrence token by token on states [V,K], as LLVM IR: K lies along the vectors. An item is a slice of
// V rows of one head of one sequence. Tokens come in blocks: their q, k and decay are prepared once, then a
// few rows at a time take all tokens of the block. A row needs no other row, so the state is read and written
// once a block, in place.
//
// 64-byte vectors: the rows stay in registers. Budget, K = 128, two rows: 16 of 32 registers hold state; a
// token costs 64 vector operations, 13 for four sums and about 20 for what is scalar. A block's tokens take
// 24 KiB of the L1 cache.
//
// Shorter vectors have 16 registers as a rule, and a row of 128 fills them: four rows stay in the L1 cache,
// and a token passes over them once, with the update of the token before. Budget, K = 128, 32-byte vectors: 4
// operations, one load and one store a vector, 16 loads of the token for all four rows, 26 operations for
// eight sums.
#include "emit.h"
#include "recurrence.h"
#include <algorithm>
#include <array>

namespace kda {
namespace {

using host::i64;
using host::Value;
using host::Values;

class RowForm : host::Recurrence {
public:
  RowForm(const Problem& p, const Variant& v, const Target& t)
      : Recurrence(p, v, t), keys_(padded(p.key_dim)),
        direct_(p.state_dtype == DType::fp32 && p.key_dim % width_ == 0),
        vectors_((direct_ ? p.key_dim : keys_) / width_), rows_(vectors_ > 8   ? 1
                                                                : vectors_ > 4 ? 2
                                                                               : 4),
        in_registers_(width_ == 16 || p.tree), block_(p.tree ? kMostTreeTokens : 16) {}

  std::string text() {
    allocate();
    return Recurrence::text({[&](const Value& begin, const Value& end) { run_sequence(begin, end); },
                             [&](const Value& begin) { run_replay(begin); }});
  }

private:
  void allocate() {
    Recurrence::allocate();
    const std::int64_t keys = std::int64_t{block_} * keys_, values = std::int64_t{block_} * columns_;
    for (Value* x : {&q_, &k_, &decay_})
      *x = zeroed(keys);
    for (Value* x : {&v_, &u_, &out_})
      *x = zeroed(values);
    for (Value* x : {&beta_, &qk_})
      *x = ir_.scratch(block_);
    none_ = zeroed(keys_);                                // the state where there is none
    carry_ = ir_.scratch(std::int64_t{columns_} * keys_); // between blocks, or the state widened
    sink_ = ir_.scratch(std::int64_t{rows_} * keys_);     // where no state is kept
    if (!in_registers_) near_ = ir_.scratch(std::int64_t{kNearRows} * keys_);
    if (keeps_states() || p_.tree) kept_ = ir_.scratch(2 * block_); // pointers by token: where states go
    if (p_.tree) {
      tree_ = ir_.scratch(std::int64_t{rows_} * keys_);
      paths_ = ir_.scratch(2 * block_);
    }
  }
  Value keys_of(const Value& base, const Value& i) { return ir_.at(base, "float", ir_.mul(i, i64(keys_))); }
  Value values_of(const Value& base, const Value& i) {
    return ir_.at(base, "float", ir_.mul(i, i64(columns_)));
  }
  Value scalar(const Value& base, const Value& i) { return ir_.load("float", ir_.at(base, "float", i), 4); }

  // --- states ----------------------------------------------------------------------------------------------
  /// Rows of a matrix in fp32: row r begins at data + r * step.
  struct Matrix {
    Value data, step;
  };
  Matrix choose(const Value& condition, const Matrix& a, const Matrix& b) {
    return {ir_.select(condition, a.data, b.data), ir_.select(condition, a.step, b.step)};
  }
  Matrix carry() { return {carry_, i64(keys_)}; }
  /// Row 0 of this slice in a tensor, and whether it is there.
  Place place(std::size_t offset, const Value& slot) {
    return Recurrence::place(offset, slot, ir_.mul(column_, i64(p_.key_dim)), none_);
  }
  /// Where the first block starts from: the state itself, or its rows widened into scratch.
  Matrix origin() {
    const Place from = place(offsetof(KernelArgs, initial_state), read_);
    if (direct_) return choose(from.wanted, {from.data, i64(p_.key_dim)}, {none_, i64(0)});
    zero(carry_, std::int64_t{columns_} * keys_);
    ir_.branch(
        from.wanted,
        [&] {
          ir_.loop(i64(0), valid_, 1, [&](const Value& r) {
            host::load_row(ir_, p_.state_dtype, row_at(from.data, r), keys_of(carry_, r), i64(p_.key_dim));
          });
        },
        [] {});
    return carry();
  }
  Value row_at(const Value& data, const Value& r) {
    return ir_.at(data, host::element_type(p_.state_dtype), ir_.mul(r, i64(p_.key_dim)));
  }
  /// States after tokens that are not the last.
  [[nodiscard]] bool keeps_states() const { return p_.every_state || p_.interior_states; }
  /// A tree that is verified has no last state.
  [[nodiscard]] bool keeps_last() const {
    return !p_.every_state && (!p_.tree || p_.operation == Operation::replay);
  }
  /// Where the last block leaves the state; widened rows are rounded into place by `finish`.
  Matrix destination() {
    if (!keeps_last()) return {sink_, i64(0)};
    if (!direct_) return carry();
    const Place to = place(offsetof(KernelArgs, final_state), write_);
    return choose(to.wanted, {to.data, i64(p_.key_dim)}, {sink_, i64(0)});
  }
  void finish() {
    if (direct_ || !keeps_last()) return;
    const Place to = place(offsetof(KernelArgs, final_state), write_);
    ir_.branch(
        to.wanted,
        [&] {
          ir_.loop(i64(0), valid_, 1, [&](const Value& r) {
            host::store_row(ir_, p_.state_dtype, keys_of(carry_, r), row_at(to.data, r), i64(p_.key_dim));
          });
        },
        [] {});
  }
  /// `rows_` rows from `row` on, by rows and vectors. A row that no state has lies on the others: step 0.
  Values load_rows(const Matrix& m, const Value& row) {
    Values s;
    for (int r = 0; r < rows_; ++r) {
      const Value line = row_of(m, row, r);
      for (int n = 0; n < vectors_; ++n)
        s.push_back(ir_.load(vector_, ir_.at(line, "float", i64(n * width_)), 4));
    }
    return s;
  }
  void store_rows(const Matrix& m, const Value& row, const Values& s) {
    for (int r = 0; r < rows_; ++r) {
      const Value line = row_of(m, row, r);
      for (int n = 0; n < vectors_; ++n)
        ir_.store(s[index(r, n)], ir_.at(line, "float", i64(n * width_)), 4);
    }
  }
  [[nodiscard]] std::size_t index(int r, int n) const {
    return static_cast<std::size_t>(r) * static_cast<std::size_t>(vectors_) + static_cast<std::size_t>(n);
  }
  /// Of row r: k.S' and q.S'.
  static std::size_t sum_a(int r) { return std::size_t{2} * static_cast<std::size_t>(r); }
  static std::size_t sum_b(int r) { return sum_a(r) + 1; }

  // --- a sequence ------------------------------------------------------------------------------------------
  void run_sequence(const Value& begin, const Value& end) {
    load_head();
    const Matrix first = origin(), last = destination();
    // One block at least: without tokens the state goes from its one place to the other.
    const Value behind = ir_.add(begin, i64(1));
    ir_.loop(begin, ir_.select(less(end, behind), behind, end), block_, [&](const Value& t) {
      const Value count = least(i64(block_), ir_.sub(end, t));
      ir_.loop(i64(0), count, 1, [&](const Value& i) { prepare_token(begin, t, i); });
      const Matrix from = choose(ir_.compare("icmp eq", t, begin), first, carry());
      const Matrix to = choose(less(ir_.add(t, i64(block_)), end), carry(), last);
      ir_.loop(i64(0), valid_, in_registers_ ? rows_ : kNearRows, [&](const Value& row) {
        if (p_.tree) return pass_tree(from, row, count);
        if (!in_registers_) return pass_near(from, to, row, count);
        const Values s = ir_.loop(i64(0), count, 1, load_rows(from, row),
                                  [&](const Value& i, const Values& before) { return step(row, i, before); });
        store_rows(to, row, s);
      });
      ir_.loop(i64(0), count, 1, [&](const Value& i) { keep_token(ir_.add(t, i), i); });
    });
    finish();
  }
  /// Token `i` of the block that begins at token t.
  void prepare_token(const Value& begin, const Value& t, const Value& i) {
    const Token token =
        prepare(ir_.add(t, i), keys_of(q_, i), keys_of(k_, i), keys_of(decay_, i), values_of(v_, i));
    ir_.store(token.beta, ir_.at(beta_, "float", i), 4);
    ir_.store(token.qk, ir_.at(qk_, "float", i), 4);
    const Value number = ir_.sub(ir_.add(t, i), begin);
    if (keeps_states()) {
      const Place to = p_.every_state ? place(offsetof(KernelArgs, final_state), place_after(number))
                                      : place(offsetof(KernelArgs, interior_states), interior_after(number));
      ir_.store(ir_.select(to.wanted, to.data, {"ptr", "null"}), ir_.at(kept_, "ptr", i), 8);
    }
    if (p_.tree) {
      const Value parent = parent_of(number);
      const Value path = ir_.select(ir_.compare("icmp eq", ir_.add(parent, i64(1)), number), i64(kContinues),
                                    path_to(parent));
      ir_.store(path, ir_.at(paths_, "i64", i), 8);
    }
  }
  /// What the call keeps of a token once all rows have passed.
  void keep_token(const Value& t, const Value& i) {
    host::store_row(ir_, p_.dtype, values_of(out_, i), output_row(o_rows_, t), valid_);
    if (!p_.updates) return;
    const Update x = update(t);
    host::store_row(ir_, DType::fp32, values_of(u_, i), x.u, valid_);
    // By one of a head's slices; the keys are those of a group's first head.
    const Value first = ir_.compare("icmp eq", column_, i64(0)), keys = i64(p_.key_dim);
    ir_.branch(
        first, [&] { host::store_row(ir_, DType::fp32, keys_of(decay_, i), x.decay, keys); }, [] {});
    const Value leads = ir_.compare("icmp eq", ir_.op("srem", head_, i64(p_.value_heads / p_.heads)), i64(0));
    ir_.branch(
        both(first, leads), [&] { host::store_row(ir_, DType::fp32, keys_of(k_, i), x.k, keys); }, [] {});
  }

  /// Advances rows from `row` on by token `i` of the block.
  Values step(const Value& row, const Value& i, const Values& before) {
    const Value q = keys_of(q_, i), k = keys_of(k_, i), decay = keys_of(decay_, i);
    // Two sums of each, of every second vector: the chain of additions is what a token waits for. A tree has
    // the bits of plain calls, which take one where the rows are near.
    const int chains = width_ == 16 ? 2 : 1;
    Values x(before.size()), sums(sum_a(rows_), zeros()), others = sums;
    for (int n = 0; n < vectors_; ++n) {
      const Value at = i64(n * width_);
      const Value query = vector_at(q, at), key = vector_at(k, at), d = vector_at(decay, at);
      Values& into = n % chains == 0 ? sums : others;
      for (int r = 0; r < rows_; ++r) {
        Value &a = into[sum_a(r)], &b = into[sum_b(r)];
        x[index(r, n)] = ir_.mul(before[index(r, n)], d);
        a = ir_.fma(key, x[index(r, n)], a);
        b = ir_.fma(query, x[index(r, n)], b);
      }
    }
    for (std::size_t n = 0; n < sums.size() && vectors_ > 1 && chains == 2; ++n)
      sums[n] = ir_.add(sums[n], others[n]);
    const Values u = results(row, i, sums);
    for (int r = 0; r < rows_; ++r)
      add_update(k, u[static_cast<std::size_t>(r)], r, x);
    if (keeps_states()) keep_state(row, i, x);
    return x;
  }
  /// u of rows from `row` on, from the vectors of their sums; stores it and o.
  Values results(const Value& row, const Value& i, const Values& sums) {
    const Values total = horizontal_sums(sums);
    const Value beta = scalar(beta_, i), qk = scalar(qk_, i);
    Values all;
    for (int r = 0; sum_a(r) < sums.size(); ++r) {
      const Value at = ir_.add(ir_.mul(i, i64(columns_)), ir_.add(row, i64(r)));
      const Value u = ir_.mul(beta, ir_.sub(scalar(v_, at), total[sum_a(r)]));
      ir_.store(u, ir_.at(u_, "float", at), 4);
      ir_.store(ir_.fma(qk, u, total[sum_b(r)]), ir_.at(out_, "float", at), 4);
      all.push_back(u);
    }
    return all;
  }
  /// x <- x + k u in row r.
  void add_update(const Value& k, const Value& u, int r, Values& x) {
    const Value wide = ir_.splat(u, width_);
    for (int n = 0; n < vectors_; ++n)
      x[index(r, n)] = ir_.fma(vector_at(k, i64(n * width_)), wide, x[index(r, n)]);
  }
  /// The rows after token `i`, to the slot of that token.
  void keep_state(const Value& row, const Value& i, const Values& x) {
    const Value to = ir_.load("ptr", ir_.at(kept_, "ptr", i), 8);
    ir_.branch(
        ir_.compare("icmp ne", to, {"ptr", "null"}),
        [&] {
          if (direct_) return store_rows({to, i64(p_.key_dim)}, row, x);
          store_rows({sink_, i64(keys_)}, i64(0), x);
          for (int r = 0; r < rows_; ++r)
            host::store_row(ir_, p_.state_dtype, keys_of(sink_, i64(r)), row_at(to, ir_.add(row, i64(r))),
                            i64(p_.key_dim));
        },
        [] {});
  }

  // --- rows near, in the L1 cache --------------------------------------------------------------------------
  static constexpr int kNearRows = 4; ///< V is a multiple of it
  Value near_row(int r, const Value& n) {
    return ir_.at(near_, "float", ir_.add(i64(std::int64_t{r} * keys_), n));
  }
  Value row_of(const Matrix& m, const Value& row, int r) {
    return ir_.at(m.data, "float", ir_.mul(ir_.add(row, i64(r)), m.step));
  }
  /// All tokens of the block over rows from `row` on.
  void pass_near(const Matrix& from, const Matrix& to, const Value& row, const Value& count) {
    const auto leave = [&](const Matrix& source, const Value& first, const Values& u, const Value& k) {
      for (int r = 0; r < kNearRows; ++r)
        add_row(source, first, row_of(to, row, r), r, u, k);
    };
    ir_.branch(
        ir_.compare("icmp eq", count, i64(0)), [&] { leave(from, row, {}, {}); },
        [&] {
          const Values u = ir_.loop(i64(1), count, 1, near_token(from, row, row, i64(0), {}),
                                    [&](const Value& i, const Values& before) {
                                      return near_token(near(), i64(0), row, i, before);
                                    });
          leave(near(), i64(0), u, keys_of(k_, ir_.sub(count, i64(1))));
        });
  }
  Matrix near() { return {near_, i64(keys_)}; }
  /// Row `first` + r of `from` with the update u[r] of `k`, if there is one, to `to`.
  void add_row(const Matrix& from, const Value& first, const Value& to, int r, const Values& u,
               const Value& k) {
    const Value source = row_of(from, first, r);
    ir_.loop(i64(0), i64(vectors_ * width_), width_, [&](const Value& n) {
      Value x = ir_.load(vector_, ir_.at(source, "float", n), 4);
      if (!u.empty()) x = ir_.fma(vector_at(k, n), u[static_cast<std::size_t>(r)], x);
      ir_.store(x, ir_.at(to, "float", n), 4);
    });
  }
  /// Token `i` of the block over the rows of `from` from `first` on, which go near; `before`: what the token
  /// before leaves to add, in vectors. Returns what this one leaves.
  Values near_token(const Matrix& from, const Value& first, const Value& row, const Value& i,
                    const Values& before) {
    const Value q = keys_of(q_, i), k = keys_of(k_, i), decay = keys_of(decay_, i);
    const Value last = keys_of(k_, ir_.sub(i, i64(1)));
    const Values sums =
        ir_.loop(i64(0), i64(vectors_ * width_), width_, Values(sum_a(kNearRows), zeros()),
                 [&](const Value& n, const Values& carried) {
                   Values s = carried;
                   const Value query = vector_at(q, n), key = vector_at(k, n), d = vector_at(decay, n);
                   for (int r = 0; r < kNearRows; ++r) {
                     Value x = ir_.load(vector_, ir_.at(row_of(from, first, r), "float", n), 4);
                     if (!before.empty())
                       x = ir_.fma(vector_at(last, n), before[static_cast<std::size_t>(r)], x);
                     x = ir_.mul(x, d);
                     ir_.store(x, near_row(r, n), 4 * width_);
                     s[sum_a(r)] = ir_.fma(key, x, s[sum_a(r)]);
                     s[sum_b(r)] = ir_.fma(query, x, s[sum_b(r)]);
                   }
                   return s;
                 });
    Values u;
    for (const Value& x : results(row, i, sums))
      u.push_back(ir_.splat(x, width_));
    if (keeps_states()) keep_near(row, i, u, k);
    return u;
  }
  /// The rows after token `i`, to the slot of that token.
  void keep_near(const Value& row, const Value& i, const Values& u, const Value& k) {
    const Value to = ir_.load("ptr", ir_.at(kept_, "ptr", i), 8);
    ir_.branch(
        ir_.compare("icmp ne", to, {"ptr", "null"}),
        [&] {
          for (int r = 0; r < kNearRows; ++r) {
            if (direct_) {
              add_row(near(), i64(0), row_of({to, i64(p_.key_dim)}, row, r), r, u, k);
              continue;
            }
            add_row(near(), i64(0), sink_, r, u, k);
            host::store_row(ir_, p_.state_dtype, sink_, row_at(to, ir_.add(row, i64(r))), i64(p_.key_dim));
          }
        },
        [] {});
  }

  // --- trees and replays -----------------------------------------------------------------------------------
  /// What token `i` of the block did to the rows: the bits that `step` leaves.
  Values updated(const Value& row, const Value& i, const Values& s) {
    const Value k = keys_of(k_, i), decay = keys_of(decay_, i);
    Values x;
    for (int r = 0; r < rows_; ++r)
      for (int n = 0; n < vectors_; ++n)
        x.push_back(ir_.mul(s[index(r, n)], vector_at(decay, i64(n * width_))));
    for (int r = 0; r < rows_; ++r)
      add_update(k, scalar(u_, ir_.add(ir_.mul(i, i64(columns_)), ir_.add(row, i64(r)))), r, x);
    return x;
  }
  Values updated_if(const Value& condition, const Value& row, const Value& i, const Values& s) {
    Values x = updated(row, i, s);
    for (std::size_t n = 0; n < x.size(); ++n)
      x[n] = ir_.select(condition, x[n], s[n]);
    return x;
  }
  /// A token whose parent is not the token before it starts again from the initial state and the updates on
  /// the way to the parent.
  void pass_tree(const Matrix& from, const Value& row, const Value& count) {
    const Matrix state{tree_, i64(keys_)};
    store_rows(state, i64(0), load_rows(from, row));
    ir_.loop(i64(0), count, 1, [&](const Value& i) {
      const Value path = ir_.load("i64", ir_.at(paths_, "i64", i), 8);
      ir_.branch(
          ir_.compare("icmp eq", path, i64(kContinues)), [] {},
          [&] {
            const auto ancestor = [&](const Value& j, const Values& s) {
              return updated_if(in_path(path, j), row, j, s);
            };
            store_rows(state, i64(0), ir_.loop(i64(0), i, 1, load_rows(from, row), ancestor));
          });
      store_rows(state, i64(0), step(row, i, load_rows(state, i64(0))));
    });
  }
  /// The accepted tokens' updates.
  void run_replay(const Value& begin) {
    const Matrix first = origin(), last = destination();
    const Value path = p_.tree ? path_to(ir_.sub(steps_, i64(1))) : i64(0);
    ir_.loop(i64(0), steps_, block_, [&](const Value& t) {
      const Value count = least(i64(block_), ir_.sub(steps_, t));
      ir_.loop(i64(0), count, 1, [&](const Value& i) {
        const Update x = update(ir_.add(begin, ir_.add(t, i)));
        host::load_row(ir_, DType::fp32, x.u, values_of(u_, i), valid_);
        host::load_row(ir_, DType::fp32, x.k, keys_of(k_, i), i64(p_.key_dim));
        host::load_row(ir_, DType::fp32, x.decay, keys_of(decay_, i), i64(p_.key_dim));
      });
      const Matrix from = choose(ir_.compare("icmp eq", t, i64(0)), first, carry());
      const Matrix to = choose(less(ir_.add(t, i64(block_)), steps_), carry(), last);
      ir_.loop(i64(0), valid_, rows_, [&](const Value& row) {
        store_rows(to, row,
                   ir_.loop(i64(0), count, 1, load_rows(from, row), [&](const Value& i, const Values& s) {
                     return p_.tree ? updated_if(in_path(path, i), row, i, s) : updated(row, i, s);
                   }));
      });
    });
    finish();
  }

  // --- sums ------------------------------------------------------------------------------------------------
  /// The sum of each vector over its elements, always in the same order. Four vectors at a time are folded
  /// into each other within groups of four elements, then the groups: 13 operations for four sums, not 32.
  Values horizontal_sums(const Values& x) {
    Values sums;
    for (std::size_t i = 0; i < x.size(); i += 4) {
      const bool two = i + 2 == x.size();
      const Value ab = fold(x[i], x[i + 1], {0, 0, 1, 1}),
                  cd = two ? ab : fold(x[i + 2], x[i + 3], {0, 0, 1, 1});
      Value all = fold(ab, cd, {0, 1, 0, 1});
      for (int width = width_ / 2; width >= 4; width /= 2)
        all = ir_.add(part(all, 0, width), part(all, width, width));
      for (int n = 0; n < (two ? 2 : 4); ++n)
        sums.push_back(ir_.emit("float", fmt::format("extractelement {} {}, i64 {}", all.type, all.name, n)));
    }
    return sums;
  }
  /// In each group of four elements: a[order[0]], b[order[1]], a.. or b.., plus the same two elements on.
  Value fold(const Value& a, const Value& b, const std::array<int, 4>& order) {
    const bool alternate = order[1] == order[0]; // a b a b, else a a b b
    const auto half = [&](int first) {
      std::string indices;
      for (int i = 0; i < width_; ++i) {
        const int n = i % 4, from_b = alternate ? n % 2 : n / 2;
        indices += fmt::format("{}i32 {}", i == 0 ? "" : ", ",
                               i - n + first + order[static_cast<std::size_t>(n)] + from_b * width_);
      }
      return shuffled(a, b, width_, indices);
    };
    return ir_.add(half(0), half(2));
  }
  Value part(const Value& x, int first, int width) {
    std::string indices;
    for (int i = 0; i < width; ++i)
      indices += fmt::format("{}i32 {}", i == 0 ? "" : ", ", first + i);
    return shuffled(x, x, width, indices);
  }
  Value shuffled(const Value& a, const Value& b, int width, const std::string& indices) {
    return ir_.emit(host::vector_of("float", width),
                    fmt::format("shufflevector {} {}, {} {}, <{} x i32> <{}>", a.type, a.name, b.type, b.name,
                                width, indices));
  }

  int keys_;    ///< K padded
  bool direct_; ///< rows pass between the state's memory and registers as they are
  int vectors_; ///< of a row
  int rows_;    ///< that pass together through registers; V is a multiple of it
  bool in_registers_;
  int block_;                                     ///< tokens
  static constexpr std::int64_t kContinues = -1;  ///< instead of a path: the parent is the token before
  Value q_, k_, decay_, v_, u_, out_, beta_, qk_; // scratch, by token of the block
  Value none_, carry_, sink_, near_, kept_, tree_, paths_;
};

} // namespace

std::string host::rows_text(const Problem& p, const Variant& v, const Target& t) {
  return RowForm(p, v, t).text();
}

} // namespace kda
