#pragma once
// What the two forms of the host's recurrence share: items, tables of numbers, trees, heads and tokens. An
// item is a slice of V columns of one head of one sequence.
#include "cuda/kernel_args.cuh"
#include "kernel.h"
#include <fmt/format.h>
#include <functional>

namespace kda::host {

class Recurrence : protected Kernel {
protected:
  struct Body {
    std::function<void(const Value& begin, const Value& end)> sequence;
    std::function<void(const Value& begin)> replay; ///< of steps_ tokens
  };

  Recurrence(const Problem& p, const Variant& v, const Target& t)
      : Kernel("kda_host_recurrent", p, t.vector_bytes), columns_(v.rows),
        slices_((p.value_dim + v.rows - 1) / v.rows) {}

  std::string text(const Body& body) {
    ir_.loop(Value{"i64", "%begin"}, Value{"i64", "%end"}, 1,
             [&](const Value& item) { run_item(item, body); });
    return ir_.finish();
  }

  Rows rows(std::size_t offset, DType type, const Value& head) {
    return Kernel::rows(offset, type, batch_, head);
  }

  /// Scratch of every form. What lies behind K and V stays zero and adds nothing to a sum.
  void allocate() {
    const int keys = padded(p_.key_dim);
    bias_ = zeroed(keys);
    o_ = ir_.scratch(columns_);
  }
  Value zeroed(std::int64_t floats) {
    const Value x = ir_.scratch(floats);
    zero(x, floats);
    return x;
  }

  // --- an item ---------------------------------------------------------------------------------------------
  void run_item(const Value& item, const Body& body) {
    const Value slice = ir_.op("srem", item, i64(slices_));
    const Value rest = ir_.div(item, i64(slices_));
    const Value heads =
        count(offsetof(KernelArgs, value_heads)); // no part of the text: one kernel serves all
    head_ = ir_.op("srem", rest, heads);
    sequence_ = ir_.div(rest, heads);
    column_ = ir_.mul(slice, i64(columns_));
    valid_ = p_.value_dim % columns_ == 0 ? i64(columns_)
                                          : least(ir_.sub(i64(p_.value_dim), column_), i64(columns_));
    if (!p_.varlen) {
      batch_ = sequence_;
      return run_in_place(i64(0), field("i64", offsetof(KernelArgs, tokens)), body);
    }
    // The sequence after the last one is the padding behind the packed tokens.
    batch_ = i64(0);
    const Value begin = boundary(sequence_);
    if (p_.operation == Operation::replay)
      return run_in_place(begin, boundary(ir_.add(sequence_, i64(1))), body);
    const Value real = ir_.compare("icmp slt", sequence_, count(offsetof(KernelArgs, sequences)));
    ir_.branch(
        real, [&] { run_in_place(begin, boundary(ir_.add(sequence_, i64(1))), body); },
        [&] { zero_output(begin, field("i64", offsetof(KernelArgs, tokens))); });
  }

  Value output_row(const Rows& o, const Value& t) { return ir_.at(row(o, t), o.element, column_); }

  void zero_output(const Value& begin, const Value& end) {
    const Rows o = rows(offsetof(KernelArgs, o), p_.dtype, head_);
    zero(o_, columns_);
    ir_.loop(begin, end, 1, [&](const Value& t) { store_row(ir_, p_.dtype, o_, output_row(o, t), valid_); });
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
  /// Column `column` of this sequence, or kNowhere without a table.
  Value number(std::size_t table, const Value& present, const Value& column) {
    const Value wide = ir_.compare("icmp ne", count(table + offsetof(NumberTable, wide)), i64(0));
    // Without a table some words that are there are read, and not used.
    const Value data = ir_.select(present, field("ptr", table + offsetof(NumberTable, data)), o_);
    const Value element =
        ir_.add(ir_.mul(sequence_, field("i64", table + offsetof(NumberTable, stride_sequence))),
                ir_.mul(column, field("i64", table + offsetof(NumberTable, stride_column))));
    const Value words = ir_.select(present, ir_.select(wide, ir_.add(element, element), element), i64(0));
    const auto word = [&](const Value& at) { return ir_.load("i32", ir_.at(data, "i32", at), 4); };
    const Value low = word(words), high = word(ir_.select(wide, ir_.add(words, i64(1)), words));
    const Value both_words =
        ir_.op("or", ir_.op("shl", ir_.cast("zext", high, "i64"), i64(32)), ir_.cast("zext", low, "i64"));
    return ir_.select(present, ir_.select(wide, both_words, ir_.cast("sext", low, "i64")), i64(kNowhere));
  }
  Value columns_of(std::size_t table) { return count(table + offsetof(NumberTable, columns)); }
  Value outside(const Value& slot, std::size_t slots) {
    return ir_.compare("icmp uge", slot, field("i64", slots));
  }
  Value less(const Value& a, const Value& b) { return ir_.compare("icmp slt", a, b); }
  Value least(const Value& a, const Value& b) { return ir_.select(less(a, b), a, b); }
  static Value yes_if(bool x) { return {"i1", x ? "true" : "false"}; }

  // find_places of recurrent/places.cuh: what is read is checked before anything is written. Everything is
  // computed without a branch, so a number that is wrong must not become an index.
  struct Places {
    Value idle, refused; ///< i1
  };
  /// Sets read_, write_ and steps_.
  Places find_places(const Value& tokens) {
    read_ = write_ = sequence_;
    steps_ = tokens;
    Places x{yes_if(false), yes_if(false)};
    Value column = i64(0);
    const bool replay = p_.operation == Operation::replay;
    if (p_.state_pool || replay) {
      constexpr std::size_t kAccepted = offsetof(KernelArgs, accepted);
      const Value given = is_present(kAccepted + offsetof(NumberTable, data));
      const Value accepted = ir_.select(given, number(kAccepted, given, i64(0)), i64(1));
      x.idle = ir_.compare("icmp eq", accepted, i64(0));
      const Value most = replay ? tokens : columns_of(offsetof(KernelArgs, read_slots));
      const Value wrong = both(given, either(less(accepted, i64(0)), less(most, accepted)));
      x.refused = wrong;
      steps_ = ir_.select(either(wrong, x.idle), i64(0), accepted);
      if (!replay) column = ir_.select(either(wrong, x.idle), i64(0), ir_.sub(accepted, i64(1)));
    }
    if (p_.tree) x.refused = either(x.refused, no_tree(tokens));
    if (p_.state_pool) find_slots(tokens, column, x);
    x.refused = both(x.refused, ir_.op("xor", x.idle, yes_if(true)));
    return x;
  }
  void find_slots(const Value& tokens, const Value& column, Places& x) {
    constexpr std::size_t kRead = offsetof(KernelArgs, read_slots),
                          kWrite = offsetof(KernelArgs, write_slots);
    const Value reads = is_present(offsetof(KernelArgs, initial_state)),
                writes = is_present(offsetof(KernelArgs, final_state));
    read_ = number(kRead, reads, column);
    const Value write = number(kWrite, writes, i64(0)), skipped = is_padding(write);
    x.idle = either(x.idle, ir_.select(reads, is_padding(read_), both(writes, skipped)));
    const Value keeps = both(writes, ir_.op("xor", skipped, yes_if(true)));
    x.refused = either(x.refused, both(reads, outside(read_, offsetof(KernelArgs, read_pool))));
    if (p_.every_state)
      x.refused = either(x.refused, both(writes, writes_outside(tokens)));
    else
      x.refused = either(x.refused, both(keeps, outside(write, offsetof(KernelArgs, write_pool))));
    write_ = ir_.select(keeps, write, i64(kNowhere));
  }
  /// Where the state after token `i` of the sequence goes.
  Value place_after(const Value& i) {
    const Value slot =
        number(offsetof(KernelArgs, write_slots), is_present(offsetof(KernelArgs, final_state)), i);
    return ir_.select(is_padding(slot), i64(kNowhere), slot);
  }
  /// Where the state after token `i` goes besides, kNowhere mostly.
  Value interior_after(const Value& i) {
    constexpr std::size_t kSlots = offsetof(KernelArgs, interior_slots);
    const Value interval = count(offsetof(KernelArgs, interior_interval)), tokens = ir_.add(i, i64(1));
    const Value column = ir_.sub(ir_.div(tokens, interval), i64(1));
    const Value whole = ir_.compare("icmp eq", ir_.op("srem", tokens, interval), i64(0));
    const Value wanted = both(both(whole, less(column, columns_of(kSlots))),
                              is_present(offsetof(KernelArgs, interior_states)));
    const Value slot = number(kSlots, wanted, column);
    return ir_.select(outside(slot, offsetof(KernelArgs, interior_pool)), i64(kNowhere), slot);
  }
  /// There is a state to start from. Without a table, number() is not 0.
  Value has_start() {
    constexpr std::size_t kTable = offsetof(KernelArgs, has_initial_state);
    const Value given = is_present(kTable + offsetof(NumberTable, data));
    return both(is_present(offsetof(KernelArgs, initial_state)),
                ir_.compare("icmp ne", number(kTable, given, i64(0)), i64(0)));
  }
  Value writes_outside(const Value& tokens) {
    const Value columns = columns_of(offsetof(KernelArgs, write_slots));
    const Value in_place = ir_.compare("icmp eq", field("ptr", offsetof(KernelArgs, initial_state)),
                                       field("ptr", offsetof(KernelArgs, final_state)));
    const Values wrong = ir_.loop(i64(0), least(tokens, columns), 1, {less(columns, tokens)},
                                  [&](const Value& i, const Values& before) {
                                    const Value place = place_after(i);
                                    Value bad = outside(place, offsetof(KernelArgs, write_pool));
                                    if (p_.tree)
                                      bad = either(bad, both(in_place, ir_.compare("icmp eq", place, read_)));
                                    bad = both(bad, ir_.compare("icmp ne", place, i64(kNowhere)));
                                    return Values{either(before[0], bad)};
                                  });
    return wrong[0];
  }

  // --- trees -----------------------------------------------------------------------------------------------
  Value parent_of(const Value& i) {
    const Value parent = number(offsetof(KernelArgs, parents), yes_if(true), i);
    return ir_.select(less(parent, i64(0)), i64(-1), parent);
  }
  Value no_tree(const Value& tokens) {
    const Value columns = least(columns_of(offsetof(KernelArgs, parents)), i64(kMostTreeTokens));
    return ir_.loop(i64(0), least(tokens, columns), 1, {less(columns, tokens)},
                    [&](const Value& i, const Values& before) {
                      const Value before_it = less(parent_of(i), i);
                      return Values{either(before[0], ir_.op("xor", before_it, yes_if(true)))};
                    })[0];
  }
  /// The tokens from the root to `token` (-1: none), a bit each.
  Value path_to(const Value& token) {
    return ir_.loop(i64(0), ir_.add(token, i64(1)), 1, {i64(0), token}, [&](const Value&, const Values& x) {
      const Value more = less(i64(-1), x[1]), at = ir_.select(more, x[1], i64(0));
      const Value bit = ir_.select(more, ir_.op("shl", i64(1), at), i64(0));
      return Values{ir_.op("or", x[0], bit), ir_.select(more, parent_of(at), i64(-1))};
    })[0];
  }
  Value in_path(const Value& path, const Value& i) {
    return ir_.compare("icmp ne", ir_.op("and", ir_.op("lshr", path, i), i64(1)), i64(0));
  }

  /// Runs the sequence unless it is padding, a no-op or refused.
  void run_in_place(const Value& begin, const Value& end, const Body& body) {
    const Places places = find_places(ir_.sub(end, begin));
    const bool replay = p_.operation == Operation::replay;
    if (!p_.state_pool && !p_.tree && !replay) return body.sequence(begin, end);
    ir_.branch(
        either(places.idle, places.refused),
        [&] {
          if (!replay) zero_output(begin, end);
          ir_.branch(
              places.refused, [&] { report(); }, [] {});
        },
        [&] {
          if (replay)
            body.replay(begin);
          else
            body.sequence(begin, end);
        });
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

  // --- updates ---------------------------------------------------------------------------------------------
  Value key_head() { return ir_.div(head_, i64(p_.value_heads / p_.heads)); }
  struct Update {
    Value u, k, decay; ///< rows in memory, u from this slice's first column on
  };
  Update update(const Value& t) {
    const auto at = [&](std::size_t offset, const Value& head) {
      return row(rows(offset, DType::fp32, head), t);
    };
    return {ir_.at(at(offsetof(KernelArgs, update_u), head_), "float", column_),
            at(offsetof(KernelArgs, update_k), key_head()), at(offsetof(KernelArgs, update_decay), head_)};
  }
  // --- states ----------------------------------------------------------------------------------------------
  /// The tensor is present, and `place` one of its states.
  Value is_wanted(std::size_t offset, const Value& place) {
    if (p_.state_pool || offset == offsetof(KernelArgs, interior_states))
      return both(is_present(offset), ir_.compare("icmp ne", place, i64(kNowhere)));
    return offset == offsetof(KernelArgs, initial_state) ? has_start() : is_present(offset);
  }
  struct Place {
    Value wanted, data;
  };
  /// Element `first` of this head's matrix in slot `slot`, or `none` where there is no such state.
  Place place(std::size_t offset, const Value& slot, const Value& first, const Value& none) {
    const Value wanted = is_wanted(offset, slot);
    const Value n = ir_.mul(slot, field("i64", offset + offsetof(StateTensor, stride_sequence)));
    const Value h = ir_.mul(head_, field("i64", offset + offsetof(StateTensor, stride_head)));
    const Value data = ir_.select(wanted, field("ptr", offset), none);
    const Value element = ir_.select(wanted, ir_.add(ir_.add(n, h), first), i64(0));
    return {wanted, ir_.at(data, element_type(p_.state_dtype), element)};
  }
  /// Calls `body` with this head's matrix where there is one.
  void with_state(std::size_t offset, const Value& slot,
                  const std::function<void(const Value& matrix)>& body) {
    const Place x = place(offset, slot, i64(0), {"ptr", "null"});
    ir_.branch(
        x.wanted, [&] { body(x.data); }, [] {});
  }
  // --- a token ---------------------------------------------------------------------------------------------
  void load_head() {
    q_rows_ = rows(offsetof(KernelArgs, q), p_.dtype, key_head());
    k_rows_ = rows(offsetof(KernelArgs, k), p_.dtype, key_head());
    v_rows_ = rows(offsetof(KernelArgs, v), p_.dtype, head_);
    o_rows_ = rows(offsetof(KernelArgs, o), p_.dtype, head_);
    g_rows_ = rows(offsetof(KernelArgs, g), p_.gate_dtype, head_);
    beta_rows_ = rows(offsetof(KernelArgs, beta), p_.beta_dtype, head_);
    bound_ = field("float", offsetof(KernelArgs, lower_bound));
    scale_ = field("float", offsetof(KernelArgs, scale));
    a_ = f32(1);
    if (reads_a_log(p_.gate)) {
      const Value a_log = field("ptr", offsetof(KernelArgs, A_log));
      a_ = exp(ir_, ir_.load("float", ir_.at(a_log, "float", head_), 4));
    }
    if (p_.dt_bias) {
      const Value bias = field("ptr", offsetof(KernelArgs, dt_bias));
      load_row(ir_, DType::fp32, ir_.at(bias, "float", ir_.mul(head_, i64(p_.key_dim))), bias_,
               i64(p_.key_dim));
    }
  }

  struct Token {
    Value beta, qk; ///< beta activated; q.k
  };
  /// Fills `q` (normalised and scaled), `k` (normalised), `decay` and `v`.
  Token prepare(const Value& t, const Value& q, const Value& k, const Value& decay, const Value& v) {
    const Value keys = i64(p_.key_dim);
    load_row(ir_, p_.dtype, row(q_rows_, t), q, keys);
    load_row(ir_, p_.dtype, row(k_rows_, t), k, keys);
    load_row(ir_, p_.gate_dtype, row(g_rows_, t), decay, keys);
    load_row(ir_, p_.dtype, ir_.at(row(v_rows_, t), v_rows_.element, column_), v, valid_);
    const Value a = ir_.splat(a_, width_), bound = ir_.splat(bound_, width_);
    const Value none = zeros();
    const Values sums = ir_.loop(
        i64(0), i64(padded(p_.key_dim)), width_, {none, none, none}, [&](const Value& i, const Values& s) {
          const Value x = vector_at(q, i), key = vector_at(k, i);
          const Value bias = p_.dt_bias ? vector_at(bias_, i) : none;
          const Value log = gate_log2(ir_, p_, vector_at(decay, i), bias, a, bound);
          put(exp2(ir_, log), decay, i);
          return Values{ir_.fma(x, x, s[0]), ir_.fma(key, key, s[1]), ir_.fma(x, key, s[2])};
        });
    Value q_factor = scale_, k_factor = f32(1);
    if (p_.qk_l2norm) {
      q_factor = ir_.mul(scale_, norm_factor(sums[0]));
      k_factor = norm_factor(sums[1]);
    }
    const Value q_wide = ir_.splat(q_factor, width_), k_wide = ir_.splat(k_factor, width_);
    ir_.loop(i64(0), i64(padded(p_.key_dim)), width_, [&](const Value& i) {
      put(ir_.mul(vector_at(q, i), q_wide), q, i);
      if (p_.qk_l2norm) put(ir_.mul(vector_at(k, i), k_wide), k, i);
    });
    const Value beta = load_element(ir_, p_.beta_dtype, row(beta_rows_, t));
    return {beta_value(ir_, p_, beta), ir_.mul(ir_.mul(horizontal(sums[2]), q_factor), k_factor)};
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

  static constexpr int kNowhere = -1;        ///< no slot
  static constexpr int kMostTreeTokens = 64; ///< bits of a path
  int columns_, slices_;
  Value bias_, o_;                                 // scratch
  Value sequence_, batch_, head_, column_, valid_; // of the item
  Value read_, write_;                             // of the sequence: its states in the two tensors
  Value steps_;                                    // of the sequence: tokens to replay
  Value a_, bound_, scale_;                        // of the head
  Rows q_rows_, k_rows_, v_rows_, o_rows_, g_rows_, beta_rows_;
};

} // namespace kda::host
