// The page of `kda-jit report --html`. It has no script and fetches nothing; lengths along x are shares of
// the width, so that it fits a narrow window without making letters smaller.
#include "report.h"
#include "roofline.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda::tools {
namespace {

constexpr std::string_view kStyle = R"(
:root{color-scheme:light dark;--ink:#1d2733;--paper:#fff;--line:#d5dbe3;--note:#566273;--bar:#9db8d9;--best:#1f5fa8;--roof:#b42318}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--paper:#14181e;--line:#38424f;--note:#a3adba;--bar:#4a6589;--best:#3b82d0;
--roof:#ff8a7a}}
body{font:14px/1.4 system-ui,sans-serif;max-width:1200px;margin:1em auto;padding:0 1em;color:var(--ink);background:var(--paper);
overflow-wrap:anywhere}
p,figcaption{color:var(--note)}figure{margin:1em 0;max-width:700px}h2{margin:2em 0 0;font-size:1.1em}
svg{display:block;width:100%}svg text{font:11px system-ui,sans-serif;fill:var(--ink)}
table{border-collapse:collapse;width:100%}td,th{padding:4px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right}td.number,td.status,th{white-space:nowrap}td.variant{width:22%}td.time{width:26%}td.reason{width:18%}
tr.chosen td.variant{font-weight:bold}
.grid{stroke:var(--line)}.here{stroke:var(--note);stroke-dasharray:2 4}.roof,.floor{stroke:var(--roof);stroke-width:2}
.spread{stroke:var(--ink)}.roof,.floor,.spread{vector-effect:non-scaling-stroke}
.bar{fill:var(--bar)}.bar.beyond{opacity:.5}.point{fill:var(--bar);stroke:var(--ink)}.best{fill:var(--best)}
@media(max-width:800px){thead{display:none}tr{display:block;padding:8px 0;border-bottom:1px solid var(--line)}
td{border:0;padding:0 12px 0 0;display:inline-block}td.variant,td.time,td.reason{display:block;width:auto}
td[data-name]::before{content:attr(data-name) " ";color:var(--note)}}
)";

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
    case '<': out += "&lt;"; break;
    case '>': out += "&gt;"; break;
    case '&': out += "&amp;"; break;
    case '"': out += "&quot;"; break;
    default: out += c;
    }
  }
  return out;
}

bool timed(const TuneRow& row) {
  return row.status == "ok" && row.median_us > 0;
}

/// A logarithmic axis over whole decades.
struct Axis {
  double low, high; ///< powers of ten
  Axis(double from, double to)
      : low(std::pow(10, std::floor(std::log10(from)))), high(std::pow(10, std::ceil(std::log10(to)))) {
    if (high <= low) high = 10 * low;
  }
  [[nodiscard]] double share(double value) const { return std::log10(value / low) / std::log10(high / low); }
  /// The decades to name: six at most.
  [[nodiscard]] std::vector<double> ticks() const {
    const int decades = static_cast<int>(std::lround(std::log10(high / low))), step = 1 + (decades - 1) / 5;
    std::vector<double> all;
    for (int i = 0; i <= decades; i += step)
      all.push_back(low * std::pow(10, i));
    return all;
  }
};

/// Flop a second over flop a byte, both logarithmic, with the candidates at the intensity of the problem.
std::string roofline_figure(const TuneReport& report, const std::vector<TuneRow>& rows) {
  const auto roof = roofline(report);
  std::vector<const TuneRow*> points;
  for (const TuneRow& row : rows)
    if (timed(row)) points.push_back(&row); // sorted: the fastest first
  if (!roof || points.empty())
    return report.flop == 0 ? "<p>Next to no arithmetic: the byte floor is all there is to reach.</p>\n" : "";
  const auto rate = [&](const TuneRow& row) { return report.flop / row.median_us * 1e6; };
  const double here = roof->intensity(), ridge = roof->peak_flop_per_s / roof->bytes_per_s;
  const Axis x(here / 4, std::max(4 * here, 2 * ridge));
  const Axis y(rate(*points.back()) / 1.5,
               1.5 * std::max({rate(*points.front()), roof->roof(here), roof->peak_flop_per_s}));
  constexpr double kTop = 24, kBottom = 224;
  const auto across = [&](double value) { return fmt::format("{:.2f}%", 12 + 84 * x.share(value)); };
  const auto down = [&](double value) { return kBottom - (kBottom - kTop) * y.share(value); };
  std::string svg = "<figure><svg height=\"262\" role=\"img\" aria-label=\"roofline\">\n";
  for (const double tick : x.ticks())
    svg += fmt::format(
        "<line class=\"grid\" x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{2}\"/><text x=\"{0}\" y=\"{3}\" "
        "text-anchor=\"middle\">{4:g}</text>\n",
        across(tick), kTop, kBottom, kBottom + 15, tick);
  for (const double tick : y.ticks())
    svg += fmt::format(
        "<line class=\"grid\" x1=\"12%\" x2=\"96%\" y1=\"{0:.1f}\" y2=\"{0:.1f}\"/><text x=\"11%\" "
        "y=\"{1:.1f}\" text-anchor=\"end\">{2}</text>\n",
        down(tick), down(tick) + 4, si(tick));
  svg +=
      fmt::format("<text x=\"0\" y=\"11\">FLOP/s</text><text x=\"96%\" y=\"{}\" text-anchor=\"end\">FLOP per "
                  "byte</text>\n",
                  kBottom + 33);
  const double start = std::max(x.low, y.low / roof->bytes_per_s);
  const double end = std::min({x.high, y.high / roof->bytes_per_s, ridge > 0 ? ridge : x.high});
  const auto line = [&](const char* kind, double x1, double y1, double x2, double y2) {
    svg += fmt::format("<line class=\"{}\" x1=\"{}\" y1=\"{:.1f}\" x2=\"{}\" y2=\"{:.1f}\"/>\n", kind,
                       across(x1), down(y1), across(x2), down(y2));
  };
  line("roof", start, start * roof->bytes_per_s, end, end * roof->bytes_per_s);
  if (ridge > 0) line("roof", ridge, roof->peak_flop_per_s, x.high, roof->peak_flop_per_s);
  line("here", here, y.low, here, roof->roof(here));
  std::reverse(points.begin(), points.end()); // the fastest on top
  std::stable_partition(points.begin(), points.end(), [](const TuneRow* row) { return !row->chosen; });
  for (const TuneRow* row : points)
    svg += fmt::format(
        "<circle class=\"point{}\" cx=\"{}\" cy=\"{:.1f}\" r=\"{}\"><title>{}: {:.1f} us, {}FLOP/s"
        "</title></circle>\n",
        row->chosen ? " best" : "", across(here), down(rate(*row)), row->chosen ? 6 : 4, escape(row->variant),
        row->median_us, si(rate(*row)));
  return svg +
         fmt::format(
             "</svg><figcaption>{}. Counted as the recurrence does it, token by token; chunks do more. A "
             "point is a candidate, the large one is chosen.</figcaption></figure>\n",
             to_string(*roof));
}

/// A bar of the row's time with its spread; a line marks the byte floor. It ends, paler, at four times the
/// shortest: what lies beyond would press the others together.
std::string bar(const TuneReport& report, const TuneRow& row, double longest) {
  if (!timed(row)) return "-";
  const double scale = 100 / longest, half = spread_of(row) * scale / 2;
  const double end = std::min(row.median_us, longest) * scale;
  std::string svg =
      fmt::format("{:.1f} us<svg viewBox=\"0 0 100 12\" height=\"12\" preserveAspectRatio=\"none\" "
                  "aria-hidden=\"true\"><rect class=\"bar{}{}\" width=\"{:.2f}\" height=\"12\"/>",
                  row.median_us, row.chosen ? " best" : "", row.median_us > longest ? " beyond" : "", end);
  if (row.median_us <= longest)
    svg += fmt::format("<line class=\"spread\" x1=\"{:.2f}\" x2=\"{:.2f}\" y1=\"6\" y2=\"6\"/>",
                       std::max(0.0, end - half), std::min(100.0, end + half));
  if (report.floor_us > 0)
    svg += fmt::format("<line class=\"floor\" x1=\"{0:.2f}\" x2=\"{0:.2f}\" y1=\"0\" y2=\"12\"/>",
                       std::min(100.0, report.floor_us * scale));
  return svg + "</svg>";
}

/// What the longest bar stands for.
double longest_of(const TuneReport& report, const std::vector<TuneRow>& rows) {
  constexpr double kMostTimes = 4;
  double longest = report.floor_us, shortest = 0;
  for (const TuneRow& row : rows) {
    if (!timed(row)) continue;
    longest = std::max(longest, row.median_us + spread_of(row) / 2);
    if (shortest == 0) shortest = row.median_us; // sorted
  }
  return std::min(longest, std::max(kMostTimes * shortest, report.floor_us));
}

std::string table(const TuneReport& report, const std::vector<TuneRow>& rows) {
  const double longest = longest_of(report, rows);
  std::string html =
      "<table><thead><tr><th>variant<th>median<th class=\"number\">spread us<th class=\"number\">of byte "
      "floor<th class=\"number\">FLOP/s<th class=\"number\">error<th class=\"number\">registers<th "
      "class=\"number\">shared bytes<th>status<th>reason</tr></thead>\n";
  for (const TuneRow& row : rows) {
    html +=
        fmt::format("<tr{}><td class=\"variant\">{}<td class=\"time\">{}",
                    row.chosen ? " class=\"chosen\"" : "", escape(row.variant), bar(report, row, longest));
    const auto number = [&](const char* name, bool known, const std::string& text) {
      html += fmt::format("<td class=\"number\" data-name=\"{}\">{}", name, known ? text : "-");
    };
    number("spread us", timed(row) && std::isfinite(row.spread_us), fmt::format("{:.1f}", row.spread_us));
    number("of byte floor", timed(row), share_of_floor(report, row));
    number("FLOP/s", timed(row) && report.flop > 0, si(report.flop / row.median_us * 1e6));
    number("error", timed(row), fmt::format("{:.1e}", row.error));
    number("registers", row.registers > 0, fmt::to_string(row.registers));
    number("shared bytes", row.shared_bytes > 0, fmt::to_string(row.shared_bytes));
    html += fmt::format("<td class=\"status\">{}<td class=\"reason\">{}</tr>\n", escape(row.status),
                        escape(row.reason));
  }
  return html + "</table>\n";
}

} // namespace

std::string reports_html(const std::vector<TuneReport>& reports) {
  std::string body;
  for (const TuneReport& r : reports) {
    const std::vector<TuneRow> rows = sorted_rows(r);
    body += fmt::format(
        "<h2>{}</h2>\n<p>{} &middot; {} &middot; driver {} &middot; {} &middot; {} &middot; byte floor "
        "{:.1f} us, the red line of a bar</p>\n",
        escape(r.problem), escape(r.bucket), escape(r.device), escape(r.driver.empty() ? "-" : r.driver),
        escape(r.compiler), escape(r.mode), r.floor_us);
    body += roofline_figure(r, rows) + table(r, rows);
  }
  if (reports.empty()) body = "<p>No tuning rows yet.</p>\n";
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width\"><title>kda-jit tuning report</title>\n<style>{}</style></head>\n"
      "<body><h1>kda-jit tuning report</h1>\n{}</body></html>\n",
      kStyle, body);
}

} // namespace kda::tools
