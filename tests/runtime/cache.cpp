// Images between processes: an engine finds what another one compiled, and mends what is damaged.
#include "scratch.h"
#include "scripted_backend.h"
#include <catch2/catch.hpp>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;

namespace {

constexpr Sizes kSizes{1, 64, 1};

Result<Kernel> prepared(const Engine& engine) {
  return engine.prepare(engine.plan(small_problem(), kScripted, kSizes).value());
}

std::vector<std::filesystem::path> entries(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> all;
  for (const auto& file : std::filesystem::recursive_directory_iterator(directory))
    if (file.path().extension() == ".kda") all.push_back(file.path());
  return all;
}

} // namespace

TEST_CASE("a second engine compiles nothing: image and figures come from the disk") {
  const Scratch scratch;
  const auto first = std::make_shared<ScriptedBackend>(), second = std::make_shared<ScriptedBackend>();
  const KernelInfo made = prepared(engine_on(first, scratch.path())).value().info();
  std::string loaded;
  second->on_load = [&](const SourceUnit&, const Image& image) {
    loaded = image.bytes;
    return Status{};
  };
  const Engine engine = engine_on(second, scratch.path());
  const KernelInfo info = prepared(engine).value().info();
  CHECK(info.origin == Origin::disk);
  CHECK(info.key == made.key);
  CHECK(info.registers == made.registers);
  CHECK(info.shared_bytes == made.shared_bytes);
  CHECK(info.spill_bytes == made.spill_bytes);
  CHECK_FALSE(loaded.empty());
  CHECK(second->compiles == 0);
  CHECK(engine.compile_count() == 0);
  CHECK(entries(scratch.path()).size() == 1);
}

TEST_CASE("where the cache and the process stand is not part of a key") {
  const Scratch scratch;
  std::filesystem::create_directory(scratch.path() / "real");
  std::filesystem::create_directory_symlink(scratch.path() / "real", scratch.path() / "link");
  const auto before = std::filesystem::current_path();
  const KernelInfo made =
      prepared(engine_on(std::make_shared<ScriptedBackend>(), scratch.path() / "real")).value().info();
  std::filesystem::current_path(scratch.path());
  for (const char* spelling : {"link", "real/../link", "./real"}) {
    const KernelInfo info = prepared(engine_on(std::make_shared<ScriptedBackend>(), spelling)).value().info();
    CHECK(info.key == made.key);
    CHECK(info.origin == Origin::disk);
  }
  std::filesystem::current_path(before);
}

TEST_CASE("an empty directory means memory only") {
  const auto backend = std::make_shared<ScriptedBackend>();
  for (int i = 0; i < 2; ++i) {
    const Engine engine = engine_on(backend);
    CHECK(engine.cache_directory().empty());
    CHECK(prepared(engine).value().info().origin == Origin::compiled);
  }
  CHECK(backend->compiles == 2);
}

TEST_CASE("a read-only cache is used and not written") {
  const Scratch shipped, own;
  REQUIRE(prepared(engine_on(std::make_shared<ScriptedBackend>(), shipped.path())));
  EngineOptions options;
  options.cache_directory = own.path();
  options.read_only_caches = {shipped.path()};
  const auto backend = std::make_shared<ScriptedBackend>();
  options.emulator = backend;
  const Engine engine = Engine::create(options).value();
  CHECK(prepared(engine).value().info().origin == Origin::read_only);
  CHECK(backend->compiles == 0);
  CHECK(entries(shipped.path()).size() == 1);
}

TEST_CASE("a pack is used, and a device of another architecture says once that it is of no use") {
  const Scratch shipped;
  const auto file = shipped.path() / "kernels.kdapack";
  {
    const Engine engine = engine_on(std::make_shared<ScriptedBackend>(), shipped.path());
    const std::string key = prepared(engine).value().info().key;
    const auto report = engine.pack(file, {key});
    REQUIRE(report);
    CHECK(report->entries == 1);
    CHECK(report->bytes == std::filesystem::file_size(file));
    CHECK_FALSE(engine.pack(file, {}));
    CHECK_FALSE(engine.pack(file, {"of no image"}));
  }
  std::vector<std::string> log;
  EngineOptions options;
  options.cache_directory = "";
  options.cache_packs = {file};
  options.log = [&](std::string_view line) { log.emplace_back(line); };
  const auto backend = std::make_shared<ScriptedBackend>();
  options.emulator = backend;
  CHECK(prepared(Engine::create(options).value()).value().info().origin == Origin::pack);
  CHECK(backend->compiles == 0);
  CHECK(log.empty());

  backend->target_ = cuda_target("sm_100a").value();
  const Engine other = Engine::create(options).value();
  CHECK(prepared(other).value().info().origin == Origin::compiled);
  CHECK(std::count_if(log.begin(), log.end(), [](const std::string& line) {
          return line.find("made for arch 'sm_90a'") != std::string::npos;
        }) == 1);
}

TEST_CASE("a damaged entry is a miss and a warning, and the next process finds a good one") {
  const Scratch scratch;
  REQUIRE(prepared(engine_on(std::make_shared<ScriptedBackend>(), scratch.path())));
  const auto file = entries(scratch.path()).at(0);
  std::string bytes = cache::test::slurp(file);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  cache::test::spill(file, bytes);

  std::vector<std::string> log;
  CHECK(
      prepared(engine_on(std::make_shared<ScriptedBackend>(), scratch.path(), &log)).value().info().origin ==
      Origin::compiled);
  CHECK(std::any_of(log.begin(), log.end(), [&](const std::string& line) {
    return line.find(file.filename().string()) != std::string::npos;
  }));
  CHECK(prepared(engine_on(std::make_shared<ScriptedBackend>(), scratch.path())).value().info().origin ==
        Origin::disk);
}

TEST_CASE("a cached image that the loader refuses is dropped, compiled again and kept") {
  const Scratch scratch;
  const auto stale = std::make_shared<ScriptedBackend>();
  stale->on_compile = [](const SourceUnit&) -> Result<Image> { return Image{"of an older driver", "", {}}; };
  REQUIRE(prepared(engine_on(stale, scratch.path())));

  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_load = [](const SourceUnit&, const Image& image) -> Status {
    if (image.bytes == "of an older driver") return fail(ErrorCode::load_failed, "no kernel image");
    return {};
  };
  std::vector<std::string> log;
  const KernelInfo info = prepared(engine_on(backend, scratch.path(), &log)).value().info();
  CHECK(info.origin == Origin::compiled);
  CHECK(backend->compiles == 1);
  CHECK(backend->loads == 2);
  CHECK(std::any_of(log.begin(), log.end(), [](const std::string& line) {
    return line.find("no kernel image") != std::string::npos;
  }));
  const auto next = std::make_shared<ScriptedBackend>();
  next->on_load = backend->on_load;
  CHECK(prepared(engine_on(next, scratch.path())).value().info().origin == Origin::disk);
}

TEST_CASE("an image that is refused right after its compile is an error, not a loop") {
  const auto backend = std::make_shared<ScriptedBackend>();
  backend->on_load = [](auto&&...) -> Status { return fail(ErrorCode::load_failed, "no kernel image"); };
  const Engine engine = engine_on(backend);
  for (int i = 0; i < 2; ++i) {
    const auto kernel = prepared(engine);
    REQUIRE_FALSE(kernel);
    CHECK(kernel.error().code == ErrorCode::load_failed);
    CHECK(kernel.error().message == "no kernel image");
  }
  CHECK(backend->compiles <= 3);
}

TEST_CASE("a directory that cannot be made costs the cache, not the call") {
  const Scratch scratch;
  const auto blocked = scratch.path() / "file";
  cache::test::spill(blocked, "not a directory");
  std::vector<std::string> log;
  CHECK(prepared(engine_on(std::make_shared<ScriptedBackend>(), blocked / "cache", &log)));
  CHECK_FALSE(log.empty());
}
