// Faults that only order shows: the checker must name each, whatever the order of threads, and must not
// find any in the same kernels without them.
#include "kernel_text.h"
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;
using namespace kda::emulator;
using Catch::Matchers::Contains;

namespace {

Run checked(unsigned threads, unsigned shared_bytes, std::size_t outputs) {
  Run r;
  r.options.checked = true;
  r.threads = threads;
  r.shared_bytes = shared_bytes;
  r.outputs = outputs;
  r.in.assign(256, 1);
  return r;
}

std::string joined(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts)
    all += part;
  return all;
}

/// The message of the launch with threads in ascending order, or "no fault"; every other order has one too,
/// or none.
std::string fault_of(const std::string& body, Run run) {
  std::string first;
  for (const std::uint64_t seed : {0, 1, 2}) {
    run.options.seed = seed;
    const auto result = run_text(body, run);
    if (seed == 0) first = result ? "no fault" : result.error().message;
    CHECK(result.has_value() == (first == "no fault"));
  }
  return first;
}

const auto kNone = Catch::Matchers::Equals("no fault");

} // namespace

TEST_CASE("checked: a missing block barrier, after a write and before the next") {
  const Run r = checked(128, 512, 128);
  const std::string write = "shared[thread] = 0.f;\nsync_block();\nshared[thread] = 1.f;\n",
                    read = "const float x = shared[127 - thread];\n",
                    again = "shared[thread] = 2.f;\nout[thread] = x;", barrier = "sync_block();\n";
  CHECK_THAT(fault_of(joined({write, barrier, read, barrier, again}), r), kNone);
  CHECK_THAT(fault_of(joined({write, read, barrier, again}), r),
             Contains("race: thread") && Contains("test.cu:3") && Contains("test.cu:4") &&
                 Contains("with no barrier between"));
  CHECK_THAT(fault_of(joined({write, barrier, read, again}), r),
             Contains("race: thread") && Contains("test.cu:5") && Contains("test.cu:6"));
}

TEST_CASE("checked: sync_warp orders the lanes of a warp, shuffles, votes and matrix loads do not") {
  const Run r = checked(32, 512, 32);
  const std::string write = "shared[lane] = 0.f;\nsync_warp();\nshared[lane] = 1.f;\n",
                    read = "out[lane] = shared[31 - lane];\n";
  CHECK_THAT(fault_of(write + "sync_warp();\n" + read, r), kNone);
  for (const char* no_order : {"", "shuffle(1.f, 0);", "vote_any(true);"})
    CHECK_THAT(fault_of(joined({write, no_order, read}), r), Contains("race: thread"));
  const std::string rows = "u32 m[4];\nload_matrix_x4(m, shared + lane * 4);\nout[lane] = bits_float(m[0]);";
  const std::string fill = "for (int i = 0; i < 4; ++i) shared[31 - lane + i * 32] = 1.f;\n";
  CHECK_THAT(fault_of(fill + "sync_warp();\n" + rows, r), kNone);
  CHECK_THAT(fault_of(fill + rows, r), Contains("race: thread") && Contains("test.cu:3"));
  // Lanes of two warps need more.
  CHECK_THAT(fault_of(write + "sync_warp();\nout[lane] = shared[31 - lane];", checked(64, 512, 32)),
             Contains("race: thread"));
}

TEST_CASE("checked: a named barrier orders those who meet there, an arrival what came before it") {
  const std::string body = "if (warp == 0) { shared[lane] = 4.f; arrive_named(1, 64); return; }\n"
                           "if (warp == 1) { sync_named(1, 64); out[lane] = shared[lane]; }";
  CHECK_THAT(fault_of(body, checked(96, 128, 32)), kNone);
  CHECK_THAT(fault_of(body + "\nif (warp == 2) out[lane] = shared[lane];", checked(96, 128, 32)),
             Contains("race: thread"));
  CHECK_THAT(fault_of("if (warp == 0) { arrive_named(1, 64); shared[lane] = 4.f; return; }\n"
                      "sync_named(1, 64); out[lane] = shared[lane];",
                      checked(64, 128, 32)),
             Contains("uninitialised") || Contains("race: thread"));
}

TEST_CASE("checked: reads of what nobody wrote, and between buffers") {
  CHECK_THAT(fault_of("out[lane] = shared[lane];", checked(32, 128, 32)),
             Contains("uninitialised: thread") && Contains("of shared memory at test.cu:1"));
  CHECK_THAT(fault_of("in = out; out[lane] = in[lane ^ 1];", checked(32, 128, 32)),
             Contains("uninitialised: a read of byte"));
  CHECK_THAT(fault_of("out[lane] = in[lane];", checked(32, 0, 32)), kNone);
  // No page and no canary is hit: 12 bytes of a buffer that ends at 256.
  CHECK_THAT(fault_of("if (lane < 3) out[lane] = 1.f;\nif (lane == 1) out[0] = out[3];", checked(32, 0, 3)),
             Contains("out of bounds: a read of byte 12 of a buffer of 12 bytes"));
}

TEST_CASE("checked: blocks of a launch share no memory but through atomics") {
  Run r = checked(32, 0, 32);
  r.grid = 2;
  CHECK_THAT(fault_of("if (block_index_x() == 0) out[lane] = 1.f;", r), kNone);
  CHECK_THAT(fault_of("out[lane] = 1.f;", r), Contains("race: a write") && Contains("another block"));
  CHECK_THAT(fault_of("float* p = const_cast<float*>(in);\n"
                      "if (block_index_x() == 0) p[lane] = 2.f; else out[lane] = p[lane];",
                      r),
             Contains("race: a") && Contains("another block"));
  CHECK_THAT(fault_of("atomic_add(const_cast<float*>(in), 1.f);", r), kNone);
}

TEST_CASE("checked: threads of a block need a barrier in global memory too") {
  const Run r = checked(64, 0, 64);
  const std::string write = "out[thread] = 1.f;\n", read = "in = out;\nconst float x = in[63 - thread];\n";
  CHECK_THAT(fault_of(joined({write, "sync_block();\n", read, "sync_block();\nout[thread] = x;"}), r), kNone);
  CHECK_THAT(fault_of(joined({write, "sync_block();\n", read, "out[thread] = x;"}), r),
             Contains("race: thread") && Contains("of a buffer of 256 bytes"));
  CHECK_THAT(fault_of("const float x = in[63 - thread];\nconst_cast<float*>(in)[thread] = x;", r),
             Contains("race: thread") && Contains("test.cu:1") && Contains("test.cu:2"));
}

TEST_CASE("checked: copy_async needs its wait, then a barrier, and its destination to be free") {
  const Run r = checked(64, 1024, 64);
  const std::string copy = "copy_async_16(shared + 4 * thread, in + 4 * thread); commit_copies();\n",
                    wait = "wait_copies<0>();\n", barrier = "sync_block();\n",
                    own = "out[thread] = shared[4 * thread];\n",
                    other = "out[thread] = shared[4 * (63 - thread)];\n";
  CHECK_THAT(fault_of(joined({copy, wait, own, barrier, copy, wait, barrier, other}), r), kNone);
  CHECK_THAT(fault_of(copy + own, r), Contains("which a copy_async of thread") &&
                                          Contains("nobody waited for that") && Contains("test.cu:2"));
  CHECK_THAT(fault_of(joined({copy, "wait_copies<1>();\n", own}), r), Contains("nobody waited for that"));
  CHECK_THAT(fault_of(joined({copy, barrier, wait, other}), r), Contains("nobody waited for that"));
  CHECK_THAT(fault_of(joined({copy, wait, barrier, other, copy, wait}), r),
             Contains("race: ") && Contains("a copy_async of thread") && Contains("test.cu:4") &&
                 Contains("test.cu:5"));
  CHECK_THAT(fault_of("copy_async_16(shared + 4 * thread, out + 4 * (thread / 4)); commit_copies();", r),
             Contains("uninitialised"));
}

TEST_CASE("checked: a pipeline of bulk loads needs full and empty barriers") {
  // Warp 0 loads 4 stages into 2 buffers, warp 1 reads them.
  const std::string empty = "if (i > 1) mbarrier_wait(empty + i % 2, i / 2 - 1 & 1);\n",
                    full = "mbarrier_wait(full + i % 2, i / 2 & 1);\n",
                    done = "mbarrier_arrive(empty + i % 2);";
  const auto pipeline = [&](const std::string& before_load, const std::string& before_read,
                            const std::string& after_read) {
    return joined({R"(
  u64 *full = reinterpret_cast<u64*>(shared + 128), *empty = full + 2;
  if (thread < 2) { mbarrier_init(full + thread, 1); mbarrier_init(empty + thread, 32); fence_mbarrier_init(); }
  sync_block();
  for (int i = 0; i < 4; ++i)
    if (thread == 0) {
)",
                   before_load, R"(
      mbarrier_expect_arrive(full + i % 2, 128);
      bulk_load(shared + i % 2 * 32, in + i * 32, 128, full + i % 2);
    } else if (warp == 1) {
)",
                   before_read, "out[i * 32 + lane] = shared[i % 2 * 32 + lane];\n", after_read, "}"});
  };
  const Run r = checked(64, 1024, 128);
  CHECK_THAT(fault_of(pipeline(empty, full, done), r), kNone);
  CHECK_THAT(fault_of(pipeline(empty, "", done), r), Contains("uninitialised") ||
                                                         Contains("which a bulk load wrote") ||
                                                         Contains("race: a bulk load"));
  std::string unfenced = pipeline(empty, full, done);
  const std::string fence = "fence_mbarrier_init();";
  unfenced.erase(unfenced.find(fence), fence.size());
  CHECK_THAT(fault_of(unfenced, r),
             Contains("proxy: thread 0") && Contains("without a fence_mbarrier_init behind"));
  // The loads overtake their reader: a race, or it never sees the phase that it waits for.
  CHECK_THAT(fault_of(pipeline("if (i > 1) mbarrier_wait(full + i % 2, i / 2 - 1 & 1);\n", full, done), r),
             Contains("race: ") || Contains("waits in mbarrier_wait"));
  CHECK_THAT(fault_of(pipeline(empty, full, "if (lane == 0)\nfor (int n = 0; n < 32; ++n) " + done), r),
             Contains("race: ") || Contains("waits in mbarrier_wait"));
  // The parity of the phase before.
  CHECK_THAT(fault_of(pipeline(empty, "mbarrier_wait(full + i % 2, (i / 2 & 1) ^ 1);\n", done), r),
             Contains("uninitialised") || Contains("race: ") || Contains("not every thread"));
}

TEST_CASE("checked: what threads wrote needs a fence_proxy_async before a bulk store or wgmma reads it") {
  const std::string write = "shared[thread] = 1.f;\n", fence = "fence_proxy_async();\n",
                    barrier = "sync_block();\n",
                    store = "if (thread == 0) { bulk_store(out, shared, 256); commit_bulk_stores();\n"
                            "wait_bulk_stores<0>(); }\n";
  const Run r = checked(64, 1024, 64);
  CHECK_THAT(fault_of(joined({write, fence, barrier, store}), r), kNone);
  CHECK_THAT(fault_of(joined({write, barrier, store}), r),
             Contains("proxy: a bulk store of thread 0 reads") &&
                 Contains("without a fence_proxy_async between"));
  CHECK_THAT(fault_of(joined({fence, write, barrier, store}), r), Contains("proxy: "));
  CHECK_THAT(fault_of(joined({write, fence, store}), r), Contains("race: ") || Contains("uninitialised"));
  CHECK_THAT(fault_of(joined({write, fence, barrier, store, barrier, write}), r), kNone);
  CHECK_THAT(fault_of(joined({write, fence, barrier, store, write}), r), Contains("race: thread"));

  const std::string fill = "for (int i = thread; i < 1024; i += 128) shared[i] = 0.f;\n",
                    product = "float d[32]; for (float& x : d) x = 0.f;\nwgmma_fence();\n"
                              "const u64 b = matrix_descriptor(shared, Swizzle::none, 256, 128);\n"
                              "wgmma<bf16, 64>(d, b, b); wgmma_commit();\n",
                    wait = "wgmma_wait<0>();\n", result = "out[thread] = d[0];\n",
                    refill = "shared[thread] = 1.f;\n";
  const Run w = checked(128, 4096, 128);
  CHECK_THAT(fault_of(joined({fill, fence, barrier, product, wait, result, barrier, refill}), w), kNone);
  CHECK_THAT(fault_of(joined({fill, barrier, product, wait, result}), w),
             Contains("proxy: wgmma of warpgroup 0 reads"));
  CHECK_THAT(fault_of(joined({fill, fence, product, wait, result}), w), Contains("race: wgmma"));
  std::string unfenced = product;
  unfenced.erase(unfenced.find("wgmma_fence();"), 14);
  CHECK_THAT(fault_of(joined({fill, fence, barrier, unfenced, wait, result}), w),
             Contains("proxy: thread") && Contains("without a wgmma_fence before"));
  CHECK_THAT(fault_of(joined({fill, fence, barrier, product, barrier, refill, wait, result}), w),
             Contains("race: thread") && Contains("wgmma of warpgroup 0 read at") &&
                 Contains("nobody waited for that"));
}
