// The table of kernel families, and the pure functions that only dispatch to them.
#include "family.h"
#include <fmt/format.h>

namespace kda {

const Family& family_of(Operation operation, Algorithm algorithm) {
  switch (algorithm) {
  case Algorithm::token:
    return operation == Operation::backward ? kTokenBackwardFamily
           : operation == Operation::replay ? kReplayFamily
                                            : kTokenFamily;
  case Algorithm::gate: return kGateFamily;
  case Algorithm::fused: return kFusedForwardFamily;
  case Algorithm::chunk: break;
  }
  return operation == Operation::backward ? kChunkBackwardFamily : kChunkForwardFamily;
}

std::vector<Candidate> enumerate(const Problem& p, const Target& t) {
  std::vector<Candidate> all;
  if (t.kind == Target::Kind::host) {
    enumerate_host(p, t, all);
    return all;
  }
  switch (p.operation) {
  case Operation::gate:
  case Operation::gate_backward: kGateFamily.enumerate(p, t, all); break;
  case Operation::recurrent: kTokenFamily.enumerate(p, t, all); break;
  case Operation::replay: kReplayFamily.enumerate(p, t, all); break;
  case Operation::forward:
    kChunkForwardFamily.enumerate(p, t, all);
    kFusedForwardFamily.enumerate(p, t, all);
    kTokenFamily.enumerate(p, t, all);
    break;
  case Operation::backward:
    kChunkBackwardFamily.enumerate(p, t, all);
    kTokenBackwardFamily.enumerate(p, t, all);
    break;
  }
  return all;
}

double estimate_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  if (t.kind == Target::Kind::host) return estimate_host_us(p, v, t, s);
  return family_of(p.operation, v.algorithm).estimate_us(p, v, t, s);
}

Result<Variant> choose(const Problem& p, const Target& t, const Sizes& s) {
  if (const Status ok = validate(p); !ok) return tl::unexpected(ok.error());
  const Variant* best = nullptr;
  double best_us = 0;
  std::string reasons;
  const std::vector<Candidate> all = enumerate(p, t);
  for (const Candidate& c : all) {
    if (!c.rejected.empty()) {
      reasons += fmt::format("{}: {}\n", to_string(c.variant), c.rejected);
      continue;
    }
    const double us = estimate_us(p, c.variant, t, s);
    if (best == nullptr || us < best_us) {
      best = &c.variant;
      best_us = us;
    }
  }
  if (best == nullptr)
    return fail(ErrorCode::invalid_argument, fmt::format("no kernel fits {} on {}", to_string(p), t.arch),
                reasons);
  return *best;
}

LaunchList launches(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  if (t.kind == Target::Kind::host) return launches_host(p, v, s);
  return family_of(p.operation, v.algorithm).launches(p, v, t, s);
}

WorkspaceLayout workspace_layout(const Problem& p, const Variant& v, const Sizes& s) {
  if (v.scan_warps == 0) return {}; // no warps: a variant of the host, which needs none
  return family_of(p.operation, v.algorithm).workspace(p, v, s);
}

} // namespace kda
