// kda-jit report: the stored tuning rows as a table, JSON or a page.
#include "report.h"
#include "command.h"
#include "roofline.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>
#include <fstream>

namespace kda::tools {
namespace {

struct Options {
  bool json = false;
  std::string html, import, against;
};

std::string heading(const TuneReport& r) {
  return fmt::format("{}, {}; {}, driver {}, {}; {}", r.problem, r.bucket, r.device,
                     r.driver.empty() ? "-" : r.driver, r.compiler, r.mode);
}

const TuneRow* chosen_row(const TuneReport& r) {
  const auto row = std::find_if(r.rows.begin(), r.rows.end(), [](const TuneRow& x) { return x.chosen; });
  return row == r.rows.end() ? nullptr : &*row;
}

/// "12.5 us" of the chosen row, "-" without one.
std::string time_of(const TuneRow* row) {
  return row == nullptr ? "-" : fmt::format("{:.1f}", row->median_us);
}

/// One line a problem that both know: the choice and its time, before and now. A difference within the spread
/// of both is none.
void print_changes(const std::vector<TuneReport>& now, const std::vector<TuneReport>& before) {
  std::vector<std::vector<std::string>> table{
      {"problem", "bucket", "device", "was", "us", "is", "us", "change"}};
  std::size_t added = 0;
  for (const TuneReport& r : now) {
    const auto old = std::find_if(before.begin(), before.end(), [&](const TuneReport& b) {
      return b.problem == r.problem && b.bucket == r.bucket && b.device == r.device && b.mode == r.mode;
    });
    if (old == before.end()) {
      ++added;
      continue;
    }
    const TuneRow *const was = chosen_row(*old), *const is = chosen_row(r);
    std::string change = "-";
    if (was != nullptr && is != nullptr && was->median_us > 0) {
      const double difference = is->median_us - was->median_us;
      const double noise = std::max({0.02 * was->median_us, spread_of(*was) / 2, spread_of(*is) / 2});
      change = std::abs(difference) <= noise ? "within the noise"
                                             : fmt::format("{:+.1f} %", 100 * difference / was->median_us);
    }
    table.push_back({r.problem, r.bucket, r.device, was == nullptr ? "-" : was->variant, time_of(was),
                     is == nullptr ? "-" : is->variant, time_of(is), change});
  }
  if (table.size() > 1) print_table(table, {4, 6});
  fmt::print("{} of {} problems are in both reports, {} only here\n", table.size() - 1, now.size(), added);
}

/// Rows of a file that this device, driver, compiler and image will not take for their own.
int import_reports(const Engine& engine, const std::string& path) {
  const auto reports = read_reports(path);
  if (!reports) return report_error(reports.error());
  const auto rows = engine.import(*reports);
  if (!rows) return report_error(rows.error());
  fmt::print("imported {} rows of {} reports\n", *rows, reports->size());
  const auto devices = engine.devices();
  for (const TuneReport& r : *reports)
    if (std::none_of(devices.begin(), devices.end(), [&](const DeviceInfo& d) {
          return d.name == r.device && d.driver == r.driver && d.compiler == r.compiler;
        }))
      fmt::print("not used here: {}\n", heading(r));
  return kOk;
}

int report(const Options& o) {
  const auto engine = make_engine();
  if (!engine) return report_error(engine.error());
  if (!o.import.empty()) return import_reports(*engine, o.import);
  const auto reports = engine->reports();
  if (!reports) return report_error(reports.error());
  if (!o.against.empty()) {
    const auto before = read_reports(o.against);
    if (!before) return report_error(before.error());
    print_changes(*reports, *before);
    return kOk;
  }
  if (!o.html.empty()) {
    std::ofstream file(o.html, std::ios::binary);
    file << reports_html(*reports);
    file.close();
    if (!file) return report_error({ErrorCode::io_error, fmt::format("cannot write {}", o.html), {}});
    fmt::print(stderr, "wrote {}\n", o.html);
    return kOk;
  }
  if (o.json) {
    fmt::print("{}\n", write_reports(*reports));
    return kOk;
  }
  if (reports->empty()) fmt::print("No tuning rows yet; `kda-jit tune --help` tells how to make some.\n");
  for (const TuneReport& r : *reports)
    print_report(r);
  return kOk;
}

} // namespace

std::vector<TuneRow> sorted_rows(const TuneReport& report) {
  std::vector<TuneRow> rows = report.rows;
  std::stable_sort(rows.begin(), rows.end(), [](const TuneRow& a, const TuneRow& b) {
    const bool a_ok = a.status == "ok", b_ok = b.status == "ok";
    if (a_ok != b_ok) return a_ok;
    return a_ok ? a.median_us < b.median_us : a.variant < b.variant;
  });
  return rows;
}

std::string share_of_floor(const TuneReport& report, const TuneRow& row) {
  return row.median_us > 0 && report.floor_us > 0
             ? fmt::format("{:.0f}%", 100 * report.floor_us / row.median_us)
             : "-";
}

double spread_of(const TuneRow& row) {
  return std::isfinite(row.spread_us) ? row.spread_us : 0;
}

void print_report(const TuneReport& report) {
  fmt::print("{}, {}\n{}, driver {}, {}; {}; byte floor {:.1f} us\n", report.problem, report.bucket,
             report.device, report.driver.empty() ? "-" : report.driver, report.compiler, report.mode,
             report.floor_us);
  if (const auto roof = roofline(report)) fmt::print("{}\n", to_string(*roof));
  std::vector<std::vector<std::string>> table{
      {"", "variant", "status", "median us", "spread", "floor", "error", "regs", "shared", "reason"}};
  for (const TuneRow& row : sorted_rows(report)) {
    const bool ok = row.status == "ok";
    table.push_back({row.chosen ? "*" : "", row.variant, row.status,
                     ok ? fmt::format("{:.1f}", row.median_us) : "-",
                     ok && std::isfinite(row.spread_us) ? fmt::format("{:.1f}", row.spread_us) : "-",
                     share_of_floor(report, row), ok ? fmt::format("{:.1e}", row.error) : "-",
                     row.registers > 0 ? fmt::to_string(row.registers) : "-",
                     row.shared_bytes > 0 ? fmt::to_string(row.shared_bytes) : "-", row.reason});
  }
  print_table(table, {3, 4, 5, 6, 7, 8});
  fmt::print("\n");
}

void add_report(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("report", "Show the stored tuning rows");
  auto o = std::make_shared<Options>();
  sub->add_flag("--json", o->json, "JSON on stdout");
  sub->add_option("--html", o->html, "write one self-contained page to this file");
  auto* const import =
      sub->add_option("--import", o->import, "add the rows of this JSON report to the stored ones");
  sub->add_option("--against", o->against, "what changed since this JSON report")->excludes(import);
  sub->footer(
      "`kda-jit report --json >FILE` writes what --import and --against read, and what KDA_JIT_TUNE=pinned\n"
      "takes by KDA_JIT_TUNE_PINS=FILE. An imported row counts where its device, driver, compiler and image\n"
      "are those of today.");
  sub->callback([o, &exit] { exit = report(*o); });
}

} // namespace kda::tools
