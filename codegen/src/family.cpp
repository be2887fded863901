// The table of kernel families, and the pure functions that only dispatch to them.
#include "family.h"
#include <algorithm>
#include <fmt/format.h>
#include <limits>

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

namespace {

constexpr std::int64_t rounded(std::int64_t x) {
  std::int64_t step = 1;
  while (x > 8 * step)
    step *= 2;
  return (x + step - 1) / step * step;
}
static_assert(rounded(0) == 0 && rounded(8) == 8 && rounded(9) == 10 && rounded(33) == 40);

/// Every rounded extent from 1 to `most`.
std::vector<std::int64_t> extents(std::int64_t most) {
  std::vector<std::int64_t> all;
  for (std::int64_t x = 1; x <= most; x = rounded(x + 1))
    all.push_back(x);
  return all;
}

/// The candidates that fit; an error with every reason when none does.
Result<std::vector<Variant>> fitting(const Problem& p, const Target& t) {
  if (const Status ok = validate(p); !ok) return tl::unexpected(ok.error());
  std::vector<Variant> fit;
  std::string reasons;
  for (const Candidate& c : enumerate(p, t)) {
    if (c.rejected.empty())
      fit.push_back(c.variant);
    else
      reasons += fmt::format("{}: {}\n", to_string(c.variant), c.rejected);
  }
  if (fit.empty())
    return fail(ErrorCode::invalid_argument, fmt::format("no kernel fits {} on {}", to_string(p), t.arch),
                reasons);
  return fit;
}

/// Index of the fastest by estimate.
std::size_t fastest(const std::vector<Variant>& fit, const Problem& p, const Target& t, const Sizes& s) {
  std::size_t best = 0;
  double best_us = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < fit.size(); ++i)
    if (const double us = estimate_us(p, fit[i], t, s); us < best_us) {
      best = i;
      best_us = us;
    }
  return best;
}

} // namespace

Result<Variant> choose(const Problem& p, const Target& t, const Sizes& s) {
  return choose(p, t, s, static_cast<std::size_t>(-1));
}

Result<Variant> choose(const Problem& p, const Target& t, const Sizes& s, std::size_t max_workspace) {
  const auto fit = fitting(p, t);
  if (!fit) return tl::unexpected(fit.error());
  std::vector<Variant> small;
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const Variant& v : *fit) {
    const std::size_t bytes = workspace_layout(p, v, s).bytes;
    least = std::min(least, bytes);
    if (bytes <= max_workspace) small.push_back(v);
  }
  if (small.empty())
    return fail(
        ErrorCode::invalid_argument,
        fmt::format("{} needs a workspace of {} bytes at least for {} tokens in {} sequences, and {} are "
                    "allowed",
                    to_string(p), least, s.batch * s.tokens, s.sequences, max_workspace));
  return small[fastest(small, p, t, {rounded(s.batch), rounded(s.tokens), rounded(s.sequences)})];
}

Result<std::vector<Variant>> choices(const Problem& p, const Target& t) {
  const auto fit = fitting(p, t);
  if (!fit) return tl::unexpected(fit.error());
  std::vector<bool> chosen(fit->size());
  for (const std::int64_t rows : extents(kMostSequences))
    for (std::int64_t tokens : extents(kMostTokens)) {
      if (!p.varlen && tokens * rows > rounded(2 * kMostTokens)) break;
      chosen[fastest(*fit, p, t, p.varlen ? Sizes{1, tokens, rows} : Sizes{rows, tokens, rows})] = true;
    }
  std::vector<Variant> all;
  for (std::size_t i = 0; i < fit->size(); ++i)
    if (chosen[i]) all.push_back((*fit)[i]);
  return all;
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
