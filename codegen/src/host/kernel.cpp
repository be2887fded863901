#include "kernel.h"
#include "cuda/kernel_args.cuh"

namespace kda::host {

Value Kernel::field(const std::string& type, std::size_t offset) {
  const Value at = ir_.at({"ptr", "%args"}, "i8", i64(static_cast<std::int64_t>(offset)));
  return ir_.load(type, at, type == "ptr" || type == "i64" ? 8 : 4);
}

Value Kernel::boundary(const Value& n) {
  const bool narrow = p_.cu_seqlens_type == IndexType::int32;
  const char* const type = narrow ? "i32" : "i64";
  const Value table = field("ptr", offsetof(KernelArgs, cu_seqlens));
  const Value x = ir_.load(type, ir_.at(table, type, n), narrow ? 4 : 8);
  return narrow ? ir_.cast("sext", x, "i64") : x;
}

Kernel::Rows Kernel::rows(std::size_t offset, DType type, const Value& batch, const Value& head) {
  const Value b = ir_.mul(batch, field("i64", offset + offsetof(TokenTensor, stride_batch)));
  const Value h = ir_.mul(head, field("i64", offset + offsetof(TokenTensor, stride_head)));
  const char* const element = element_type(type);
  return {ir_.at(field("ptr", offset), element, ir_.add(b, h)),
          field("i64", offset + offsetof(TokenTensor, stride_token)), element};
}

void Kernel::zero(const Value& base, std::int64_t floats) {
  ir_.loop(i64(0), i64(floats), width_, [&](const Value& i) { put(zeros(), base, i); });
}

} // namespace kda::host
