// Images and modules: compile or find, load, heal.
#include "engine_impl.h"
#include "cache/named_lock.h"
#include "cuda_backend.h"
#include "host_backend.h"
#include <chrono>
#include <fmt/format.h>
#include <fstream>
#include <thread>

namespace kda {
namespace fs = std::filesystem;
namespace {

constexpr const char* kGeneratorVersion = "2"; // of the key's fields, the metadata and the form of an image

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

cache::KeyManifest key_of(const SourceUnit& unit, const Target& target, const std::string& compiler) {
  cache::KeyManifest key;
  key.add("generator", kGeneratorVersion);
  key.add("kind", target.kind == Target::Kind::cuda ? "cuda" : "host");
  key.add("arch", target.arch);
  key.add("features", target.features);
  key.add("compiler", compiler);
  for (const std::string& o : unit.options)
    key.add("option", o);
  for (const std::string& e : unit.entries)
    key.add("entry", e);
  key.add(unit.name, unit.main);
  for (const SourceFile& f : unit.files)
    key.add(f.name, f.text);
  return key;
}

cache::Entry entry_of(const Image& image) {
  cache::Entry entry;
  entry.payload = image.bytes;
  for (const KernelFigures& k : image.kernels)
    entry.metadata.emplace_back("kernel", fmt::format("{} {} {} {} {}", k.entry, k.registers, k.shared_bytes,
                                                      k.stack_bytes, k.spill_bytes));
  entry.metadata.emplace_back("log", image.log);
  return entry;
}

Image image_of(const cache::Entry& entry) {
  Image image;
  image.bytes = entry.payload;
  for (const auto& [name, value] : entry.metadata) {
    if (name == "log") image.log = value;
    if (name != "kernel") continue;
    KernelFigures k;
    std::array<char, 128> text{};
    // The entry's name has no space; the width keeps within `text`.
    if (std::sscanf(value.c_str(), "%127s %d %d %d %d", text.data(), &k.registers, &k.shared_bytes,
                    &k.stack_bytes, &k.spill_bytes) != 5)
      continue;
    k.entry = text.data();
    image.kernels.push_back(k);
  }
  return image;
}

Origin origin_of(cache::Source source) {
  switch (source) {
  case cache::Source::made: return Origin::compiled;
  case cache::Source::memory: return Origin::memory;
  case cache::Source::disk: return Origin::disk;
  case cache::Source::read_only: return Origin::read_only;
  case cache::Source::pack: break;
  }
  return Origin::pack;
}

/// What a compiler must be told beside the text, one a line.
std::string describe(const SourceUnit& unit, const cache::KeyManifest& key) {
  std::string text;
  for (const cache::KeyField& field : cache::key_fields(key.text()).value_or(std::vector<cache::KeyField>{}))
    if (!field.value.empty() &&
        (field.name == "arch" || field.name == "compiler" || field.name == "features"))
      text += fmt::format("{}: {}\n", field.name, field.value);
  text +=
      fmt::format("options: {}\nkernels: {}\n", fmt::join(unit.options, " "), fmt::join(unit.entries, " "));
  return text;
}

bool write_text(const fs::path& file, std::string_view text) {
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  std::ofstream out(file, std::ios::binary | std::ios::trunc);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  out.close();
  return static_cast<bool>(out);
}

cache::StoreOptions store_options(const EngineOptions& o) {
  cache::StoreOptions s;
  s.directory = o.cache_directory ? *o.cache_directory : cache::default_directory();
  s.read_only = o.read_only_caches;
  s.packs = o.cache_packs;
  s.max_bytes = o.cache_max_bytes;
  s.max_memory_bytes = o.cache_memory_bytes;
  s.warn = [log = o.log](const std::string& text) {
    if (log)
      log(text);
    else
      fmt::print(stderr, "kda-jit: warning: {}\n", text);
  };
  return s;
}

} // namespace

Engine::Impl::Impl(EngineOptions o)
    : options(std::move(o)), store(store_options(options)),
      tuning(store.directory(), [this](const std::string& text) { warn(text); }),
      nvrtc(Nvrtc::open(options.nvrtc, options.threads)), driver(CudaDriver::open()) {}

std::shared_ptr<Engine::Impl> Engine::Impl::make(EngineOptions o) {
  return {new Impl(std::move(o)), [](Impl* impl) {
            if (impl->forks_ == fork_count()) delete impl;
          }};
}

Status Engine::Impl::usable() const {
  if (forks_ == fork_count()) return {};
  return fail(ErrorCode::unavailable,
              "this engine was made before fork(); its threads and devices stayed with "
              "the parent process: make a new engine here, or spawn instead of forking");
}

std::shared_ptr<const void> Engine::Impl::tuning_lock(const Backend& backend,
                                                      const std::function<void()>& waiting) {
  constexpr double kMostSeconds = 900; // of a tuner that hangs
  if (auto lock = cache::lock_named(store.directory(), backend.id(), kMostSeconds, waiting,
                                    [this](const std::string& text) { warn(text); }))
    return lock;
  auto lock = std::make_shared<std::unique_lock<std::mutex>>(tuning_mutex_, std::try_to_lock);
  if (!lock->owns_lock()) {
    waiting();
    lock->lock();
  }
  return lock;
}

int Engine::Impl::threads() const {
  return options.threads > 0 ? options.threads
                             : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}
void Engine::Impl::log(std::string_view line) const {
  if (options.log) options.log(line);
}
void Engine::Impl::warn(std::string_view line) const {
  if (options.log)
    options.log(line);
  else
    fmt::print(stderr, "kda-jit: warning: {}\n", line);
}

bool Engine::Impl::first(const std::string& line) {
  const std::scoped_lock lock(mutex_);
  return said_.insert(line).second;
}
void Engine::Impl::log_once(const std::string& line) {
  if (first(line)) log(line);
}
void Engine::Impl::warn_once(const std::string& line) {
  if (first(line)) warn(line);
}

Result<std::string> Engine::Impl::image_key(const Backend& backend, const Problem& problem,
                                            const Variant& variant) {
  const auto compiler = backend.compiler();
  if (!compiler) return compiler;
  const auto unit = emit(problem, variant, backend.target());
  if (!unit) return tl::unexpected(unit.error());
  return key_of(*unit, backend.target(), *compiler).digest();
}

Result<std::shared_ptr<Backend>> Engine::Impl::backend(const Device& device) {
  if (const Status ok = usable(); !ok) return tl::unexpected(ok.error());
  const std::scoped_lock lock(mutex_);
  std::shared_ptr<Backend>& slot = backends_[to_string(device)];
  if (slot != nullptr) return slot;
  Result<std::shared_ptr<Backend>> made = fail(ErrorCode::unavailable, "this program has no emulator");
  switch (device.kind) {
  case Device::Kind::host: made = make_host_backend(threads()); break;
  case Device::Kind::cuda:
    made = driver ? make_cuda_backend(*driver, device.index, nvrtc)
                  : Result<std::shared_ptr<Backend>>(tl::unexpected(driver.error()));
    break;
  case Device::Kind::emulator:
    if (options.emulator != nullptr) made = options.emulator;
    break;
  }
  if (made) slot = *made;
  return made;
}

std::string Engine::Impl::keep_reproducer(const SourceUnit& unit, const cache::KeyManifest& key,
                                          const Error& error) {
  fs::path directory = options.dump_directory;
  if (directory.empty() && !store.directory().empty()) directory = store.directory() / "failed";
  if (directory.empty()) return "set KDA_JIT_DUMP to a directory to get a reproducer\n";
  const fs::path file = directory / fmt::format("{}.{}", key.digest(), unit.name);
  const std::string text = flatten(unit, describe(unit, key) + error.message + '\n' + error.context);
  if (!write_text(file, text)) return fmt::format("no reproducer: cannot write {}\n", file.string());
  return fmt::format("reproducer: {}\n", file.string());
}

void Engine::Impl::dump(const SourceUnit& unit, const Target& target, const cache::KeyManifest& key,
                        const Image& image) {
  const fs::path directory = options.dump_directory;
  const auto file = [&](std::string_view name) {
    return directory / fmt::format("{}.{}", key.digest(), name);
  };
  bool ok =
      write_text(file(unit.name), flatten(unit, describe(unit, key))) && write_text(file("log"), image.log);
  const auto cubins = unpack_cubins(image.bytes);
  if (target.kind == Target::Kind::host || !cubins || cubins->size() != unit.entries.size())
    ok = ok && (image.bytes.empty() || write_text(file("o"), image.bytes));
  else
    for (std::size_t i = 0; i < cubins->size(); ++i)
      ok = ok && write_text(file(unit.entries[i] + ".cubin"), (*cubins)[i]);
  if (!ok) warn_once(fmt::format("cannot write dumps to {}", directory.string()));
}

Result<Image> Engine::Impl::image(const SourceUnit& unit, const Target& target, const std::string& compiler,
                                  const std::function<Result<Image>(const SourceUnit&)>& compile,
                                  KernelInfo& info) {
  if (const Status ok = usable(); !ok) return tl::unexpected(ok.error());
  const cache::KeyManifest key = key_of(unit, target, compiler);
  info.key = key.digest();
  Result<Image> made = fail(ErrorCode::internal, "not compiled");
  const auto make = [&]() -> std::optional<cache::Entry> {
    const auto begin = std::chrono::steady_clock::now();
    made = compile(unit);
    if (!made && made.error().code == ErrorCode::compile_failed)
      made.error().context = keep_reproducer(unit, key, made.error()) + made.error().context;
    if (!made) return std::nullopt;
    ++compiles;
    info.compile_ms = milliseconds_since(begin);
    log(fmt::format("compiled {} for {} in {:.0f} ms", unit.name, target.arch, info.compile_ms));
    return entry_of(*made);
  };
  cache::Source source = cache::Source::made;
  const auto entry = store.get_or_make(key, make, &source);
  if (entry == nullptr) return made;
  info.origin = origin_of(source);
  Image image = image_of(*entry);
  info.image_bytes = image.bytes.size();
  if (!options.dump_directory.empty()) dump(unit, target, key, image);
  for (const KernelFigures& k : image.kernels) {
    info.registers = std::max(info.registers, k.registers);
    info.shared_bytes = std::max(info.shared_bytes, k.shared_bytes);
    info.spill_bytes = std::max(info.spill_bytes, k.spill_bytes);
  }
  return image;
}

int shared_bytes_of(const Problem& p, const Variant& v, const Target& target, const KernelInfo& info) {
  const LaunchList list = launches(p, v, target, {1, 1024, 1});
  unsigned most = 0;
  for (int i = 0; i < list.count; ++i)
    most = std::max(most, list.items[static_cast<std::size_t>(i)].shared_bytes);
  return info.shared_bytes + static_cast<int>(most);
}

Status Engine::Impl::load(const Backend& backend, const SourceUnit& unit, LoadedImage& loaded) {
  const auto compiler = backend.compiler();
  if (!compiler) return tl::unexpected(compiler.error());
  const auto compile = [&](const SourceUnit& u) { return backend.compile(u); };
  for (const bool last : {false, true}) {
    const auto bytes = image(unit, backend.target(), *compiler, compile, loaded.info);
    if (!bytes) return tl::unexpected(bytes.error());
    const auto begin = std::chrono::steady_clock::now();
    auto module = backend.load(unit, *bytes);
    loaded.info.load_ms = milliseconds_since(begin);
    if (module) {
      loaded.module = *module;
      return {};
    }
    if (last || loaded.info.origin == Origin::compiled) return tl::unexpected(module.error());
    // A cached image that the loader refuses: drop it and compile again.
    store.discard(key_of(unit, backend.target(), *compiler), module.error().message);
  }
  return {};
}

Result<std::shared_ptr<const Kernel::Impl>> Engine::Impl::kernel(const std::shared_ptr<Impl>& self,
                                                                 const Plan::Impl& plan) {
  auto device = backend(plan.device);
  if (!device) return tl::unexpected(device.error());
  auto unit = emit(plan.problem, plan.variant, (*device)->target());
  if (!unit) return tl::unexpected(unit.error());
  // Same code, four times the bytes: only for who looks at them. With it debuggers and profilers name the
  // templates.
  if (!options.dump_directory.empty() && (*device)->target().kind == Target::Kind::cuda)
    unit->options.emplace_back("--generate-line-info");
  std::shared_ptr<LoadedImage> loaded;
  {
    const std::string key = to_string(plan.device) + key_of(*unit, (*device)->target(), "").digest();
    const std::scoped_lock lock(mutex_);
    std::shared_ptr<LoadedImage>& slot = images_[key];
    if (slot == nullptr) slot = std::make_shared<LoadedImage>();
    loaded = slot;
  }
  auto k = std::make_shared<Kernel::Impl>();
  {
    const std::scoped_lock lock(loaded->mutex);
    if (loaded->module == nullptr) {
      if (const Status ok = load(**device, *unit, *loaded); !ok) return tl::unexpected(ok.error());
      k->info = loaded->info;
    } else {
      k->info = loaded->info;
      k->info.origin = Origin::memory;
      k->info.compile_ms = k->info.load_ms = 0;
    }
    k->module = loaded->module;
  }
  k->engine = self;
  k->backend = *device;
  k->problem = plan.problem;
  k->variant = plan.variant;
  k->host_memory = plan.device.kind != Device::Kind::cuda;
  k->info.device = fmt::format("{} ({})", to_string(plan.device), (*device)->name());
  k->info.variant = to_string(plan.variant);
  k->info.choice = plan.choice;
  k->info.shared_bytes = shared_bytes_of(plan.problem, plan.variant, (*device)->target(), k->info);
  return std::shared_ptr<const Kernel::Impl>(std::move(k));
}

} // namespace kda
