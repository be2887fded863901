// The file format: what was encoded comes back, and any damage is an error, never an entry.
#include "entry.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <xxhash.h>

using namespace kda::cache;

static const std::string kManifest = test::key_of("source text").text();
static Entry sample() {
  std::string payload(5000, '\0');
  for (std::size_t i = 0; i < payload.size(); ++i)
    payload[i] = static_cast<char>(i * 131 >> 3);
  return {payload, {{"registers", "168"}, {"log", "a\nb"}, {"", ""}}};
}

TEST_CASE("an entry comes back as it was written", "[entry]") {
  const auto file = decode(encode(kManifest, sample()));
  REQUIRE(file);
  CHECK(file->manifest == kManifest);
  CHECK(file->entry.payload == sample().payload);
  CHECK(file->entry.metadata == sample().metadata);
  const auto empty = decode(encode("", {}));
  REQUIRE(empty);
  CHECK(empty->entry.payload.empty());
  CHECK(empty->entry.metadata.empty());
}

TEST_CASE("the bytes of the format are fixed", "[entry]") {
  // A change here is a change of the format: raise kFormatVersion.
  const std::string bytes = encode("k 1\nv\n", {"image", {{"n", "v"}}});
  const std::string expected("KDAJIT\r\n"
                             "\x01\0\0\0"
                             "\x55\0\0\0\0\0\0\0"
                             "\x06\0\0\0\0\0\0\0k 1\nv\n"
                             "\x01\0\0\0"
                             "\x01\0\0\0\0\0\0\0n"
                             "\x01\0\0\0\0\0\0\0v"
                             "\x05\0\0\0\0\0\0\0image",
                             8 + 4 + 8 + 14 + 4 + 9 + 9 + 13);
  REQUIRE(bytes.size() == expected.size() + 16);
  CHECK(bytes.substr(0, expected.size()) == expected);
}

TEST_CASE("a file cut short at any length is refused", "[entry]") {
  const std::string bytes = encode(kManifest, sample());
  for (std::size_t length = 0; length < bytes.size(); ++length)
    if (decode(bytes.substr(0, length))) FAIL("accepted at length " << length);
  CHECK_FALSE(decode(bytes + '\0'));
  CHECK_FALSE(decode(bytes + bytes));
}

TEST_CASE("one flipped bit anywhere is refused", "[entry]") {
  const std::string bytes = encode(kManifest, sample());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string flipped = bytes;
    flipped[i] = static_cast<char>(flipped[i] ^ (1 << (i % 8)));
    if (decode(flipped)) FAIL("accepted with a flipped bit at " << i);
  }
}

TEST_CASE("a valid checksum over nonsense lengths is refused", "[entry]") {
  // A writer with a fault of its own, not a damaged disk: every length is bounded by the file.
  std::string bytes = encode(kManifest, sample());
  const std::string huge(8, '\xff');
  for (const std::size_t at : {std::size_t{20}, bytes.size() - 16 - 5000 - 8}) {
    std::string body = bytes.substr(0, bytes.size() - 16);
    body.replace(at, 8, huge);
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(body.data(), body.size()));
    body.append(reinterpret_cast<const char*>(sum.digest), sizeof sum);
    const auto file = decode(body);
    REQUIRE_FALSE(file);
    CHECK(file.error() == "fields do not fill the file");
  }
}
