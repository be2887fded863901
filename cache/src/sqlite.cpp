#include "sqlite.h"
#include <fmt/format.h>
#include <limits>

namespace kda::cache::sqlite {
namespace {

constexpr int kBusyMilliseconds = 10000; // a put is one short transaction: this long means something is stuck

tl::unexpected<Failure> failure(sqlite3* db, int code) {
  return tl::unexpected(Failure{code & 0xff, db ? sqlite3_errmsg(db) : sqlite3_errstr(code)});
}

/// "file:" address of a path; only what has a meaning in one is escaped.
std::string address(const std::filesystem::path& file) {
  std::string text = "file:";
  for (const char c : file.native())
    text += c == '?' || c == '#' || c == '%' ? fmt::format("%{:02x}", c) : std::string(1, c);
  return text;
}

} // namespace

Result<Connection> open(const std::filesystem::path& file, Access access) {
  const std::string name = address(file) + (access == Access::frozen ? "?immutable=1" : "");
  const int flags = SQLITE_OPEN_URI | (access == Access::frozen ? SQLITE_OPEN_READONLY
                                                                : SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE);
  sqlite3* raw = nullptr;
  const int code = sqlite3_open_v2(name.c_str(), &raw, flags, nullptr);
  Connection db(raw);
  if (code != SQLITE_OK) return failure(raw, code);
  sqlite3_busy_timeout(raw, kBusyMilliseconds);
  return db;
}

Connection open_memory() {
  sqlite3* raw = nullptr;
  (void)sqlite3_open_v2(":memory:", &raw, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, nullptr);
  return Connection(raw);
}

Result<void> copy(sqlite3* from, sqlite3* to) {
  sqlite3_backup* backup = sqlite3_backup_init(to, "main", from, "main");
  if (!backup) return failure(to, sqlite3_errcode(to));
  sqlite3_backup_step(backup, -1);
  const int code = sqlite3_backup_finish(backup);
  if (code != SQLITE_OK) return failure(to, code);
  return {};
}

Result<void> run(sqlite3* db, const char* sql) {
  const int code = sqlite3_exec(db, sql, nullptr, nullptr, nullptr);
  if (code != SQLITE_OK) return failure(db, code);
  return {};
}

Result<std::int64_t> integer(sqlite3* db, const char* sql) {
  auto statement = Statement::prepare(db, sql);
  if (!statement) return tl::unexpected(statement.error());
  const auto row = statement->step();
  if (!row) return tl::unexpected(row.error());
  return *row ? statement->integer(0) : 0;
}

Result<Statement> Statement::prepare(sqlite3* db, const std::string& sql) {
  sqlite3_stmt* raw = nullptr;
  const int code = sqlite3_prepare_v2(db, sql.c_str(), -1, &raw, nullptr);
  if (code != SQLITE_OK) return failure(db, code);
  return Statement(raw);
}

void Statement::bind(int index, const std::string& value) {
  sqlite3_bind_text64(statement_.get(), index, value.data(), value.size(), SQLITE_TRANSIENT, SQLITE_UTF8);
}

void Statement::bind(int index, double value) {
  sqlite3_bind_double(statement_.get(), index, value);
}

void Statement::bind(int index, std::int64_t value) {
  sqlite3_bind_int64(statement_.get(), index, value);
}

Result<bool> Statement::step() {
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  auto error = failure(sqlite3_db_handle(statement_.get()), code);
  sqlite3_reset(statement_.get());
  if (code == SQLITE_DONE) return false;
  return error;
}

std::string Statement::text(int column) const {
  const auto* bytes = sqlite3_column_text(statement_.get(), column);
  const int size = sqlite3_column_bytes(statement_.get(), column);
  return bytes ? std::string(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(size))
               : std::string();
}

double Statement::number(int column) const {
  return sqlite3_column_type(statement_.get(), column) == SQLITE_NULL
             ? std::numeric_limits<double>::quiet_NaN()
             : sqlite3_column_double(statement_.get(), column);
}

std::int64_t Statement::integer(int column) const {
  return sqlite3_column_int64(statement_.get(), column);
}

} // namespace kda::cache::sqlite
