// The public API over engine_impl: plan, prepare, execute.
#include "engine_impl.h"
#include "marshal.h"
#include "tuning.h"
#include "tuning_rows.h"
#include <algorithm>
#include <bit>
#include <fmt/format.h>

namespace kda {

std::string bucket(const Sizes& s) {
  const auto up = [](std::int64_t x) {
    return std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(x, 1)));
  };
  return fmt::format("T{} N{}", up(s.tokens), up(s.sequences));
}

Sizes choice_sizes(const Problem& p, const Sizes& s) {
  return p.batch_invariant ? Sizes{1, 8192, 1} : s;
}

WorkspaceLayout workspace_of(const Target& target, const Problem& p, const Variant& v, const Sizes& s) {
  return target.kind == Target::Kind::host ? WorkspaceLayout{} : workspace_layout(p, v, s);
}

Status launch_all(const Backend& backend, const Module& module, const Problem& p, const Variant& v,
                  const Sizes& s, KernelArgs& args, void* workspace, void* stream) {
  const WorkspaceLayout layout = workspace_of(backend.target(), p, v, s);
  for (int i = 0; i < layout.count; ++i)
    args.workspace[i] = static_cast<std::byte*>(workspace) + layout.offset[static_cast<std::size_t>(i)];
  const LaunchList list = launches(p, v, backend.target(), s);
  set_slabs(list.slabs, args);
  for (int i = 0; i < list.count; ++i)
    if (list.items[static_cast<std::size_t>(i)].ctas > kMostCtas)
      return fail(ErrorCode::invalid_argument,
                  fmt::format("{} tokens and {} sequences with {} value heads need {} CTAs in a launch and a "
                              "grid has {}; split the call",
                              s.batch * s.tokens, s.sequences, p.value_heads,
                              list.items[static_cast<std::size_t>(i)].ctas, kMostCtas));
  return module.launch_all(list, args, stream);
}

// ---- Plan

const Problem& Plan::problem() const {
  return impl_->problem;
}
const Variant& Plan::variant() const {
  return impl_->variant;
}
Device Plan::device() const {
  return impl_->device;
}
std::string Plan::explain() const {
  return fmt::format("{} on {}: {} ({}{}{})", to_string(impl_->problem), to_string(impl_->device),
                     to_string(impl_->variant), impl_->choice, impl_->note.empty() ? "" : "; ", impl_->note);
}

// ---- Kernel

const KernelInfo& Kernel::info() const {
  return impl_->info;
}
const Problem& Kernel::problem() const {
  return impl_->problem;
}

Result<std::size_t> Kernel::workspace_bytes(const Sizes& sizes) const {
  if (const Status ok = check_sizes(impl_->problem, sizes); !ok) return tl::unexpected(ok.error());
  return workspace_of(impl_->backend->target(), impl_->problem, impl_->variant, sizes).bytes;
}

Status Kernel::execute(const Args& args, void* workspace, std::size_t bytes, void* stream) const {
  if (impl_ == nullptr) return fail(ErrorCode::not_prepared, "execute on a kernel that was never prepared");
  if (Status ok = impl_->engine->usable(); !ok) return ok;
  KernelArgs kernel_args;
  Sizes sizes;
  if (Status ok = make_kernel_args(impl_->problem, args, impl_->host_memory, kernel_args, sizes); !ok)
    return ok;
  const std::size_t needed =
      workspace_of(impl_->backend->target(), impl_->problem, impl_->variant, sizes).bytes;
  if (bytes < needed || (needed > 0 && workspace == nullptr))
    return fail(
        ErrorCode::invalid_argument,
        fmt::format("the workspace has {} bytes and {} are needed; ask workspace_bytes", bytes, needed));
  if (reinterpret_cast<std::uintptr_t>(workspace) % 256 != 0)
    return fail(ErrorCode::invalid_argument, "the workspace is not aligned to 256 bytes");
  return launch_all(*impl_->backend, *impl_->module, impl_->problem, impl_->variant, sizes, kernel_args,
                    workspace, stream);
}

// ---- Engine

Result<Engine> Engine::create(EngineOptions options) {
  std::vector<TuneReport> pins;
  if (options.tune == TuneMode::pinned)
    for (const std::filesystem::path& file : options.tune_pins) {
      auto reports = read_reports(file);
      if (!reports) return tl::unexpected(reports.error());
      pins.insert(pins.end(), reports->begin(), reports->end());
    }
  Engine engine;
  engine.impl_ = Impl::make(std::move(options));
  engine.impl_->pins = std::move(pins);
  return engine;
}

std::vector<DeviceInfo> Engine::devices() const {
  std::vector<Device> candidates;
  int count = 0;
  if (impl_->usable() && impl_->driver) (*impl_->driver)->device_count(&count);
  for (int i = 0; i < std::max(count, 1); ++i)
    candidates.push_back(Device::cuda(i));
  if (impl_->options.emulator != nullptr) candidates.push_back({Device::Kind::emulator, 0});
  candidates.push_back(Device::host());
  std::vector<DeviceInfo> all;
  for (const Device& d : candidates) {
    DeviceInfo info;
    info.device = d;
    const auto backend = impl_->backend(d);
    if (backend) {
      info.name = (*backend)->name();
      info.arch = (*backend)->target().arch;
      info.id = (*backend)->id();
      info.compute_capability = (*backend)->target().compute_capability;
      info.driver = (*backend)->driver();
      const auto compiler = (*backend)->compiler();
      if (compiler)
        info.compiler = *compiler;
      else
        info.problem = compiler.error().message;
      if (const Status ok = (*backend)->wait((*backend)->stream()); !ok) info.problem = ok.error().message;
    } else {
      info.problem = backend.error().message;
    }
    all.push_back(std::move(info));
  }
  return all;
}

Device Engine::best_device() const {
  const auto gpu = impl_->backend(Device::cuda(0));
  return gpu && (*gpu)->wait((*gpu)->stream()) ? Device::cuda(0) : Device::host();
}

Result<Plan> Engine::plan(const Problem& problem, Device device, const Sizes& typical,
                          const std::optional<Variant>& variant, std::size_t max_workspace) const {
  if (const Status ok = validate(problem); !ok) return tl::unexpected(ok.error());
  if (const Status ok = check_sizes(problem, typical); !ok) return tl::unexpected(ok.error());
  const auto backend = impl_->backend(device);
  if (!backend) return tl::unexpected(backend.error());
  const Target& target = (*backend)->target();
  auto impl =
      std::make_shared<Plan::Impl>(Plan::Impl{problem, {}, device, typical, "cost model", {}, max_workspace});
  const TuneMode mode = impl_->options.tune;
  if (variant) {
    if (const std::string why = misfit(problem, target, *variant); !why.empty())
      return fail(ErrorCode::invalid_argument,
                  fmt::format("the variant '{}' cannot run {} on {}: {}", to_string(*variant),
                              to_string(problem), target.arch, why));
    if (const std::size_t bytes = workspace_of(target, problem, *variant, typical).bytes;
        bytes > max_workspace)
      return fail(ErrorCode::invalid_argument,
                  fmt::format("the variant '{}' needs a workspace of {} bytes, and {} are allowed",
                              to_string(*variant), bytes, max_workspace));
    impl->variant = *variant;
    impl->choice = "given";
  } else {
    const Sizes sizes = choice_sizes(problem, typical);
    const auto chosen = choose(problem, target, sizes, max_workspace);
    if (!chosen) return tl::unexpected(chosen.error());
    impl->variant = *chosen;
    const bool pinned = mode == TuneMode::pinned;
    const auto tuned = pinned                  ? pinned_choice(*impl_, **backend, problem, sizes)
                       : mode == TuneMode::off ? TunedChoice{}
                                               : tuned_choice(*impl_, **backend, problem, sizes);
    if (!tuned) return tl::unexpected(tuned.error());
    impl->note = tuned->note;
    if (tuned->variant && workspace_of(target, problem, *tuned->variant, typical).bytes <= max_workspace) {
      impl->variant = *tuned->variant;
      impl->choice = pinned ? "pinned" : "tuned";
    } else if (tuned->variant) {
      impl->note = fmt::format("the {} variant '{}' needs more than {} bytes of workspace",
                               pinned ? "pinned" : "tuned", to_string(*tuned->variant), max_workspace);
      if (const auto within =
              pinned ? std::nullopt : tuned_within(*impl_, **backend, problem, typical, max_workspace)) {
        impl->variant = *within;
        impl->choice = "tuned";
      }
    }
    if (!impl->note.empty())
      impl_->log_once(fmt::format("{}, {}: {}", to_string(problem), bucket(sizes), impl->note));
  }
  Plan plan;
  plan.impl_ = std::move(impl);
  return plan;
}

Result<Kernel> Engine::prepare(const Plan& plan) const {
  if (plan.impl_ == nullptr) return fail(ErrorCode::not_prepared, "prepare needs a plan of this engine");
  const TuneMode mode = impl_->options.tune;
  Plan wanted = plan;
  if (plan.impl_->choice != "given" && (mode == TuneMode::force || mode == TuneMode::on)) {
    TuneRequest request;
    request.progress = [&](const TuneProgress& p) {
      if (p.total == 0) impl_->log(p.stage);
    };
    if (const auto report = tune_device(impl_, plan.problem(), plan.device(), plan.impl_->typical, request,
                                        mode == TuneMode::on);
        !report)
      impl_->warn(fmt::format("tuning failed, the cost model's choice is used: {}", report.error().message));
    else if (auto again = this->plan(plan.problem(), plan.device(), plan.impl_->typical, std::nullopt,
                                     plan.impl_->max_workspace);
             again)
      wanted = *again;
  }
  auto made = impl_->kernel(impl_, *wanted.impl_);
  if (!made) return tl::unexpected(made.error());
  Kernel kernel;
  kernel.impl_ = *made;
  return kernel;
}

std::future<Result<Kernel>> Engine::prepare_async(const Plan& plan) const {
  return std::async(std::launch::async, [engine = *this, plan] { return engine.prepare(plan); });
}

Result<KernelInfo> Engine::precompile(const Problem& problem, const Variant& variant,
                                      const Target& target) const {
  const auto unit = emit(problem, variant, target);
  if (!unit) return tl::unexpected(unit.error());
  if (!impl_->nvrtc) return tl::unexpected(impl_->nvrtc.error());
  KernelInfo info;
  info.device = target.arch;
  info.variant = to_string(variant);
  info.choice = "given";
  const auto image = impl_->image(
      *unit, target, (*impl_->nvrtc)->identity(),
      [&](const SourceUnit& u) { return (*impl_->nvrtc)->compile(u); }, info);
  if (!image) return tl::unexpected(image.error());
  info.shared_bytes = shared_bytes_of(problem, variant, target, info);
  return info;
}

Result<PackReport> Engine::pack(const std::filesystem::path& file, const std::set<std::string>& keys) const {
  if (const Status ok = impl_->usable(); !ok) return tl::unexpected(ok.error());
  if (keys.empty()) return fail(ErrorCode::invalid_argument, "a pack needs at least one image");
  const auto info = impl_->store.pack(file, {keys});
  if (!info) return fail(ErrorCode::io_error, info.error());
  return PackReport{info->entries, info->bytes, info->digest};
}

Status Engine::run(const Problem& problem, Device device, const Sizes& sizes, const Args& args,
                   void* stream) const {
  const auto backend = impl_->backend(device);
  if (!backend) return tl::unexpected(backend.error());
  if ((*backend)->capturing(stream))
    return fail(
        ErrorCode::not_prepared,
        "run prepares, allocates and waits, which no capture can hold: prepare before the capture and "
        "execute inside it");
  const auto made = plan(problem, device, sizes);
  if (!made) return tl::unexpected(made.error());
  const auto kernel = prepare(*made);
  if (!kernel) return tl::unexpected(kernel.error());
  const auto bytes = kernel->workspace_bytes(sizes);
  if (!bytes) return tl::unexpected(bytes.error());
  void* workspace = nullptr;
  if (*bytes > 0) {
    const auto memory = allocate(device, *bytes);
    if (!memory) return tl::unexpected(memory.error());
    workspace = *memory;
  }
  Status ok = kernel->execute(args, workspace, *bytes, stream);
  const Status done = (*backend)->wait(stream);
  if (workspace != nullptr) release(device, workspace);
  return ok ? done : ok;
}

Result<void*> Engine::allocate(Device device, std::size_t bytes) const {
  const auto backend = impl_->backend(device);
  if (!backend) return tl::unexpected(backend.error());
  return (*backend)->allocate(bytes);
}
void Engine::release(Device device, void* data) const {
  if (const auto backend = impl_->backend(device); backend && data != nullptr) (*backend)->release(data);
}
Status Engine::copy_to_device(Device device, void* to, const void* from, std::size_t bytes) const {
  const auto backend = impl_->backend(device);
  return backend ? (*backend)->copy_to_device(to, from, bytes) : Status(tl::unexpected(backend.error()));
}
Status Engine::copy_from_device(Device device, void* to, const void* from, std::size_t bytes) const {
  const auto backend = impl_->backend(device);
  return backend ? (*backend)->copy_from_device(to, from, bytes) : Status(tl::unexpected(backend.error()));
}
Status Engine::synchronize(Device device) const {
  const auto backend = impl_->backend(device);
  return backend ? (*backend)->synchronize() : Status(tl::unexpected(backend.error()));
}
std::filesystem::path Engine::cache_directory() const {
  return impl_->store.directory();
}
std::int64_t Engine::compile_count() const {
  return impl_->compiles;
}

} // namespace kda
