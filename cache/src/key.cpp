#include "cache/key.h"
#include "hash.h"
#include <charconv>

namespace kda::cache {

void KeyManifest::add(std::string_view name, std::string_view value) {
  text_ += fmt::format("{} {}\n{}\n", name, value.size(), value);
}

std::string KeyManifest::digest() const {
  return hex_digest(text_);
}

std::optional<std::vector<KeyField>> key_fields(std::string_view rest) {
  std::vector<KeyField> fields;
  while (!rest.empty()) {
    const std::size_t line = rest.find('\n'), space = rest.substr(0, line).rfind(' ');
    if (line == std::string_view::npos || space == std::string_view::npos) return std::nullopt;
    std::size_t size = 0;
    const auto [end, error] = std::from_chars(rest.data() + space + 1, rest.data() + line, size);
    const std::size_t after = rest.size() - line - 1; // value and its newline
    if (error != std::errc() || end != rest.data() + line || size >= after) return std::nullopt;
    const std::string_view text = rest.substr(0, line + 1 + size + 1);
    fields.push_back({rest.substr(0, space), rest.substr(line + 1, size), text});
    if (text.back() != '\n') return std::nullopt;
    rest.remove_prefix(text.size());
  }
  return fields;
}

} // namespace kda::cache
