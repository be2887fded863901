#include "cache/tuning_db.h"
#include "cache/store.h"
#include "sqlite.h"
#include <ctime>
#include <fmt/chrono.h>
#include <mutex>

namespace kda::cache {
namespace fs = std::filesystem;
using sqlite::Failure;
using sqlite::Statement;

namespace {

constexpr int kSchema = 3;                    // PRAGMA user_version
constexpr std::int64_t kApplication = 0x4b44; // PRAGMA application_id: "KD"

constexpr std::string_view kCreate = R"(
CREATE TABLE candidate(
  problem TEXT NOT NULL, bucket TEXT NOT NULL, device TEXT NOT NULL, driver TEXT NOT NULL,
  compiler TEXT NOT NULL, mode TEXT NOT NULL, variant TEXT NOT NULL,
  status TEXT NOT NULL, reason TEXT NOT NULL,
  median_us REAL, spread_us REAL, error REAL, floor_us REAL,
  registers INTEGER NOT NULL, shared_bytes INTEGER NOT NULL, chosen INTEGER NOT NULL, at TEXT NOT NULL,
  image TEXT NOT NULL, bytes REAL, flop REAL,
  PRIMARY KEY(problem, bucket, device, driver, compiler, mode, variant)) WITHOUT ROWID;
PRAGMA application_id = {};
PRAGMA user_version = {};
)";
/// Rows of schema 1 do not know their image: they stay to be read, and are timed again.
constexpr std::string_view kFromSchema1 = "ALTER TABLE candidate ADD COLUMN image TEXT NOT NULL DEFAULT '';";
/// Those of schema 2 do not know what their problem takes at least.
constexpr std::string_view kFromSchema2 = R"(
ALTER TABLE candidate ADD COLUMN bytes REAL;
ALTER TABLE candidate ADD COLUMN flop REAL;
PRAGMA user_version = {};
)";
constexpr const char* kUnchoose =
    "UPDATE candidate SET chosen = 0 WHERE problem = ?1 AND bucket = ?2 AND device = ?3 AND driver = ?4 AND "
    "compiler = ?5 AND mode = ?6";
constexpr const char* kUpsert =
    "INSERT OR REPLACE INTO candidate VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)";
constexpr const char* kSelect =
    "SELECT * FROM candidate WHERE (?1 = '' OR problem = ?1) AND (?2 = '' OR bucket = ?2) AND "
    "(?3 = '' OR device = ?3) ORDER BY problem, bucket, device, variant, driver, compiler, mode";

/// Makes the table in a fresh database, brings an older one up to date; refuses one that is not ours or
/// of another schema.
sqlite::Result<void> prepare_schema(sqlite3* db) {
  // IMMEDIATE: of two processes that find a fresh file, the second waits and then sees the table.
  if (auto begun = sqlite::run(db, "BEGIN IMMEDIATE"); !begun) return begun;
  const auto refuse = [&](Failure failure) -> sqlite::Result<void> {
    (void)sqlite::run(db, "ROLLBACK");
    return tl::unexpected(std::move(failure));
  };
  const auto tables = sqlite::integer(db, "SELECT count(*) FROM sqlite_schema");
  const auto application = sqlite::integer(db, "PRAGMA application_id");
  const auto schema = sqlite::integer(db, "PRAGMA user_version");
  for (const auto* value : {&tables, &application, &schema})
    if (!*value) return refuse(value->error());
  if (*tables == 0 && *schema == 0) {
    if (auto created = sqlite::run(db, fmt::format(kCreate, kApplication, kSchema).c_str()); !created)
      return refuse(created.error());
  } else if (*application != kApplication) {
    return refuse({SQLITE_NOTADB, "it is the database of another program"});
  } else if (*schema == 1 || *schema == 2) {
    const std::string steps =
        fmt::format("{}{}", *schema == 1 ? kFromSchema1 : "", fmt::format(kFromSchema2, kSchema));
    if (auto migrated = sqlite::run(db, steps.c_str()); !migrated) return refuse(migrated.error());
  } else if (*schema != kSchema) {
    return refuse({SQLITE_SCHEMA, fmt::format("it has schema {}, this build has {}", *schema, kSchema)});
  }
  return sqlite::run(db, "COMMIT");
}

/// Whether every page can be read.
bool sound(sqlite3* db) {
  auto check = Statement::prepare(db, "PRAGMA quick_check(1)");
  return check && check->step().value_or(false) && check->text(0) == "ok";
}

void bind_key(Statement& statement, const TuningRow& row) {
  int index = 0;
  for (const auto* text : {&row.problem, &row.bucket, &row.device, &row.driver, &row.compiler, &row.mode})
    statement.bind(++index, *text);
}

sqlite::Result<void> write(sqlite3* db, const std::vector<TuningRow>& rows, const std::string& now) {
  auto unchoose = Statement::prepare(db, kUnchoose);
  auto upsert = Statement::prepare(db, kUpsert);
  for (const auto* statement : {&unchoose, &upsert})
    if (!*statement) return tl::unexpected(statement->error());
  // First all, so that the order of the rows does not matter: a key has one chosen candidate.
  for (const TuningRow& row : rows)
    if (row.chosen) {
      bind_key(*unchoose, row);
      if (auto done = unchoose->step(); !done) return tl::unexpected(done.error());
    }
  for (const TuningRow& row : rows) {
    bind_key(*upsert, row);
    int index = 6;
    for (const auto* text : {&row.variant, &row.status, &row.reason})
      upsert->bind(++index, *text);
    for (const double number : {row.median_us, row.spread_us, row.error, row.floor_us})
      upsert->bind(++index, number);
    for (const int number : {row.registers, row.shared_bytes, row.chosen ? 1 : 0})
      upsert->bind(++index, std::int64_t{number});
    upsert->bind(++index, row.when.empty() ? now : row.when);
    upsert->bind(++index, row.image);
    for (const double number : {row.bytes, row.flop})
      upsert->bind(++index, number);
    if (auto done = upsert->step(); !done) return tl::unexpected(done.error());
  }
  return {};
}

sqlite::Result<void> put_all(sqlite3* db, const std::vector<TuningRow>& rows) {
  const std::string now = fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
  if (auto begun = sqlite::run(db, "BEGIN IMMEDIATE"); !begun) return begun;
  auto done = write(db, rows, now);
  if (done) done = sqlite::run(db, "COMMIT");
  if (!done) (void)sqlite::run(db, "ROLLBACK");
  return done;
}

sqlite::Result<std::vector<TuningRow>> select(sqlite3* db, const std::string& problem,
                                              const std::string& bucket, const std::string& device) {
  auto statement = Statement::prepare(db, kSelect);
  if (!statement) return tl::unexpected(statement.error());
  statement->bind(1, problem);
  statement->bind(2, bucket);
  statement->bind(3, device);
  std::vector<TuningRow> rows;
  for (;;) {
    const auto more = statement->step();
    if (!more) return tl::unexpected(more.error());
    if (!*more) return rows;
    TuningRow& row = rows.emplace_back();
    int column = 0;
    for (auto* text : {&row.problem, &row.bucket, &row.device, &row.driver, &row.compiler, &row.mode,
                       &row.variant, &row.status, &row.reason})
      *text = statement->text(column++);
    for (auto* number : {&row.median_us, &row.spread_us, &row.error, &row.floor_us})
      *number = statement->number(column++);
    row.registers = static_cast<int>(statement->integer(column++));
    row.shared_bytes = static_cast<int>(statement->integer(column++));
    row.chosen = statement->integer(column++) != 0;
    row.when = statement->text(column++);
    row.image = statement->text(column++);
    for (auto* number : {&row.bytes, &row.flop})
      *number = statement->number(column++);
  }
}

} // namespace

struct TuningDb::Impl {
  fs::path file;
  std::function<void(const std::string&)> warn;
  std::mutex mutex; // a transaction belongs to a connection, not to a thread
  sqlite::Connection db;
  bool on_disk = false;

  sqlite::Result<void> open();
  void work_in_memory(const std::string& why);
};

sqlite::Result<void> TuningDb::Impl::open() {
  std::error_code error;
  fs::create_directories(file.parent_path(), error); // if this fails, opening says why
  auto opened = sqlite::open(file, sqlite::Access::writable);
  if (!opened) return tl::unexpected(opened.error());
  // Write-ahead logging lets readers and a writer work at the same time, but needs memory shared by all of
  // them: not between the machines of a network file system. Refused, the mode stays as it is: no harm.
  (void)sqlite::run(opened->get(), on_network(file.parent_path()) ? "PRAGMA journal_mode = DELETE"
                                                                  : "PRAGMA journal_mode = WAL");
  (void)sqlite::run(opened->get(), "PRAGMA synchronous = NORMAL");
  if (auto ready = prepare_schema(opened->get()); !ready) return ready;
  db = std::move(*opened);
  on_disk = true;
  return {};
}

/// What can still be read of the file goes along.
void TuningDb::Impl::work_in_memory(const std::string& why) {
  if (warn)
    warn(fmt::format("tuning results will not be kept: cannot use '{}': {}; make it writable, or remove it "
                     "to start anew",
                     file.native(), why));
  auto memory = sqlite::open_memory();
  auto source = sqlite::open(file, sqlite::Access::frozen);
  if (source && sqlite::copy(source->get(), memory.get()) && sound(memory.get()) &&
      prepare_schema(memory.get())) {
    db = std::move(memory);
  } else {
    db = sqlite::open_memory();
    (void)prepare_schema(db.get());
  }
  on_disk = false;
}

TuningDb::TuningDb(const fs::path& directory, const std::function<void(const std::string&)>& warn)
    : impl_(std::make_unique<Impl>()) {
  impl_->warn = warn;
  if (directory.empty()) {
    impl_->db = sqlite::open_memory();
    (void)prepare_schema(impl_->db.get());
    return;
  }
  impl_->file = directory / "tuning.sqlite";
  if (auto opened = impl_->open(); !opened) impl_->work_in_memory(opened.error().message);
}

TuningDb::~TuningDb() = default;

tl::expected<void, std::string> TuningDb::put(const std::vector<TuningRow>& rows) {
  const std::lock_guard lock(impl_->mutex);
  auto done = put_all(impl_->db.get(), rows);
  // Busy passes; anything else (full, read-only, damaged) stays, so the rows live in memory from here on.
  if (!done && impl_->on_disk && done.error().code != SQLITE_BUSY) {
    impl_->work_in_memory(done.error().message);
    done = put_all(impl_->db.get(), rows);
  }
  if (!done)
    return tl::unexpected(fmt::format("cannot store {} tuning rows in '{}': {}", rows.size(),
                                      impl_->file.native(), done.error().message));
  return {};
}

std::vector<TuningRow> TuningDb::rows(const std::string& problem, const std::string& bucket,
                                      const std::string& device) const {
  const std::lock_guard lock(impl_->mutex);
  auto rows = select(impl_->db.get(), problem, bucket, device);
  if (!rows && impl_->on_disk && rows.error().code != SQLITE_BUSY) {
    impl_->work_in_memory(rows.error().message);
    rows = select(impl_->db.get(), problem, bucket, device);
  }
  return rows ? *std::move(rows) : std::vector<TuningRow>();
}

} // namespace kda::cache
