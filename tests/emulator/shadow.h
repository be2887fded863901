#pragma once
// What the checker knows of the memory that one CTA has used: who wrote and read each piece, and which of
// that every thread can rely on. An access is a race unless a barrier, mbarrier or wait orders it. What other
// CTAs do in global memory is GlobalShadow's concern (memory.h).
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace kda::emulator {

using Epoch = std::uint32_t;

/// Up to which epoch of every agent a thread, or a barrier, has seen. Agents are the threads, and what works
/// for them: their copy_async groups, their bulk stores, the wgmma of a warpgroup, the loads of an mbarrier.
struct Clock {
  std::vector<Epoch> seen;
  /// What of it a fence_proxy_async made visible to asynchronous accesses; empty: nothing.
  std::vector<Epoch> fenced;

  void join(const Clock& other);
};
using SharedClock = std::shared_ptr<const Clock>;

/// What the threads that arrive at a barrier bring.
struct Gathering {
  std::shared_ptr<Clock> clock;
  SharedClock last; ///< joined last: the lanes of a warp often have the same one
};

enum class Access : std::uint8_t { read, write, atomic };

/// Bytes of shared memory, by their offset, or of global memory, by their address.
struct Span {
  std::size_t at, bytes;
  bool global = false;
};

class Shadow {
public:
  void start(int threads, std::size_t shared_bytes);

  // Agents, by the thread or warpgroup they work for.
  [[nodiscard]] int copies(int thread) const { return threads_ + thread; }
  [[nodiscard]] int stores(int thread) const { return 2 * threads_ + thread; }
  [[nodiscard]] int wgmma(int group) const { return 3 * threads_ + group; }
  /// A new one a call.
  [[nodiscard]] int loads();

  // Order. A thread's accesses up to a release are seen by whoever acquires what it was released into.
  void release(int thread, Gathering& into);
  void acquire(int thread, const SharedClock& clock);
  /// The same, when the thread released into it and has done nothing since.
  void replace(int thread, const SharedClock& clock);
  /// `thread` has waited for the work of `agent` up to `epoch`.
  void complete(int thread, int agent, Epoch epoch);
  static void complete(Gathering& gathering, int agent, Epoch epoch);
  void fence(int thread);
  void sync_warp(int first);

  // Accesses; empty, or the fault.
  [[nodiscard]] std::string access(int thread, const Span& span, Access access, const void* place);
  /// On behalf of `agent`, at its `epoch`, when `thread` issued it.
  [[nodiscard]] std::string access(int thread, int agent, Epoch epoch, const Span& span, Access access,
                                   const void* place);
  /// wgmma reads when all 128 threads have issued it: it may rely on what every one of them has seen.
  void issue_wgmma(int group, Epoch epoch);
  [[nodiscard]] std::string read_wgmma(const Span& span, const void* place);

private:
  static constexpr std::size_t kCell = 2;   ///< bytes: no element is smaller
  static constexpr std::size_t kPage = 128; ///< cells of global memory that come together
  static constexpr int kNobody = -1;

  struct Reader {
    int first; ///< of 32 agents
    std::uint32_t lanes;
    Epoch epoch;
    const void* place;
  };
  struct Cell {
    int writer = kNobody;
    Epoch epoch = 0;
    const void* place = nullptr;
    bool atomic = false;
    std::vector<Reader> readers{}; ///< since then, of which none is ordered before another
  };
  struct Thread {
    SharedClock clock;
    Epoch epoch = 1;
    Epoch copies = 0, stores = 0; ///< complete
  };
  /// Who accesses, and as whom.
  struct Accessor {
    const Clock* clock;
    const Thread* thread; ///< null: as the clock says
    int index;            ///< of the thread
    int agent;
    Epoch epoch;
    Access access;
    const void* place;
    bool global = false;
  };

  [[nodiscard]] bool asynchronous(int agent) const { return agent >= 2 * threads_; }
  [[nodiscard]] bool ordered(const Accessor& who, int agent, Epoch epoch) const;
  [[nodiscard]] bool fenced(const Accessor& who, int agent, Epoch epoch) const;
  [[nodiscard]] bool ordered(const Accessor& who, const Reader& reader) const;
  [[nodiscard]] Cell& cell(const Accessor& who, std::size_t index);
  [[nodiscard]] std::string range(Accessor who, const Span& span);
  [[nodiscard]] std::string after_write(const Accessor& who, const Cell& cell, std::size_t at) const;
  void add_reader(const Accessor& who, Cell& cell) const;
  [[nodiscard]] int unordered_lane(const Accessor& who, const Reader& reader) const;
  [[nodiscard]] std::string conflict(const Accessor& who, std::size_t at, int agent, const char* did,
                                     const void* place) const;
  [[nodiscard]] std::string name(int agent) const;
  void publish(int thread, Clock& to) const;

  int threads_ = 0, loads_ = 0;
  std::vector<Thread> thread_;
  std::vector<Cell> cells_;
  std::unordered_map<std::size_t, std::vector<Cell>> pages_; ///< of global memory that this CTA has used
  std::vector<Cell>* page_ = nullptr;                        ///< used last ...
  std::size_t page_number_ = 0;                              ///< ... its number
  Clock wgmma_clock_;                                        ///< of the wgmma that reads
  int wgmma_group_ = 0;
  Epoch wgmma_epoch_ = 0;
};

} // namespace kda::emulator
