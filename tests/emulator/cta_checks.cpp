// What a checked CTA tells its shadow of each access.
#include "cta.h"
#include <dlfcn.h>
#include <fmt/format.h>

namespace kda::emulator {
namespace {

/// Constants of the kernel lie in its object.
bool in_same_object(const void* address, const void* place) {
  Dl_info a, b;
  return dladdr(address, &a) != 0 && dladdr(place, &b) != 0 && a.dli_fbase == b.dli_fbase;
}

Span global_span(const void* address, std::size_t bytes) {
  return {reinterpret_cast<std::size_t>(address), bytes, true};
}

} // namespace

bool Cta::check_global(const void* address, std::size_t bytes, Access access, const void* place) {
  const std::string fault = job_->global->access(linear_, address, bytes, access);
  if (fault.empty()) return true;
  if (access == Access::read && in_same_object(address, place)) return false;
  fail(fmt::format("{}, by {} at {}", fault, describe_current(), source_place(place)));
}

void Cta::access(const Fiber& fiber, const void* address, std::size_t bytes, Access access,
                 const void* place) {
  if (!checked()) return;
  if (overdue_.load(std::memory_order_relaxed)) fail_overdue(place);
  const auto within = [&](const void* first, std::size_t size) {
    return static_cast<std::size_t>(static_cast<const char*>(address) - static_cast<const char*>(first)) <
           size;
  };
  // thread_index() and its kin read these.
  if (within(fibers_.data(), fibers_.size() * sizeof(Fiber)) || within(&kServices, sizeof kServices)) return;
  if (within(shared_, job_->shared_bytes))
    require(shadow_.access(fiber.index, {shared_offset(address), bytes}, access, place));
  else if (check_global(address, bytes, access, place))
    require(shadow_.access(fiber.index, global_span(address, bytes), access, place));
}

void Cta::fence_proxy(const Fiber& fiber) {
  if (!checked()) return;
  shadow_.fence(fiber.index);
  fence_mbarrier_init(fiber);
}

void Cta::fence_mbarrier_init(const Fiber& fiber) {
  for (auto& [address, barrier] : mbarriers_)
    if (barrier.initialiser == fiber.index) barrier.visible = true;
}

/// The lane that gets or gives a word accesses it, not the one that names the row.
void Cta::check_matrix(std::size_t first, WarpOperation operation, const void* place) {
  if (operation == WarpOperation::sync) return shadow_.sync_warp(static_cast<int>(first));
  const bool load =
      operation == WarpOperation::load_matrix || operation == WarpOperation::load_matrix_transposed;
  const bool store =
      operation == WarpOperation::store_matrix || operation == WarpOperation::store_matrix_transposed;
  if (!load && !store) return;
  const bool transposed = operation == WarpOperation::load_matrix_transposed ||
                          operation == WarpOperation::store_matrix_transposed;
  const Warp& warp = warps_[first / 32];
  for (std::size_t lane = 0; lane < 32; ++lane) {
    const void* row = load ? static_cast<const LoadMatrixArguments*>(warp.arguments[lane])->row
                           : static_cast<const StoreMatrixArguments*>(warp.arguments[lane])->row;
    const auto offset = static_cast<const unsigned char*>(row) - shared_;
    if (offset < 0 || offset + 16 > static_cast<std::ptrdiff_t>(job_->shared_bytes)) return; // refused later
    const std::size_t r = lane % 8;
    for (std::size_t column = 0; column < 8; column += transposed ? 1 : 2) {
      const std::size_t owner = transposed ? column * 4 + r / 2 : r * 4 + column / 2;
      require(shadow_.access(static_cast<int>(first + owner),
                             {shared_offset(row) + 2 * column, transposed ? 2UL : 4UL},
                             load ? Access::read : Access::write, place));
    }
  }
}

void Cta::check_copy(const Fiber& fiber, const PendingCopy& copy, const void* place) {
  const auto bytes = static_cast<std::size_t>(copy.bytes);
  const int agent = shadow_.copies(fiber.index);
  const auto epoch = static_cast<Epoch>(copy.group + 1);
  if (copy.valid && check_global(copy.from, bytes, Access::read, place))
    require(shadow_.access(fiber.index, agent, epoch, global_span(copy.from, bytes), Access::read, place));
  require(shadow_.access(fiber.index, agent, epoch, {shared_offset(copy.to), bytes}, Access::write, place));
}

void Cta::check_bulk(const Fiber& fiber, const PendingBulk& bulk, const void* place) {
  const bool load = bulk.copy.mbarrier != nullptr;
  const Mbarrier* barrier = load ? &mbarriers_.at(bulk.copy.mbarrier) : nullptr;
  if (load && !barrier->visible)
    fail(fmt::format(
        "proxy: {} starts a bulk load at {} to an mbarrier without a fence_mbarrier_init behind its "
        "mbarrier_init",
        describe_current(), source_place(place)));
  const int agent = load ? barrier->loads : shadow_.stores(fiber.index);
  const auto epoch = load ? barrier->phase + 1 : static_cast<Epoch>(bulk.group + 1);
  each_global(bulk, [&](unsigned char* global, std::size_t bytes) {
    const Access access = load ? Access::read : Access::write;
    if (check_global(global, bytes, access, place))
      require(shadow_.access(fiber.index, agent, epoch, global_span(global, bytes), access, place));
  });
  require(shadow_.access(fiber.index, agent, epoch,
                         {shared_offset(bulk.copy.shared), static_cast<std::size_t>(counted_bytes(bulk))},
                         load ? Access::write : Access::read, place));
}

void Cta::check_wgmma(const Warpgroup& group, const PendingWgmma& wgmma, const void* place) {
  shadow_.issue_wgmma(static_cast<int>(&group - groups_.data()), static_cast<Epoch>(wgmma.group + 1));
  each_operand(wgmma.arguments, [&](std::size_t at, std::size_t bytes) {
    if (at + bytes <= job_->shared_bytes)
      require(shadow_.read_wgmma({at, bytes}, place)); // else refused later
  });
}

} // namespace kda::emulator
