#include "cuda_driver.h"
#include <dlfcn.h>
#include <fmt/format.h>

namespace kda {

Result<std::shared_ptr<const CudaDriver>> CudaDriver::open() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return fail(ErrorCode::unavailable,
                "no CUDA driver (libcuda.so.1 was not found); install one to use a GPU");
  auto d = std::make_shared<CudaDriver>();
  std::string missing;
  const auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  load(d->init, "cuInit");
  load(d->driver_version, "cuDriverGetVersion");
  load(d->error_name, "cuGetErrorName");
  load(d->device_count, "cuDeviceGetCount");
  load(d->device_get, "cuDeviceGet");
  load(d->device_name, "cuDeviceGetName");
  load(d->device_uuid, "cuDeviceGetUuid_v2");
  load(d->device_attribute, "cuDeviceGetAttribute");
  load(d->primary_retain, "cuDevicePrimaryCtxRetain");
  load(d->context_current, "cuCtxGetCurrent");
  load(d->context_push, "cuCtxPushCurrent_v2");
  load(d->context_pop, "cuCtxPopCurrent_v2");
  load(d->context_synchronize, "cuCtxSynchronize");
  load(d->library_load, "cuLibraryLoadData");
  load(d->library_unload, "cuLibraryUnload");
  load(d->library_kernel, "cuLibraryGetKernel");
  load(d->kernel_function, "cuKernelGetFunction");
  load(d->kernel_set_attribute, "cuKernelSetAttribute");
  load(d->launch, "cuLaunchKernelEx");
  load(d->allocate, "cuMemAlloc_v2");
  load(d->release, "cuMemFree_v2");
  load(d->copy_to_device, "cuMemcpyHtoDAsync_v2");
  load(d->copy_to_host, "cuMemcpyDtoHAsync_v2");
  load(d->fill_words, "cuMemsetD32Async");
  load(d->stream_create, "cuStreamCreate");
  load(d->stream_destroy, "cuStreamDestroy_v2");
  load(d->stream_synchronize, "cuStreamSynchronize");
  load(d->stream_is_capturing, "cuStreamIsCapturing");
  load(d->stream_begin_capture, "cuStreamBeginCapture_v2");
  load(d->stream_end_capture, "cuStreamEndCapture");
  load(d->exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  load(d->graph_instantiate, "cuGraphInstantiateWithFlags");
  load(d->graph_upload, "cuGraphUpload");
  load(d->graph_launch, "cuGraphLaunch");
  load(d->graph_executable_destroy, "cuGraphExecDestroy");
  load(d->graph_destroy, "cuGraphDestroy");
  load(d->event_create, "cuEventCreate");
  load(d->event_record, "cuEventRecord");
  load(d->event_synchronize, "cuEventSynchronize");
  load(d->event_elapsed, "cuEventElapsedTime");
  load(d->event_destroy, "cuEventDestroy_v2");
  if (!missing.empty())
    return fail(
        ErrorCode::unavailable,
        fmt::format("the CUDA driver is too old: it has no {}; version 12.0 or later is needed", missing));
  // 34: the toolkit's stub library in place of a driver; 100: no device.
  if (const int code = d->init(0); code != 0)
    return fail(ErrorCode::unavailable, code == 34 ? "libcuda.so.1 is the toolkit's stub, not a driver"
                                        : code == 100
                                            ? std::string("the CUDA driver finds no GPU")
                                            : fmt::format("the CUDA driver does not start (error {})", code));
  d->driver_version(&d->version);
  return std::shared_ptr<const CudaDriver>(std::move(d));
}

Status CudaDriver::check(int code, const char* call) const {
  if (code == 0) return {};
  const char* name = nullptr;
  error_name(code, &name);
  return fail(code == 2 ? ErrorCode::out_of_memory : ErrorCode::device_error,
              fmt::format("{} failed: {} ({})", call, name == nullptr ? "unknown error" : name, code));
}

} // namespace kda
