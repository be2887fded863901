// The host backend below the kernels: IR text in, a running function out, and errors for what is neither.
#include "host_backend.h"
#include <catch2/catch.hpp>
#include <cstddef>

using namespace kda;

namespace {

/// Writes item i's number to the i-th float of o.
SourceUnit counting_unit() {
  SourceUnit unit;
  unit.name = "counting.ll";
  unit.entries = {"counting"};
  unit.main = R"(
define void @counting(ptr %args, i64 %begin, i64 %end) {
entry:
  %slot = getelementptr i8, ptr %args, i64 OFFSET
  %data = load ptr, ptr %slot
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %value = sitofp i64 %i to float
  %at = getelementptr float, ptr %data, i64 %i
  store float %value, ptr %at
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
)";
  const std::string word = "OFFSET";
  unit.main.replace(unit.main.find(word), word.size(), std::to_string(offsetof(KernelArgs, o)));
  return unit;
}

} // namespace

TEST_CASE("host backend: names this machine and its compiler") {
  const auto backend = make_host_backend(3).value();
  CHECK(backend->target().kind == Target::Kind::host);
  CHECK_FALSE(backend->target().arch.empty());
  CHECK(backend->target().multiprocessors == 3);
  CHECK(backend->target().vector_bytes >= 16);
  CHECK(backend->compiler().value().substr(0, 8) == "llvm 19.");
}

TEST_CASE("host backend: compiles, loads and spreads the items of a launch over threads") {
  const auto backend = make_host_backend(4).value();
  const SourceUnit unit = counting_unit();
  const Image image = backend->compile(unit).value();
  const auto module = backend->load(unit, image).value();
  constexpr unsigned kItems = 1000;
  void* data = backend->allocate(kItems * sizeof(float)).value();
  REQUIRE(backend->fill(data, 0xFFFFFFFF, kItems, nullptr));
  KernelArgs args{};
  args.o.data = data;
  REQUIRE(module->launch({0, kItems, 0, 0}, args, nullptr));
  std::vector<float> out(kItems);
  REQUIRE(backend->copy_from_device(out.data(), data, kItems * sizeof(float)));
  for (unsigned i = 0; i < kItems; ++i)
    CHECK(out[i] == static_cast<float>(i));
  backend->release(data);
  CHECK_FALSE(module->launch({1, 1, 0, 0}, args, nullptr));
}

TEST_CASE("host backend: text that is no IR is compile_failed and says where") {
  const auto backend = make_host_backend(1).value();
  SourceUnit unit = counting_unit();
  unit.main += "define nonsense\n";
  const auto image = backend->compile(unit);
  REQUIRE_FALSE(image);
  CHECK(image.error().code == ErrorCode::compile_failed);
  CHECK(image.error().context.find("nonsense") != std::string::npos);
}

TEST_CASE("host backend: an image that is no object of this unit is load_failed") {
  const auto backend = make_host_backend(1).value();
  const SourceUnit unit = counting_unit();
  const Image good = backend->compile(unit).value();
  const auto refused = [&](const SourceUnit& of, const std::string& bytes) {
    Image image;
    image.bytes = bytes;
    const auto module = backend->load(of, image);
    return !module && module.error().code == ErrorCode::load_failed;
  };
  CHECK(refused(unit, ""));
  CHECK(refused(unit, "not an object"));
  CHECK(refused(unit, good.bytes.substr(0, good.bytes.size() / 2)));
  CHECK(refused(unit, "X" + good.bytes.substr(1)));
  SourceUnit other = unit;
  other.entries = {"another"};
  CHECK(refused(other, good.bytes));
}
