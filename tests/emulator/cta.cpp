// Scheduler, barriers and rendezvous of one CTA.
#include "cta.h"
#include <algorithm>
#include <cstring>
#include <fmt/format.h>
#include <map>
#include <numeric>
#include <sys/mman.h>

namespace kda::emulator {
namespace {

constexpr std::size_t kPage = 4096, kGuard = std::size_t{1} << 20;
constexpr unsigned char kPoison = 0xFF; // NaN in every floating type

Fiber& current_fiber() {
  return static_cast<Fiber&>(current());
}
void fiber_main() {
  Fiber& fiber = current_fiber();
  fiber.cta->job().entry(*fiber.cta->job().arguments);
  fiber.cta->finish(fiber);
}

// The place is the caller's caller-visible address: the primitives are inlined into the kernel.
void collective(WarpOperation operation, void* arguments) {
  Fiber& fiber = current_fiber();
  fiber.cta->collective(fiber, operation, arguments, __builtin_return_address(0));
}
void barrier(int id, int threads, bool arrive_only) {
  Fiber& fiber = current_fiber();
  fiber.cta->barrier(fiber, id, threads, arrive_only, __builtin_return_address(0));
}
void group(GroupOperation operation, void* arguments) {
  Fiber& fiber = current_fiber();
  fiber.cta->group(fiber, operation, arguments, __builtin_return_address(0));
}
bool mbarrier(MbarrierOperation operation, void* barrier, unsigned value) {
  Fiber& fiber = current_fiber();
  return fiber.cta->mbarrier(fiber, operation, barrier, value, __builtin_return_address(0));
}
void bulk(const BulkCopy* copy) {
  Fiber& fiber = current_fiber();
  fiber.cta->bulk(fiber, *copy, __builtin_return_address(0));
}
void bulk_commit() {
  ++current_fiber().bulk_groups;
}
void bulk_wait(int pending) {
  Fiber& fiber = current_fiber();
  fiber.cta->bulk_wait(fiber, pending);
}
// CTAs run on several threads of the host.
unsigned atomic_add(unsigned* to, unsigned value) {
  Fiber& fiber = current_fiber();
  fiber.cta->access(fiber, to, sizeof value, Access::atomic, __builtin_return_address(0));
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
float atomic_add_float(float* to, float value) {
  Fiber& fiber = current_fiber();
  fiber.cta->access(fiber, to, sizeof value, Access::atomic, __builtin_return_address(0));
  float old = 0;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  for (float sum = old + value;
       !__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);)
    sum = old + value;
  return old;
}
int atomic_max(int* to, int value) {
  Fiber& fiber = current_fiber();
  fiber.cta->access(fiber, to, sizeof value, Access::atomic, __builtin_return_address(0));
  int old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(to, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
void copy(void* shared, const void* global, int bytes, bool valid) {
  Fiber& fiber = current_fiber();
  fiber.cta->copy(fiber, {shared, global, bytes, valid, fiber.groups}, __builtin_return_address(0));
}
void commit() {
  ++current_fiber().groups;
}
void wait(int pending) {
  Fiber& fiber = current_fiber();
  fiber.cta->wait(fiber, pending);
}

void arrive_copies(void* barrier) {
  Fiber& fiber = current_fiber();
  fiber.cta->arrive_copies(fiber, barrier, __builtin_return_address(0));
}

void fence_proxy() {
  const Fiber& fiber = current_fiber();
  fiber.cta->fence_proxy(fiber);
}
void fence_mbarrier_init() {
  const Fiber& fiber = current_fiber();
  fiber.cta->fence_mbarrier_init(fiber);
}
void access(const void* address, unsigned long bytes, bool write, const void* place) {
  const Fiber& fiber = current_fiber();
  fiber.cta->access(fiber, address, bytes, write ? Access::write : Access::read, place);
}

} // namespace

void complete(const PendingCopy& copy) {
  const auto bytes = static_cast<std::size_t>(copy.bytes);
  if (copy.valid)
    std::memcpy(copy.to, copy.from, bytes);
  else
    std::memset(copy.to, 0, bytes);
}

const Services kServices{collective,
                         barrier,
                         copy,
                         commit,
                         wait,
                         arrive_copies,
                         group,
                         mbarrier,
                         bulk,
                         bulk_commit,
                         bulk_wait,
                         atomic_add,
                         atomic_add_float,
                         atomic_max,
                         fence_proxy,
                         fence_mbarrier_init,
                         access};

Cta::~Cta() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

bool Cta::prepare_shared() {
  const std::size_t bytes = (job_->shared_bytes + kPage - 1) / kPage * kPage;
  if (map_ == nullptr || map_bytes_ != bytes + 2 * kGuard) {
    if (map_ != nullptr) munmap(map_, map_bytes_);
    map_ = nullptr;
    map_bytes_ = bytes + 2 * kGuard;
    void* map = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return false;
    map_ = static_cast<unsigned char*>(map);
    mprotect(map_, kGuard, PROT_NONE);
    mprotect(map_ + kGuard + bytes, kGuard, PROT_NONE);
  }
  // As far right as 1,024-byte alignment allows; what is left before the guard is checked at the end.
  const std::size_t used = (job_->shared_bytes + 1023) / 1024 * 1024;
  shared_ = map_ + kGuard + bytes - used;
  std::memset(map_ + kGuard, kPoison, bytes);
  return true;
}

std::string Cta::check_shared() const {
  const unsigned char* const end = map_ + map_bytes_ - kGuard;
  for (const unsigned char* p = map_ + kGuard; p < end; ++p) {
    const bool inside = p >= shared_ && p < shared_ + job_->shared_bytes;
    if (!inside && *p != kPoison)
      return fmt::format("a write to byte {} of shared memory, of which the launch asked for {}", p - shared_,
                         job_->shared_bytes);
  }
  return {};
}

void Cta::start(std::size_t linear) {
  const auto count = static_cast<std::size_t>(job_->threads);
  // Not assign: a fiber keeps the capacity of its copies.
  fibers_.resize(count);
  warps_.assign((count + 31) / 32, {});
  order_.resize(warps_.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});
  if (job_->seed == 1) std::reverse(order_.begin(), order_.end());
  random_.seed(static_cast<std::uint_fast32_t>(job_->seed * 7919 + linear * 104729 + 1));
  shuffle_warps();
  for (Barrier& b : barriers_)
    b = {};
  groups_.assign((count + 127) / 128, {});
  mbarriers_.clear();
  mbarrier_waiting_.clear();
  loads_.clear();
  arrivals_.clear();
  polls_ = 0;
  overdue_ = false;
  live_ = job_->threads;
  linear_ = linear;
  if (checked()) shadow_.start(job_->threads, job_->shared_bytes);
  error_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& f = fibers_[i];
    f.index = static_cast<int>(i);
    for (std::size_t axis = 0, rest = linear; axis < 3; rest /= job_->grid[axis], ++axis) {
      f.grid[axis] = static_cast<int>(job_->grid[axis]);
      f.block[axis] = static_cast<int>(rest % job_->grid[axis]);
    }
    f.shared = shared_;
    f.services = &kServices;
    f.cta = this;
    f.waits_in = nullptr;
    f.done = false;
    f.groups = 0;
    f.copies.clear();
    f.bulk_groups = 0;
    f.bulk_stores.clear();
    f.stack = stacks_.prepare(i, &f, fiber_main);
    wake(f);
  }
}

std::string Cta::run(const Job& job, std::size_t linear) {
  job_ = &job;
  if (!stacks_.reserve(static_cast<std::size_t>(job.threads)) || !prepare_shared())
    return "no memory for the threads of a CTA";
  start(linear);
  running_ = pick();
  kda_switch_stack(&main_stack_, running_->stack);
  const std::string shared = check_shared();
  if (error_.empty()) return shared.empty() ? shared : shared + ", by " + describe_current();
  return shared.empty() ? error_ : error_ + "; " + shared;
}

void Cta::shuffle_warps() {
  if (job_->seed > 1) std::shuffle(order_.begin(), order_.end(), random_);
}

/// The first ready warp in order runs as far as it can: between two barriers, some warps are done before
/// others begin, which shows a missing barrier. Lanes of a warp differ in order too.
Fiber* Cta::pick() {
  for (const std::size_t w : order_) {
    const unsigned ready = warps_[w].ready;
    if (ready == 0) continue;
    int lane = 0;
    if (job_->seed == 0)
      lane = __builtin_ctz(ready);
    else if (job_->seed == 1)
      lane = 31 - __builtin_clz(ready);
    else {
      const unsigned turn = random_() % 32;
      const unsigned turned = ready >> turn | ready << ((32 - turn) % 32);
      lane = static_cast<int>((static_cast<unsigned>(__builtin_ctz(turned)) + turn) % 32);
    }
    warps_[w].ready &= ~(1U << lane);
    return &fibers_[w * 32 + static_cast<std::size_t>(lane)];
  }
  return nullptr;
}

void Cta::wake(const Fiber& fiber) {
  warps_[static_cast<std::size_t>(fiber.index) / 32].ready |= 1U << (fiber.index % 32);
}

void Cta::block(Fiber& fiber, const char* in, const void* place) {
  fiber.waits_in = in;
  fiber.place = place;
  ++switches_;
  if (overdue_.load(std::memory_order_relaxed)) fail_overdue(place);
  Fiber* next = pick();
  if (next == nullptr) fail(deadlock_report());
  if (next != &fiber) {
    running_ = next;
    kda_switch_stack(&fiber.stack, next->stack);
  }
  fiber.waits_in = nullptr;
}

void Cta::finish(Fiber& fiber) {
  ++switches_;
  ++progress_;
  fiber.done = true;
  Fiber* next = --live_ == 0 ? nullptr : pick();
  if (live_ != 0 && next == nullptr) fail(deadlock_report());
  if (next != nullptr) running_ = next;
  kda_switch_stack(&fiber.stack, next == nullptr ? main_stack_ : next->stack);
  __builtin_unreachable();
}

void Cta::fail(std::string text) {
  error_ = std::move(text);
  void* abandoned = nullptr;
  kda_switch_stack(&abandoned, main_stack_);
  __builtin_unreachable();
}

void Cta::fail_overdue(const void* place) {
  fail(fmt::format(
      "an endless loop: {} ran for {:g} s without a barrier or warp operation, or its block ten times "
      "as long without an end of a barrier or thread, at {}",
      describe_current(), job_->watchdog_seconds, source_place(place)));
}

std::string Cta::describe_current() const {
  return fmt::format("thread {} of block {},{},{}", running_->index, running_->block[0], running_->block[1],
                     running_->block[2]);
}

void Cta::collective(Fiber& fiber, WarpOperation operation, void* arguments, const void* place) {
  const std::size_t first = static_cast<std::size_t>(fiber.index) / 32 * 32;
  Warp& warp = warps_[first / 32];
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.place = place;
  }
  if (warp.operation != operation)
    fail(fmt::format("the lanes of warp {} diverge: {} calls {} at {} where others wait in {}\n{}",
                     first / 32, describe_current(), name_of(operation), source_place(place),
                     name_of(warp.operation), deadlock_report()));
  const bool aligned = operation != WarpOperation::sync && operation != WarpOperation::shuffle &&
                       operation != WarpOperation::ballot;
  if (aligned && !same_line(place, warp.place))
    fail(fmt::format("the lanes of warp {} diverge: {} calls {} at {}, others at {}", first / 32,
                     describe_current(), name_of(operation), source_place(place), source_place(warp.place)));
  warp.arguments[fiber.index % 32] = arguments;
  warp.arrived |= 1U << (fiber.index % 32);
  if (warp.arrived != ~0U) return block(fiber, name_of(operation), place);
  if (checked()) check_matrix(first, operation, place);
  const std::string wrong = run_operation(operation, warp.arguments, shared_, job_->shared_bytes);
  if (!wrong.empty())
    fail(fmt::format("{} in {} at {}: {}", describe_current(), name_of(operation), source_place(place),
                     wrong));
  warp.arrived = 0;
  warp.ready |= ~0U & ~(1U << (fiber.index % 32));
  // Now and then another warp goes on here.
  if (job_->seed > 1 && random_() % 16 == 0) {
    shuffle_warps();
    wake(fiber);
    block(fiber, "resume", place);
  }
}

/// The compiler may have made two calls of one.
bool Cta::same_line(const void* a, const void* b) {
  if (a == b) return true;
  const auto [found, fresh] = same_line_.try_emplace({a, b}, false);
  if (fresh) found->second = source_place(a) == source_place(b);
  return found->second;
}

/// bar.sync and bar.arrive are .aligned: the lanes of a warp must execute the same one.
void Cta::check_aligned(const Fiber& fiber, int barrier, const void* place) {
  Warp& warp = warps_[static_cast<std::size_t>(fiber.index) / 32];
  if (warp.at_barrier == 0) {
    warp.barrier = barrier;
    warp.barrier_place = place;
  }
  if (warp.barrier != barrier || !same_line(place, warp.barrier_place))
    fail(fmt::format("the lanes of warp {} diverge: {} is at barrier {} at {}, others at barrier {} at {}",
                     fiber.index / 32, describe_current(), barrier, source_place(place), warp.barrier,
                     source_place(warp.barrier_place)));
  warp.at_barrier = (warp.at_barrier + 1) % 32;
}

void Cta::barrier(Fiber& fiber, int id, int threads, bool arrive_only, const void* place) {
  if (id < 0 || id > 15) fail(fmt::format("barrier {} at {}; there are 0 to 15", id, source_place(place)));
  if (id == 0 && threads == 0) threads = job_->threads;
  if (threads <= 0 || threads % 32 != 0 || threads > job_->threads)
    fail(fmt::format("barrier {} among {} threads at {}; a CTA has {}", id, threads, source_place(place),
                     job_->threads));
  Barrier& b = barriers_[static_cast<std::size_t>(id)];
  if (b.arrived == 0) b.threads = threads;
  if (b.threads != threads)
    fail(fmt::format("{} waits at barrier {} among {} threads at {}, others among {}", describe_current(), id,
                     threads, source_place(place), b.threads));
  check_aligned(fiber, id, place);
  ++b.arrived;
  if (checked()) shadow_.release(fiber.index, b.gathering);
  if (!arrive_only) b.waiting.push_back(&fiber);
  static constexpr std::array<const char*, 16> kNames = {
      "sync_block",     "sync_named(1)",  "sync_named(2)",  "sync_named(3)",
      "sync_named(4)",  "sync_named(5)",  "sync_named(6)",  "sync_named(7)",
      "sync_named(8)",  "sync_named(9)",  "sync_named(10)", "sync_named(11)",
      "sync_named(12)", "sync_named(13)", "sync_named(14)", "sync_named(15)"};
  if (b.arrived == threads) {
    for (const Fiber* waiting : b.waiting) {
      if (checked()) shadow_.replace(waiting->index, b.gathering.clock);
      wake(*waiting);
    }
    ++progress_;
    b.gathering = {};
    b.waiting.clear();
    b.arrived = 0;
    shuffle_warps();
  }
  if (!arrive_only) block(fiber, kNames[static_cast<std::size_t>(id)], place);
}

void Cta::copy(Fiber& fiber, const PendingCopy& copy, const void* place) {
  const auto offset = static_cast<const unsigned char*>(copy.to) - shared_;
  if (offset < 0 || static_cast<std::size_t>(offset + copy.bytes) > job_->shared_bytes)
    fail(fmt::format("{}: a copy of {} bytes to byte {} of shared memory, which has {}", describe_current(),
                     copy.bytes, offset, job_->shared_bytes));
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(copy.bytes) != 0;
  };
  if (misaligned(copy.to) || (copy.valid && misaligned(copy.from)))
    fail(fmt::format("{}: a copy of {} bytes whose {} address is not aligned to as many", describe_current(),
                     copy.bytes, misaligned(copy.to) ? "shared" : "global"));
  if (checked()) check_copy(fiber, copy, place);
  if (job_->copies == Copies::early) return complete(copy);
  // Whoever reads before the wait, or still reads what this overwrites, gets NaN.
  std::memset(copy.to, kPoison, static_cast<std::size_t>(copy.bytes));
  fiber.copies.push_back(copy);
}

void Cta::wait(Fiber& fiber, int pending) {
  if (checked() && fiber.groups > pending)
    shadow_.complete(fiber.index, shadow_.copies(fiber.index), static_cast<Epoch>(fiber.groups - pending));
  const auto ready = [&](const PendingCopy& copy) { return copy.group < fiber.groups - pending; };
  for (const PendingCopy& copy : fiber.copies)
    if (ready(copy)) complete(copy);
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), ready), fiber.copies.end());
}

void Cta::yield(Fiber& fiber, const char* in, const void* place) {
  shuffle_warps();
  wake(fiber);
  block(fiber, in, place);
}

std::string Cta::deadlock_report() const {
  std::string report = fmt::format("not every thread of block {},{},{} gets there:", running_->block[0],
                                   running_->block[1], running_->block[2]);
  for (std::size_t w = 0; w < warps_.size(); ++w) {
    std::map<std::string, unsigned> places; // -> lanes
    for (std::size_t lane = 0; lane < 32 && w * 32 + lane < fibers_.size(); ++lane) {
      const Fiber& f = fibers_[w * 32 + lane];
      std::string where = "can run";
      if (f.done)
        where = "has ended";
      else if (f.waits_in != nullptr)
        where = fmt::format("waits in {} at {}", f.waits_in, source_place(f.place));
      places[where] |= 1U << lane;
    }
    for (const auto& [where, lanes] : places)
      report += fmt::format("\n  warp {} lanes {:08x} {}", w, lanes, where);
  }
  return report;
}

} // namespace kda::emulator
