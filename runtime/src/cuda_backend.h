#pragma once
#include "backend.h"
#include "cuda_driver.h"
#include "nvrtc.h"

namespace kda {

/// Device `index` through the driver. Its primary context is created meanwhile: what needs it waits, and
/// answers the error if there was one. `nvrtc` may be an error: compile then answers it, and cached images
/// still load.
[[nodiscard]] Result<std::shared_ptr<Backend>> make_cuda_backend(std::shared_ptr<const CudaDriver> driver,
                                                                 int index,
                                                                 Result<std::shared_ptr<const Nvrtc>> nvrtc);

} // namespace kda
