#include "kernel_text.h"
#include "templates/embedded.h"

namespace kda::emulator {

SourceUnit kernel_text(const std::string& body) {
  SourceUnit unit;
  unit.name = "test.cu";
  unit.main = R"(#include "kernel_args.cuh"
#include "primitives/async.cuh"
#include "primitives/matrix.cuh"
#include "primitives/tma.cuh"
#include "primitives/vote.cuh"
#include "primitives/wgmma.cuh"
using namespace kda;
KDA_KERNEL(1024, 1) kernel(KDA_GRID_CONSTANT KernelArgs args) {
  [[maybe_unused]] const float* in = static_cast<const float*>(args.workspace[0]);
  [[maybe_unused]] float* out = static_cast<float*>(args.workspace[1]);
  [[maybe_unused]] float* shared = reinterpret_cast<float*>(shared_memory());
  [[maybe_unused]] const int thread = thread_index(), lane = lane_index(), warp = thread / 32;
  [[maybe_unused]] const TensorMap* map = static_cast<const TensorMap*>(args.workspace[2]);
#line 1
)" + body + "\n}\n";
  for (const char* name : {"kernel_args.cuh", "primitives/async.cuh", "primitives/basic.cuh",
                           "primitives/mma.cuh", "primitives/matrix.cuh", "primitives/mbarrier.cuh",
                           "primitives/tma.cuh", "primitives/vote.cuh", "primitives/wgmma.cuh"})
    unit.files.push_back({name, std::string(templates::find(name).value())});
  unit.entries = {"kernel"};
  return unit;
}

namespace {

Result<std::vector<float>> launch(const Backend& backend, const Module& module, const Run& run, void* in,
                                  void* out) {
  if (Status ok = backend.copy_to_device(in, run.in.data(), run.in.size() * sizeof(float)); !ok)
    return tl::unexpected(ok.error());
  KernelArgs args{};
  args.workspace[0] = in;
  args.workspace[1] = out;
  TensorMapFields map = run.map;
  map.base = static_cast<unsigned char*>(in);
  args.workspace[2] = &map;
  if (Status ok = module.launch({0, run.grid, run.threads, run.shared_bytes}, args, nullptr); !ok)
    return tl::unexpected(ok.error());
  std::vector<float> result(run.outputs);
  if (Status ok = backend.copy_from_device(result.data(), out, run.outputs * sizeof(float)); !ok)
    return tl::unexpected(ok.error());
  return result;
}

} // namespace

Result<std::vector<float>> run_text(const std::string& body, const Run& run) {
  const auto backend = make_backend(run.options);
  if (!backend) return tl::unexpected(backend.error());
  const SourceUnit unit = kernel_text(body);
  const auto image = (*backend)->compile(unit);
  if (!image) return tl::unexpected(image.error());
  const auto module = (*backend)->load(unit, *image);
  if (!module) return tl::unexpected(module.error());
  void* in = (*backend)->allocate(run.in.size() * sizeof(float)).value();
  void* out = (*backend)->allocate(run.outputs * sizeof(float)).value();
  auto result = launch(**backend, **module, run, in, out);
  (*backend)->release(in);
  (*backend)->release(out);
  return result;
}

} // namespace kda::emulator
