// TMA, mbarrier, wgmma, matrix and vote primitives: right in every mode and order, and with a planted fault
// each.
#include "kernel_text.h"
#include "nvrtc.h"
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <fmt/format.h>

using namespace kda;
using namespace kda::emulator;
using Catch::Matchers::Contains;

namespace {

/// Value i of A and B: small, exact in every type.
float element(int i) {
  return static_cast<float>(i * 37 % 17 - 8) / 8;
}

/// `rows` rows of `depth` bf16 values, two in a float's bits.
std::vector<float> as_bf16(std::size_t count) {
  std::vector<float> packed(count / 2);
  for (std::size_t i = 0; i < count; ++i) {
    const float x = element(static_cast<int>(i));
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, 4);
    const auto half = static_cast<std::uint16_t>(bits >> 16);
    std::memcpy(reinterpret_cast<unsigned char*>(packed.data()) + 2 * i, &half, 2);
  }
  return packed;
}

TensorMapFields rows_map(unsigned rows, unsigned depth, unsigned box_rows, int swizzle) {
  TensorMapFields map{};
  map.size[0] = map.box[0] = depth;
  map.size[1] = rows;
  map.box[1] = box_rows;
  map.stride[0] = depth * 2;
  map.dimensions = 2;
  map.element_bytes = 2;
  map.swizzle_bytes = swizzle;
  map.mark = kTensorMapMark;
  return map;
}

/// in: A [64][depth], then B [64][depth]; out = A B^T [64][64]. `rows` of the map may leave a tail.
std::string tma_wgmma(int depth, const std::string& swizzle) {
  const std::string span = std::to_string(depth * 2), tile = std::to_string(depth * 128);
  std::string issue;
  for (int k = 0; k < depth; k += 16) {
    issue += fmt::format("wgmma<bf16, 64>(d, matrix_descriptor(bytes + {0}, Swizzle::{2}, 8 * {3}), "
                         "matrix_descriptor(bytes + {1} + {0}, Swizzle::{2}, 8 * {3}));\n",
                         2 * k, tile, swizzle, span);
  }
  return R"(
  unsigned char* bytes = reinterpret_cast<unsigned char*>(shared);
  u64* full = reinterpret_cast<u64*>(bytes + 2 * )" +
         tile + R"();
  if (thread == 0) { mbarrier_init(full, 1); fence_mbarrier_init(); }
  sync_block();
  if (warp == 4) {
    if (lane == 0) {
      mbarrier_expect_arrive(full, 2 * )" +
         tile + R"();
      tensor_load(bytes, map, full, 0, 0);
      tensor_load(bytes + )" +
         tile + R"(, map, full, 0, 64);
    }
    return;
  }
  mbarrier_wait(full, 0);
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = 0.f;
  wgmma_fence();
  )" + issue +
         R"(wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i)
    out[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];)";
}

Run tma_run(int depth, unsigned rows = 128) {
  Run r;
  r.threads = 160;
  r.shared_bytes = static_cast<unsigned>(depth) * 256 + 64;
  r.in = as_bf16(static_cast<std::size_t>(rows) * static_cast<std::size_t>(depth));
  r.outputs = 64 * 64;
  r.map = rows_map(rows, static_cast<unsigned>(depth), 64, 2 * depth);
  return r;
}

/// Rows of B from `rows` on are zero.
bool is_product(const std::vector<float>& out, int depth, int rows = 128) {
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) {
      float sum = 0;
      for (int k = 0; k < depth && 64 + j < rows; ++k)
        sum += element(i * depth + k) * element((64 + j) * depth + k);
      if (!(out[i * 64 + j] == sum)) return false;
    }
  return true;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::vector<float> run_or_fail(const std::string& body, const Run& run) {
  const auto out = run_text(body, run);
  if (!out) FAIL(out.error().message << "\n" << out.error().context);
  return *out;
}

/// Checked or not: the same.
std::vector<float> good(const std::string& body, Run run) {
  const std::vector<float> out = run_or_fail(body, run);
  run.options.checked = true;
  CHECK(run_or_fail(body, run) == out);
  return out;
}

} // namespace

TEST_CASE("TMA boxes of every swizzle feed wgmma, early and late, in every order of threads") {
  const std::pair<int, const char*> layouts[] = {{64, "b128"}, {32, "b64"}, {16, "b32"}};
  for (const auto& [depth, swizzle] : layouts)
    for (const Copies copies : {Copies::late, Copies::early})
      for (const std::uint64_t seed : {0, 1, 2, 3}) {
        Run r = tma_run(depth);
        r.options.copies = copies;
        r.options.seed = seed;
        CHECK(is_product(good(tma_wgmma(depth, swizzle), r), depth));
      }
}

TEST_CASE("rows outside of a tensor arrive as zeros and count") {
  CHECK(is_product(good(tma_wgmma(64, "b128"), tma_run(64, 100)), 64, 100));
}

TEST_CASE("a wrong parity, swizzle, byte count or a missing wgmma_wait does not go unseen") {
  const std::string body = tma_wgmma(64, "b128");
  const Run r = tma_run(64);
  const auto fails = [&](const std::string& planted) {
    const auto out = run_text(planted, r);
    return !out || !is_product(*out, 64);
  };
  CHECK_FALSE(fails(body));
  CHECK(fails(replaced(body, "mbarrier_wait(full, 0)", "mbarrier_wait(full, 1)")));
  CHECK(fails(replaced(body, "Swizzle::b128", "Swizzle::b64")));
  CHECK(fails(replaced(body, "wgmma_wait<0>();", "")));
  CHECK(fails(replaced(body, "wgmma_wait<0>();", "wgmma_wait<1>();")));
  const auto stuck = run_text(
      replaced(body, "mbarrier_expect_arrive(full, 2 * 8192)", "mbarrier_expect_arrive(full, 24576)"), r);
  REQUIRE_FALSE(stuck);
  CHECK_THAT(stuck.error().message, Contains("waits in mbarrier_wait at test.cu:"));
}

TEST_CASE("wgmma takes A from registers and B transposed") {
  // A = 64x16 in registers; B [16 k][64 n] as loaded, 128-byte rows.
  const std::string body = R"(
  unsigned char* bytes = reinterpret_cast<unsigned char*>(shared);
  u64* full = reinterpret_cast<u64*>(bytes + 2048);
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_expect_arrive(full, 2048);
    tensor_load(bytes, map, full, 0, 0);
  }
  sync_block();
  mbarrier_wait(full, 0);
  const int g = warp * 16 + lane / 4, t = lane % 4;
  u32 a[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
    a[i] = pack2<bf16>(static_cast<float>(row % 5 + k), static_cast<float>(row % 5 + k + 1));
  }
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = 1.f;
  wgmma_fence();
  wgmma<bf16, 64, true, true>(d, a, matrix_descriptor(bytes, Swizzle::b128, 1024));
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[(g + i / 2 % 2 * 8) * 64 + i / 4 * 8 + t * 2 + i % 2] = d[i];)";
  Run r;
  r.threads = 128;
  r.shared_bytes = 2112;
  r.in = as_bf16(16 * 64);
  r.outputs = 64 * 64;
  r.map = rows_map(16, 64, 16, 128);
  const std::vector<float> out = good(body, r);
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) {
      float sum = 1;
      for (int k = 0; k < 16; ++k)
        sum -= static_cast<float>(i % 5 + k) * element(k * 64 + j);
      CHECK(out[i * 64 + j] == sum);
    }
}

TEST_CASE("an mbarrier counts copies that have come") {
  const std::string body = R"(
  u64* full = reinterpret_cast<u64*>(shared + 128);
  if (thread == 0) { mbarrier_init(full, 32); fence_mbarrier_init(); }
  sync_block();
  if (thread < 32) {
    copy_async_16(shared + 4 * thread, in + 4 * thread);
    arrive_copies(full);
  }
  mbarrier_wait(full, 0);
  out[thread] = shared[127 - thread];
)";
  Run r;
  r.threads = 128;
  r.shared_bytes = 640;
  r.in.resize(128);
  for (std::size_t i = 0; i < 128; ++i)
    r.in[i] = static_cast<float>(i);
  r.outputs = 128;
  CHECK(good(body, r) == std::vector<float>(r.in.rbegin(), r.in.rend()));
  CHECK(std::isnan(run_or_fail(replaced(body, "mbarrier_wait(full, 0);", ""), r).at(9)));
  const auto stuck = run_text(replaced(body, "full, 32", "full, 33"), r);
  REQUIRE_FALSE(stuck);
  CHECK_THAT(stuck.error().message, Contains("waits in mbarrier_wait"));
  r.options.checked = true;
  const auto race =
      run_text(replaced(body, "mbarrier_wait(full, 0);", "if (thread >= 64) mbarrier_wait(full, 0);"), r);
  REQUIRE_FALSE(race);
  CHECK_THAT(race.error().message, Contains("race: ") || Contains("uninitialised: "));
}

TEST_CASE("bulk copies go to shared memory and back; a store that nobody waits for does not arrive") {
  const std::string body = R"(
  u64* full = reinterpret_cast<u64*>(shared + 64);
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_expect_arrive(full, 256);
    bulk_load(shared, in, 256, full);
    mbarrier_wait(full, 0);
    fence_proxy_async();
    bulk_store(out, shared, 256);
    commit_bulk_stores();
    wait_bulk_stores<0>();
  })";
  Run r;
  r.shared_bytes = 320;
  r.in.assign(64, 3);
  r.outputs = 64;
  CHECK(good(body, r) == r.in);
  CHECK(std::isnan(run_or_fail(replaced(body, "wait_bulk_stores<0>();", ""), r).at(9)));
  CHECK(std::isnan(run_or_fail(replaced(body, "mbarrier_wait(full, 0);", ""), r).at(9)));
}

TEST_CASE("stmatrix undoes ldmatrix, movmatrix transposes, votes and atomics add up") {
  const std::string body = R"(
  u16* m = reinterpret_cast<u16*>(shared);
  for (int i = lane; i < 256; i += 32) m[i] = static_cast<u16>(i);
  sync_warp();
  u32 r[4], s[4];
  load_matrix_x4(r, m + lane * 8);
  load_matrix_x4_transposed(s, m + lane * 8);
  store_matrix_x4(m + 256 + lane * 8, r);
  store_matrix_x4_transposed(m + 512 + lane * 8, s);
  sync_warp();
  bool same = transpose_matrix(r[1]) == s[1];
  for (int i = lane; i < 256; i += 32) same = same && m[256 + i] == m[i] && m[512 + i] == m[i];
  out[lane] = vote_all(same) && vote_ballot(lane < 3) == 7u && vote_any(lane == 5) ? 1.f : 0.f;
  sync_warp(); // votes order no memory
  if (lane == 0) shared[0] = 0.f;
  sync_warp();
  atomic_add(shared, 2.f);
  int* const most = reinterpret_cast<int*>(shared + 1);
  if (lane == 0) *most = 7;
  sync_warp();
  atomic_max(most, lane % 20);
  sync_warp();
  out[32 + lane] = shared[0] + *most;)";
  Run r;
  r.shared_bytes = 1536;
  r.outputs = 64;
  const std::vector<float> out = good(body, r);
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == 1);
    CHECK(out[32 + lane] == 64 + 19);
  }
}

TEST_CASE("arrive_named lets a producer go on where its consumer waits") {
  const std::string body = R"(
  if (warp == 0) { shared[lane] = 4.f; arrive_named(1, 64); return; }
  sync_named(1, 64);
  out[lane] = shared[lane];)";
  Run r;
  r.threads = 64;
  r.shared_bytes = 128;
  r.outputs = 32;
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    r.options.seed = seed;
    CHECK(good(body, r) == std::vector<float>(32, 4));
  }
}

TEST_CASE("the same kernels compile for sm_90a") {
  const char* const path = std::getenv("KDA_JIT_NVRTC");
  const auto nvrtc = Nvrtc::open(path == nullptr ? std::nullopt : std::optional<std::filesystem::path>(path));
  if (!nvrtc) {
    WARN("SKIPPED, no NVRTC: " << nvrtc.error().message);
    return;
  }
  const std::string many = R"(
  const u64 b = matrix_descriptor(shared, Swizzle::none, 128, 256);
  u32 a[4] = {1, 2, 3, 4};
  float d[128], e[8], f[64];
  for (int i = 0; i < 128; ++i) d[i] = 0.f;
  for (int i = 0; i < 8; ++i) e[i] = 0.f;
  wgmma_fence();
  wgmma<fp16, 256, true, true>(d, b, b);
  wgmma<tf32, 16>(e, a, b);
  wgmma<tf32, 16>(e, b, b);
  wgmma<fp16, 128>(f, a, b, false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 128; ++i) out[i] = d[i] + e[i % 8] + f[i % 64];
  tensor_load(shared, map, reinterpret_cast<u64*>(shared), 1, 2, 3, 4);
  tensor_store(map, shared, 1, 2, 3);
  mbarrier_expect(reinterpret_cast<u64*>(shared), 16);
  while (!mbarrier_test(reinterpret_cast<u64*>(shared), 1)) {}
  prefetch_tensor_map(map);
  wait_bulk_stores_read<1>();
  u32 m = vote_ballot(lane > 3);
  store_matrix_x4(shared, a);
  store_matrix_x4_transposed(shared, a);
  out[lane] = atomic_add(out, static_cast<float>(transpose_matrix(m)));
  atomic_max(reinterpret_cast<int*>(out), 1);
  arrive_named(1, 64);)";
  for (const std::string& body : {tma_wgmma(64, "b128"), many}) {
    SourceUnit unit = kernel_text(body);
    unit.options = {"--gpu-architecture=sm_90a", "--std=c++20", "--minimal"};
    // Registers for n = 256; launch bounds of one CTA of 128 threads.
    unit.main = replaced(unit.main, "KDA_KERNEL(1024, 1)", "KDA_KERNEL(160, 1)");
    const auto image = (*nvrtc)->compile(unit);
    if (!image) FAIL(image.error().message << "\n" << image.error().context);
    CHECK_FALSE(image->bytes.empty());
  }
}
