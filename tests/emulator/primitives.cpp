// The host primitives do what the PTX ones do.
#include "kernel_text.h"
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>

using namespace kda;
using namespace kda::emulator;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Checked or not: the same.
std::vector<float> run(const std::string& body, Run options) {
  const auto result = run_text(body, options);
  if (!result) FAIL(result.error().message << "\n" << result.error().context);
  options.options.checked = true;
  const auto checked = run_text(body, options);
  if (!checked) FAIL(checked.error().message << "\n" << checked.error().context);
  CHECK(std::memcmp(checked->data(), result->data(), result->size() * sizeof(float)) == 0);
  return *result;
}

/// Small multiples of 1/8: exact in bf16, fp16 and tf32.
std::vector<float> eighths(std::size_t count) {
  std::mt19937 random(1);
  std::vector<float> x(count);
  for (float& value : x)
    value = static_cast<float>(static_cast<int>(random() % 33) - 16) / 8;
  return x;
}

/// D[16][8] = A[16][depth] * B[depth][8], in double; `in` holds A, then B.
std::vector<float> product(const std::vector<float>& in, int depth) {
  std::vector<float> d;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < depth; ++k)
        sum += static_cast<double>(in[i * depth + k]) * in[16 * depth + k * 8 + j];
      d.push_back(static_cast<float>(sum));
    }
  return d;
}

/// A and B go to shared memory as 16-bit values, B as [k][n] (transposed load) or [n][k].
std::string mma_16_bit(const std::string& type, bool b_transposed) {
  const std::string place = b_transposed ? "i % 8 + i / 8 * 8" : "i % 8 * 16 + i / 8";
  const std::string rows = b_transposed ? "b + lane % 16 * 8" : "b + lane % 8 * 16 + lane / 8 % 2 * 8";
  return "using T = " + type + R"(;
  T* a = reinterpret_cast<T*>(shared);
  T* b = a + 256;
  for (int i = lane; i < 256; i += 32) a[i] = from_float<T>(in[i]);
  for (int i = lane; i < 128; i += 32) b[)" +
         place + R"(] = from_float<T>(in[256 + i]);
  sync_warp();
  u32 fa[4], fb[4];
  load_matrix_x4(fa, a + lane % 16 * 16 + lane / 16 * 8);
  )" + (b_transposed ? "load_matrix_x4_transposed" : "load_matrix_x4") +
         "(fb, " + rows + R"();
  float d[4] = {0, 0, 0, 0};
  mma_16x8x16<T>(d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];)";
}

Run one_warp(std::vector<float> in, std::size_t outputs, unsigned shared_bytes = 0) {
  Run r;
  r.in = std::move(in);
  r.outputs = outputs;
  r.shared_bytes = shared_bytes;
  return r;
}

} // namespace

TEST_CASE("ldmatrix and mma multiply 16-bit matrices") {
  const std::vector<float> in = eighths(16 * 16 + 16 * 8);
  for (const char* type : {"bf16", "fp16"})
    for (const bool transposed : {false, true})
      CHECK(run(mma_16_bit(type, transposed), one_warp(in, 128, 768)) == product(in, 16));
}

TEST_CASE("mma multiplies tf32 matrices and ignores the low 13 bits") {
  const std::vector<float> in = eighths(16 * 8 + 8 * 8);
  const std::string body = R"(
  const int g = lane / 4, t = lane % 4;
  const auto dirty = [](float x) { return bits_float(float_bits(x) | 0x1fffu); };
  const float a[4] = {dirty(in[g * 8 + t]), dirty(in[(g + 8) * 8 + t]), dirty(in[g * 8 + t + 4]),
                      dirty(in[(g + 8) * 8 + t + 4])};
  float d[4] = {0, 0, 0, 0};
  mma_16x8x8_tf32(d, a, dirty(in[128 + t * 8 + g]), dirty(in[128 + (t + 4) * 8 + g]));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];)";
  CHECK(run(body, one_warp(in, 128)) == product(in, 8));
}

TEST_CASE("ldmatrix gives lane l the elements 2(l%4) and 2(l%4)+1 of row l/4") {
  const std::string body = R"(
  u16* m = reinterpret_cast<u16*>(shared);
  for (int i = lane; i < 256; i += 32) m[i] = static_cast<u16>(i);
  sync_warp();
  u32 r[4], s[4];
  load_matrix_x4(r, m + lane * 8);
  load_matrix_x4_transposed(s, m + lane * 8);
  for (int i = 0; i < 4; ++i) {
    out[lane * 8 + i] = static_cast<float>(r[i] & 0xffff);
    out[lane * 8 + 4 + i] = static_cast<float>(s[i] >> 16);
  })";
  const std::vector<float> out = run(body, one_warp({}, 256, 512));
  const auto element = [](int matrix, int row, int column) { return matrix * 64 + row * 8 + column; };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      CHECK(out[lane * 8 + i] == static_cast<float>(element(i, lane / 4, lane % 4 * 2)));
      CHECK(out[lane * 8 + 4 + i] == static_cast<float>(element(i, lane % 4 * 2 + 1, lane / 4)));
    }
}

TEST_CASE("shuffles move values between lanes; a lane without a partner keeps its own") {
  const std::string body = R"(
  const float x = static_cast<float>(lane);
  out[lane] = shuffle(x, 5);
  out[32 + lane] = shuffle_xor(x, 3);
  out[64 + lane] = shuffle_up(x, 2);
  out[96 + lane] = shuffle_down(x, 2);
  out[128 + lane] = warp_sum(x);)";
  const std::vector<float> out = run(body, one_warp({}, 160));
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == 5);
    CHECK(out[32 + lane] == static_cast<float>(lane ^ 3));
    CHECK(out[64 + lane] == static_cast<float>(lane < 2 ? lane : lane - 2));
    CHECK(out[96 + lane] == static_cast<float>(lane > 29 ? lane : lane + 2));
    CHECK(out[128 + lane] == 496);
  }
}

TEST_CASE("block and named barriers order the warps, for every order of threads") {
  // Warps 0 and 1 hand over to warps 2 and 3 through barrier 3; all meet at the end.
  const std::string body = R"(
  if (warp < 2) {
    shared[thread] = static_cast<float>(thread);
    sync_named(3, 128);
  } else {
    sync_named(3, 128);
    shared[thread] = shared[thread - 64] + 1;
    sync_named(4, 64);
  }
  sync_block();
  out[thread] = shared[127 - thread];)";
  for (const std::uint64_t seed : {0, 1, 2, 3, 4}) {
    Run r = one_warp({}, 128, 512);
    r.threads = 128;
    r.options.seed = seed;
    const std::vector<float> out = run(body, r);
    for (int i = 0; i < 128; ++i)
      CHECK(out[i] == static_cast<float>(i < 64 ? 63 - i + 1 : 127 - i));
  }
}

TEST_CASE("conversions round to nearest even, and to_tf32 ties away from zero") {
  const std::string body = R"(
  if (lane == 0) {
    out[0] = to_float(from_float<bf16>(in[0]));
    out[1] = to_float(from_float<bf16>(in[1]));
    out[2] = to_float(from_float<fp16>(in[2]));
    out[3] = to_float(from_float<fp16>(in[3]));
    out[4] = to_tf32(in[4]);
    const u32 pair = pack2<bf16>(1.f, 2.f);
    out[5] = low_half<bf16>(pair);
    out[6] = high_half<bf16>(pair);
  })";
  const float ulp = std::ldexp(1.F, -7), half = std::ldexp(1.F, -10);
  const std::vector<float> in = {1 + ulp / 2, 1 + ulp * 1.5F, 65520.F, 1 + half / 2, 1 + half / 2};
  CHECK(run(body, one_warp(in, 7)) == std::vector<float>{1, 1 + 2 * ulp, kInfinity, 1, 1 + half, 1, 2});
}

TEST_CASE("fast functions flush denormals and know infinities") {
  const std::string body = R"(
  if (lane == 0) {
    out[0] = exp2_fast(in[0]);
    out[1] = exp2_fast(-127.f);
    out[2] = exp2_fast(3.f);
    out[3] = log2_fast(in[1]);
    out[4] = log2_fast(8.f);
    out[5] = rcp_fast(in[1]);
    out[6] = rsqrt_fast(4.f);
    out[7] = rsqrt_fast(0.f);
  })";
  CHECK(run(body, one_warp({-kInfinity, 1e-40F}, 8)) ==
        std::vector<float>{0, 0, 8, -kInfinity, 3, kInfinity, 0.5F, kInfinity});
}

TEST_CASE("cp.async copies 8 and 16 bytes and fills with zeros, early and late") {
  const std::string body = R"(
  copy_async_16(shared + 4 * lane, in + 4 * lane, lane != 7);
  commit_copies();
  copy_async_8(shared + 128 + 2 * lane, in + 2 * lane);
  commit_copies();
  wait_copies<1>();
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = shared[4 * lane + i];
  wait_copies<0>();
  for (int i = 0; i < 2; ++i) out[128 + 2 * lane + i] = shared[128 + 2 * lane + i];)";
  const std::vector<float> in = eighths(128);
  for (const Copies copies : {Copies::late, Copies::early}) {
    Run r = one_warp(in, 192, 768);
    r.options.copies = copies;
    const std::vector<float> out = run(body, r);
    for (int i = 0; i < 128; ++i)
      CHECK(out[i] == (i / 4 == 7 ? 0 : in[i]));
    for (int i = 0; i < 64; ++i)
      CHECK(out[128 + i] == in[i]);
  }
}

TEST_CASE("a grid runs every CTA once, on two threads") {
  Run r = one_warp({}, 100);
  r.grid = 100;
  const std::vector<float> out =
      run("if (lane == 0) out[block_index_x()] = static_cast<float>(block_index_x() + grid_size_x());", r);
  for (int i = 0; i < 100; ++i)
    CHECK(out[i] == static_cast<float>(100 + i));
}
