#pragma once
// The key of an entry: named fields, in order. The whole manifest is stored in the entry and compared on
// every hit, so a digest collision or a foreign file is a miss.
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kda::cache {

class KeyManifest {
public:
  KeyManifest() = default;
  /// Takes what text() gave.
  explicit KeyManifest(std::string text) : text_(std::move(text)) {}

  /// `name`: a word, without space or newline; `value`: any bytes.
  void add(std::string_view name, std::string_view value);
  /// Every field as "name length\nvalue\n": ("ab","c") and ("a","bc") differ.
  [[nodiscard]] const std::string& text() const { return text_; }
  /// XXH3-128 of text(), 32 hex digits.
  [[nodiscard]] std::string digest() const;

private:
  std::string text_;
};

struct KeyField {
  std::string_view name, value;
  std::string_view text; ///< all of it: "name length\nvalue\n"
};
/// The fields of a manifest's text; nullopt when it is none.
[[nodiscard]] std::optional<std::vector<KeyField>> key_fields(std::string_view manifest);

/// Fields that say what an entry is for, where a key has them. A pack lists their values, so that a look-up
/// which cannot succeed says why. `kind` comes first: a pack of another kind is none of the look-up's
/// business.
inline constexpr std::array<std::string_view, 5> kLabelFields = {"kind", "arch", "features", "compiler",
                                                                 "generator"};

} // namespace kda::cache
