#include "kda/safetensors.h"
#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fmt/format.h>
#include <fstream>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace kda::safetensors {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

using nlohmann::json;

struct DTypeName {
  DType dtype;
  const char* name;
  std::size_t size;
};
constexpr std::array<DTypeName, 6> kDTypes{{{DType::f64, "F64", 8},
                                            {DType::f32, "F32", 4},
                                            {DType::f16, "F16", 2},
                                            {DType::bf16, "BF16", 2},
                                            {DType::i64, "I64", 8},
                                            {DType::i32, "I32", 4}}};
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000; // the format's own limit

const DTypeName& entry(DType dtype) {
  return *std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeName& d) { return d.dtype == dtype; });
}

tl::unexpected<Error> broken(const std::filesystem::path& path, const std::string& why) {
  return fail(ErrorCode::invalid_argument, fmt::format("{}: {}", path.string(), why));
}

std::string error_text() {
  return std::generic_category().message(errno);
}

/// A tensor's place in the data section.
struct Range {
  std::uint64_t begin, end;
  std::string name;
};

/// The tensor without its bytes, or a sentence (in the error's message) that says what is wrong with it.
Result<Tensor> parse_tensor(const json& header, Range& range) {
  const auto wrong = [](std::string why) { return fail(ErrorCode::invalid_argument, std::move(why)); };
  if (!header.is_object() || !header.contains("dtype") || !header.contains("shape") ||
      !header.contains("data_offsets"))
    return wrong("the header entry lacks dtype, shape or data_offsets");
  Tensor t;
  const json& dtype = header["dtype"];
  const auto* known = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeName& d) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == d.name;
  });
  if (known == kDTypes.end())
    return wrong(
        fmt::format("dtype {} is not supported; F64, F32, F16, BF16, I64 and I32 are", dtype.dump()));
  t.dtype = known->dtype;
  const json& shape = header["shape"];
  if (!shape.is_array()) return wrong("shape is not an array");
  for (const json& extent : shape) {
    if (!extent.is_number_unsigned()) return wrong("shape holds something that is not a whole number >= 0");
    t.shape.push_back(extent.get<std::int64_t>());
  }
  const std::int64_t count = element_count(t.shape);
  if (count < 0) return wrong("shape is too large");
  const json& offsets = header["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned())
    return wrong("data_offsets is not a pair of whole numbers >= 0");
  range.begin = offsets[0].get<std::uint64_t>();
  range.end = offsets[1].get<std::uint64_t>();
  const std::uint64_t bytes = static_cast<std::uint64_t>(count) * known->size;
  if (range.begin > range.end || range.end - range.begin != bytes)
    return wrong(fmt::format("shape and dtype need {} bytes and data_offsets are [{}, {}]", bytes,
                             range.begin, range.end));
  return t;
}

/// Every byte of the data section belongs to exactly one tensor.
Status check_ranges(const std::filesystem::path& path, std::vector<Range> ranges, std::uint64_t data_bytes) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t at = 0;
  for (const Range& r : ranges) {
    if (r.end > data_bytes)
      return broken(path,
                    fmt::format("tensor '{}' ends at byte {} of the data, and the file holds {}: truncated?",
                                r.name, r.end, data_bytes));
    if (r.begin < at) return broken(path, fmt::format("tensor '{}' overlaps another one", r.name));
    if (r.begin > at)
      return broken(path,
                    fmt::format("{} bytes before tensor '{}' belong to no tensor", r.begin - at, r.name));
    at = r.end;
  }
  if (at != data_bytes)
    return broken(path, fmt::format("{} bytes at the end belong to no tensor", data_bytes - at));
  return {};
}

Result<json> read_header(const std::filesystem::path& path, std::ifstream& in, std::uint64_t file_bytes,
                         std::uint64_t& data_begin) {
  std::uint64_t length = 0;
  if (file_bytes < sizeof length || !in.read(reinterpret_cast<char*>(&length), sizeof length))
    return broken(path, "too short for a safetensors file (8 bytes of header length are missing)");
  if (length > kMaxHeaderBytes || length > file_bytes - sizeof length)
    return broken(path, fmt::format("the header length is {} and {} bytes follow: not a safetensors file, or "
                                    "truncated",
                                    length, file_bytes - sizeof length));
  std::string text(length, '\0');
  if (!in.read(text.data(), static_cast<std::streamsize>(length)))
    return broken(path, "cannot read the header");
  data_begin = sizeof length + length;
  json header = json::parse(text, nullptr, false);
  if (!header.is_object()) return broken(path, "the header is not a JSON object");
  return header;
}

std::string header_text(const File& file,
                        const std::vector<const std::pair<const std::string, Tensor>*>& order) {
  json header = json::object();
  if (!file.metadata.empty()) header["__metadata__"] = file.metadata;
  std::uint64_t at = 0;
  for (const auto* item : order) {
    const Tensor& t = item->second;
    header[item->first] = {
        {"dtype", to_string(t.dtype)}, {"shape", t.shape}, {"data_offsets", {at, at + t.data.size()}}};
    at += t.data.size();
  }
  std::string text = header.dump(-1, ' ', false, json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' '); // the data section starts on 8 bytes
  return text;
}

} // namespace

const char* to_string(DType dtype) {
  return entry(dtype).name;
}
std::size_t size_of(DType dtype) {
  return entry(dtype).size;
}
std::int64_t element_count(const std::vector<std::int64_t>& shape) {
  constexpr std::int64_t limit = std::int64_t{1} << 59; // times 8 bytes still fits
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 || (extent > 0 && count > limit / extent)) return -1;
    count *= extent;
  }
  return count;
}

Result<File> read(const std::filesystem::path& path) {
  std::error_code error;
  const std::uint64_t file_bytes = std::filesystem::file_size(path, error);
  if (error) return broken(path, fmt::format("cannot be read: {}", error.message()));
  std::ifstream in(path, std::ios::binary);
  if (!in) return broken(path, fmt::format("cannot be opened: {}", error_text()));
  std::uint64_t data_begin = 0;
  const auto header = read_header(path, in, file_bytes, data_begin);
  if (!header) return tl::unexpected(header.error());

  File file;
  std::vector<Range> ranges;
  for (const auto& [name, value] : header->items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) return broken(path, "__metadata__ is not an object");
      for (const auto& [key, text] : value.items()) {
        if (!text.is_string()) return broken(path, fmt::format("metadata '{}' is not a string", key));
        file.metadata[key] = text.get<std::string>();
      }
      continue;
    }
    Range range{0, 0, name};
    auto tensor = parse_tensor(value, range);
    if (!tensor) return broken(path, fmt::format("tensor '{}': {}", name, tensor.error().message));
    file.tensors[name] = std::move(*tensor);
    ranges.push_back(std::move(range));
  }
  if (const Status ok = check_ranges(path, ranges, file_bytes - data_begin); !ok)
    return tl::unexpected(ok.error());
  for (const Range& r : ranges) {
    std::vector<std::byte>& data = file.tensors[r.name].data;
    data.resize(r.end - r.begin);
    in.seekg(static_cast<std::streamoff>(data_begin + r.begin));
    if (!in.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size())))
      return broken(path, fmt::format("cannot read tensor '{}'", r.name));
  }
  return file;
}

Status write(const std::filesystem::path& path, const File& file) {
  std::vector<const std::pair<const std::string, Tensor>*> order;
  for (const auto& item : file.tensors)
    order.push_back(&item);
  // Widest elements first: every tensor is then aligned to its element without padding, which the format
  // forbids.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return size_of(a->second.dtype) > size_of(b->second.dtype);
  });
  const std::string header = header_text(file, order);
  const std::uint64_t length = header.size();

  const std::filesystem::path temporary = fmt::format("{}.{}.tmp", path.string(), getpid());
  const auto failed = [&](const std::string& why) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    return fail(ErrorCode::io_error, fmt::format("cannot write {}: {}", path.string(), why));
  };
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  if (!out) return failed(error_text());
  out.write(reinterpret_cast<const char*>(&length), sizeof length);
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  for (const auto* item : order)
    out.write(reinterpret_cast<const char*>(item->second.data.data()),
              static_cast<std::streamsize>(item->second.data.size()));
  out.close();
  if (!out) return failed(error_text());
  std::error_code error;
  std::filesystem::rename(temporary, path, error);
  if (error) return failed(error.message());
  return {};
}

} // namespace kda::safetensors
