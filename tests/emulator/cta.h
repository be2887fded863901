#pragma once
// One CTA: its fibers, the scheduler, barriers and warp operations.
#include "async.h"
#include "cuda/kernel_args.cuh"
#include "emulator.h"
#include "fiber.h"
#include "memory.h"
#include <atomic>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace kda::emulator {

using Entry = void (*)(KernelArgs);

struct Job {
  Entry entry = nullptr;
  const KernelArgs* arguments = nullptr;
  std::array<unsigned, 3> grid{1, 1, 1};
  int threads = 0;
  std::size_t shared_bytes = 0;
  std::uint64_t seed = 0;
  Copies copies = Copies::late;
  std::optional<GlobalShadow> global;              ///< checked
  const void *code = nullptr, *code_end = nullptr; ///< the kernel's object
  double watchdog_seconds = 0;
};

class Cta;
struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int group;
};
void complete(const PendingCopy& copy);
/// An mbarrier counts it when its thread's copies have come.
struct PendingArrival {
  void* barrier;
  std::vector<PendingCopy> copies;
  int thread, group;
};
/// Thread comes first: Thread* and Fiber* are the same address.
struct Fiber : Thread {
  Cta* cta = nullptr;
  void* stack = nullptr;
  const char* waits_in = nullptr; ///< null while it can run
  const void* place = nullptr;    ///< return address in the kernel
  bool done = false;
  int groups = 0; ///< committed so far
  std::vector<PendingCopy> copies;
  int bulk_groups = 0;
  std::vector<PendingBulk> bulk_stores;
};

/// Runs the CTAs of one worker. The shared memory of a CTA holds NaN until it is written, and ends at a page
/// that cannot be touched.
class Cta {
public:
  Cta() = default;
  Cta(const Cta&) = delete;
  Cta& operator=(const Cta&) = delete;
  ~Cta();

  /// Empty when CTA `linear` of the grid ran to its end; else what went wrong, and where.
  [[nodiscard]] std::string run(const Job& job, std::size_t linear);

  // Called from fibers.
  void collective(Fiber& fiber, WarpOperation operation, void* arguments, const void* place);
  void barrier(Fiber& fiber, int id, int threads, bool arrive_only, const void* place);
  void copy(Fiber& fiber, const PendingCopy& copy, const void* place);
  void wait(Fiber& fiber, int pending);
  void arrive_copies(Fiber& fiber, void* barrier, const void* place);
  void group(Fiber& fiber, GroupOperation operation, void* arguments, const void* place);
  bool mbarrier(Fiber& fiber, MbarrierOperation operation, void* barrier, unsigned value, const void* place);
  void bulk(Fiber& fiber, const BulkCopy& copy, const void* place);
  void bulk_wait(Fiber& fiber, int pending);
  // Checked, in cta_checks.cpp.
  void access(const Fiber& fiber, const void* address, std::size_t bytes, Access access, const void* place);
  void fence_proxy(const Fiber& fiber);
  void fence_mbarrier_init(const Fiber& fiber);
  [[noreturn]] void fail(std::string text);
  [[noreturn]] void finish(Fiber& fiber);
  [[nodiscard]] const Job& job() const { return *job_; }
  /// Changes whenever another thread of the CTA goes on. Signal handlers may ask.
  void set_overdue() { overdue_.store(true, std::memory_order_relaxed); }
  [[noreturn]] void fail_overdue(const void* place);
  [[nodiscard]] unsigned long progress() const { return progress_.load(std::memory_order_relaxed); }
  [[nodiscard]] unsigned long switches() const { return switches_.load(std::memory_order_relaxed); }
  /// Where a fault at this address comes from, e.g. "thread 37 of block 0,1,0".
  [[nodiscard]] std::string describe_current() const;

private:
  struct Warp {
    unsigned ready = 0, arrived = 0;
    WarpOperation operation = WarpOperation::sync;
    void* arguments[32] = {};
    const void* place = nullptr; ///< where its first lane called the operation
    // The barrier that its lanes arrive at, all of them before any goes to another one.
    int barrier = 0, at_barrier = 0;
    const void* barrier_place = nullptr;
  };
  struct Barrier {
    int threads = 0;
    int arrived = 0;
    std::vector<Fiber*> waiting;
    Gathering gathering;
  };

  [[nodiscard]] bool checked() const { return job_->global.has_value(); }
  void require(const std::string& fault) {
    if (!fault.empty()) fail(fault);
  }
  [[nodiscard]] std::size_t shared_offset(const void* address) const {
    return static_cast<std::size_t>(static_cast<const unsigned char*>(address) - shared_);
  }
  /// False for a constant of the kernel.
  bool check_global(const void* address, std::size_t bytes, Access access, const void* place);
  void check_matrix(std::size_t first, WarpOperation operation, const void* place);
  void check_copy(const Fiber& fiber, const PendingCopy& copy, const void* place);
  void check_bulk(const Fiber& fiber, const PendingBulk& bulk, const void* place);
  void check_wgmma(const Warpgroup& group, const PendingWgmma& wgmma, const void* place);

  bool prepare_shared();
  void start(std::size_t linear);
  void shuffle_warps();
  [[nodiscard]] bool same_line(const void* a, const void* b);
  void check_aligned(const Fiber& fiber, int barrier, const void* place);
  void issue_wgmma(Warpgroup& group, const void* place);
  void finish_wgmma(Warpgroup& group, int pending, const void* place);
  void finish_loads(const void* barrier);
  void complete_load(const PendingBulk& bulk);
  void complete_arrival(const PendingArrival& arrival);
  void wake_waiting(void* barrier);
  void advance(void* barrier, Mbarrier& state);
  void yield(Fiber& fiber, const char* in, const void* place);
  [[nodiscard]] SharedView shared() const { return {shared_, job_->shared_bytes}; }
  [[nodiscard]] Fiber* pick();
  void block(Fiber& fiber, const char* in, const void* place);
  void wake(const Fiber& fiber);
  [[nodiscard]] std::string deadlock_report() const;
  [[nodiscard]] std::string check_shared() const;

  const Job* job_ = nullptr;
  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::size_t> order_; ///< warps, the first that is ready runs
  std::array<Barrier, 16> barriers_;
  std::vector<Warpgroup> groups_;
  std::map<void*, Mbarrier> mbarriers_;
  std::map<void*, std::vector<Fiber*>> mbarrier_waiting_;
  std::vector<PendingBulk> loads_;
  std::vector<PendingArrival> arrivals_;
  Shadow shadow_;
  std::size_t linear_ = 0;  ///< of the grid
  unsigned long polls_ = 0; ///< tests of mbarriers since the last progress
  std::minstd_rand random_;
  std::atomic<unsigned long> switches_{0};
  std::atomic<unsigned long> progress_{0}; ///< barriers, phases and threads that have come to their end
  std::atomic<bool> overdue_{false};       ///< the watchdog has barked
  std::map<std::pair<const void*, const void*>, bool> same_line_; ///< what same_line has found
  Fiber* running_ = nullptr;
  void* main_stack_ = nullptr;
  int live_ = 0;
  std::string error_;
  unsigned char* map_ = nullptr; ///< guard page, shared memory, guard page
  std::size_t map_bytes_ = 0;
  unsigned char* shared_ = nullptr;
};

/// The lanes of a complete warp meet: does the operation for all of them. Empty, or what was wrong.
[[nodiscard]] std::string run_operation(WarpOperation operation, void* const* arguments,
                                        const unsigned char* shared, std::size_t shared_bytes);
[[nodiscard]] const char* name_of(WarpOperation operation);

/// "chunk_forward.cu:123" (innermost inlined frame outside primitives first), or the bare address.
[[nodiscard]] std::string source_place(const void* address);

extern const Services kServices;

/// While one lives on a thread, SIGSEGV, SIGBUS, SIGILL and SIGFPE raised by `cta`'s fibers end that CTA with
/// an error, and so does a fiber that runs for `watchdog_seconds` without a switch. Only for the emulator's
/// own worker threads.
class FaultScope {
public:
  FaultScope(Cta& cta, const Job& job);
  ~FaultScope();
  FaultScope(const FaultScope&) = delete;
  FaultScope& operator=(const FaultScope&) = delete;

private:
  std::vector<unsigned char> stack_;
  void* timer_ = nullptr;
};

} // namespace kda::emulator
