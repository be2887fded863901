// A build without the host backend.
#include "host_backend.h"

namespace kda {

Result<std::shared_ptr<Backend>> make_host_backend(int) {
  return fail(ErrorCode::unavailable, "this build has no host backend; build with KDA_JIT_HOST=ON");
}

} // namespace kda
