// Samples: on tensors of the real size, each candidate on its own, then the fastest few in turn.
//
// A sample is one call after a fill of a buffer larger than the L2. The fill is timed as well: where it takes
// longer than it did undisturbed, something else used the device, and the sample is taken again.
#include "tuning.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>
#include <limits>
#include <random>

namespace kda {
namespace {

constexpr std::size_t kSamples = 15, kFinalists = 3;
constexpr std::size_t kFew = 5; ///< fewer samples have no spread
constexpr int kCalibrations = 50, kRetakes = 8;
constexpr double kDisturbed = 1.3; ///< of the fill's calm time
/// A candidate is stopped when its best is this often the best median so far: after one sample, after two.
constexpr double kHopeless = 4, kBehind = 1.3;

void summarise(Contestant& c) {
  if (c.samples.empty()) return;
  std::sort(c.samples.begin(), c.samples.end());
  const auto at = [&](double share) {
    return c.samples[static_cast<std::size_t>(share * static_cast<double>(c.samples.size() - 1))];
  };
  c.row.median_us = at(0.5);
  c.row.spread_us = c.samples.size() < kFew ? std::numeric_limits<double>::quiet_NaN() : at(0.9) - at(0.1);
}

} // namespace

Result<void*> Tuning::fitting_workspace(const CallTensors& tensors, std::size_t flush_bytes) {
  for (;;) {
    Contestant* largest = nullptr;
    std::size_t bytes = 0;
    for (Contestant& c : all_) {
      if (!c.runs()) continue;
      const std::size_t own = workspace_of(backend_->target(), p_, c.variant, s_).bytes;
      if (largest == nullptr || own > bytes) {
        largest = &c;
        bytes = own;
      }
    }
    const auto memory = allocate(tensors, flush_bytes, std::max<std::size_t>(bytes, 256));
    if (memory || largest == nullptr || memory.error().code != ErrorCode::out_of_memory) return memory;
    largest->out(
        "skipped",
        fmt::format("its workspace of {} MiB does not fit in the device's memory beside the tensors: {}",
                    bytes >> 20U, memory.error().message));
  }
}

Status Tuning::time_all() {
  if (broken_ || std::none_of(all_.begin(), all_.end(), [](const Contestant& c) { return c.runs(); }))
    return {};
  tell_preparing();
  CallTensors tensors(backend_, engine_->options.tune_memory_bytes);
  if (Status ok = tensors.create(p_, s_, std::random_device{}()); !ok) return ok;
  // More than any L2; a smaller buffer where memory is short would time warm lines.
  const std::size_t flush_bytes =
      backend_->target().kind == Target::Kind::cuda ? std::size_t{128} << 20U : std::size_t{64} << 20U;
  const auto flush = allocate(tensors, 0, flush_bytes);
  if (!flush) return tl::unexpected(flush.error());
  const auto workspace = fitting_workspace(tensors, flush_bytes);
  if (workspace) {
    Bench bench{tensors, *workspace, *flush, flush_bytes};
    calibrate(bench);
    double best = std::numeric_limits<double>::infinity();
    std::size_t done = 0;
    for (Contestant& c : all_) {
      ++done;
      if (!c.runs()) continue;
      if (!c.always && past(1)) {
        c.out("skipped", "not timed: " + budget_text());
        continue;
      }
      tell("timing", done, all_.size(), c);
      time_one(c, bench, best);
      if (c.ok()) best = std::min(best, c.row.median_us);
    }
    finals(bench);
    backend_->release(*workspace);
  }
  backend_->release(*flush);
  return workspace ? Status{} : Status(tl::unexpected(workspace.error()));
}

/// Brings the clocks up and finds what a fill takes. A fill only writes; a copy reads and writes at about the
/// same rate of bytes.
void Tuning::calibrate(Bench& bench) {
  const auto fill = [&](void* stream) {
    return backend_->fill(bench.flush, 1, bench.flush_bytes / 4, stream);
  };
  std::vector<double> fills;
  for (int i = 0; i < kCalibrations && (i == 0 || !past(0.9)); ++i)
    if (const auto us = backend_->time_us(fill, Replay::eager); us) fills.push_back(*us);
  if (fills.empty()) return;
  std::nth_element(fills.begin(), fills.begin() + std::ssize(fills) / 2, fills.end());
  bench.calm_us = fills[fills.size() / 2];
  if (bench.calm_us > 0)
    head_.floor_us = head_.bytes / (static_cast<double>(bench.flush_bytes) / bench.calm_us);
}

Status Tuning::sample(Contestant& c, const Bench& bench) {
  const TuneTiming& timing = engine_->options.tune_timing;
  const auto fill = [&](void* stream) {
    return backend_->fill(bench.flush, 0, bench.flush_bytes / 4, stream);
  };
  const auto work = [&](void* stream) { return call(*c.kernel, bench.tensors, bench.workspace, stream); };
  for (int attempt = 0;; ++attempt) {
    const auto fill_us = backend_->time_us(fill, Replay::eager);
    if (!fill_us) return tl::unexpected(fill_us.error());
    if (timing.warm_l2)
      if (const Status ok = work(backend_->stream()); !ok) return ok;
    const auto us = backend_->time_us(work, timing.graph ? Replay::graph : Replay::eager);
    if (!us) return tl::unexpected(us.error());
    const bool calm = *fill_us <= kDisturbed * bench.calm_us;
    if (!calm && attempt < kRetakes && !past(1)) continue;
    c.disturbed += calm ? 0 : 1;
    c.samples.push_back(*us);
    return {};
  }
}

void Tuning::time_one(Contestant& c, const Bench& bench, double best_us) {
  for (bool warm_up = true; c.samples.size() < kSamples; warm_up = false) {
    if (const Status ok = sample(c, bench); !ok) {
      fault(c, ok.error());
      return;
    }
    if (past(1)) break; // with one sample at least, were it the warm-up
    if (warm_up) {
      c.samples.clear();
      continue;
    }
    const double times = *std::min_element(c.samples.begin(), c.samples.end()) / best_us;
    if ((c.samples.size() == 1 && times > kHopeless) || (c.samples.size() == 2 && times > kBehind)) {
      c.note(fmt::format("stopped after {} samples: {:.1f} times the best", c.samples.size(), times));
      break;
    }
  }
  if (c.disturbed > 0)
    c.note(
        fmt::format("{} of {} samples while something else used the device", c.disturbed, c.samples.size()));
  summarise(c);
}

/// The fastest few again, interleaved, so that a drift of clocks hits all alike. One alone has nobody to
/// meet.
void Tuning::finals(const Bench& bench) {
  std::vector<Contestant*> order;
  for (Contestant& c : all_)
    if (c.runs() && c.samples.size() >= kFew) order.push_back(&c);
  std::stable_sort(order.begin(), order.end(), [](const Contestant* a, const Contestant* b) {
    return a->row.median_us < b->row.median_us;
  });
  for (std::size_t i = order.size(); i-- > kFinalists;)
    if (order[i]->variant != standard_) order.erase(order.begin() + static_cast<std::ptrdiff_t>(i));
  if (order.size() < 2) return;
  std::vector<std::vector<double>> first;
  first.reserve(order.size());
  for (Contestant* c : order)
    first.push_back(std::exchange(c->samples, {}));
  constexpr std::size_t kRounds = 2 * kSamples;
  std::size_t rounds = 0;
  for (; rounds < kRounds && !past(1) && !broken_; ++rounds)
    for (Contestant* c : order) {
      tell("finals", rounds + 1, kRounds, *c);
      if (!c->ok()) continue;
      if (const Status ok = sample(*c, bench); !ok) fault(*c, ok.error());
    }
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (rounds < kFew) order[i]->samples = first[i];
    if (order[i]->ok()) summarise(*order[i]);
  }
}

} // namespace kda
