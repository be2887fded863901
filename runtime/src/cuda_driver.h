#pragma once
// The CUDA driver's functions, opened at run time. Types are declared here so that no toolkit header is
// needed.
#include "codegen/error.h"
#include <cstddef>
#include <memory>
#include <string>

namespace kda {

struct CudaDriver {
  using Device = int;
  using DevicePointer = unsigned long long;
  using Handle = void*; ///< context, stream, event, library, kernel, function, graph

  // CUlaunchAttribute and CUlaunchConfig.
  struct LaunchAttribute {
    int id = 0;
    alignas(8) unsigned char value[64] = {};
  };
  struct LaunchConfig {
    unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, shared_bytes = 0;
    Handle stream = nullptr;
    LaunchAttribute* attributes = nullptr;
    unsigned count = 0;
  };

  int (*init)(unsigned) = nullptr;
  int (*driver_version)(int*) = nullptr;
  int (*error_name)(int, const char**) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device_get)(Device*, int) = nullptr;
  int (*device_name)(char*, int, Device) = nullptr;
  int (*device_uuid)(unsigned char*, Device) = nullptr; ///< 16 bytes; of the MIG slice where there is one
  int (*device_attribute)(int*, int, Device) = nullptr;
  int (*primary_retain)(Handle*, Device) = nullptr;
  int (*context_current)(Handle*) = nullptr;
  int (*context_push)(Handle) = nullptr;
  int (*context_pop)(Handle*) = nullptr;
  int (*context_synchronize)() = nullptr;
  int (*library_load)(Handle*, const void*, const int*, void* const*, unsigned, const int*, void* const*,
                      unsigned) = nullptr;
  int (*library_unload)(Handle) = nullptr;
  int (*library_kernel)(Handle*, Handle, const char*) = nullptr;
  int (*kernel_function)(Handle*, Handle) = nullptr;
  int (*kernel_set_attribute)(int, int, Handle, Device) = nullptr;
  int (*launch)(const LaunchConfig*, Handle, void**, void**) = nullptr;
  int (*allocate)(DevicePointer*, std::size_t) = nullptr;
  int (*release)(DevicePointer) = nullptr;
  int (*copy_to_device)(DevicePointer, const void*, std::size_t, Handle) = nullptr; ///< both in a stream
  int (*copy_to_host)(void*, DevicePointer, std::size_t, Handle) = nullptr;
  int (*fill_words)(DevicePointer, unsigned, std::size_t, Handle) = nullptr;
  int (*stream_create)(Handle*, unsigned) = nullptr;
  int (*stream_destroy)(Handle) = nullptr;
  int (*stream_synchronize)(Handle) = nullptr;
  int (*stream_is_capturing)(Handle, int*) = nullptr; ///< 0: it is not
  int (*stream_begin_capture)(Handle, int) = nullptr;
  int (*stream_end_capture)(Handle, Handle*) = nullptr;
  int (*exchange_capture_mode)(int*) = nullptr; ///< of the calling thread
  int (*graph_instantiate)(Handle*, Handle, unsigned long long) = nullptr;
  int (*graph_upload)(Handle, Handle) = nullptr;
  int (*graph_launch)(Handle, Handle) = nullptr;
  int (*graph_executable_destroy)(Handle) = nullptr;
  int (*graph_destroy)(Handle) = nullptr;
  int (*event_create)(Handle*, unsigned) = nullptr;
  int (*event_record)(Handle, Handle) = nullptr;
  int (*event_synchronize)(Handle) = nullptr;
  int (*event_elapsed)(float*, Handle, Handle) = nullptr;
  int (*event_destroy)(Handle) = nullptr;

  // CUdevice_attribute and CUfunction_attribute values, fixed by the driver's ABI.
  static constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedPerSm = 81,
                       kRegistersPerSm = 82, kSharedOptin = 97, kL2Bytes = 38;
  static constexpr int kMaxDynamicShared = 8;
  static constexpr int kRelaxed = 2;                ///< CUstreamCaptureMode
  static constexpr unsigned kNonBlockingStream = 1; ///< CUstream_flags
  static constexpr int kStreamSerialization = 6;    ///< CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  static constexpr int kOverlapInGraphs = 12030;    ///< first driver that captures launches with it

  int version = 0; ///< 13000 for 13.0

  /// Opens libcuda.so.1 and initialises it; unavailable, with what to do, when there is no usable driver or
  /// GPU.
  [[nodiscard]] static Result<std::shared_ptr<const CudaDriver>> open();
  /// Ok for 0, else device_error (out_of_memory for code 2) naming the call and the driver's error.
  [[nodiscard]] Status check(int code, const char* call) const;
};

} // namespace kda
