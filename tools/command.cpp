#include "command.h"
#include <algorithm>
#include <cstdio>
#include <fmt/format.h>
#include <unistd.h>
#ifdef KDA_JIT_EMULATOR
#include "emulator.h"
#endif

namespace kda::tools {

int report_error(const Error& error) {
  fmt::print(stderr, "kda-jit: {}\n", error.message);
  if (!error.context.empty()) fmt::print(stderr, "{}\n", error.context);
  return error.code == ErrorCode::invalid_argument ? kUsage : kFailed;
}

Result<Engine> make_engine() {
  auto options = EngineOptions::from_environment();
  if (!options) return tl::unexpected(options.error());
  return Engine::create(std::move(*options));
}

Result<Engine> make_engine_with_emulator() {
  auto options = EngineOptions::from_environment();
  if (!options) return tl::unexpected(options.error());
#ifdef KDA_JIT_EMULATOR
  auto backend = emulator::make_backend();
  if (!backend) return tl::unexpected(backend.error());
  options->emulator = std::move(*backend);
#endif
  return Engine::create(std::move(*options));
}

void print_table(const std::vector<std::vector<std::string>>& rows, const std::vector<std::size_t>& right) {
  std::vector<std::size_t> width;
  for (const auto& row : rows)
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i == width.size()) width.push_back(0);
      width[i] = std::max(width[i], row[i].size());
    }
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const bool to_right = std::find(right.begin(), right.end(), i) != right.end();
      line +=
          to_right ? fmt::format("{:>{}}  ", row[i], width[i]) : fmt::format("{:<{}}  ", row[i], width[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    fmt::print("{}\n", line);
  }
}

Progress::Progress(std::string what, std::int64_t total) : what_(std::move(what)), total_(total) {}

void Progress::step(std::string_view text) {
  at(done_ + 1, text);
}

void Progress::at(std::int64_t done, std::string_view text) {
  if (done == done_) return;
  done_ = done;
  if (isatty(STDERR_FILENO) != 0) {
    fmt::print(stderr, "\r\033[K{} {}/{} {}", what_, done_, total_, text);
    if (done_ == total_) fmt::print(stderr, "\n");
    std::fflush(stderr);
  } else if (done_ == total_ || (done_ - shown_) * 10 >= total_) {
    shown_ = done_;
    fmt::print(stderr, "{} {}/{} {}\n", what_, done_, total_, text);
  }
}

} // namespace kda::tools
