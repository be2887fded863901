// Tuning rows: one a candidate, kept over processes, replaced one by one.
#include "cache/tuning_db.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <sqlite3.h>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

static TuningRow row_of(const std::string& variant, double median) {
  TuningRow row;
  row.problem = "forward H32 K128 V128 bf16";
  row.bucket = "T8192 N1";
  row.device = "NVIDIA H100";
  row.driver = "580.65";
  row.compiler = "nvrtc 13.0.88";
  row.mode = "cold graph";
  row.variant = variant;
  row.status = "ok";
  row.median_us = median;
  row.spread_us = 0.5;
  row.error = 1e-3;
  row.floor_us = 12;
  row.registers = 168;
  row.shared_bytes = 98304;
  row.image = "0123";
  row.bytes = 3e7;
  row.flop = 2e9;
  return row;
}

static void execute(const fs::path& file, const char* sql) {
  sqlite3* db = nullptr;
  REQUIRE(sqlite3_open(file.c_str(), &db) == SQLITE_OK);
  CHECK(sqlite3_exec(db, sql, nullptr, nullptr, nullptr) == SQLITE_OK);
  sqlite3_close(db);
}

struct Warnings {
  std::vector<std::string> texts;
  std::function<void(const std::string&)> sink = [this](const std::string& text) { texts.push_back(text); };
};

TEST_CASE("rows come back whole, from another connection", "[tuning]") {
  const Scratch scratch;
  Warnings warnings;
  TuningRow wrong = row_of("c64", 7);
  wrong.status = "wrong";
  wrong.reason = "o differs: 'nan'; DROP TABLE candidate";
  wrong.error = std::numeric_limits<double>::quiet_NaN();
  wrong.median_us = std::numeric_limits<double>::infinity();
  wrong.chosen = true;
  REQUIRE(TuningDb(scratch.path() / "new", warnings.sink).put({row_of("c16", 21.25), wrong}));
  const auto rows = TuningDb(scratch.path() / "new", warnings.sink).rows();
  CHECK(warnings.texts.empty());
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].variant == "c16");
  CHECK(rows[0].problem == "forward H32 K128 V128 bf16");
  CHECK(rows[0].bucket == "T8192 N1");
  CHECK(rows[0].device == "NVIDIA H100");
  CHECK(rows[0].driver == "580.65");
  CHECK(rows[0].compiler == "nvrtc 13.0.88");
  CHECK(rows[0].mode == "cold graph");
  CHECK(rows[0].status == "ok");
  CHECK(rows[0].median_us == 21.25);
  CHECK(rows[0].spread_us == 0.5);
  CHECK(rows[0].error == 1e-3);
  CHECK(rows[0].floor_us == 12);
  CHECK(rows[0].bytes == 3e7);
  CHECK(rows[0].flop == 2e9);
  CHECK(rows[0].registers == 168);
  CHECK(rows[0].shared_bytes == 98304);
  CHECK_FALSE(rows[0].chosen);
  CHECK(rows[0].image == "0123");
  REQUIRE(rows[0].when.size() == 20);
  CHECK(rows[0].when[10] == 'T');
  CHECK(rows[0].when.back() == 'Z');
  CHECK(rows[1].reason == wrong.reason);
  CHECK(std::isnan(rows[1].error)); // not 0, which would be a perfect candidate
  CHECK(std::isinf(rows[1].median_us));
  CHECK(rows[1].chosen);
}

TEST_CASE("a second put replaces its candidates and leaves the others", "[tuning]") {
  const Scratch scratch;
  TuningDb db(scratch.path(), nullptr);
  REQUIRE(db.put({row_of("c16", 20), row_of("c32", 18)}));
  REQUIRE(db.put({row_of("c32", 17)}));
  const auto rows = db.rows();
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].median_us == 20);
  CHECK(rows[1].median_us == 17);
  TuningRow other = row_of("c32", 99);
  other.driver = "590.10";
  REQUIRE(db.put({other}));
  CHECK(db.rows().size() == 3); // every part of the key counts
}

TEST_CASE("one candidate of a key is chosen", "[tuning]") {
  TuningDb db({}, nullptr);
  TuningRow first = row_of("c16", 20), second = row_of("c32", 18), elsewhere = row_of("c16", 20);
  first.chosen = second.chosen = elsewhere.chosen = true;
  elsewhere.device = "NVIDIA A100";
  REQUIRE(db.put({first, elsewhere}));
  REQUIRE(db.put({second}));
  int chosen = 0;
  for (const TuningRow& row : db.rows({}, {}, "NVIDIA H100")) {
    chosen += row.chosen ? 1 : 0;
    CHECK(row.chosen == (row.variant == "c32"));
  }
  CHECK(chosen == 1);
  CHECK(db.rows({}, {}, "NVIDIA A100").at(0).chosen);
}

TEST_CASE("rows can be asked for by problem, bucket and device", "[tuning]") {
  TuningDb db({}, nullptr);
  TuningRow a = row_of("v", 1), b = a, c = a;
  b.bucket = "T1 N64";
  c.problem = "gate";
  REQUIRE(db.put({a, b, c}));
  CHECK(db.rows().size() == 3);
  CHECK(db.rows(a.problem).size() == 2);
  CHECK(db.rows(a.problem, b.bucket).size() == 1);
  CHECK(db.rows(a.problem, a.bucket, "NVIDIA A100").empty());
}

TEST_CASE("a file that is not a database gives a memory database, a warning, and stays", "[tuning]") {
  const Scratch scratch;
  const std::string text(5000, 'x');
  spill(scratch.path() / "tuning.sqlite", text);
  Warnings warnings;
  TuningDb db(scratch.path(), warnings.sink);
  REQUIRE(warnings.texts.size() == 1);
  CHECK(warnings.texts[0].find("tuning.sqlite") != std::string::npos);
  REQUIRE(db.put({row_of("c16", 20)}));
  CHECK(db.rows().size() == 1);
  CHECK(warnings.texts.size() == 1);
  CHECK(slurp(scratch.path() / "tuning.sqlite") == text);
}

TEST_CASE("a database of another program or schema is not touched", "[tuning]") {
  const Scratch scratch;
  const char* sql =
      GENERATE("CREATE TABLE theirs(x)", "CREATE TABLE candidate(x); PRAGMA user_version = 1",
               "CREATE TABLE candidate(x); PRAGMA application_id = 19268; PRAGMA user_version = 99");
  const fs::path file = scratch.path() / "tuning.sqlite";
  execute(file, sql);
  const std::string before = slurp(file);
  Warnings warnings;
  {
    TuningDb db(scratch.path(), warnings.sink);
    CHECK(warnings.texts.size() == 1);
    REQUIRE(db.put({row_of("c16", 20)}));
    CHECK(db.rows().size() == 1);
  }
  // Nothing but the journal mode, two bytes of the header and a change counter, may differ.
  CHECK(slurp(file).substr(100) == before.substr(100));
}

TEST_CASE("a database of schema 1 or 2 is brought up to date, and its rows stay", "[tuning]") {
  const Scratch scratch;
  const fs::path file = scratch.path() / "tuning.sqlite";
  execute(
      file,
      "CREATE TABLE candidate("
      "problem TEXT NOT NULL, bucket TEXT NOT NULL, device TEXT NOT NULL, driver TEXT NOT NULL,"
      "compiler TEXT NOT NULL, mode TEXT NOT NULL, variant TEXT NOT NULL,"
      "status TEXT NOT NULL, reason TEXT NOT NULL,"
      "median_us REAL, spread_us REAL, error REAL, floor_us REAL,"
      "registers INTEGER NOT NULL, shared_bytes INTEGER NOT NULL, chosen INTEGER NOT NULL, at TEXT NOT NULL,"
      "PRIMARY KEY(problem, bucket, device, driver, compiler, mode, variant)) WITHOUT ROWID;"
      "INSERT INTO candidate VALUES('forward', 'T1 N1', 'H100', '13.0', 'nvrtc', 'cold L2, stream', 'c16',"
      "'ok', '', 20, 1, 0.001, 12, 168, 98304, 1, '2026-01-01T00:00:00Z');"
      "PRAGMA application_id = 19268; PRAGMA user_version = 1");
  const bool second = GENERATE(false, true);
  if (second)
    execute(
        file,
        "ALTER TABLE candidate ADD COLUMN image TEXT NOT NULL DEFAULT ''; UPDATE candidate SET image = 'i';"
        "PRAGMA user_version = 2");
  Warnings warnings;
  for (int opened = 0; opened < 2; ++opened) { // the second time it is of today
    TuningDb db(scratch.path(), warnings.sink);
    REQUIRE(db.rows("forward").size() == 1);
    const TuningRow row = db.rows("forward")[0];
    CHECK(row.variant == "c16");
    CHECK(row.median_us == 20);
    CHECK(row.chosen);
    CHECK(row.when == "2026-01-01T00:00:00Z");
    CHECK(row.image == (second ? "i" : "")); // empty: the image of no kernel, so the row counts for none
    CHECK((std::isnan(row.bytes) && std::isnan(row.flop)));
    REQUIRE(db.put({row_of("c32", 18)}));
    CHECK(db.rows().size() == 2);
  }
  CHECK(warnings.texts.empty());
}

TEST_CASE("a row that says when it was written keeps its time", "[tuning]") {
  TuningDb db({}, nullptr);
  TuningRow row = row_of("c16", 20);
  row.when = "2020-02-02T02:02:02Z";
  REQUIRE(db.put({row}));
  CHECK(db.rows()[0].when == row.when);
}

TEST_CASE("a database damaged in the middle goes on in memory", "[tuning]") {
  const Scratch scratch;
  const fs::path file = scratch.path() / "tuning.sqlite";
  {
    TuningDb db(scratch.path(), nullptr);
    std::vector<TuningRow> rows;
    for (int i = 0; i < 500; ++i)
      rows.push_back(row_of("variant " + std::to_string(i), i));
    REQUIRE(db.put(rows));
  }
  std::string bytes = slurp(file);
  REQUIRE(bytes.size() > 20000);
  std::fill(bytes.begin() + 4096, bytes.end(), '\x5a');
  spill(file, bytes);
  Warnings warnings;
  TuningDb db(scratch.path(), warnings.sink);
  CHECK(db.rows().empty());
  CHECK(db.put({row_of("c16", 20)}));
  CHECK(db.rows().size() == 1);
  CHECK(warnings.texts.size() == 1);
}

TEST_CASE("no directory, or one that cannot be made: a memory database", "[tuning]") {
  const Scratch scratch;
  Warnings warnings;
  TuningDb memory({}, warnings.sink);
  CHECK(memory.put({row_of("c16", 20)}));
  CHECK(warnings.texts.empty());
  spill(scratch.path() / "file", "");
  TuningDb db(scratch.path() / "file" / "below", warnings.sink);
  CHECK(warnings.texts.size() == 1);
  CHECK(db.put({row_of("c16", 20)}));
  CHECK(db.rows().size() == 1);
}
