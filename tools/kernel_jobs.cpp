#include "kernel_jobs.h"
#include <future>

namespace kda::tools {
namespace {

Result<std::vector<Variant>> variants_of(const Problem& p, const Target& target, bool candidates) {
  if (!candidates) return choices(p, target);
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, target))
    if (c.rejected.empty()) all.push_back(c.variant);
  return all;
}

} // namespace

Result<std::vector<KernelJob>> kernel_jobs(const std::vector<Problem>& problems, const Target& target,
                                           bool candidates) {
  // All sizes of a problem take up to a second: at the same time.
  std::vector<std::future<Result<std::vector<Variant>>>> found;
  found.reserve(problems.size());
  for (const Problem& p : problems)
    found.push_back(std::async(std::launch::async,
                               [&p, &target, candidates] { return variants_of(p, target, candidates); }));
  std::vector<KernelJob> jobs;
  for (std::size_t i = 0; i < problems.size(); ++i) {
    const auto variants = found[i].get();
    if (!variants) return tl::unexpected(variants.error());
    for (const Variant& v : *variants)
      jobs.push_back({problems[i], v, target});
  }
  return jobs;
}

} // namespace kda::tools
