#include "ir.h"
#include <cstdlib>
#include <cstring>
#include <fmt/format.h>

namespace kda::host {

Value i64(std::int64_t value) {
  return {"i64", std::to_string(value)};
}

/// LLVM reads a float constant as the bits of a double of the same value.
static std::string literal(float value) {
  const double wide = value;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &wide, sizeof(bits));
  return fmt::format("0x{:016X}", bits);
}

Value f32(float value) {
  return {"float", literal(value)};
}

std::string vector_of(const char* element, int count) {
  return count == 1 ? element : fmt::format("<{} x {}>", count, element);
}

int width_of(const Value& value) {
  return value.type[0] == '<' ? std::atoi(value.type.c_str() + 1) : 1;
}

Ir::Ir(std::string name, int vector_bytes) : name_(std::move(name)), vector_bytes_(vector_bytes) {}

std::string Ir::finish() {
  std::string out;
  for (const std::string& d : declarations_)
    out += d + "\n";
  const int bits = 8 * vector_bytes_;
  // Without min-legal-vector-width LLVM splits 64-byte vectors on CPUs that it thinks prefer 32.
  return out + fmt::format("define void @{}(ptr %args, i64 %begin, i64 %end) nounwind "
                           "\"prefer-vector-width\"=\"{}\" \"min-legal-vector-width\"=\"{}\" {{\nentry:\n"
                           "{}{}  ret void\n}}\n",
                           name_, bits, bits, head_, text_);
}

Value Ir::emit(std::string type, const std::string& text) {
  Value v{std::move(type), fmt::format("%v{}", counter_++)};
  text_ += fmt::format("  {} = {}\n", v.name, text);
  return v;
}

void Ir::effect(const std::string& text) {
  text_ += fmt::format("  {}\n", text);
}

Value Ir::op(const char* opcode, const Value& a, const Value& b) {
  return emit(a.type, fmt::format("{} {} {}, {}", opcode, a.type, a.name, b.name));
}

Value Ir::fma(const Value& a, const Value& b, const Value& c) {
  return intrinsic("fmuladd", {a, b, c});
}

Value Ir::compare(const char* predicate, const Value& a, const Value& b) {
  return emit(vector_of("i1", width_of(a)), fmt::format("{} {} {}, {}", predicate, a.type, a.name, b.name));
}

Value Ir::select(const Value& condition, const Value& a, const Value& b) {
  return emit(a.type, fmt::format("select {} {}, {} {}, {} {}", condition.type, condition.name, a.type,
                                  a.name, b.type, b.name));
}

Value Ir::cast(const char* opcode, const Value& a, std::string type) {
  const std::string text = fmt::format("{} {} {} to {}", opcode, a.type, a.name, type);
  return emit(std::move(type), text);
}

Value Ir::call(const std::string& type, const std::string& name, const Values& arguments, const char* flags) {
  std::vector<std::string> types, operands;
  for (const Value& a : arguments) {
    types.push_back(a.type);
    operands.push_back(fmt::format("{} {}", a.type, a.name));
  }
  declarations_.insert(fmt::format("declare {} @{}({})", type, name, fmt::join(types, ", ")));
  return emit(type, fmt::format("call {}{} @{}({})", flags, type, name, fmt::join(operands, ", ")));
}

Value Ir::intrinsic(const char* name, const Values& arguments) {
  const int width = width_of(arguments[0]);
  const std::string suffix = width == 1 ? "f32" : fmt::format("v{}f32", width);
  return call(arguments[0].type, fmt::format("llvm.{}.{}", name, suffix), arguments);
}

Value Ir::load(std::string type, const Value& pointer, int align) {
  const std::string text = fmt::format("load {}, ptr {}, align {}", type, pointer.name, align);
  return emit(std::move(type), text);
}

void Ir::store(const Value& value, const Value& pointer, int align) {
  effect(fmt::format("store {} {}, ptr {}, align {}", value.type, value.name, pointer.name, align));
}

Value Ir::at(const Value& pointer, const char* element, const Value& index) {
  return emit("ptr", fmt::format("getelementptr {}, ptr {}, i64 {}", element, pointer.name, index.name));
}

Value Ir::scratch(std::int64_t floats) {
  Value v{"ptr", fmt::format("%v{}", counter_++)};
  head_ += fmt::format("  {} = alloca [{} x float], align 64\n", v.name, floats);
  return v;
}

Value Ir::splat(const Value& scalar, int count) {
  if (count == 1) return scalar;
  const std::string type = vector_of(scalar.type.c_str(), count);
  const Value one =
      emit(type, fmt::format("insertelement {} poison, {} {}, i64 0", type, scalar.type, scalar.name));
  return emit(type, fmt::format("shufflevector {} {}, {} poison, <{} x i32> zeroinitializer", type, one.name,
                                type, count));
}

Value Ir::constant(const Value& like, float value) {
  if (like.type[0] != '<') return f32(value);
  return {like.type, fmt::format("splat (float {})", literal(value))};
}

Value Ir::integers(const Value& like, std::int32_t value) {
  const int width = width_of(like);
  return {vector_of("i32", width), width == 1 ? std::to_string(value) : fmt::format("splat (i32 {})", value)};
}

std::string Ir::label() {
  return fmt::format("b{}", counter_++);
}

void Ir::enter(const std::string& block) {
  text_ += fmt::format("{}:\n", block);
  block_ = block;
}

Values Ir::loop(const Value& begin, const Value& end, std::int64_t step, const Values& carried,
                const Body& body) {
  const std::string before = block_, head = label(), inside = label(), after = label();
  effect(fmt::format("br label %{}", head));
  enter(head);
  const std::size_t phis = text_.size(); // written when the body's results have names
  Values now;
  for (const Value& c : carried)
    now.push_back({c.type, fmt::format("%v{}", counter_++)});
  const Value i{"i64", fmt::format("%v{}", counter_++)};
  const Value more = compare("icmp slt", i, end);
  effect(fmt::format("br i1 {}, label %{}, label %{}", more.name, inside, after));
  enter(inside);
  const Values next = body(i, now);
  const Value next_i = add(i, i64(step));
  std::string text;
  const auto phi = [&](const Value& v, const Value& first, const Value& then) {
    text += fmt::format("  {} = phi {} [ {}, %{} ], [ {}, %{} ]\n", v.name, v.type, first.name, before,
                        then.name, block_);
  };
  phi(i, begin, next_i);
  for (std::size_t n = 0; n < carried.size(); ++n)
    phi(now[n], carried[n], next[n]);
  effect(fmt::format("br label %{}", head));
  text_.insert(phis, text);
  enter(after);
  return now;
}

void Ir::loop(const Value& begin, const Value& end, std::int64_t step,
              const std::function<void(const Value& i)>& body) {
  loop(begin, end, step, {}, [&](const Value& i, const Values&) {
    body(i);
    return Values{};
  });
}

void Ir::branch(const Value& condition, const std::function<void()>& yes, const std::function<void()>& no) {
  const std::string taken = label(), other = label(), after = label();
  effect(fmt::format("br i1 {}, label %{}, label %{}", condition.name, taken, other));
  enter(taken);
  yes();
  effect(fmt::format("br label %{}", after));
  enter(other);
  no();
  effect(fmt::format("br label %{}", after));
  enter(after);
}

} // namespace kda::host
