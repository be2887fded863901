// mbarriers, bulk copies and wgmma of one CTA: everything completes at the wait that covers it, or at once.
#include "cta.h"
#include <algorithm>
#include <cstring>
#include <fmt/format.h>
#include <limits>

namespace kda::emulator {
namespace {
constexpr unsigned long kPolls = 1000000; // of mbarriers while nothing else happens

const char* name_of(GroupOperation operation) {
  switch (operation) {
  case GroupOperation::wgmma: return "wgmma";
  case GroupOperation::fence: return "wgmma_fence";
  case GroupOperation::commit: return "wgmma_commit";
  case GroupOperation::wait: return "wgmma_wait";
  }
  return "?";
}
} // namespace

void Cta::advance(void* barrier, Mbarrier& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.pending = state.arrivals;
  ++state.phase;
  if (state.gathering.clock != nullptr)
    state.completed = std::make_shared<const Clock>(*state.gathering.clock);
  polls_ = 0;
  ++progress_;
  std::vector<Fiber*>& waiting = mbarrier_waiting_[barrier];
  for (const Fiber* fiber : waiting)
    wake(*fiber);
  waiting.clear();
}

void Cta::complete_load(const PendingBulk& bulk) {
  kda::emulator::run(bulk, shared());
  const auto at = mbarriers_.find(bulk.copy.mbarrier);
  at->second.bytes -= counted_bytes(bulk);
  if (checked()) Shadow::complete(at->second.gathering, at->second.loads, at->second.phase + 1);
  advance(at->first, at->second);
}

void Cta::complete_arrival(const PendingArrival& arrival) {
  for (const PendingCopy& copy : arrival.copies)
    complete(copy);
  const auto at = mbarriers_.find(arrival.barrier);
  if (at->second.pending == 0)
    fail(fmt::format("more arrivals of copies at an mbarrier than it counts, of thread {}", arrival.thread));
  --at->second.pending;
  if (checked())
    Shadow::complete(at->second.gathering, shadow_.copies(arrival.thread),
                     static_cast<Epoch>(arrival.group + 1));
  advance(at->first, at->second);
}

void Cta::finish_loads(const void* barrier) {
  for (std::size_t i = 0; i < arrivals_.size();) {
    if (arrivals_[i].barrier != barrier) {
      ++i;
      continue;
    }
    const PendingArrival arrival = std::move(arrivals_[i]);
    arrivals_.erase(arrivals_.begin() + static_cast<std::ptrdiff_t>(i));
    complete_arrival(arrival);
  }
  for (std::size_t i = 0; i < loads_.size();) {
    if (loads_[i].copy.mbarrier != barrier) {
      ++i;
      continue;
    }
    const PendingBulk bulk = loads_[i];
    loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(i));
    complete_load(bulk);
  }
}

bool Cta::mbarrier(Fiber& fiber, MbarrierOperation operation, void* barrier, unsigned value,
                   const void* place) {
  const auto refuse = [&](const char* why) {
    fail(fmt::format("{} at {}: {}", describe_current(), source_place(place), why));
  };
  const auto offset = static_cast<unsigned char*>(barrier) - shared_;
  if (offset < 0 || offset % 8 != 0 || static_cast<std::size_t>(offset) + 8 > job_->shared_bytes)
    refuse("an mbarrier is 8 aligned bytes of shared memory");
  if (operation == MbarrierOperation::init) {
    std::memset(barrier, 0, 8);
    Mbarrier& state = mbarriers_[barrier] = {};
    state.arrivals = state.pending = static_cast<int>(value);
    if (checked()) {
      state.initialiser = fiber.index;
      state.loads = shadow_.loads();
      access(fiber, barrier, 8, Access::write, place);
    }
    return true;
  }
  const auto found = mbarriers_.find(barrier);
  if (found == mbarriers_.end()) refuse("an mbarrier that nobody initialised");
  Mbarrier& state = found->second;
  if (checked()) access(fiber, barrier, 8, Access::read, place);
  const auto passed = [&] {
    if ((state.phase & 1U) == value) return false;
    if (checked()) shadow_.acquire(fiber.index, state.completed);
    return true;
  };
  switch (operation) {
  case MbarrierOperation::init: break;
  case MbarrierOperation::expect: state.bytes += static_cast<long>(value); return true;
  case MbarrierOperation::expect_arrive: state.bytes += static_cast<long>(value); [[fallthrough]];
  case MbarrierOperation::arrive:
    if (state.pending == 0) refuse("more arrivals at an mbarrier than it counts");
    --state.pending;
    if (checked()) shadow_.release(fiber.index, state.gathering);
    advance(barrier, state);
    if (job_->seed > 1 && random_() % 4 == 0) yield(fiber, "resume", place);
    return true;
  case MbarrierOperation::test:
    finish_loads(barrier);
    if (passed()) return true;
    if (++polls_ > kPolls) fail("an endless loop of mbarrier_test; " + deadlock_report());
    yield(fiber, "mbarrier_test", place);
    return passed();
  case MbarrierOperation::wait:
    if (value > 1) refuse("a parity is 0 or 1");
    while (true) {
      finish_loads(barrier);
      if (passed()) return true;
      mbarrier_waiting_[barrier].push_back(&fiber);
      block(fiber, "mbarrier_wait", place);
    }
  }
  return true;
}

void Cta::bulk(Fiber& fiber, const BulkCopy& copy, const void* place) {
  PendingBulk bulk{copy, {}, fiber.index, fiber.bulk_groups};
  if (copy.map != nullptr) std::memcpy(&bulk.map, copy.map, sizeof bulk.map);
  if (const std::string wrong = check(copy, bulk.map, shared()); !wrong.empty())
    fail(fmt::format("{} at {}: a bulk copy of {}", describe_current(), source_place(place), wrong));
  const bool load = copy.mbarrier != nullptr;
  if (load && mbarriers_.count(copy.mbarrier) == 0)
    fail(fmt::format("{} at {}: a bulk copy to an mbarrier that nobody initialised", describe_current(),
                     source_place(place)));
  if (checked()) check_bulk(fiber, bulk, place);
  if (job_->copies == Copies::early) {
    if (load) return complete_load(bulk);
    return kda::emulator::run(bulk, shared());
  }
  // Whoever reads before the wait, or still reads what this overwrites, gets NaN.
  if (load && copy.map == nullptr) std::memset(copy.shared, 0xFF, copy.bytes);
  if (load && copy.map != nullptr)
    std::memset(copy.shared, 0xFF, static_cast<std::size_t>(counted_bytes(bulk)));
  if (!load) return fiber.bulk_stores.push_back(bulk);
  loads_.push_back(bulk);
  wake_waiting(copy.mbarrier);
}

/// They find new work to finish.
void Cta::wake_waiting(void* barrier) {
  std::vector<Fiber*>& waiting = mbarrier_waiting_[barrier];
  for (const Fiber* other : waiting)
    wake(*other);
  waiting.clear();
}

void Cta::arrive_copies(Fiber& fiber, void* barrier, const void* place) {
  if (mbarriers_.count(barrier) == 0)
    fail(fmt::format("{} at {}: copies arrive at an mbarrier that nobody initialised", describe_current(),
                     source_place(place)));
  PendingArrival arrival{barrier, std::move(fiber.copies), fiber.index, fiber.groups++};
  fiber.copies.clear();
  if (job_->copies == Copies::early) return complete_arrival(arrival);
  arrivals_.push_back(std::move(arrival));
  wake_waiting(barrier);
}

void Cta::bulk_wait(Fiber& fiber, int pending) {
  if (checked() && fiber.bulk_groups > pending)
    shadow_.complete(fiber.index, shadow_.stores(fiber.index),
                     static_cast<Epoch>(fiber.bulk_groups - pending));
  const auto ready = [&](const PendingBulk& bulk) { return bulk.group < fiber.bulk_groups - pending; };
  for (const PendingBulk& bulk : fiber.bulk_stores)
    if (ready(bulk)) kda::emulator::run(bulk, shared());
  fiber.bulk_stores.erase(std::remove_if(fiber.bulk_stores.begin(), fiber.bulk_stores.end(), ready),
                          fiber.bulk_stores.end());
}

void Cta::group(Fiber& fiber, GroupOperation operation, void* arguments, const void* place) {
  const std::size_t first = static_cast<std::size_t>(fiber.index) / 128 * 128;
  if (first + 128 > fibers_.size())
    fail(fmt::format("{} calls {} at {} outside of a whole warpgroup", describe_current(), name_of(operation),
                     source_place(place)));
  Warpgroup& group = groups_[first / 128];
  if (group.arrived == 0) group.operation = operation;
  if (group.operation != operation)
    fail(fmt::format("{} calls {} at {} where others of its warpgroup wait in {}\n{}", describe_current(),
                     name_of(operation), source_place(place), name_of(group.operation), deadlock_report()));
  group.arguments[fiber.index % 128] = arguments;
  if (++group.arrived < 128) return block(fiber, name_of(operation), place);
  group.arrived = 0;
  if (operation == GroupOperation::fence) group.fenced = true;
  if (operation == GroupOperation::wgmma) {
    if (checked() && !group.fenced)
      fail(fmt::format("proxy: {} calls wgmma at {} without a wgmma_fence before", describe_current(),
                       source_place(place)));
    issue_wgmma(group, place);
  }
  if (operation == GroupOperation::commit) ++group.groups;
  if (operation == GroupOperation::wait) {
    const int pending = *static_cast<int*>(arguments);
    finish_wgmma(group, pending, place);
    for (std::size_t i = first; checked() && group.groups > pending && i < first + 128; ++i)
      shadow_.complete(static_cast<int>(i), shadow_.wgmma(static_cast<int>(first / 128)),
                       static_cast<Epoch>(group.groups - pending));
  }
  for (std::size_t i = first; i < first + 128; ++i)
    if (&fibers_[i] != &fiber) wake(fibers_[i]);
}

void Cta::issue_wgmma(Warpgroup& group, const void* place) {
  PendingWgmma wgmma;
  for (std::size_t i = 0; i < 128; ++i)
    wgmma.arguments[i] = *static_cast<WgmmaArguments*>(group.arguments[i]);
  wgmma.group = group.groups;
  if (checked()) check_wgmma(group, wgmma, place);
  const bool chained = std::any_of(group.queue.begin(), group.queue.end(), [&](const PendingWgmma& other) {
    return other.arguments[0].d == wgmma.arguments[0].d;
  });
  if (!chained) {
    wgmma.d = read_accumulators(wgmma.arguments);
    // Whoever reads them before the wait gets NaN.
    write_accumulators(wgmma.arguments,
                       std::vector<float>(wgmma.d.size(), std::numeric_limits<float>::quiet_NaN()));
  }
  group.queue.push_back(std::move(wgmma));
  if (job_->copies == Copies::early) finish_wgmma(group, -1, place);
}

void Cta::finish_wgmma(Warpgroup& group, int pending, const void* place) {
  while (!group.queue.empty() && group.queue.front().group < group.groups - pending) {
    PendingWgmma& wgmma = group.queue.front();
    std::vector<float> d = wgmma.d.empty() ? read_accumulators(wgmma.arguments) : std::move(wgmma.d);
    const std::string wrong = kda::emulator::run(wgmma.arguments, d, shared());
    if (!wrong.empty()) fail(fmt::format("{} at {}: {}", describe_current(), source_place(place), wrong));
    write_accumulators(wgmma.arguments, d);
    group.queue.erase(group.queue.begin());
  }
}

} // namespace kda::emulator
