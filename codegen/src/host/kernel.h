#pragma once
// What the host's emitters share: arguments, rows of tensors, and scratch by vectors.
#include "math.h"
#include <cstddef>

namespace kda::host {

class Kernel {
protected:
  Kernel(const char* entry, const Problem& p, int vector_bytes)
      : p_(p), width_(vector_bytes / 4), vector_(vector_of("float", width_)), ir_(entry, vector_bytes) {}

  /// The member of KernelArgs at this offset.
  Value field(const std::string& type, std::size_t offset);
  /// The same for an int, widened to i64.
  Value count(std::size_t offset) { return ir_.cast("sext", field("i32", offset), "i64"); }
  /// cu_seqlens[n]
  Value boundary(const Value& n);

  /// Token 0 of a batch row and head of a tensor, and the elements to the next token.
  struct Rows {
    Value data, step;
    const char* element;
  };
  Rows rows(std::size_t offset, DType type, const Value& batch, const Value& head);
  Value row(const Rows& r, const Value& t) { return ir_.at(r.data, r.element, ir_.mul(t, r.step)); }

  // Element `i` of scratch on, a vector wide; i is a multiple of the width.
  Value vector_at(const Value& base, const Value& i) {
    return ir_.load(vector_, ir_.at(base, "float", i), 4 * width_);
  }
  void put(const Value& x, const Value& base, const Value& i) {
    ir_.store(x, ir_.at(base, "float", i), 4 * width_);
  }
  Value zeros() const { return Ir::constant({vector_, ""}, 0); }
  void zero(const Value& base, std::int64_t floats);

  const Problem& p_;
  int width_;          ///< floats of a vector
  std::string vector_; ///< its type
  Ir ir_;
};

} // namespace kda::host
