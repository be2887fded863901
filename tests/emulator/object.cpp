// Compiles source units with the compiler that built the emulator.
#include "object.h"
#include <atomic>
#include <cstdlib>
#include <fmt/format.h>
#include <fstream>
#include <sstream>
#include <unistd.h>
#include <xxhash.h>

namespace kda::emulator {
namespace fs = std::filesystem;
namespace {

// alignment and bounds: vectors that are not aligned fault on a GPU too, and arrays in registers have no
// guard pages; the trap becomes an error with a line. init=pattern: registers hold no lucky zeros.
constexpr const char* kFlags =
    "-std=c++20 -fPIC -g1 -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=off "
    "-fno-strict-aliasing -fno-omit-frame-pointer -ftrivial-auto-var-init=pattern "
    "-fsanitize=alignment,bounds "
    "-fsanitize-undefined-trap-on-error -Wall -Wextra -Wno-unknown-pragmas -Wno-attributes -Wno-psabi";

// Calls hooks.cpp at every load and store.
constexpr const char* kChecked = " -fsanitize=thread --param tsan-instrument-func-entry-exit=0";

std::string digest(const std::string& text) {
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

bool is_primitive(const SourceFile& file) {
  return file.name.rfind("primitives/", 0) == 0;
}

/// Everything that the object depends on, compiler and host primitives among it.
std::string identity(const SourceUnit& unit, const std::string& flags) {
  std::string all = fmt::format("{} {} {}\n", KDA_EMULATOR_CXX, __VERSION__, flags);
  std::vector<fs::path> ours = {fs::path(KDA_EMULATOR_DIR) / "device.h",
                                fs::path(KDA_EMULATOR_DIR) / "hooks.cpp"};
  for (const SourceFile& file : unit.files)
    if (is_primitive(file)) ours.push_back(fs::path(KDA_EMULATOR_DIR) / file.name);
  for (const fs::path& path : ours)
    all += read_file(path).value_or("");
  all += unit.name + '\n' + unit.main;
  for (const SourceFile& file : unit.files)
    if (!is_primitive(file)) all += '\n' + file.name + '\n' + file.text;
  return all;
}

Status write_file(const fs::path& path, const std::string& text) {
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) return fail(ErrorCode::io_error, fmt::format("cannot write {}", path.string()));
  return {};
}

fs::path private_name(const fs::path& final_name) {
  static std::atomic<int> counter{0};
  return fmt::format("{}.{}.{}", final_name.string(), getpid(), counter++);
}

Status build(const SourceUnit& unit, const std::string& flags, bool checked, const fs::path& dir,
             const fs::path& final_dir) {
  if (Status ok = write_file(dir / unit.name, unit.main); !ok) return ok;
  for (const SourceFile& file : unit.files)
    if (!is_primitive(file))
      if (Status ok = write_file(dir / file.name, file.text); !ok) return ok;
  const std::string log = (dir / "log").string();
  const std::string object = (dir / "kernel.o").string(), hooks = KDA_EMULATOR_DIR "/hooks.cpp";
  // Two steps: linked with the flag of the sanitizer, its library would come too.
  const std::string command =
      fmt::format("'{}' {}{} -fdebug-prefix-map='{}'='{}' -I'{}' -I'{}' -c -x c++ '{}' -o '{}' >'{}' 2>&1 && "
                  "'{}' {} -fno-builtin -shared {} '{}' -o '{}' -lm >>'{}' 2>&1",
                  KDA_EMULATOR_CXX, flags, checked ? kChecked : "", dir.string(), final_dir.string(),
                  KDA_EMULATOR_DIR, dir.string(), (dir / unit.name).string(), object, log, KDA_EMULATOR_CXX,
                  flags, checked ? "'" + hooks + "'" : "", object, (dir / "kernel.so").string(), log);
  if (std::system(command.c_str()) != 0)
    return fail(ErrorCode::compile_failed, fmt::format("the host compiler refused {}", unit.name),
                read_file(log).value_or("") + command);
  return {};
}

} // namespace

Result<std::string> read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) return fail(ErrorCode::io_error, fmt::format("cannot read {}", path.string()));
  return text.str();
}

Result<fs::path> compile_object(const SourceUnit& unit, int optimize, bool checked) {
  // f16c and fma inline the conversions; every x86-64 of the last ten years has them.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const std::string flags = fmt::format("{} -O{}{}", kFlags, optimize, v3 ? " -mavx2 -mfma -mf16c" : "");
  const fs::path dir =
      fs::path(KDA_EMULATOR_CACHE) / digest(identity(unit, flags + (checked ? kChecked : "")));
  if (fs::exists(dir / "kernel.so")) return dir / "kernel.so";
  const fs::path temporary = private_name(dir);
  std::error_code error;
  if (Status ok = build(unit, flags, checked, temporary, dir); !ok) {
    fs::remove_all(temporary, error);
    return tl::unexpected(ok.error());
  }
  fs::rename(temporary, dir, error);
  if (error) fs::remove_all(temporary, error); // another one was quicker
  return dir / "kernel.so";
}

Result<fs::path> object_file(const std::string& bytes) {
  const fs::path path = fs::path(KDA_EMULATOR_CACHE) / (digest(bytes) + ".so");
  if (fs::exists(path)) return path;
  const fs::path temporary = private_name(path);
  if (Status ok = write_file(temporary, bytes); !ok) return tl::unexpected(ok.error());
  std::error_code error;
  fs::rename(temporary, path, error);
  if (error) return fail(ErrorCode::io_error, fmt::format("cannot write {}", path.string()));
  return path;
}

} // namespace kda::emulator
