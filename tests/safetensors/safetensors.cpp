// What a file looks like, what survives a round trip, and every kind of damage with its error.
#include "kda/safetensors.h"
#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <unistd.h>

using namespace kda;
namespace fs = std::filesystem;

namespace {

/// A directory of its own, removed at the end.
struct Scratch {
  fs::path path = fs::temp_directory_path() / ("kda_safetensors_" + std::to_string(getpid()));
  Scratch() { fs::create_directories(path); }
  ~Scratch() { fs::remove_all(path); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

void put(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}
std::string get(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
/// Header length, header, `data` zero bytes.
std::string file_of(const std::string& header, std::size_t data) {
  std::uint64_t length = header.size();
  std::string out(sizeof length, '\0');
  std::memcpy(out.data(), &length, sizeof length);
  return out + header + std::string(data, '\0');
}

safetensors::Tensor tensor(safetensors::DType dtype, std::vector<std::int64_t> shape) {
  const auto bytes =
      static_cast<std::size_t>(safetensors::element_count(shape)) * safetensors::size_of(dtype);
  safetensors::Tensor t{dtype, std::move(shape), std::vector<std::byte>(bytes)};
  for (std::size_t i = 0; i < bytes; ++i)
    t.data[i] = static_cast<std::byte>(i * 7 + 1);
  return t;
}

} // namespace

TEST_CASE("a file is a length, a JSON header and the bytes; each tensor is aligned to its element") {
  const Scratch scratch;
  safetensors::File file;
  file.metadata["gate"] = "bounded";
  file.tensors["a"] = tensor(safetensors::DType::bf16, {3});
  file.tensors["b"] = tensor(safetensors::DType::i64, {1});
  REQUIRE(safetensors::write(scratch.path / "x", file).has_value());
  const std::string bytes = get(scratch.path / "x");
  const std::string header =
      R"({"__metadata__":{"gate":"bounded"},"a":{"data_offsets":[8,14],"dtype":"BF16","shape":[3]},)"
      R"("b":{"data_offsets":[0,8],"dtype":"I64","shape":[1]}})";
  CHECK(bytes.substr(8, header.size()) == header);
  CHECK((bytes.size() - 14) % 8 == 0);
}

TEST_CASE("every dtype, scalars and empty tensors survive a round trip") {
  const Scratch scratch;
  using safetensors::DType;
  safetensors::File file;
  for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16, DType::i64, DType::i32})
    file.tensors[safetensors::to_string(dtype)] = tensor(dtype, {2, 3});
  file.tensors["scalar"] = tensor(DType::f32, {});
  file.tensors["empty"] = tensor(DType::f32, {0, 5});
  file.metadata["name"] = "round \"trip\"";
  REQUIRE(safetensors::write(scratch.path / "x", file).has_value());
  const auto back = safetensors::read(scratch.path / "x");
  REQUIRE(back.has_value());
  CHECK(back->metadata == file.metadata);
  REQUIRE(back->tensors.size() == file.tensors.size());
  for (const auto& [name, t] : file.tensors) {
    INFO(name);
    CHECK(back->tensors.at(name).dtype == t.dtype);
    CHECK(back->tensors.at(name).shape == t.shape);
    CHECK(back->tensors.at(name).data == t.data);
  }
}

TEST_CASE("each kind of damage is refused with its own sentence") {
  const Scratch scratch;
  const fs::path path = scratch.path / "broken.safetensors";
  const auto refused = [&](const std::string& bytes, const char* word) {
    INFO(word);
    put(path, bytes);
    const auto file = safetensors::read(path);
    REQUIRE_FALSE(file.has_value());
    CHECK(file.error().code == ErrorCode::invalid_argument);
    CHECK_THAT(file.error().message, Catch::Matchers::Contains(word));
    CHECK_THAT(file.error().message, Catch::Matchers::Contains("broken.safetensors"));
  };
  const auto a = [](const std::string& fields) { return R"({"a":{)" + fields + "}}"; };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  put(path, file_of(a(good), 8));
  REQUIRE(safetensors::read(path).has_value());

  refused("", "too short");
  refused("1234567", "too short");
  refused("PK\x03\x04 is a zip file, not tensors", "header length");
  refused(file_of(a(good), 8).substr(0, 20), "header length");
  refused(file_of("not json", 0), "not a JSON object");
  refused(file_of("[1,2]", 0), "not a JSON object");
  refused(file_of(R"({"__metadata__":7})", 0), "__metadata__");
  refused(file_of(R"({"__metadata__":{"scale":1}})", 0), "metadata 'scale'");
  refused(file_of(a(R"("dtype":"F32","shape":[2])"), 8), "lacks");
  refused(file_of(R"({"a":1})", 8), "lacks");
  refused(file_of(a(R"("dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2])"), 2), "F8_E4M3");
  refused(file_of(a(R"("dtype":5,"shape":[2],"data_offsets":[0,8])"), 8), "dtype 5");
  refused(file_of(a(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), 8), "not an array");
  refused(file_of(a(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8), "whole number");
  refused(file_of(a(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,8])"), 8), "whole number");
  refused(file_of(a(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), 8),
          "too large");
  refused(file_of(a(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), 8), "data_offsets");
  refused(file_of(a(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])"), 8), "data_offsets");
  refused(file_of(a(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8), "need 8 bytes");
  refused(file_of(a(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8), "need 12 bytes");
  refused(file_of(a(good), 7), "truncated");
  refused(file_of(a(good), 9), "1 bytes at the end");
  refused(file_of(a(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])"), 12), "4 bytes before");
  const std::string b = R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})";
  refused(file_of(R"({"a":{)" + good + "}" + b, 12), "overlaps");
  fs::remove(path);
  CHECK_THAT(safetensors::read(path).error().message, Catch::Matchers::Contains("No such file"));
  CHECK_FALSE(safetensors::read(scratch.path).has_value());
}

TEST_CASE("a failed write leaves the old file and nothing else") {
  const Scratch scratch;
  safetensors::File file;
  file.tensors["a"] = tensor(safetensors::DType::f32, {2});
  CHECK(safetensors::write(scratch.path / "no" / "such" / "folder", file).error().code ==
        ErrorCode::io_error);
  fs::create_directories(scratch.path / "taken" / "full"); // a folder cannot be replaced by a file
  CHECK(safetensors::write(scratch.path / "taken", file).error().code == ErrorCode::io_error);
  CHECK(std::distance(fs::directory_iterator(scratch.path), fs::directory_iterator()) == 1);
  CHECK(fs::is_directory(scratch.path / "taken" / "full"));
}
