// A build without the host backend.
#include "family.h"

namespace kda {

void enumerate_host(const Problem&, const Target&, std::vector<Candidate>&) {}

Result<SourceUnit> emit_host(const Problem&, const Variant&, const Target&) {
  return fail(ErrorCode::unavailable, "this build has no host backend; build with KDA_JIT_HOST=ON");
}

} // namespace kda
