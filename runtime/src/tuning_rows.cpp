#include "tuning_rows.h"
#include "roofline.h"
#include <algorithm>
#include <fmt/format.h>

namespace kda {

cache::TuningRow to_stored(const TuneReport& head, const TuneRow& r) {
  cache::TuningRow row;
  row.problem = head.problem;
  row.bucket = head.bucket;
  row.device = head.device;
  row.driver = head.driver;
  row.compiler = head.compiler;
  row.mode = head.mode;
  row.floor_us = head.floor_us;
  row.bytes = head.bytes;
  row.flop = head.flop;
  row.variant = r.variant;
  row.status = r.status;
  row.reason = r.reason;
  row.median_us = r.median_us;
  row.spread_us = r.spread_us;
  row.error = r.error;
  row.registers = r.registers;
  row.shared_bytes = r.shared_bytes;
  row.chosen = r.chosen;
  row.image = r.image;
  row.when = r.written;
  return row;
}

TuneRow from_stored(const cache::TuningRow& row) {
  return {row.variant,   row.status,       row.reason, row.median_us, row.spread_us, row.error,
          row.registers, row.shared_bytes, row.chosen, row.image,     row.when};
}

TuneReport report_head(const Engine::Impl& engine, const Backend& backend, const Problem& p, const Sizes& s) {
  TuneReport head;
  head.problem = to_string(p);
  head.bucket = bucket(s);
  head.device = backend.name();
  head.driver = backend.driver();
  head.compiler = backend.compiler().value_or("");
  head.mode = to_string(engine.options.tune_timing);
  head.bytes = compulsory_bytes(p, s);
  head.flop = recurrence_flop(p, s);
  return head;
}

std::string misfit(const Problem& p, const Target& target, const Variant& v) {
  const auto all = enumerate(p, target);
  const auto c = std::find_if(all.begin(), all.end(), [&](const Candidate& x) { return x.variant == v; });
  return c == all.end() ? std::string("it is not a variant of this problem") : c->rejected;
}

namespace {

/// Why a row of another time or place does not count; empty when it does, as far as its image is the same.
std::string foreign(const cache::TuningRow& row, const TuneReport& today) {
  if (row.device != today.device) return fmt::format("another device, {}", row.device);
  if (row.driver != today.driver) return fmt::format("another driver, {}", row.driver);
  if (row.compiler != today.compiler) return fmt::format("another compiler, {}", row.compiler);
  if (row.mode != today.mode) return fmt::format("another timing, {}", row.mode);
  return {};
}

bool current(const Backend& backend, const Problem& p, const Variant& v, const std::string& image) {
  const auto today = Engine::Impl::image_key(backend, p, v);
  return today && *today == image;
}

} // namespace

std::map<std::string, TuneRow> rows_of(const Engine::Impl& engine, const TuneReport& head) {
  std::map<std::string, TuneRow> rows;
  for (const cache::TuningRow& row : engine.tuning.rows(head.problem, head.bucket, head.device))
    if (foreign(row, head).empty()) rows.emplace(row.variant, from_stored(row));
  return rows;
}

TunedChoice tuned_choice(const Engine::Impl& engine, const Backend& backend, const Problem& p,
                         const Sizes& s) {
  const TuneReport today = report_head(engine, backend, p, s);
  TunedChoice choice;
  std::set<std::string> ignored;
  for (const cache::TuningRow& row : engine.tuning.rows(today.problem, today.bucket)) {
    if (!row.chosen) continue;
    const auto variant = parse_variant(row.variant);
    std::string why = foreign(row, today);
    if (why.empty() && (!variant || !misfit(p, backend.target(), *variant).empty()))
      why = "a variant that cannot run here";
    if (why.empty() && !current(backend, p, *variant, row.image)) why = "another version of the kernel";
    if (why.empty())
      choice.variant = *variant;
    else
      ignored.insert(why);
  }
  if (!choice.variant && !ignored.empty())
    choice.note = fmt::format("tuning rows were ignored: they are of {}", fmt::join(ignored, "; of "));
  return choice;
}

std::optional<Variant> tuned_within(const Engine::Impl& engine, const Backend& backend, const Problem& p,
                                    const Sizes& s, std::size_t max_workspace) {
  std::optional<Variant> best;
  double best_us = 0;
  for (const auto& [text, row] : rows_of(engine, report_head(engine, backend, p, s))) {
    const auto variant = parse_variant(text);
    if (row.status != "ok" || !variant || (best && row.median_us >= best_us) ||
        !misfit(p, backend.target(), *variant).empty() ||
        workspace_of(backend.target(), p, *variant, s).bytes > max_workspace ||
        !current(backend, p, *variant, row.image))
      continue;
    best = *variant;
    best_us = row.median_us;
  }
  return best;
}

Result<TunedChoice> pinned_choice(const Engine::Impl& engine, const Backend& backend, const Problem& p,
                                  const Sizes& s) {
  const TuneReport today = report_head(engine, backend, p, s);
  TunedChoice choice;
  std::set<std::string> ignored;
  const TuneRow* pin = nullptr;
  for (const bool same_mode : {true, false}) // how it was timed matters only between two pins
    for (const TuneReport& report : engine.pins) {
      if (report.problem != today.problem || report.bucket != today.bucket || pin != nullptr) continue;
      if (report.device != today.device)
        ignored.insert(report.device);
      else if (!same_mode || report.mode == today.mode)
        for (const TuneRow& row : report.rows)
          if (row.chosen) pin = &row;
    }
  if (pin == nullptr) {
    choice.note = ignored.empty() ? "not pinned"
                                  : fmt::format("pins were ignored: they are of another device, {}",
                                                fmt::join(ignored, ", "));
    return choice;
  }
  choice.variant = parse_variant(pin->variant).value(); // as read_reports has checked
  if (const std::string why = misfit(p, backend.target(), *choice.variant); !why.empty())
    return fail(ErrorCode::invalid_argument,
                fmt::format("the pin '{}' cannot run {} on {}: {}; tune again and export its report",
                            pin->variant, today.problem, backend.target().arch, why));
  if (!current(backend, p, *choice.variant, pin->image))
    choice.note = "pinned when its kernel had another version";
  return choice;
}

Result<std::vector<TuneReport>> Engine::reports() const {
  if (const Status ok = impl_->usable(); !ok) return tl::unexpected(ok.error());
  const auto same = [](const TuneReport& r, const cache::TuningRow& row) {
    return r.problem == row.problem && r.bucket == row.bucket && r.device == row.device &&
           r.driver == row.driver && r.compiler == row.compiler && r.mode == row.mode;
  };
  std::vector<TuneReport> all;
  for (const cache::TuningRow& row : impl_->tuning.rows()) {
    auto report = std::find_if(all.begin(), all.end(), [&](const TuneReport& r) { return same(r, row); });
    if (report == all.end())
      report = all.insert(all.end(), {row.problem,
                                      row.bucket,
                                      row.device,
                                      row.driver,
                                      row.compiler,
                                      row.mode,
                                      row.floor_us,
                                      row.bytes,
                                      row.flop,
                                      {}});
    report->rows.push_back(from_stored(row));
  }
  return all;
}

Result<std::size_t> Engine::import(const std::vector<TuneReport>& reports) const {
  if (const Status ok = impl_->usable(); !ok) return tl::unexpected(ok.error());
  std::vector<cache::TuningRow> rows;
  for (const TuneReport& report : reports)
    for (const TuneRow& row : report.rows)
      rows.push_back(to_stored(report, row));
  if (const auto ok = impl_->tuning.put(rows); !ok) return fail(ErrorCode::io_error, ok.error());
  return rows.size();
}

} // namespace kda
