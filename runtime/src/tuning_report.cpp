#include "kda/tuning_report.h"
#include "codegen/variant.h"
#include <algorithm>
#include <array>
#include <fmt/format.h>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

namespace kda {
namespace {

using nlohmann::json;
constexpr int kSchema = 3, kOldest = 2;
constexpr std::array<std::string_view, 6> kStatuses{"ok",     "rejected", "wrong",
                                                    "failed", "skipped",  "faulted"};

/// Calls `text`, `number`, `count` and `flag` for the members of a row by name: one list for both directions.
template <class Row, class Visitor>
void visit(Row& row, Visitor&& v) {
  v.text("variant", row.variant);
  v.text("status", row.status);
  v.text("reason", row.reason);
  v.number("median_us", row.median_us);
  v.number("spread_us", row.spread_us);
  v.number("error", row.error);
  v.count("registers", row.registers);
  v.count("shared_bytes", row.shared_bytes);
  v.flag("chosen", row.chosen);
  v.text("image", row.image);
  v.text("written", row.written);
}
template <class Report, class Visitor>
void visit_head(Report& report, Visitor&& v) {
  v.text("problem", report.problem);
  v.text("bucket", report.bucket);
  v.text("device", report.device);
  v.text("driver", report.driver);
  v.text("compiler", report.compiler);
  v.text("mode", report.mode);
  v.number("floor_us", report.floor_us);
  v.since_3("bytes", report.bytes);
  v.since_3("flop", report.flop);
}

struct Writer {
  json& object;
  void text(const char* name, const std::string& value) { object[name] = value; }
  void number(const char* name, double value) { object[name] = value; } // not finite: dumped as null
  void since_3(const char* name, double value) { number(name, value); }
  void count(const char* name, int value) { object[name] = value; }
  void flag(const char* name, bool value) { object[name] = value; }
};

/// Throws what nlohmann throws for a missing member or one of another type.
struct Reader {
  const json& object;
  int schema;
  std::size_t members = 0;
  void text(const char* name, std::string& value) { value = at(name).get<std::string>(); }
  void number(const char* name, double& value) {
    const json& x = at(name);
    value = x.is_null() ? std::numeric_limits<double>::quiet_NaN() : x.get<double>();
  }
  void since_3(const char* name, double& value) {
    if (schema >= 3)
      number(name, value);
    else
      value = std::numeric_limits<double>::quiet_NaN();
  }
  void count(const char* name, int& value) { value = at(name).get<int>(); }
  void flag(const char* name, bool& value) { value = at(name).get<bool>(); }

private:
  const json& at(const char* name) {
    ++members;
    return object.at(name);
  }
};

tl::unexpected<Error> refuse(std::string why) {
  return fail(ErrorCode::invalid_argument, std::move(why));
}

Result<TuneRow> parse_row(const json& object, int schema) {
  TuneRow row;
  Reader reader{object, schema};
  visit(row, reader);
  if (object.size() != reader.members) return refuse("a row has members that are not known");
  if (std::find(kStatuses.begin(), kStatuses.end(), row.status) == kStatuses.end())
    return refuse(
        fmt::format("unknown status '{}'; choose one of {}", row.status, fmt::join(kStatuses, ", ")));
  if (const auto variant = parse_variant(row.variant); !variant) return refuse(variant.error().message);
  return row;
}

Result<TuneReport> parse_report(const json& object, int schema) {
  TuneReport report;
  Reader reader{object, schema};
  visit_head(report, reader);
  if (object.size() != reader.members + 1) return refuse("it has members that are not known");
  if (report.problem.empty() || report.bucket.empty() || report.device.empty())
    return refuse("problem, bucket and device must not be empty");
  for (const json& x : object.at("rows")) {
    auto row = parse_row(x, schema);
    if (!row) return tl::unexpected(row.error());
    report.rows.push_back(std::move(*row));
  }
  if (std::count_if(report.rows.begin(), report.rows.end(), [](const TuneRow& r) { return r.chosen; }) > 1)
    return refuse("more than one row is chosen");
  return report;
}

} // namespace

std::string to_string(const TuneTiming& timing) {
  return fmt::format("{} L2, {}", timing.warm_l2 ? "warm" : "cold", timing.graph ? "graph" : "eager");
}

std::string write_reports(const std::vector<TuneReport>& reports) {
  json out{{"schema", kSchema}, {"reports", json::array()}};
  for (const TuneReport& report : reports) {
    json& x = out["reports"].emplace_back(json::object());
    visit_head(report, Writer{x});
    x["rows"] = json::array();
    for (const TuneRow& row : report.rows)
      visit(row, Writer{x["rows"].emplace_back(json::object())});
  }
  // Names of devices and reasons come from drivers and compilers: any bytes.
  return out.dump(1, ' ', false, json::error_handler_t::replace);
}

Result<std::vector<TuneReport>> parse_reports(std::string_view text) {
  std::vector<TuneReport> reports;
  try {
    const json all = json::parse(text);
    const int schema = all.at("schema").get<int>();
    if (schema < kOldest || schema > kSchema)
      return refuse(fmt::format("it has schema {}; this build reads {} to {}: export the reports again",
                                schema, kOldest, kSchema));
    for (const json& x : all.at("reports")) {
      auto report = parse_report(x, schema);
      if (!report) return refuse(fmt::format("report {}: {}", reports.size() + 1, report.error().message));
      reports.push_back(std::move(*report));
    }
  } catch (const json::exception& error) {
    return refuse(fmt::format("report {}: {}", reports.size() + 1, error.what()));
  }
  return reports;
}

Result<std::vector<TuneReport>> read_reports(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return refuse(fmt::format("cannot open the tuning reports '{}'", path.native()));
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  auto reports = parse_reports(text);
  if (!reports)
    return refuse(fmt::format("'{}' holds no tuning reports (kda-jit report --json writes them): {}",
                              path.native(), reports.error().message));
  return reports;
}

} // namespace kda
