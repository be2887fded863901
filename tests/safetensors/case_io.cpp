// From a file's tensors and metadata to a problem: what is read, what is refused, and how numbers are packed.
#include "kda/case_io.h"
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>

using namespace kda;
using Stored = safetensors::DType;

namespace {

void add(safetensors::File& file, const char* name, Stored dtype, std::vector<std::int64_t> shape) {
  const auto count = static_cast<std::size_t>(safetensors::element_count(shape));
  file.tensors[name] = {dtype, std::move(shape), std::vector<std::byte>(count * safetensors::size_of(dtype))};
}
void set_cu_seqlens(safetensors::File& file, const std::vector<std::int64_t>& cu) {
  add(file, "cu_seqlens", Stored::i64, {static_cast<std::int64_t>(cu.size())});
  std::memcpy(file.tensors["cu_seqlens"].data.data(), cu.data(), cu.size() * sizeof cu[0]);
}

/// T=8, H=2, HV=4, K=32, V=16, two packed sequences, a softplus gate.
safetensors::File good_file() {
  safetensors::File file;
  add(file, "q", Stored::bf16, {8, 2, 32});
  add(file, "k", Stored::bf16, {8, 2, 32});
  add(file, "v", Stored::bf16, {8, 4, 16});
  add(file, "g", Stored::f32, {8, 4, 32});
  add(file, "beta", Stored::f16, {8, 4});
  add(file, "A_log", Stored::f32, {4});
  add(file, "dt_bias", Stored::f32, {4, 32});
  add(file, "initial_state", Stored::f32, {2, 4, 32, 16});
  set_cu_seqlens(file, {0, 3, 8});
  file.metadata = {{"gate", "softplus"},         {"qk_l2norm", "True"}, {"beta_sigmoid", "True"},
                   {"allow_neg_eigval", "True"}, {"scale", "0.5"},      {"name", "good"}};
  return file;
}

} // namespace

TEST_CASE("tensors and metadata make a problem") {
  const auto c = make_case(good_file());
  REQUIRE(c.has_value());
  CHECK(to_string(c->problem) ==
        "forward H=2 HV=4 K=32 V=16 bf16 gate=softplus/fp32 beta=sigmoid2/fp16 state=fp32/k_v dt_bias l2norm "
        "varlen/int64");
  CHECK(c->sizes.tokens == 8);
  CHECK(c->sizes.sequences == 2);
  CHECK(c->scale == 0.5);
  CHECK(c->cu_seqlens == std::vector<std::int64_t>{0, 3, 8});
}

TEST_CASE("a batch, a transposed bf16 state, a bounded gate without A_log") {
  safetensors::File file = good_file();
  file.tensors.erase("cu_seqlens");
  file.tensors.erase("A_log");
  for (const char* name : {"q", "k", "v", "g", "beta", "cu_seqlens"})
    if (auto it = file.tensors.find(name); it != file.tensors.end())
      it->second.shape.insert(it->second.shape.begin(), 2), it->second.shape[1] = 4;
  add(file, "initial_state", Stored::bf16, {2, 4, 16, 32});
  file.metadata["state_layout"] = "VK";
  file.metadata["gate"] = "bounded";
  file.metadata["has_A_log"] = "False";
  const auto c = make_case(file);
  REQUIRE(c.has_value());
  CHECK(c->problem.gate == GateKind::bounded_no_a);
  CHECK(c->problem.state_layout == StateLayout::v_k);
  CHECK(c->problem.state_dtype == DType::bf16);
  CHECK(c->sizes.batch == 2);
  CHECK(c->sizes.tokens == 4);
}

TEST_CASE("what does not fit together is refused by name") {
  const auto refused = [](auto change, const char* word) {
    INFO(word);
    safetensors::File file = good_file();
    change(file);
    const auto c = make_case(std::move(file));
    REQUIRE_FALSE(c.has_value());
    CHECK(c.error().code == ErrorCode::invalid_argument);
    CHECK_THAT(c.error().message, Catch::Matchers::Contains(word));
  };
  using File = safetensors::File;
  refused([](File& f) { f.tensors.erase("q"); }, "tensor q is missing");
  refused([](File& f) { f.tensors.erase("beta"); }, "tensor beta is missing");
  refused([](File& f) { f.tensors.erase("A_log"); }, "tensor A_log is missing");
  refused([](File& f) { add(f, "q", Stored::i64, {8, 2, 32}); }, "I64");
  refused([](File& f) { add(f, "v", Stored::f16, {8, 4, 16}); }, "must agree");
  refused([](File& f) { add(f, "A_log", Stored::bf16, {4}); }, "A_log has dtype BF16");
  refused([](File& f) { add(f, "k", Stored::bf16, {8, 2, 16}); }, "tensor k has shape [8,2,16]");
  refused([](File& f) { add(f, "v", Stored::bf16, {7, 4, 16}); }, "tensor v");
  refused([](File& f) { add(f, "g", Stored::f32, {8, 2, 32}); }, "[8,4,32] is expected");
  refused([](File& f) { add(f, "q", Stored::bf16, {32}); }, "[T,H,K]");
  refused([](File& f) { add(f, "dt_bias", Stored::f32, {4, 16}); }, "dt_bias");
  refused([](File& f) { add(f, "initial_state", Stored::f32, {2, 4, 16, 32}); }, "initial_state");
  refused([](File& f) { set_cu_seqlens(f, {0, 5, 3}); }, "never decrease");
  refused([](File& f) { set_cu_seqlens(f, {1, 3, 8}); }, "start at 0");
  refused([](File& f) { set_cu_seqlens(f, {0, 3, 9}); }, "T = 8");
  refused([](File& f) { add(f, "cu_seqlens", Stored::f32, {3}); }, "cu_seqlens has dtype F32");
  refused([](File& f) { f.metadata.erase("gate"); }, "has no gate");
  refused([](File& f) { f.metadata["gate"] = "linear"; }, "unknown gate 'linear'");
  refused([](File& f) { f.metadata["qk_l2norm"] = "perhaps"; }, "perhaps");
  refused([](File& f) { f.metadata["scale"] = "big"; }, "not a number");
  refused([](File& f) { f.metadata["state_layout"] = "KK"; }, "KV or VK");
  refused([](File& f) { f.metadata["beta_sigmoid"] = "False"; }, "beta_times_two");
  refused([](File& f) { f.metadata["gate"] = "precomputed"; }, "dt_bias goes with");
}

TEST_CASE("16-bit floats: every value decodes and encodes to itself") {
  for (const auto& [narrow, name] : {std::pair{DType::bf16, Stored::bf16}, {DType::fp16, Stored::f16}}) {
    std::vector<std::byte> all(2 * 65536);
    for (unsigned i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      std::memcpy(&all[2 * i], &bits, 2);
    }
    const reference::Array decoded = unpack(all, name);
    const std::vector<std::byte> encoded = pack(decoded, narrow);
    int different = 0;
    for (std::size_t i = 0; i < decoded.size(); ++i)
      if (!std::isnan(decoded[i])) different += std::memcmp(&all[2 * i], &encoded[2 * i], 2) == 0 ? 0 : 1;
    CHECK(different == 0);
  }
}

TEST_CASE("16-bit floats round to nearest even, once, and overflow to infinity") {
  const auto through = [](double x, DType dtype) { return unpack(pack({x}, dtype), file_dtype(dtype))[0]; };
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(through(1 + 1.0 / 256, DType::bf16) == 1);                     // a tie, down to even
  CHECK(through(1 + 3.0 / 256, DType::bf16) == 1 + 2.0 / 128);         // a tie, up to even
  CHECK(through(1 + 1.0 / 256 + 1e-12, DType::bf16) == 1 + 1.0 / 128); // fp32 would make it a tie
  CHECK(through(1.999, DType::bf16) == 2);                             // the carry reaches the exponent
  CHECK(through(65504, DType::fp16) == 65504);
  CHECK(through(65519, DType::fp16) == 65504);
  CHECK(through(65520, DType::fp16) == inf);
  CHECK(through(-1e300, DType::bf16) == -inf);
  CHECK(through(std::ldexp(1.0, -24), DType::fp16) == std::ldexp(1.0, -24)); // the least subnormal
  CHECK(through(std::ldexp(1.0, -26), DType::fp16) == 0);
  CHECK(std::isnan(through(std::nan(""), DType::fp16)));
  CHECK(std::signbit(through(-0.0, DType::bf16)));
}

TEST_CASE("transposed swaps the inner matrix of every state") {
  const reference::Array x = {1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50, 60};
  CHECK(transposed(x, 2, 3) == reference::Array{1, 4, 2, 5, 3, 6, 10, 40, 20, 50, 30, 60});
  CHECK(transposed(transposed(x, 2, 3), 3, 2) == x);
}
