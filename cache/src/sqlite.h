#pragma once
// SQLite behind two owning types. Errors are values: a message, with the result code for those who decide.
#include <filesystem>
#include <memory>
#include <sqlite3.h>
#include <string>
#include <tl/expected.hpp>

namespace kda::cache::sqlite {

struct Failure {
  int code = SQLITE_OK;
  std::string message;
};
template <class T>
using Result = tl::expected<T, Failure>;

struct Closer {
  void operator()(sqlite3* db) const { sqlite3_close_v2(db); }
};
using Connection = std::unique_ptr<sqlite3, Closer>;

/// How a file is opened. `frozen` reads a file that nobody can write, without any file beside it.
enum class Access { writable, frozen };
[[nodiscard]] Result<Connection> open(const std::filesystem::path& file, Access access);
[[nodiscard]] Connection open_memory();
/// Replaces everything in `to` by what is in `from`.
[[nodiscard]] Result<void> copy(sqlite3* from, sqlite3* to);
/// Statements without results.
[[nodiscard]] Result<void> run(sqlite3* db, const char* sql);
/// A statement with one integer as its result.
[[nodiscard]] Result<std::int64_t> integer(sqlite3* db, const char* sql);

/// A prepared statement. Parameters are numbered from 1, columns from 0. A bind that fails shows in step().
class Statement {
public:
  [[nodiscard]] static Result<Statement> prepare(sqlite3* db, const std::string& sql);
  void bind(int index, const std::string& value);
  void bind(int index, double value); ///< SQLite has no NaN: it becomes NULL and comes back as NaN
  void bind(int index, std::int64_t value);
  [[nodiscard]] Result<bool> step(); ///< false: no further row; the statement may then be bound again
  [[nodiscard]] std::string text(int column) const;
  [[nodiscard]] double number(int column) const;
  [[nodiscard]] std::int64_t integer(int column) const;

private:
  struct Finalizer {
    void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
  };
  explicit Statement(sqlite3_stmt* statement) : statement_(statement) {}
  std::unique_ptr<sqlite3_stmt, Finalizer> statement_;
};

} // namespace kda::cache::sqlite
