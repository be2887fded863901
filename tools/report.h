#pragma once
#include "kda/engine.h"
#include <string>
#include <vector>

namespace kda::tools {

/// A heading line and a table on stdout, fastest first.
void print_report(const TuneReport& report);
/// One self-contained page: per problem a table and an SVG of every candidate's time against the byte floor.
[[nodiscard]] std::string reports_html(const std::vector<TuneReport>& reports);

} // namespace kda::tools
