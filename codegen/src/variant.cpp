#include "codegen/variant.h"
#include <algorithm>
#include <array>
#include <charconv>
#include <fmt/format.h>

namespace kda {
namespace {

struct Field {
  const char* name;
  int Variant::*member;
};
constexpr std::array<Field, 11> kFields{{{"c", &Variant::chunk},
                                         {"vt", &Variant::value_tile},
                                         {"pw", &Variant::prepare_warps},
                                         {"sw", &Variant::scan_warps},
                                         {"r", &Variant::rows},
                                         {"st", &Variant::stages},
                                         {"l", &Variant::lanes},
                                         {"seg", &Variant::segments},
                                         {"cs", &Variant::streaming},
                                         {"sl", &Variant::slab},
                                         {"pdl", &Variant::overlap}}};
constexpr std::array<std::pair<Algorithm, const char*>, 4> kAlgorithms{{{Algorithm::token, "token"},
                                                                        {Algorithm::chunk, "chunk"},
                                                                        {Algorithm::fused, "fused"},
                                                                        {Algorithm::gate, "gate"}}};

} // namespace

std::string to_string(const Variant& v) {
  std::string text;
  for (const auto& [algorithm, name] : kAlgorithms)
    if (algorithm == v.algorithm) text = name;
  for (const auto& [name, member] : kFields)
    if (v.*member != 0) text += fmt::format(" {}={}", name, v.*member);
  return text;
}

Result<Variant> parse_variant(std::string_view text) {
  const auto refuse = [&](std::string_view word) {
    return fail(
        ErrorCode::invalid_argument,
        fmt::format(
            "cannot read '{}' in the variant '{}'; a variant reads like 'chunk c=64 vt=32 pw=4 sw=4 st=2'",
            word, text));
  };
  Variant v;
  bool first = true;
  for (std::string_view rest = text; !rest.empty();) {
    const auto space = std::min(rest.find(' '), rest.size());
    const std::string_view word = rest.substr(0, space);
    rest.remove_prefix(std::min(space + 1, rest.size()));
    if (word.empty()) continue;
    if (first) {
      const auto* const a = std::find_if(kAlgorithms.begin(), kAlgorithms.end(),
                                         [&](const auto& x) { return word == x.second; });
      if (a == kAlgorithms.end()) return refuse(word);
      v.algorithm = a->first;
      first = false;
      continue;
    }
    const auto equals = word.find('=');
    if (equals == std::string_view::npos) return refuse(word);
    const auto* const f = std::find_if(kFields.begin(), kFields.end(),
                                       [&](const Field& x) { return word.substr(0, equals) == x.name; });
    if (f == kFields.end()) return refuse(word);
    const auto [end, error] =
        std::from_chars(word.data() + equals + 1, word.data() + word.size(), v.*(f->member));
    if (error != std::errc() || end != word.data() + word.size()) return refuse(word);
  }
  if (first) return refuse("");
  return v;
}

Result<Target> cuda_target(std::string_view arch) {
  struct Limits {
    const char* arch;
    int compute_capability, multiprocessors, max_shared, shared_per_sm;
  };
  // Shared memory: CUDA programming guide, "technical specifications per compute capability". SMs: the
  // largest common part.
  constexpr std::array<Limits, 11> limits{{{"sm_80", 80, 108, 166912, 167936},
                                           {"sm_86", 86, 84, 101376, 102400},
                                           {"sm_89", 89, 142, 101376, 102400},
                                           {"sm_90", 90, 132, 232448, 233472},
                                           {"sm_90a", 90, 132, 232448, 233472},
                                           {"sm_100", 100, 148, 232448, 233472},
                                           {"sm_100a", 100, 148, 232448, 233472},
                                           {"sm_103a", 103, 160, 232448, 233472},
                                           {"sm_120", 120, 188, 101376, 102400},
                                           {"sm_120a", 120, 188, 101376, 102400},
                                           {"sm_121a", 121, 48, 101376, 102400}}};
  std::string all;
  for (const Limits& x : limits) {
    if (arch == x.arch) {
      Target t;
      t.arch = x.arch;
      t.compute_capability = x.compute_capability;
      t.multiprocessors = x.multiprocessors;
      t.max_shared_bytes = x.max_shared;
      t.shared_bytes_per_sm = x.shared_per_sm;
      return t;
    }
    all += all.empty() ? x.arch : fmt::format(", {}", x.arch);
  }
  return fail(ErrorCode::invalid_argument,
              fmt::format("unknown architecture '{}'; choose one of {}", arch, all));
}

} // namespace kda
