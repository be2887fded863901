#pragma once
#include "kda/engine.h"
#include <string>
#include <vector>

namespace kda::tools {

/// A heading, its roofline and a table on stdout, fastest first.
void print_report(const TuneReport& report);
/// One self-contained page without a script: per problem the roofline, and a table with a bar of every
/// candidate's time against the byte floor.
[[nodiscard]] std::string reports_html(const std::vector<TuneReport>& reports);

/// "ok" rows by time, then the rest by text.
[[nodiscard]] std::vector<TuneRow> sorted_rows(const TuneReport& report);
/// "47%", "-" where one of both is not known.
[[nodiscard]] std::string share_of_floor(const TuneReport& report, const TuneRow& row);
/// 0 where it is not known.
[[nodiscard]] double spread_of(const TuneRow& row);

} // namespace kda::tools
