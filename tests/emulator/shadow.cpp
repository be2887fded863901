// The order of shared memory accesses by vector clocks. Shuffles, votes, ldmatrix and mma order nothing
// (PTX ISA, "Memory Consistency Model": barriers do).
#include "shadow.h"
#include "cta.h"
#include "memory.h"
#include <algorithm>
#include <fmt/format.h>

namespace kda::emulator {
namespace {

void join(std::vector<Epoch>& to, const std::vector<Epoch>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i)
    to[i] = std::max(to[i], from[i]);
}
std::size_t place_of(int agent) {
  return static_cast<std::size_t>(agent);
}
/// "byte 12 of shared memory".
std::string name(bool global, std::size_t at) {
  return global ? Memory::describe(reinterpret_cast<const void*>(at))
                : fmt::format("byte {} of shared memory", at);
}
bool covers(const std::vector<Epoch>& clock, int agent, Epoch epoch) {
  return place_of(agent) < clock.size() && clock[place_of(agent)] >= epoch;
}
void raise(std::vector<Epoch>& clock, int agent, Epoch epoch) {
  if (clock.size() <= place_of(agent)) clock.resize(place_of(agent) + 1);
  clock[place_of(agent)] = std::max(clock[place_of(agent)], epoch);
}

} // namespace

void Clock::join(const Clock& other) {
  kda::emulator::join(seen, other.seen);
  kda::emulator::join(fenced, other.fenced);
}

void Shadow::start(int threads, std::size_t shared_bytes) {
  threads_ = threads;
  loads_ = 0;
  thread_.assign(static_cast<std::size_t>(threads), {std::make_shared<const Clock>()});
  // Not assign: a cell keeps the capacity of its readers.
  cells_.resize((shared_bytes + kCell - 1) / kCell);
  for (Cell& cell : cells_) {
    cell.writer = kNobody;
    cell.readers.clear();
  }
  pages_.clear();
  page_ = nullptr;
}

int Shadow::loads() {
  return wgmma((threads_ + 127) / 128) + loads_++;
}

void Shadow::publish(int thread, Clock& to) const {
  const Thread& t = thread_[place_of(thread)];
  raise(to.seen, thread, t.epoch);
  if (t.copies != 0) raise(to.seen, copies(thread), t.copies);
  if (t.stores != 0) raise(to.seen, stores(thread), t.stores);
}

void Shadow::release(int thread, Gathering& into) {
  Thread& t = thread_[place_of(thread)];
  if (into.clock == nullptr) into.clock = std::make_shared<Clock>();
  if (into.last != t.clock) into.clock->join(*t.clock);
  into.last = t.clock;
  publish(thread, *into.clock);
  ++t.epoch;
}

void Shadow::acquire(int thread, const SharedClock& clock) {
  Thread& t = thread_[place_of(thread)];
  if (clock == nullptr || clock == t.clock) return;
  auto joined = std::make_shared<Clock>(*t.clock);
  joined->join(*clock);
  t.clock = std::move(joined);
}

void Shadow::replace(int thread, const SharedClock& clock) {
  thread_[place_of(thread)].clock = clock;
}

void Shadow::complete(int thread, int agent, Epoch epoch) {
  Thread& t = thread_[place_of(thread)];
  if (agent == copies(thread)) {
    t.copies = std::max(t.copies, epoch);
  } else if (agent == stores(thread)) {
    t.stores = std::max(t.stores, epoch);
  } else if (!covers(t.clock->seen, agent, epoch)) {
    auto raised = std::make_shared<Clock>(*t.clock);
    raise(raised->seen, agent, epoch);
    t.clock = std::move(raised);
  }
}

void Shadow::complete(Gathering& gathering, int agent, Epoch epoch) {
  if (gathering.clock == nullptr) gathering.clock = std::make_shared<Clock>();
  raise(gathering.clock->seen, agent, epoch);
}

void Shadow::fence(int thread) {
  Thread& t = thread_[place_of(thread)];
  auto clock = std::make_shared<Clock>(*t.clock);
  publish(thread, *clock);
  join(clock->fenced, clock->seen);
  t.clock = std::move(clock);
  ++t.epoch;
}

void Shadow::sync_warp(int first) {
  Gathering all;
  Epoch latest = 0;
  for (int i = first; i < first + 32; ++i) {
    release(i, all);
    latest = std::max(latest, thread_[place_of(i)].epoch);
  }
  for (int i = first; i < first + 32; ++i) {
    thread_[place_of(i)].clock = all.clock;
    thread_[place_of(i)].epoch = latest;
  }
}

std::string Shadow::access(int thread, const Span& span, Access access, const void* place) {
  const Thread& t = thread_[place_of(thread)];
  return range({t.clock.get(), &t, thread, thread, t.epoch, access, place}, span);
}

std::string Shadow::access(int thread, int agent, Epoch epoch, const Span& span, Access access,
                           const void* place) {
  const Thread& t = thread_[place_of(thread)];
  return range({t.clock.get(), &t, thread, agent, epoch, access, place}, span);
}

void Shadow::issue_wgmma(int group, Epoch epoch) {
  wgmma_group_ = group;
  wgmma_epoch_ = epoch;
  wgmma_clock_ = *thread_[place_of(group * 128)].clock;
  for (int i = group * 128; i < group * 128 + 128; ++i) {
    const Clock& other = *thread_[place_of(i)].clock;
    const auto meet = [](std::vector<Epoch>& to, const std::vector<Epoch>& from) {
      to.resize(std::min(to.size(), from.size()));
      for (std::size_t k = 0; k < to.size(); ++k)
        to[k] = std::min(to[k], from[k]);
    };
    meet(wgmma_clock_.seen, other.seen);
    meet(wgmma_clock_.fenced, other.fenced);
  }
}

std::string Shadow::read_wgmma(const Span& span, const void* place) {
  return range({&wgmma_clock_, nullptr, 0, wgmma(wgmma_group_), wgmma_epoch_, Access::read, place}, span);
}

bool Shadow::ordered(const Accessor& who, int agent, Epoch epoch) const {
  if (who.thread != nullptr) {
    if (agent == who.index) return true;
    if (agent == copies(who.index) && who.thread->copies >= epoch) return true;
    if (agent == stores(who.index)) return who.thread->stores >= epoch;
  }
  return covers(who.clock->seen, agent, epoch);
}

/// What an asynchronous access needs for a write of the generic proxy.
bool Shadow::fenced(const Accessor& who, int agent, Epoch epoch) const {
  return !asynchronous(who.agent) || asynchronous(agent) || covers(who.clock->fenced, agent, epoch);
}

bool Shadow::ordered(const Accessor& who, const Reader& reader) const {
  for (std::uint32_t lanes = reader.lanes; lanes != 0; lanes &= lanes - 1)
    if (!ordered(who, reader.first + __builtin_ctz(lanes), reader.epoch)) return false;
  return true;
}

Shadow::Cell& Shadow::cell(const Accessor& who, std::size_t index) {
  if (!who.global) return cells_[index];
  if (page_ == nullptr || page_number_ != index / kPage) {
    page_number_ = index / kPage;
    page_ = &pages_[page_number_];
    page_->resize(kPage);
  }
  return (*page_)[index % kPage];
}

std::string Shadow::range(Accessor who, const Span& span) {
  who.global = span.global;
  for (std::size_t at = span.at / kCell; at * kCell < span.at + span.bytes; ++at) {
    Cell& cell = this->cell(who, at);
    if (std::string wrong = after_write(who, cell, at * kCell); !wrong.empty()) return wrong;
    if (who.access == Access::read) {
      add_reader(who, cell);
      continue;
    }
    for (const Reader& reader : cell.readers)
      if (!ordered(who, reader))
        return conflict(who, at * kCell, unordered_lane(who, reader), "read", reader.place);
    cell.readers.clear();
    cell.writer = who.agent;
    cell.epoch = who.epoch;
    cell.place = who.place;
    cell.atomic = who.access == Access::atomic;
  }
  return {};
}

std::string Shadow::after_write(const Accessor& who, const Cell& cell, std::size_t at) const {
  if (cell.writer == kNobody) {
    // Of global memory, other launches and the host may have written it.
    if (who.access == Access::write || who.global) return {};
    return fmt::format("uninitialised: {} reads {} at {}, which nobody wrote", name(who.agent),
                       kda::emulator::name(false, at), source_place(who.place));
  }
  if (who.access == Access::atomic && cell.atomic) return {};
  if (!ordered(who, cell.writer, cell.epoch)) return conflict(who, at, cell.writer, "wrote", cell.place);
  if (fenced(who, cell.writer, cell.epoch)) return {};
  return fmt::format("proxy: {} {} {} at {}, which {} wrote at {}, without a fence_proxy_async between",
                     name(who.agent), who.access == Access::read ? "reads" : "writes",
                     kda::emulator::name(who.global, at), source_place(who.place), name(cell.writer),
                     source_place(cell.place));
}

void Shadow::add_reader(const Accessor& who, Cell& cell) const {
  const int first = who.agent / 32 * 32;
  const std::uint32_t lane = 1U << (who.agent % 32);
  for (Reader& reader : cell.readers)
    if (reader.first == first && reader.epoch == who.epoch) {
      reader.lanes |= lane;
      reader.place = who.place;
      return;
    }
  // Whoever is ordered after this read is ordered after those.
  const auto earlier = [&](const Reader& reader) { return ordered(who, reader); };
  cell.readers.erase(std::remove_if(cell.readers.begin(), cell.readers.end(), earlier), cell.readers.end());
  cell.readers.push_back({first, lane, who.epoch, who.place});
}

int Shadow::unordered_lane(const Accessor& who, const Reader& reader) const {
  std::uint32_t lanes = reader.lanes;
  while (ordered(who, reader.first + __builtin_ctz(lanes), reader.epoch))
    lanes &= lanes - 1;
  return reader.first + __builtin_ctz(lanes);
}

std::string Shadow::conflict(const Accessor& who, std::size_t at, int agent, const char* did,
                             const void* place) const {
  return fmt::format("race: {} {} {} at {}, which {} {} at {}, {}", name(who.agent),
                     who.access == Access::read ? "reads" : "writes", kda::emulator::name(who.global, at),
                     source_place(who.place), name(agent), did, source_place(place),
                     agent < threads_ ? "with no barrier between" : "and nobody waited for that");
}

std::string Shadow::name(int agent) const {
  if (agent < threads_) return fmt::format("thread {}", agent);
  if (agent < stores(0)) return fmt::format("a copy_async of thread {}", agent - copies(0));
  if (agent < wgmma(0)) return fmt::format("a bulk store of thread {}", agent - stores(0));
  if (agent < wgmma((threads_ + 127) / 128)) return fmt::format("wgmma of warpgroup {}", agent - wgmma(0));
  return "a bulk load";
}

} // namespace kda::emulator
