#include "nvrtc.h"
#include <array>
#include <cctype>
#include <charconv>
#include <cstring>
#include <dlfcn.h>
#include <fmt/format.h>
#include <future>

namespace kda {

// The part of NVRTC's C interface that we call; stable since CUDA 11.
struct Nvrtc::Functions {
  using Program = void*;
  int (*version)(int*, int*) = nullptr;
  const char* (*error_string)(int) = nullptr;
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
  int (*destroy)(Program*) = nullptr;
  int (*compile)(Program, int, const char* const*) = nullptr;
  int (*log_size)(Program, std::size_t*) = nullptr;
  int (*log)(Program, char*) = nullptr;
  int (*cubin_size)(Program, std::size_t*) = nullptr;
  int (*cubin)(Program, char*) = nullptr;
  // Since 11.2; asked only by who diagnoses.
  int (*architecture_count)(int*) = nullptr;
  int (*architectures)(int*) = nullptr;
};

namespace {

template <class F>
bool load_symbol(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(dlsym(library, name));
  return out != nullptr;
}

int read_int(std::string_view text, std::size_t at) {
  int value = 0;
  while (at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) == 0)
    ++at;
  std::from_chars(text.data() + at, text.data() + text.size(), value);
  return value;
}
/// The integer that stands before `word`, e.g. "232 registers".
int int_before(std::string_view line, std::string_view word) {
  const std::size_t at = line.find(word);
  if (at == std::string_view::npos) return 0;
  std::size_t begin = at;
  while (begin > 0 &&
         (line[begin - 1] == ' ' || std::isdigit(static_cast<unsigned char>(line[begin - 1])) != 0))
    --begin;
  return read_int(line, begin);
}

template <class Visit>
void for_lines(std::string_view text, const Visit& visit) {
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    visit(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

/// Numbered lines around `line` of `text`, the faulty one marked.
std::string excerpt(std::string_view text, int line) {
  std::string out;
  int number = 0;
  for_lines(text, [&](std::string_view content) {
    ++number;
    if (number >= line - 6 && number <= line + 4)
      out += fmt::format("{} {:4} | {}\n", number == line ? ">" : " ", number, content);
  });
  return out;
}

/// NVRTC writes "file(line): error: ..."; the excerpt is of that file.
std::string annotate(const SourceUnit& unit, const std::string& log) {
  std::string out;
  const std::size_t at = log.find("): error");
  if (at != std::string::npos) {
    const std::size_t open = log.rfind('(', at), begin = log.rfind('\n', at) + 1;
    const std::string file = log.substr(begin, open - begin);
    const int line = read_int(log, open + 1);
    std::string_view text = unit.main;
    for (const SourceFile& f : unit.files)
      if (f.name == file) text = f.text;
    out += fmt::format("{}:{}\n{}\n", file, line, excerpt(text, line));
  }
  for (const SourceFile& f : unit.files)
    if (f.name == "config.cuh") out += fmt::format("config.cuh:\n{}\n", f.text);
  return out + log;
}

} // namespace

std::vector<KernelFigures> parse_ptxas_log(std::string_view log) {
  std::vector<KernelFigures> all;
  for_lines(log, [&](std::string_view line) {
    constexpr std::string_view kEntry = "Compiling entry function '";
    if (const std::size_t at = line.find(kEntry); at != std::string_view::npos) {
      const std::size_t begin = at + kEntry.size();
      KernelFigures figures;
      figures.entry = std::string(line.substr(begin, line.find('\'', begin) - begin));
      all.push_back(figures);
    }
    if (all.empty()) return;
    if (line.find("bytes spill stores") != std::string_view::npos) {
      all.back().stack_bytes = int_before(line, " bytes stack frame");
      all.back().spill_bytes = int_before(line, " bytes spill stores");
    }
    if (const std::size_t at = line.find("Used "); at != std::string_view::npos) {
      all.back().registers = read_int(line, at);
      all.back().shared_bytes = int_before(line, " bytes smem");
    }
  });
  return all;
}

std::string ptxas_advisories(std::string_view log) {
  std::string out;
  for_lines(log, [&](std::string_view line) {
    if (line.find("(C75") != std::string_view::npos) out += fmt::format("{}\n", line);
  });
  return out;
}

Result<std::shared_ptr<const Nvrtc>> Nvrtc::open(const std::optional<std::filesystem::path>& library,
                                                 int threads) {
  std::vector<std::string> names;
  if (library)
    names.push_back(library->string());
  else
    names = {"libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so.13",
             "/usr/local/cuda/lib64/libnvrtc.so.12", "/usr/lib/x86_64-linux-gnu/libnvrtc.so"};
  void* handle = nullptr;
  for (const std::string& name : names)
    if (handle == nullptr) handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr)
    return fail(ErrorCode::unavailable,
                "NVRTC was not found; install the CUDA toolkit's NVRTC or the nvidia-cuda-nvrtc wheel and "
                "set KDA_JIT_NVRTC to "
                "its libnvrtc.so",
                fmt::format("looked for {}", fmt::join(names, ", ")));
  auto f = std::make_shared<Functions>();
  const bool all = load_symbol(handle, "nvrtcVersion", f->version) &&
                   load_symbol(handle, "nvrtcGetErrorString", f->error_string) &&
                   load_symbol(handle, "nvrtcCreateProgram", f->create) &&
                   load_symbol(handle, "nvrtcDestroyProgram", f->destroy) &&
                   load_symbol(handle, "nvrtcCompileProgram", f->compile) &&
                   load_symbol(handle, "nvrtcGetProgramLogSize", f->log_size) &&
                   load_symbol(handle, "nvrtcGetProgramLog", f->log) &&
                   load_symbol(handle, "nvrtcGetCUBINSize", f->cubin_size) &&
                   load_symbol(handle, "nvrtcGetCUBIN", f->cubin);
  int major = 0, minor = 0;
  if (!all || f->version(&major, &minor) != 0 || major < 12)
    return fail(ErrorCode::unavailable,
                fmt::format("NVRTC 12 or 13 is needed; the one found is {}.{}", major, minor));
  (void)(load_symbol(handle, "nvrtcGetNumSupportedArchs", f->architecture_count) &&
         load_symbol(handle, "nvrtcGetSupportedArchs", f->architectures));
  Dl_info info{};
  std::error_code error;
  std::uintmax_t size = 0;
  std::filesystem::path path;
  if (dladdr(reinterpret_cast<void*>(f->version), &info) != 0 && info.dli_fname != nullptr)
    size = std::filesystem::file_size(path = std::filesystem::canonical(info.dli_fname, error), error);
  auto self = std::make_shared<Nvrtc>(threads);
  self->path_ = path;
  self->f_ = std::move(f);
  self->major_ = major;
  self->identity_ = fmt::format("nvrtc {}.{} {}", major, minor, error ? 0 : size);
  return std::shared_ptr<const Nvrtc>(std::move(self));
}

std::vector<int> Nvrtc::architectures() const {
  int count = 0;
  if (f_->architectures == nullptr || f_->architecture_count(&count) != 0 || count <= 0) return {};
  std::vector<int> all(static_cast<std::size_t>(count));
  return f_->architectures(all.data()) == 0 ? all : std::vector<int>();
}

std::string pack_cubins(const std::vector<std::string>& cubins) {
  std::string image;
  for (const std::string& cubin : cubins) {
    const auto size = static_cast<std::uint64_t>(cubin.size());
    image.append(reinterpret_cast<const char*>(&size), sizeof(size));
    image += cubin;
  }
  return image;
}

Result<std::vector<std::string>> unpack_cubins(std::string_view image) {
  std::vector<std::string> cubins;
  while (!image.empty()) {
    std::uint64_t size = 0;
    if (image.size() >= sizeof(size)) std::memcpy(&size, image.data(), sizeof(size));
    if (size == 0 || size > image.size() - sizeof(size))
      return fail(ErrorCode::load_failed, "the image is no list of cubins");
    cubins.emplace_back(image.substr(sizeof(size), size));
    image.remove_prefix(sizeof(size) + size);
  }
  return cubins;
}

Result<Image> Nvrtc::compile(const SourceUnit& unit) const {
  std::vector<std::future<Result<Image>>> parts;
  for (const std::string& entry : unit.entries)
    parts.push_back(std::async(unit.entries.size() > 1 ? std::launch::async : std::launch::deferred,
                               [this, &unit, &entry] {
                                 const CompileSlots::Slot slot(slots_);
                                 return compile_entry(unit, entry);
                               }));
  Image image;
  std::vector<std::string> cubins;
  std::optional<Error> error;
  for (auto& future : parts) {
    Result<Image> part = future.get();
    if (!part) {
      if (!error) error = part.error();
      continue;
    }
    cubins.push_back(std::move(part->bytes));
    image.log += part->log;
    image.kernels.insert(image.kernels.end(), part->kernels.begin(), part->kernels.end());
  }
  if (error) return tl::unexpected(*error);
  image.bytes = pack_cubins(cubins);
  return image;
}

Result<Image> Nvrtc::compile_entry(const SourceUnit& unit, const std::string& entry) const {
  std::vector<const char*> names, texts, options;
  for (const SourceFile& f : unit.files) {
    names.push_back(f.name.c_str());
    texts.push_back(f.text.c_str());
  }
  for (const std::string& o : unit.options)
    options.push_back(o.c_str());
  for (const char* extra : {"--ptxas-options=-v", "--ptxas-options=--warn-on-spills"})
    options.push_back(extra);
  const std::string one = fmt::format("--define-macro=KDA_ONE_{}=1", entry);
  options.push_back("--define-macro=KDA_ONE_KERNEL=1");
  options.push_back(one.c_str());
  // The driver keeps a cache of its own, which would hide what a compile costs; ours replaces it.
  if (major_ >= 13) options.push_back("--no-cache");

  Functions::Program program = nullptr;
  int code = f_->create(&program, unit.main.c_str(), unit.name.c_str(), static_cast<int>(names.size()),
                        texts.data(), names.data());
  if (code != 0) return fail(ErrorCode::compile_failed, fmt::format("NVRTC: {}", f_->error_string(code)));
  const auto destroy = [this](Functions::Program* p) { f_->destroy(p); };
  const std::unique_ptr<Functions::Program, decltype(destroy)> guard(&program, destroy);
  code = f_->compile(program, static_cast<int>(options.size()), options.data());
  Image image;
  std::size_t size = 0;
  if (f_->log_size(program, &size) == 0 && size > 1) {
    image.log.resize(size);
    f_->log(program, image.log.data());
    image.log.resize(size - 1);
  }
  if (code != 0)
    return fail(ErrorCode::compile_failed,
                fmt::format("NVRTC refused {}: {}", unit.name, f_->error_string(code)),
                annotate(unit, image.log));
  if (f_->cubin_size(program, &size) != 0 || size == 0)
    return fail(ErrorCode::compile_failed, fmt::format("NVRTC made no cubin of {}", unit.name), image.log);
  image.bytes.resize(size);
  f_->cubin(program, image.bytes.data());
  image.kernels = parse_ptxas_log(image.log);
  return image;
}

} // namespace kda
