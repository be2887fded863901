// Faults that a kernel may have, each planted once: the emulator must see it.
#include "kernel_text.h"
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;
using namespace kda::emulator;
using Catch::Matchers::Contains;

namespace {

Run threads(unsigned count, unsigned shared_bytes, std::size_t outputs) {
  Run r;
  r.threads = count;
  r.shared_bytes = shared_bytes;
  r.outputs = outputs;
  return r;
}

std::string joined(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts)
    all += part;
  return all;
}

/// The message of a launch that must fail.
std::string error_of(const std::string& body, const Run& run) {
  const auto result = run_text(body, run);
  if (result) return "no error";
  return result.error().message;
}

bool reverses(const Result<std::vector<float>>& out) {
  REQUIRE(out);
  for (std::size_t i = 0; i < out->size(); ++i)
    if ((*out)[i] != static_cast<float>(out->size() - 1 - i)) return false;
  return true;
}

} // namespace

TEST_CASE("a missing block barrier gives a wrong result in some order of warps") {
  const std::string write = "shared[thread] = static_cast<float>(thread);",
                    read = "out[thread] = shared[127 - thread];";
  int wrong = 0;
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    Run r = threads(128, 512, 128);
    r.options.seed = seed;
    CHECK(reverses(run_text(joined({write, "sync_block();", read}), r)));
    wrong += reverses(run_text(write + read, r)) ? 0 : 1;
  }
  CHECK(wrong > 0);
}

TEST_CASE("a missing barrier before shared memory is reused gives a wrong result in some order of warps") {
  const std::string first =
      "shared[thread] = static_cast<float>(thread); sync_block(); const float x = shared[127 - thread];";
  const std::string second = "shared[thread] = -1.f; out[thread] = x;";
  int wrong = 0;
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    Run r = threads(128, 512, 128);
    r.options.seed = seed;
    CHECK(reverses(run_text(joined({first, "sync_block();", second}), r)));
    wrong += reverses(run_text(first + second, r)) ? 0 : 1;
  }
  CHECK(wrong > 0);
}

TEST_CASE("a missing sync_warp gives a wrong result in some order of lanes") {
  const std::string write = "shared[lane] = static_cast<float>(lane);",
                    read = "out[lane] = shared[31 - lane];";
  CHECK(reverses(run_text(write + "sync_warp();" + read, threads(32, 128, 32))));
  CHECK_FALSE(reverses(run_text(write + read, threads(32, 128, 32))));
}

TEST_CASE("writes outside of shared memory are errors") {
  // Just behind the end, and far behind it.
  CHECK_THAT(error_of("shared[25 + lane] = 1.f;", threads(32, 224, 0)),
             Contains("byte 224 of shared memory"));
  CHECK_THAT(error_of("if (lane == 3) shared[4096] = 1.f;", threads(32, 1024, 0)),
             Contains("a write of") && Contains("thread 3") && Contains("test.cu:"));
}

TEST_CASE("accesses outside of global memory are errors with the distance") {
  Run r = threads(32, 0, 64);
  r.in.resize(64);
  CHECK_THAT(error_of("out[lane] = in[64 + lane];", r), Contains("byte 256 of a buffer of 256 bytes"));
  CHECK_THAT(error_of("if (lane == 31) out[64] = 1.f;", r),
             Contains("a write of byte 256") && Contains("thread 31"));
  r.outputs = 3;
  CHECK_THAT(error_of("if (lane == 0) out[3] = 1.f;", r),
             Contains("a write to byte 12 of a buffer of 12 bytes"));
  CHECK_THAT(error_of("if (lane == 0) out[1 << 30] = 1.f;", r), Contains("in no buffer"));
}

TEST_CASE("shared memory and registers that nobody wrote hold no zeros") {
  const auto out =
      run_text("float x[4]; x[lane & 1] = 1.f; out[lane] = shared[lane] + x[2];", threads(32, 128, 32));
  REQUIRE(out);
  CHECK(std::isnan(out->at(5)));
}

TEST_CASE("a barrier that not every thread reaches is reported with the place of each warp") {
  const std::string error =
      error_of("if (warp == 0) sync_block();\nif (warp == 1) sync_named(1, 64);", threads(64, 0, 0));
  CHECK_THAT(error, Contains("warp 0 lanes ffffffff waits in sync_block at test.cu:1") &&
                        Contains("warp 1 lanes ffffffff waits in sync_named(1) at test.cu:2"));
  CHECK_THAT(error_of("if (lane < 16) return;\nsync_warp();", threads(32, 0, 0)),
             Contains("lanes 0000ffff has ended"));
}

TEST_CASE("lanes of a warp that call different operations are an error") {
  CHECK_THAT(error_of("if (lane < 16) sync_warp(); else out[0] = shuffle(1.f, 0);", threads(32, 0, 1)),
             Contains("diverge") && Contains("sync_warp") && Contains("shuffle"));
}

TEST_CASE("a thread that loops without barriers is named, with the line") {
#if defined(__SANITIZE_THREAD__)
  WARN("SKIPPED under ThreadSanitizer, which keeps timer signals back until a call of the C library");
  return;
#endif
  Run r = threads(64, 128, 0);
  r.options.watchdog_seconds = 0.2;
  r.in.assign(1, 0);
  for (const bool checked : {false, true}) {
    r.options.checked = checked;
    CHECK_THAT(error_of("sync_block();\nvolatile const float* flag = in;\nif (thread == 37)\n"
                        "while (flag[0] == 0.f) {}",
                        r),
               Contains("an endless loop: thread 37 of block 0,0,0 ran for 0.2 s") && Contains("test.cu:4"));
    CHECK(error_of("for (int i = 0; i < 1000; ++i) sync_warp();", r) == "no error");
  }
  r.options.watchdog_seconds = 0.05;
  for (const char* turn : {"sync_warp();", "x = shuffle(x, 3);"})
    CHECK_THAT(error_of(std::string("float x = 0.f;\nwhile (in[0] == 0.f) ") + turn, r),
               Contains("an endless loop: thread") && Contains("test.cu:2"));
}

TEST_CASE("lanes of a warp that meet in different lines are an error where the instruction is aligned") {
  const Run r = threads(64, 1024, 1);
  CHECK_THAT(error_of("if (lane < 16) sync_block();\nelse sync_block();", r),
             Contains("the lanes of warp") && Contains("test.cu:1") && Contains("test.cu:2"));
  CHECK_THAT(error_of("sync_named(lane < 16 ? 1 : 2, 32);", threads(32, 0, 0)),
             Contains("is at barrier 2") && Contains("others at barrier 1"));
  CHECK_THAT(error_of("u32 m[4];\nif (lane < 16) load_matrix_x4(m, shared + lane * 4);\n"
                      "else load_matrix_x4(m, shared + lane * 4);",
                      r),
             Contains("diverge") && Contains("test.cu:2") && Contains("test.cu:3"));
  // Warps may, and the lanes of shuffles may.
  CHECK(
      error_of("if (warp == 0) sync_block();\nelse sync_block();\nfloat x = 0.f;\n"
               "if (lane < 16) x = shuffle(1.f, 0);\nelse x = shuffle(2.f, 0);\nif (thread == 0) out[0] = x;",
               r) == "no error");
}

TEST_CASE("threads that name different sizes for a barrier are an error") {
  CHECK_THAT(error_of("if (lane == 0) sync_named(1, 64); else sync_named(1, 32);", threads(64, 0, 0)),
             Contains("barrier 1 among"));
}

TEST_CASE("a missing wait_copies gives NaN, a wait for too few groups too") {
  const std::string copy = "copy_async_16(shared + 4 * lane, in + 4 * lane); commit_copies();";
  const std::string read = "out[lane] = shared[4 * lane];";
  Run r = threads(32, 512, 32);
  r.in.assign(128, 1);
  CHECK(run_text(copy + "wait_copies<0>();" + read, r).value().at(9) == 1);
  CHECK(std::isnan(run_text(copy + read, r).value().at(9)));
  CHECK(std::isnan(run_text(copy + "wait_copies<1>();" + read, r).value().at(9)));
}

TEST_CASE("misaligned vectors, copies and matrix rows are errors") {
  Run r = threads(32, 1024, 64);
  r.in.assign(128, 1);
  CHECK_THAT(error_of("const Word4 w = load_streaming(reinterpret_cast<const Word4*>(in + 2)); out[0] = "
                      "bits_float(w.w[0]);",
                      r),
             Contains("misaligned") && Contains("test.cu:1"));
  CHECK_THAT(error_of("copy_async_16(shared + 1, in);", r), Contains("shared address is not aligned"));
  CHECK_THAT(error_of("u32 m[4]; load_matrix_x4(m, shared + lane);\nout[0] = bits_float(m[0]);", r),
             Contains("a row is 16 bytes and so aligned") && Contains("test.cu:1"));
}

TEST_CASE("an index outside of an array in registers is an error") {
  Run r = threads(32, 0, 32);
  r.in.assign(32, 7);
  CHECK_THAT(error_of("float x[4] = {0, 0, 0, 0}; x[static_cast<int>(in[lane])] = 1.f; out[lane] = x[1];", r),
             Contains("index outside of an array") && Contains("test.cu:1"));
}

TEST_CASE("launches that a device would refuse are refused") {
  CHECK_THAT(error_of("", threads(48, 0, 0)), Contains("whole warps"));
  CHECK_THAT(error_of("", threads(32, 300 << 10, 0)), Contains("of shared memory"));
}

TEST_CASE("a source that does not compile is compile_failed with the compiler's words") {
  const auto result = run_text("int x = nonsense;", threads(32, 0, 0));
  REQUIRE_FALSE(result);
  CHECK(result.error().code == ErrorCode::compile_failed);
  CHECK_THAT(result.error().context, Contains("nonsense"));
}

TEST_CASE("after a fault the same backend still runs kernels") {
  CHECK_THAT(error_of("shared[1 << 20] = 1.f;", threads(32, 128, 0)), Contains("a write of"));
  CHECK(reverses(run_text("out[lane] = static_cast<float>(31 - lane);", threads(32, 0, 32))));
}
