// Sizes and launches of gate.cu.
#include "family.h"

namespace kda {
namespace {

std::vector<std::string> kernel_entries(const Problem&) {
  return {};
}
void variants(const Problem&, const Target&, std::vector<Candidate>&) {}
LaunchList launch_list(const Problem&, const Variant&, const Target&, const Sizes&) {
  return {};
}
WorkspaceLayout buffers(const Problem&, const Variant&, const Sizes&) {
  return {};
}
double estimate(const Problem&, const Variant&, const Target&, const Sizes&) {
  return 0;
}

} // namespace

const Family kGateFamily{"gate.cu", kernel_entries, variants, launch_list, buffers, estimate};

} // namespace kda
