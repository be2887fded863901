#pragma once
// Writes one LLVM IR function as text. It names values, keeps types next to them and builds loops; it checks
// nothing, LLVM's verifier does.
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace kda::host {

struct Value {
  std::string type, name;
};
using Values = std::vector<Value>;

[[nodiscard]] Value i64(std::int64_t value);
[[nodiscard]] Value f32(float value);

class Ir {
public:
  /// A function `void name(ptr %args, i64 %begin, i64 %end)`. `vector_bytes`: widest register to use.
  Ir(std::string name, int vector_bytes);

  /// The module.
  [[nodiscard]] std::string finish();

  // `type %v = text`, and an instruction without a result.
  Value emit(std::string type, const std::string& text);
  void effect(const std::string& text);

  /// Both operands have the type of the first; so has the result.
  Value op(const char* opcode, const Value& a, const Value& b);
  Value add(const Value& a, const Value& b) { return op(a.type == "i64" ? "add" : "fadd", a, b); }
  Value sub(const Value& a, const Value& b) { return op(a.type == "i64" ? "sub" : "fsub", a, b); }
  Value mul(const Value& a, const Value& b) { return op(a.type == "i64" ? "mul" : "fmul", a, b); }
  Value div(const Value& a, const Value& b) { return op(a.type == "i64" ? "sdiv" : "fdiv", a, b); }
  /// a * b + c with one rounding where the CPU has it.
  Value fma(const Value& a, const Value& b, const Value& c);
  /// i1 or a vector of i1; `predicate` is spelled as in "icmp slt" or "fcmp ogt".
  Value compare(const char* predicate, const Value& a, const Value& b);
  Value select(const Value& condition, const Value& a, const Value& b);
  Value cast(const char* opcode, const Value& a, std::string type);
  /// A function by name, declared on first use; `flags`: fast-math flags.
  Value call(const std::string& type, const std::string& name, const Values& arguments,
             const char* flags = "");
  /// "llvm.NAME.v16f32" for the first argument's type, which is also the result's.
  Value intrinsic(const char* name, const Values& arguments);

  Value load(std::string type, const Value& pointer, int align);
  void store(const Value& value, const Value& pointer, int align);
  /// Address of element `index` (i64) of an array of `element`.
  Value at(const Value& pointer, const char* element, const Value& index);
  /// floats on the stack, aligned to a cache line; placed in the entry block.
  Value scratch(std::int64_t floats);

  /// `scalar` in every element of a vector of `count`.
  Value splat(const Value& scalar, int count);
  /// A constant of the type of `like`, float or a vector of it.
  static Value constant(const Value& like, float value);
  static Value integers(const Value& like, std::int32_t value); ///< i32 in each element of a float type

  /// for (i = begin; i < end; i += step), also zero times. `body` gets i and the carried values and returns
  /// their next ones; the result is what they are at the end.
  using Body = std::function<Values(const Value& i, const Values& carried)>;
  Values loop(const Value& begin, const Value& end, std::int64_t step, const Values& carried,
              const Body& body);
  void loop(const Value& begin, const Value& end, std::int64_t step,
            const std::function<void(const Value& i)>& body);
  void branch(const Value& condition, const std::function<void()>& yes, const std::function<void()>& no);

private:
  std::string label();
  void enter(const std::string& block);

  std::string name_, head_, text_, block_ = "entry";
  std::set<std::string> declarations_;
  int vector_bytes_, counter_ = 0;
};

/// "<4 x float>"; "float" for 1.
[[nodiscard]] std::string vector_of(const char* element, int count);
/// Elements of a vector type, 1 for a scalar.
[[nodiscard]] int width_of(const Value& value);

} // namespace kda::host
