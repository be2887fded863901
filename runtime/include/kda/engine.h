#pragma once
// The public C++ API: describe -> plan -> prepare -> execute.
//
//   auto engine = kda::Engine::create(kda::EngineOptions::from_environment().value()).value();
//   auto plan   = engine.plan(problem, kda::Device::host(), sizes).value(); // no compile, no device work
//   auto kernel = engine.prepare(plan).value();                             // compile, load, perhaps tune:
//   may block auto bytes  = kernel.workspace_bytes(sizes).value();                    // exact, a pure
//   function auto status = kernel.execute(args, workspace, bytes, stream);           // launch only
//
// Handles are cheap to copy, immutable and safe to share between threads; a Kernel keeps its engine alive.
#include "codegen/variant.h"
#include "kda/tuning_report.h"
#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

struct Device {
  enum class Kind : std::uint8_t { host, cuda, emulator } kind = Kind::host;
  int index = 0;
  static Device host() { return {}; }
  static Device cuda(int index) { return {Kind::cuda, index}; }
  bool operator==(const Device&) const = default;
};
/// "host", "cuda:0", "emulator".
[[nodiscard]] std::string to_string(const Device&);
[[nodiscard]] Result<Device> parse_device(std::string_view);

/// A tensor the caller owns. Strides are in elements; 0 everywhere means contiguous. The last dimension of q,
/// k, v, g, o (and of gradients) must be contiguous, and so must the inner matrix of a state.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::fp32;
  int rank = 0;
  std::int64_t shape[4] = {0, 0, 0, 0};
  std::int64_t stride[4] = {0, 0, 0, 0};
};
[[nodiscard]] Tensor contiguous(void* data, DType dtype, std::initializer_list<std::int64_t> shape);
struct IndexTensor {
  const void* data = nullptr; ///< on the kernel's device, never read back
  IndexType dtype = IndexType::int64;
  std::int64_t size = 0; ///< N+1
};
/// Whole numbers by sequence, [N], or by sequence and column, [N, columns]. Strides are in elements and taken
/// as they are: a 0 is refused where there is more than one element.
struct IndexTable {
  const void* data = nullptr; ///< on the kernel's device, never read back
  IndexType dtype = IndexType::int32;
  int rank = 1;
  std::int64_t shape[2] = {0, 0};
  std::int64_t stride[2] = {0, 0};
};
[[nodiscard]] IndexTable contiguous_table(const void* data, IndexType dtype,
                                          std::initializer_list<std::int64_t> shape);
/// Which slot numbers mean "this row is padding" and not a slot.
enum class PaddingPolicy : std::uint8_t { none, negative, zero, both };

/// The tensors of a call. Absent optional ones keep data == nullptr.
///   q, k [B,T,H,K]; v, o [B,T,HV,V]; g [B,T,HV,K]; beta [B,T,HV]; states [N,HV,K,V] or [N,HV,V,K];
///   A_log [HV] fp32; dt_bias [HV,K] fp32. Packed: B = 1 and cu_seqlens. Gradients have the shape and dtype
///   of their input; d_A_log, d_dt_bias, d_initial_state and d_final_state are fp32 / the state's dtype and
///   layout. gate: g -> o, fp32 [B,T,HV,K] natural-log decay; gate_backward: d_o (fp32, of that shape) ->
///   d_g, d_A_log, d_dt_bias.
///
/// States of a forward besides the last one (Problem::interior_states): the state after (j + 1) *
/// interior_interval tokens of sequence n goes to slot interior_slots[n, j] of interior_states,
/// [slots,HV,K,V] or [slots,HV,V,K] in the state's dtype, as long as the sequence has so many tokens and the
/// table such a column. A number that is no slot means that this state is not kept: with an interval of 64
/// and -1 elsewhere these are the states at any offsets that are multiples of 64. The slots of a call differ
/// from each other, and interior_states is not the memory of another tensor.
///
/// has_initial_state, [N], of a forward or a recurrence without a pool: a sequence whose number is 0 starts
/// from zero, whatever initial_state holds for it.
///
/// States that the forward saved for the backward (Problem::saved_interval; their number and bytes:
/// saved_states): the state after (j + 1) * interior_interval tokens of sequence n is slot interior_slots[n,
/// j] of interior_states, [slots,HV,K,V] or [slots,HV,V,K] in the state's dtype. A backward in slabs starts
/// from them where it would otherwise find them again; one in one piece does not read them. One that is read
/// and whose number is no slot makes the gradients that it reaches NaN, and raises slot_error to 1 + n.
///
/// With a state pool (Problem::state_pool), initial_state and final_state are pools [slots,HV,K,V] or
/// [slots,HV,V,K]: the same memory (in place) or two. Sequence n starts from slot read_slots[n] of
/// initial_state (from zero where that is absent) and leaves its state in slot write_slots[n] of final_state
/// (nowhere where that is absent). stride[0], the distance of two slots, is 64-bit and may leave gaps. The
/// numbers of every table are read by the kernel, so that a replayed CUDA graph sees what they hold then.
///   * Padding: a sequence whose read slot is skipped by the padding policy (its first write slot where there
///     is no initial_state) gets o = 0 and touches no slot. Where only a write slot is skipped, o is computed
///     and the state is not kept.
///   * Refused: a slot number that is not skipped and not in [0, slots) gives o = 0, changes no slot and
///     raises slot_error to 1 + n where it is less; with several the largest n stays. Zero it before the
///     call. The same becomes of an accepted count, a parent or a length that its table cannot hold.
///   * A sequence without tokens copies its state from the one slot to the other.
///   * Sequences of one call must not write the same slot, nor one the slot that another reads.
///
/// Verifying drafts. A call of several tokens a sequence, of which the caller accepts some afterwards:
///   * Problem::every_state: write_slots is [N, columns]; the state after token t of sequence n goes to slot
///     write_slots[n, t]. Tokens beyond the columns refuse the sequence; columns beyond its tokens are not
///     touched. The next call passes the same table as read_slots and accepted[n], how many of the tokens
///     were accepted: it starts from read_slots[n, accepted[n] - 1].
///   * Only the last state: without every_state.
///   * Problem::updates: what every token does to the state is kept, not the state: u, k and decay in
///     update_u, update_k and update_decay, fp32 tensors of [B,T,HV,V], [B,T,H,K] and [B,T,HV,K]; final_state
///     is then mostly absent. The operation replay takes them, initial_state and accepted[n], and leaves in
///     final_state the state after the first accepted[n] tokens, with the bits that the recurrence would have
///     left. Sequences that were padding or refused leave their rows as they are.
///   * accepted[n] = 0 is a no-op in either operation: o = 0, no slot is touched, in place or not.
///   * Problem::tree: the tokens of a sequence are a tree of at most 64. parents[n, t] is the token, counted
///   in
///     the sequence, that token t continues, before it in order; negative: the initial state. Every token
///     gets the same bits as in a chain of its ancestors. accepted[n] is 1 + the last accepted token here,
///     and that token's ancestors are what replay applies. No "last" state is kept: final_state goes with
///     every_state. In place, no slot of write_slots[n] may be the one that n reads.
struct Args {
  Tensor q, k, v, g, beta, A_log, dt_bias, initial_state, o, final_state;
  Tensor d_o, d_final_state, d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial_state;
  IndexTensor cu_seqlens;
  Tensor update_u, update_k, update_decay; ///< recurrent with updates: out; replay: in
  IndexTable read_slots, write_slots;      ///< with a pool: given where initial_state and final_state are
  IndexTable accepted;       ///< [N]; replay; recurrent: with a pool, required where read_slots has columns
  IndexTable parents;        ///< with a tree: [N, columns]
  Tensor interior_states;    ///< with interior states, or saved states
  IndexTable interior_slots; ///< with interior_states: [N, columns]
  std::int64_t interior_interval = 64; ///< tokens, a multiple of 64
  IndexTable has_initial_state;        ///< [N]; absent: every sequence has one, if there is initial_state
  PaddingPolicy padding = PaddingPolicy::none; ///< with a pool
  std::int32_t* slot_error = nullptr;          ///< one word on the kernel's device; null: nobody looks
  float scale = 0;                             ///< 0: K^-1/2
  float lower_bound = -5;                      ///< of the bounded gates
};

class Backend; // runtime/src/backend.h

/// Of a workspace: as many bytes as the kernel wants.
inline constexpr std::size_t kNoLimit = static_cast<std::size_t>(-1);

enum class TuneMode : std::uint8_t {
  off,    ///< the cost model's choice
  cached, ///< a tuned row if there is one, else the cost model's choice (default)
  on,     ///< time the candidates that have no row
  force,  ///< tune again
  pinned, ///< what EngineOptions::tune_pins say, else the cost model's choice; the same in every process
};

/// Replaces every value by its largest over all ranks (an all-reduce with max, in float64). Every rank calls
/// it with as many values, and as often, for the same sequence of prepare and tune.
using TuneReduce = std::function<Status(std::span<double> values)>;

struct EngineOptions {
  std::optional<std::filesystem::path> cache_directory; ///< unset: XDG; empty path: memory only
  std::vector<std::filesystem::path> read_only_caches;
  std::vector<std::filesystem::path> cache_packs; ///< files of `kda-jit cache pack` or precompile --pack
  std::uint64_t cache_max_bytes = std::uint64_t{1} << 30U; ///< of the directory; 0: no limit
  /// Of images and sources kept in memory beside the loaded kernels, which it does not touch; 0: no limit.
  std::uint64_t cache_memory_bytes = std::uint64_t{256} << 20U;
  TuneMode tune = TuneMode::cached;
  double tune_budget_seconds =
      30; ///< of one tune: compile until half, check until 3/4, time until all is spent
  std::uint64_t tune_memory_bytes = 0; ///< of the device, that a tuner may hold; 0: what is free
  TuneTiming tune_timing;
  std::vector<std::filesystem::path> tune_pins; ///< JSON files of reports; the first that fits counts
  /// `kda-jit`: candidates then run in a process of their own, so that one that faults spoils nothing here.
  std::filesystem::path tune_worker;
  TuneReduce tune_reduce; ///< of ranks that must choose alike; the slowest rank's time counts
  int threads = 0; ///< host kernels and parallel compiles (as many as memory allows); 0: hardware threads
  /// Where the source, the log and the code of every kernel that is prepared go, compiled with line info for
  /// that (a cache entry of its own); empty: nowhere. A kernel that does not compile leaves a reproducer
  /// there, or else in the cache directory.
  std::filesystem::path dump_directory;
  std::function<void(std::string_view)> log;  ///< one line a call; empty: warnings to stderr
  std::optional<std::filesystem::path> nvrtc; ///< unset: where the loader and the CUDA toolkit have it
  std::shared_ptr<Backend> emulator; ///< what Device::Kind::emulator runs on; for tests and `kda-jit check`
  /// The variables that environment_variables lists. Malformed values are an error; `strict` also refuses
  /// unknown KDA_JIT_ names.
  static Result<EngineOptions> from_environment(bool strict = false);
};

/// Paths separated by colons, as in the environment; empty ones are left out.
[[nodiscard]] std::vector<std::filesystem::path> parse_paths(std::string_view);

/// A variable that EngineOptions::from_environment reads.
struct EnvironmentVariable {
  const char* name;
  const char* meaning;
};
[[nodiscard]] std::vector<EnvironmentVariable> environment_variables();

enum class Origin : std::uint8_t { compiled, memory, disk, read_only, pack };
[[nodiscard]] const char* to_string(Origin);

/// What a prepared kernel is and where it came from.
struct KernelInfo {
  std::string device, variant, choice; ///< choice: "cost model", "tuned", "pinned", "given"
  Origin origin = Origin::compiled;
  int registers = 0, shared_bytes = 0,
      spill_bytes = 0; ///< largest over the kernels; shared: of a launch, in all
  double compile_ms = 0, load_ms = 0;
  std::size_t image_bytes = 0;
  std::string key; ///< digest of the cache entry
};

/// What the tuner is about to do, told before it does it.
struct TuneProgress {
  /// "waiting for another tuner of this device", "compiling", "preparing", "checking", "timing", "finals"
  std::string_view stage;
  int done = 0, total = 0;  ///< which of the stage's steps; 0 of 0 while waiting
  std::string_view variant; ///< empty while waiting and preparing
};
struct TuneRequest {
  std::function<void(const TuneProgress&)> progress;
  std::vector<Variant> only;  ///< what to time; empty: every candidate
  std::vector<Variant> never; ///< what must not run, not even as the reference
  /// For who holds the device's tuning lock and keeps the rows himself: a parent that started this process.
  bool worker = false;
};

/// A pack that was written.
struct PackReport {
  std::size_t entries = 0;
  std::uint64_t bytes = 0;
  std::string digest;
};

class Engine;
class Plan {
public:
  [[nodiscard]] const Problem& problem() const;
  [[nodiscard]] const Variant& variant() const;
  [[nodiscard]] Device device() const;
  [[nodiscard]] std::string explain() const;

  struct Impl; ///< the library's own

private:
  friend class Engine;
  std::shared_ptr<const Impl> impl_;
};

class Kernel {
public:
  /// Exact bytes of workspace that `execute` needs for these sizes; invalid_argument for impossible sizes.
  [[nodiscard]] Result<std::size_t> workspace_bytes(const Sizes&) const;
  /// Checks shapes, dtypes, strides and alignment, then launches into `stream` (a CUstream; ignored on the
  /// host, where the call is complete on return). Allocates nothing on success, does not synchronise, may be
  /// captured into a CUDA graph. `workspace` is 256-byte aligned and on the device. A decode kernel may be
  /// launched while the kernel before it in the stream ends (programmatic dependent launch); before it reads
  /// anything it waits for that one itself.
  Status execute(const Args&, void* workspace, std::size_t workspace_bytes, void* stream = nullptr) const;
  [[nodiscard]] const KernelInfo& info() const;
  [[nodiscard]] const Problem& problem() const;

  struct Impl; ///< the library's own

private:
  friend class Engine;
  std::shared_ptr<const Impl> impl_;
};

struct DeviceInfo {
  Device device;
  std::string name, arch, driver, compiler;
  std::string id;             ///< that of a GPU: its UUID
  int compute_capability = 0; ///< 90 for sm_90a; 0 on the host
  std::string problem;        ///< why it cannot be used; empty when it can
};

class Engine {
public:
  [[nodiscard]] static Result<Engine> create(EngineOptions options = {});
  /// Every device, unusable ones with the reason. The host is always the last.
  [[nodiscard]] std::vector<DeviceInfo> devices() const;
  /// The best device there is: cuda:0, else the host.
  [[nodiscard]] Device best_device() const;

  /// Picks a variant: `variant` if given, else the pin or the tuned row of this problem and bucket, else the
  /// cost model. Plan::explain says which, and which rows or pins did not count. None needs more than
  /// `max_workspace` bytes for the typical sizes: a tuned one that does gives way to the fastest measured
  /// one, else the cost model's, that does not. An error when every one does, or when the given one does.
  [[nodiscard]] Result<Plan> plan(const Problem&, Device, const Sizes& typical,
                                  const std::optional<Variant>& variant = std::nullopt,
                                  std::size_t max_workspace = kNoLimit) const;
  /// Compiles or finds the image and loads it; with TuneMode on or force it tunes first.
  [[nodiscard]] Result<Kernel> prepare(const Plan&) const;
  [[nodiscard]] std::future<Result<Kernel>> prepare_async(const Plan&) const;
  /// Compiles into the cache for an architecture that need not be here. Returns where the image came from.
  [[nodiscard]] Result<KernelInfo> precompile(const Problem&, const Variant&, const Target&) const;
  /// Writes the images with these keys (KernelInfo::key), which this engine made or found, into one file for
  /// EngineOptions::cache_packs, whole or not at all.
  [[nodiscard]] Result<PackReport> pack(const std::filesystem::path&,
                                        const std::set<std::string>& keys) const;
  /// Checks every candidate against the device's token kernel and times it, in order of the cost model's
  /// estimate; the rows go to the tuning database. The untuned choice and one token kernel have their turn
  /// whatever the budget. One tuner works on a device at a time, also among processes that share the cache;
  /// the others wait. Candidates that do not fit in the budget or in the device's memory get a row that says
  /// so; with none that fits no row is chosen and plans keep the untuned choice.
  [[nodiscard]] Result<TuneReport> tune(const Problem&, Device, const Sizes&,
                                        const TuneRequest& request = {}) const;
  /// Stored tuning rows, all problems and devices.
  [[nodiscard]] Result<std::vector<TuneReport>> reports() const;
  /// Adds them to the stored rows, as they are: each counts where its device, driver, compiler and image are
  /// those of today. Returns how many rows there were; io_error, and nothing added, when they cannot be
  /// stored.
  Result<std::size_t> import(const std::vector<TuneReport>&) const;

  /// Everything at once: plan, prepare (and tune, when the options say so), a workspace from the device,
  /// execute, wait for the stream. not_prepared, and nothing done, while the stream is being captured.
  Status run(const Problem&, Device, const Sizes&, const Args&, void* stream = nullptr) const;

  // Device memory for callers without a runtime of their own (tools, tests).
  [[nodiscard]] Result<void*> allocate(Device, std::size_t bytes) const;
  void release(Device, void* data) const;
  Status copy_to_device(Device, void* to, const void* from, std::size_t bytes) const;
  Status copy_from_device(Device, void* to, const void* from, std::size_t bytes) const;
  /// Waits for all work of the device; not while a stream of it is captured.
  Status synchronize(Device) const;
  /// The cache's directory, empty when it is memory only.
  [[nodiscard]] std::filesystem::path cache_directory() const;
  /// Images compiled by this engine since it was created.
  [[nodiscard]] std::int64_t compile_count() const;

  struct Impl; ///< the library's own

private:
  std::shared_ptr<Impl> impl_;
};

} // namespace kda
