#pragma once
// Tuning rows: one row per (problem, bucket, device, driver, compiler, mode, candidate) in SQLite, so that
// adding a variant times only it.
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <tl/expected.hpp>
#include <vector>

namespace kda::cache {

struct TuningRow {
  std::string problem; ///< Problem's one line
  std::string bucket;  ///< T and N bucket, e.g. "T8192 N1"
  std::string device, driver, compiler;
  std::string mode; ///< how it was timed: "cold L2, graph" ...
  std::string variant;
  std::string status, reason; ///< those of kda::TuneRow
  double median_us = 0, spread_us = 0, error = 0, floor_us = 0;
  int registers = 0, shared_bytes = 0;
  bool chosen = false;
  std::string when;           ///< UTC, ISO 8601; empty: put takes the time
  std::string image;          ///< digest of the cache entry that was measured; empty in rows of schema 1
  double bytes = 0, flop = 0; ///< that a call of the problem takes at least; NaN in rows of schema 1 and 2
};

class TuningDb {
public:
  /// Opens or creates `directory`/tuning.sqlite; an empty directory or an unusable file gives a memory
  /// database and a warning.
  TuningDb(const std::filesystem::path& directory, const std::function<void(const std::string&)>& warn);
  ~TuningDb();
  TuningDb(const TuningDb&) = delete;
  TuningDb& operator=(const TuningDb&) = delete;

  /// Inserts or replaces all rows in one transaction. The error is a sentence.
  tl::expected<void, std::string> put(const std::vector<TuningRow>& rows);
  /// Rows of one key, or all rows when `problem` is empty; ordered by problem, bucket, device, variant.
  [[nodiscard]] std::vector<TuningRow> rows(const std::string& problem = {}, const std::string& bucket = {},
                                            const std::string& device = {}) const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kda::cache
