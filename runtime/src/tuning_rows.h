#pragma once
// The rows that count today, and what plans make of them.
#include "engine_impl.h"

namespace kda {

[[nodiscard]] cache::TuningRow to_stored(const TuneReport& head, const TuneRow&);
[[nodiscard]] TuneRow from_stored(const cache::TuningRow&);

/// What rows of a device are compared with. `driver` and `compiler` made and ran the machine code.
[[nodiscard]] TuneReport report_head(const Engine::Impl&, const Backend&, const Problem&, const Sizes&);

/// The rows of a head, by variant. They count where their image is the one that the generator makes today.
[[nodiscard]] std::map<std::string, TuneRow> rows_of(const Engine::Impl&, const TuneReport& head);

/// The tuned row, or the pin, of a plan; absent when there is none that counts. `note` says what did not
/// count.
struct TunedChoice {
  std::optional<Variant> variant;
  std::string note;
};
[[nodiscard]] TunedChoice tuned_choice(const Engine::Impl&, const Backend&, const Problem&, const Sizes&);
/// The fastest measured variant whose workspace is at most `max_workspace` bytes; absent when there is none.
[[nodiscard]] std::optional<Variant> tuned_within(const Engine::Impl&, const Backend&, const Problem&,
                                                  const Sizes&, std::size_t max_workspace);
/// invalid_argument when a pin names what cannot run.
[[nodiscard]] Result<TunedChoice> pinned_choice(const Engine::Impl&, const Backend&, const Problem&,
                                                const Sizes&);

/// Why a variant cannot run a problem; empty when it can.
[[nodiscard]] std::string misfit(const Problem&, const Target&, const Variant&);

} // namespace kda
