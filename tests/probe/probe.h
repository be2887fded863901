#pragma once
// Counts what a piece of code asks of the allocator and of locks, in its thread, however it asks: the
// functions of libc are replaced in this executable, also for the libraries that it loads.
#include <cstdint>

namespace kda::test {

struct Counts {
  std::int64_t allocations = 0, releases = 0; ///< malloc and its kin, which operator new calls; free
  std::int64_t locks = 0; ///< mutexes, reader-writer and spin locks, condition variables, semaphores, once
};

/// While it lives, this thread is counted. One at a time.
class Probe {
public:
  Probe();
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;
  ~Probe();
  /// So far; ends the counting.
  Counts stop();
};

} // namespace kda::test
