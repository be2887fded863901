#include "fork_count.h"
#include <atomic>
#include <pthread.h>

namespace kda {
namespace {
std::atomic<std::uint32_t> forks{0};
// Not getpid(): that is a system call, and a grandchild may get the number of its dead grandparent.
[[maybe_unused]] const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++forks; });
} // namespace

std::uint32_t fork_count() {
  return forks.load(std::memory_order_relaxed);
}

} // namespace kda
