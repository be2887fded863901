#pragma once
// What the tests of the two chunk kernels share: the options that pairwise rows index, and the golden files.
#include "codegen/variant.h"
#include "random_case.h"
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fmt/format.h>
#include <set>

namespace kda::test::chunk {

inline Variant variant(const std::string& text) {
  return parse_variant(text).value();
}

/// Why the enumerator rejects the variant; empty when it does not.
inline std::string rejection(const Problem& p, const Variant& v, const char* arch = "sm_90a") {
  for (const Candidate& c : enumerate(p, cuda_target(arch).value()))
    if (c.variant == v) return c.rejected;
  return "not enumerated";
}

/// Two variants or more for the problem of a golden file: those of `preferred` that take it, and others of
/// the enumerator where they are not enough. Says which.
inline std::vector<Variant> golden_variants(const std::string& name, const Problem& p,
                                            std::initializer_list<const char*> preferred) {
  std::vector<Variant> all;
  std::string said;
  const auto add = [&](const Variant& v) {
    if (std::find(all.begin(), all.end(), v) != all.end()) return;
    all.push_back(v);
    said += (said.empty() ? "" : ", ") + to_string(v);
  };
  for (const char* text : preferred)
    if (rejection(p, variant(text)).empty()) add(variant(text));
  for (const Candidate& c : enumerate(p, cuda_target("sm_90a").value()))
    if (all.size() < 2 && c.rejected.empty()) add(c.variant);
  fmt::print("{} {}: {}\n", to_string(p.operation), name, said);
  REQUIRE(all.size() >= 2);
  return all;
}

// One array an option.
inline constexpr std::array<std::array<int, 2>, 4> kDims{{{64, 64}, {60, 100}, {48, 32}, {96, 60}}};
inline constexpr std::array kTypes{DType::bf16, DType::fp16};
inline constexpr std::array kAllTypes{DType::fp32, DType::bf16, DType::fp16};
enum Shape { fixed, packed_int32, packed_int64, shapes };
/// Columns as in option_matrix.h; the last indexes four variants.
inline const std::vector<int> kOptionSizes{4, 2, 3, 3, 3, 2, 5, 2, 3, 2, 3, shapes, 2, 2, 2, 4, 4};

inline void set_shape(CaseOptions& o, Shape shape) {
  o.batch = 2;
  o.tokens = 83; // neither a whole number of tiles nor of chunks
  if (shape == fixed) return;
  o.batch = 1;
  o.problem.varlen = true;
  o.problem.cu_seqlens_type = shape == packed_int32 ? IndexType::int32 : IndexType::int64;
  o.lengths = {0, 64, 1, 0, 0, 71, 17};
  o.padding = shape == packed_int32 ? 7 : 0;
}

/// Dims, dtypes and shape of a row.
inline void set_dims(CaseOptions& o, const std::vector<int>& row) {
  const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
  Problem& p = o.problem;
  p.key_dim = kDims[at(0)][0];
  p.value_dim = kDims[at(0)][1];
  p.dtype = kTypes[at(1)];
  p.gate_dtype = kAllTypes[at(2)];
  p.beta_dtype = kAllTypes[at(3)];
  p.state_dtype = kAllTypes[at(4)];
  set_shape(o, static_cast<Shape>(row[11]));
}

/// None, said aloud, where they are not.
inline std::set<std::filesystem::path> golden_files() {
  std::set<std::filesystem::path> files;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(KDA_JIT_GOLDEN_DIR, missing))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path());
  if (files.empty())
    WARN("SKIPPED: no golden files in " KDA_JIT_GOLDEN_DIR "; set the CMake variable KDA_JIT_GOLDEN_DIR");
  return files;
}

} // namespace kda::test::chunk
