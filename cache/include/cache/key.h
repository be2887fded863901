#pragma once
// The key of an entry: named fields, in order. The whole manifest is stored in the entry and compared on
// every hit, so a digest collision or a foreign file is a miss.
#include <string>
#include <string_view>

namespace kda::cache {

class KeyManifest {
public:
  /// `name`: a word, without space or newline; `value`: any bytes.
  void add(std::string_view name, std::string_view value);
  /// Every field as "name length\nvalue\n": ("ab","c") and ("a","bc") differ.
  [[nodiscard]] const std::string& text() const { return text_; }
  /// XXH3-128 of text(), 32 hex digits.
  [[nodiscard]] std::string digest() const;

private:
  std::string text_;
};

} // namespace kda::cache
