#pragma once
// Which kernels to compile ahead so that a set of problems compiles nothing later.
#include "codegen/variant.h"
#include <vector>

namespace kda::tools {

struct KernelJob {
  Problem problem;
  Variant variant;
  Target target;
};

/// One job a kernel: every variant that the cost model chooses for some sizes (choices), or, for those who
/// tune, every candidate. Problems with the same kernels, which differ in heads or in what a family does not
/// read, are jobs of their own; their images are made once.
[[nodiscard]] Result<std::vector<KernelJob>> kernel_jobs(const std::vector<Problem>&, const Target&,
                                                         bool candidates);

} // namespace kda::tools
