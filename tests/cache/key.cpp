// The digest depends on every byte of every field, and on where one field ends and the next begins.
#include "cache/key.h"
#include <catch2/catch.hpp>
#include <set>
#include <utility>
#include <vector>

using Fields = std::vector<std::pair<std::string, std::string>>;

static std::string digest(const Fields& fields) {
  kda::cache::KeyManifest key;
  for (const auto& [name, value] : fields)
    key.add(name, value);
  return key.digest();
}

TEST_CASE("changing any field changes the digest", "[key]") {
  const Fields base = {{"source", "__global__ void f() {}"}, {"options", "-arch=sm_90a"}, {"arch", "sm_90a"},
                       {"compiler", "nvrtc 13.0.88"},        {"generator", "1"},          {"kind", "cubin"}};
  std::set<std::string> seen = {digest(base)};
  std::size_t variants = 1;
  const auto differs = [&](const Fields& fields) {
    ++variants;
    return seen.insert(digest(fields)).second;
  };
  for (std::size_t i = 0; i < base.size(); ++i) {
    Fields changed = base;
    changed[i].second += ' ';
    CHECK(differs(changed));
    changed = base;
    changed[i].second.clear();
    CHECK(differs(changed));
    changed = base;
    changed[i].first += 'x';
    CHECK(differs(changed));
    changed = base;
    changed.erase(changed.begin() + static_cast<std::ptrdiff_t>(i));
    CHECK(differs(changed));
    // One bit of one byte, at both ends of the value.
    for (const std::size_t at : {std::size_t{0}, base[i].second.size() - 1}) {
      changed = base;
      changed[i].second[at] = static_cast<char>(changed[i].second[at] ^ 1);
      if (base[i].second.size() > 1 || at == 0) (void)differs(changed);
      CHECK(digest(changed) != digest(base));
    }
  }
  CHECK(digest(base) == *seen.find(digest(base)));
  CHECK(digest(base).size() == 32);
  CHECK(digest({{"arch", "sm_90"}}) != digest({{"arch", "sm_90a"}}));
}

TEST_CASE("where a field ends is part of the key", "[key]") {
  CHECK(digest({{"a", "ab"}, {"b", "c"}}) != digest({{"a", "a"}, {"b", "bc"}}));
  CHECK(digest({{"a", "x\nb y"}}) != digest({{"a", "x"}, {"b", "y"}}));
  CHECK(digest({{"a", "x\nb 1\ny"}}) != digest({{"a", "x"}, {"b", "y"}}));
  CHECK(digest({{"a", ""}, {"b", ""}}) != digest({{"a", ""}}));
  CHECK(digest({{"a", "1"}, {"b", "2"}}) != digest({{"b", "2"}, {"a", "1"}}));
  CHECK(digest({{"a", std::string("x\0y", 3)}}) != digest({{"a", "x"}}));
}
