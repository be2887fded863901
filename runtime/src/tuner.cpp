// The run of a tuner: who competes, compiling, the decision, the rows.
#include "marshal.h"
#include "tuning.h"
#include "tuning_rows.h"
#include <algorithm>
#include <cmath>
#include <ctime>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <limits>
#include <thread>

namespace kda {
namespace {

/// A gain below this share of the untuned choice's time is noise whatever the spread says.
constexpr double kLeastGain = 0.02;
/// Half the spread of a row that has too few samples to know it, as a share of its time.
constexpr double kUnknownSpread = 0.3;
constexpr double kNever = std::numeric_limits<double>::infinity();

bool contains(const std::vector<Variant>& list, const Variant& v) {
  return std::find(list.begin(), list.end(), v) != list.end();
}

/// What varies at random about a row's median, in microseconds.
double noise_of(const TuneRow& row) {
  return std::isfinite(row.spread_us) ? row.spread_us / 2 : kUnknownSpread * row.median_us;
}

constexpr std::string_view kTie = "tie with '";
/// What decide wrote into a stored row is of then.
void forget_tie(TuneRow& row) {
  if (const auto at = row.reason.find(kTie); at != row.reason.npos) row.reason.erase(at > 2 ? at - 2 : 0);
}

} // namespace

Result<TuneReport> Tuning::run() {
  const auto standard = choose(p_, backend_->target(), s_);
  if (!standard) return tl::unexpected(standard.error());
  standard_ = *standard;
  head_ = report_head(*engine_, *backend_, p_, s_);
  enter();
  const bool ranks = static_cast<bool>(engine_->options.tune_reduce);
  // Ranks meet in the reduce hook, so none holds a lock there: two of them may share a device.
  if (const Status ok = agree_on_wanted(); !ok) return tl::unexpected(ok.error());
  bool measured = false;
  std::shared_ptr<const void> lock;
  if (anything_wanted()) {
    bool waited = false;
    if (!request_.worker)
      lock = engine_->tuning_lock(*backend_, [&] {
        waited = true;
        if (request_.progress) request_.progress({"waiting for another tuner of this device", 0, 0, {}});
      });
    if (waited && !ranks) enter(); // the other may have done this work
    began_ = backend_->seconds();
    measured = anything_wanted();
    if (measured)
      if (const Status ok = engine_->options.tune_worker.empty() ? measure() : measure_in_worker(); !ok) {
        if (!ranks) return tl::unexpected(ok.error());
        drop_rest("skipped", ok.error().message); // the other ranks wait for this one's times
      }
  }
  if (!measured && !ranks) return report();
  if (ranks) lock.reset(); // else held until the rows are kept, so that whoever waits finds them
  if (const Status ok = agree_on_times(); !ok) return tl::unexpected(ok.error());
  decide();
  keep();
  return report();
}

void Tuning::enter() {
  all_.clear();
  const auto stored = rows_of(*engine_, head_);
  std::map<std::string, std::string> images; // by variant
  for (const Candidate& candidate : enumerate(p_, backend_->target()))
    if (candidate.rejected.empty())
      images[to_string(candidate.variant)] =
          Engine::Impl::image_key(*backend_, p_, candidate.variant).value_or("");
  const auto counts = [&](const TuneRow& row) {
    const auto image = images.find(row.variant);
    return image != images.end() && image->second == row.image;
  };
  const bool has_choice = std::any_of(stored.begin(), stored.end(),
                                      [&](const auto& x) { return x.second.chosen && counts(x.second); });
  for (const Candidate& candidate : enumerate(p_, backend_->target())) {
    Contestant c;
    c.variant = candidate.variant;
    c.estimate_us = kNever;
    c.row.variant = to_string(c.variant);
    c.row.status = "ok";
    if (!candidate.rejected.empty()) {
      c.wanted = false;
      c.out("rejected", candidate.rejected);
      all_.push_back(std::move(c));
      continue;
    }
    c.estimate_us = estimate_us(p_, c.variant, backend_->target(), s_);
    c.row.image = images[c.row.variant];
    const auto known = stored.find(c.row.variant);
    const std::string status = known != stored.end() && counts(known->second) ? known->second.status : "";
    const bool asked = request_.only.empty() || contains(request_.only, c.variant);
    // What was skipped is tried again as long as nothing could be chosen.
    const bool settled =
        status == "faulted" || (missing_only_ && !status.empty() && (status != "skipped" || has_choice));
    if (contains(request_.never, c.variant)) {
      c.wanted = c.stored = false;
      c.barred = true;
      c.out("skipped", "it was not to run");
    } else if (settled || (!asked && !status.empty())) {
      c.wanted = false;
      c.row = known->second;
      c.barred = status == "faulted" || status == "wrong" || status == "failed";
    } else if (!asked) {
      c.wanted = c.stored = false;
      c.out("skipped", "not asked for");
    }
    all_.push_back(std::move(c));
  }
  std::stable_sort(all_.begin(), all_.end(),
                   [](const Contestant& a, const Contestant& b) { return a.estimate_us < b.estimate_us; });
  const auto first = [&](const auto& is) {
    const auto c = std::find_if(all_.begin(), all_.end(), [&](const Contestant& x) {
      return std::isfinite(x.estimate_us) && !x.barred && is(x);
    });
    if (c != all_.end()) c->always = true;
  };
  first([&](const Contestant& c) { return c.variant == standard_; });
  first([&](const Contestant& c) { return !is_chunked(c.variant.algorithm); });
}

bool Tuning::anything_wanted() const {
  return std::any_of(all_.begin(), all_.end(), [](const Contestant& c) { return c.wanted && c.ok(); });
}

bool Tuning::past(double share) const {
  return spent_seconds() >= share * engine_->options.tune_budget_seconds;
}
std::string Tuning::budget_text() const {
  return fmt::format("the tuning budget of {:g} s was spent", engine_->options.tune_budget_seconds);
}

void Tuning::tell(std::string_view stage, std::size_t done, std::size_t total, const Contestant& c) const {
  if (request_.progress)
    request_.progress({stage, static_cast<int>(done), static_cast<int>(total), c.row.variant});
}

void Tuning::tell_preparing() const {
  if (request_.progress) request_.progress({"preparing", 1, 1, {}});
}

Status Tuning::measure() {
  compile();
  if (const Status ok = unless_full(check_all()); !ok) return ok;
  return unless_full(time_all());
}

void Tuning::compile() {
  std::vector<Contestant*> todo;
  for (Contestant& c : all_)
    if (c.wanted || c.always) todo.push_back(&c);
  // Those that have their turn anyway come first: the others end with their share of the budget.
  std::stable_partition(todo.begin(), todo.end(), [](const Contestant* c) { return c->always; });
  std::atomic<std::size_t> next{0};
  std::mutex mutex; // of the caller's progress
  const auto work = [&] {
    for (std::size_t i = next++; i < todo.size(); i = next++) {
      Contestant& c = *todo[i];
      if (!c.always && past(0.5)) {
        c.out("skipped", "not compiled: half of " + budget_text());
        continue;
      }
      {
        const std::scoped_lock lock(mutex);
        tell("compiling", i + 1, todo.size(), c);
      }
      const auto kernel = engine_->kernel(engine_, Plan::Impl{p_, c.variant, device_, s_, "given", {}});
      if (!kernel) {
        if (c.wanted) c.out("failed", kernel.error().message);
        continue;
      }
      c.kernel = *kernel;
      if (!c.wanted) continue;
      c.row.registers = c.kernel->info.registers;
      c.row.shared_bytes = c.kernel->info.shared_bytes;
      if (c.kernel->info.spill_bytes > 0)
        c.row.reason = fmt::format("spills {} bytes", c.kernel->info.spill_bytes);
    }
  };
  const int threads = engine_->threads();
  std::vector<std::jthread> pool;
  pool.reserve(static_cast<std::size_t>(threads));
  for (int i = 0; i < threads; ++i)
    pool.emplace_back(work);
}

Status Tuning::unless_full(const Status& ok) {
  if (ok || ok.error().code != ErrorCode::out_of_memory) return ok;
  drop_rest("skipped", fmt::format("not timed: {}", ok.error().message));
  engine_->warn(fmt::format("nothing of {} fits in the device's memory; the untuned choice stays: {}",
                            to_string(p_), ok.error().message));
  return {};
}

void Tuning::drop_rest(const std::string& status, const std::string& reason) {
  for (Contestant& c : all_)
    if (c.wanted && c.ok() && c.row.median_us == 0) c.out(status, reason);
}

void Tuning::fault(Contestant& c, const Error& error) {
  c.out(error.code == ErrorCode::out_of_memory ? "skipped" : "failed", error.message);
  // An error that a second wait still reports is the context's, not the call's.
  if (error.code != ErrorCode::device_error || backend_->wait(backend_->stream())) return;
  c.row.status = "faulted";
  c.stored = true;
  broken_ = true;
  drop_rest("skipped",
            fmt::format("the device does not work any more in this process: '{}' faulted", c.row.variant));
  engine_->warn(fmt::format("'{}' broke the device for this process: {}; start anew, it will not run again. "
                            "EngineOptions::tune_worker tunes in a process of its own",
                            c.row.variant, error.message));
}

Status Tuning::agree_on_wanted() {
  const TuneReduce& reduce = engine_->options.tune_reduce;
  if (!reduce) return {};
  std::vector<double> wanted;
  for (const Contestant& c : all_)
    wanted.push_back(c.wanted ? 1 : 0);
  if (const Status ok = reduce(wanted); !ok) return ok;
  for (std::size_t i = 0; i < all_.size(); ++i) {
    Contestant& c = all_[i];
    if (wanted[i] < 0.5 || c.wanted || !c.ok()) continue;
    c.wanted = true; // another rank has no row of it
    TuneRow fresh;
    fresh.variant = c.row.variant;
    fresh.status = "ok";
    fresh.image = c.row.image;
    c.row = std::move(fresh);
  }
  return {};
}

Status Tuning::agree_on_times() {
  const TuneReduce& reduce = engine_->options.tune_reduce;
  if (!reduce) return {};
  std::vector<double> times;
  for (const Contestant& c : all_) {
    times.push_back(c.ok() ? c.row.median_us : kNever);
    times.push_back(c.ok() && std::isfinite(c.row.spread_us) ? c.row.spread_us : kNever);
  }
  if (const Status ok = reduce(times); !ok) return ok;
  for (std::size_t i = 0; i < all_.size(); ++i) {
    Contestant& c = all_[i];
    if (!c.ok()) continue;
    c.row.median_us = times[2 * i];
    c.row.spread_us =
        std::isfinite(times[2 * i + 1]) ? times[2 * i + 1] : std::numeric_limits<double>::quiet_NaN();
    if (std::isfinite(c.row.median_us)) continue;
    c.out("skipped", "it could not be timed on another rank");
    c.row.median_us = c.row.spread_us = 0;
  }
  return {};
}

/// The fastest wins; the untuned choice stays unless the gain exceeds the noise of both. Equal times: the
/// first in order of the estimate.
void Tuning::decide() {
  Contestant* best = nullptr;
  Contestant* standard = nullptr;
  for (Contestant& c : all_) {
    c.row.chosen = false;
    forget_tie(c.row);
    if (!c.ok() || !(c.row.median_us > 0)) continue;
    if (c.variant == standard_)
      standard = &c;
    else if (best == nullptr || c.row.median_us < best->row.median_us)
      best = &c;
  }
  Contestant* chosen = standard == nullptr ? best : standard;
  if (chosen == nullptr) return;
  if (standard != nullptr && best != nullptr) {
    const double base = standard->row.median_us, gain = base - best->row.median_us;
    const double noise = std::max({kLeastGain * base, noise_of(standard->row), noise_of(best->row)});
    if (gain > noise) chosen = best;
    if (std::abs(gain) <= noise)
      chosen->note(fmt::format("{}{}': {:.1f} % apart, within the noise of {:.1f} %", kTie, best->row.variant,
                               100 * std::abs(gain) / base, 100 * noise / base));
  }
  chosen->row.chosen = true;
}

void Tuning::keep() {
  const std::string now = fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
  std::vector<cache::TuningRow> rows;
  for (Contestant& c : all_) {
    if (c.wanted || c.row.written.empty()) c.row.written = now;
    if (c.stored) rows.push_back(to_stored(head_, c.row));
  }
  if (request_.worker) return;
  if (const auto ok = engine_->tuning.put(rows); !ok)
    engine_->warn(fmt::format("tuning rows were not kept: {}", ok.error()));
}

TuneReport Tuning::report() const {
  TuneReport report = head_;
  for (const Contestant& c : all_)
    report.rows.push_back(c.row);
  return report;
}

Result<TuneReport> tune_device(const std::shared_ptr<Engine::Impl>& engine, const Problem& problem,
                               Device device, const Sizes& sizes, const TuneRequest& request,
                               bool missing_only) {
  if (const Status ok = validate(problem); !ok) return tl::unexpected(ok.error());
  if (const Status ok = check_sizes(problem, sizes); !ok) return tl::unexpected(ok.error());
  const auto backend = engine->backend(device);
  if (!backend) return tl::unexpected(backend.error());
  return Tuning(engine, *backend, problem, device, choice_sizes(problem, sizes), request, missing_only).run();
}

Result<TuneReport> Engine::tune(const Problem& problem, Device device, const Sizes& sizes,
                                const TuneRequest& request) const {
  return tune_device(impl_, problem, device, sizes, request, false);
}

} // namespace kda
