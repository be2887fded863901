// The CUDA backend on a driver of this file: which calls it makes in which capture mode, and into which
// stream.
#include "cuda_backend.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <map>

using namespace kda;

namespace {

/// What the driver below was asked for; one test at a time uses it.
struct Calls {
  struct Call {
    std::string name;
    int mode; ///< of the calling thread: 0 is global, as a thread begins
    void* stream;
  };
  std::vector<Call> all;
  static thread_local int mode;
  static thread_local int depth; ///< contexts pushed
  int capturing = 0;             ///< what cuStreamIsCapturing answers
  int begun = 0, graphs = 0, executables = 0, events = 0;
  std::map<std::string, int> errors; ///< what a call answers; 0 if not given

  int add(const char* name, void* stream = nullptr) {
    all.push_back({name, mode, stream});
    const auto error = errors.find(name);
    return error == errors.end() ? 0 : error->second;
  }
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> list;
    for (const Call& c : all)
      list.push_back(c.name);
    return list;
  }
} calls;
thread_local int Calls::mode = 0;
thread_local int Calls::depth = 0;

using Handle = CudaDriver::Handle;
Handle handle(std::uintptr_t n) {
  return reinterpret_cast<Handle>(n);
}
constexpr std::uintptr_t kFirstStream = 0x100;

std::shared_ptr<CudaDriver> driver() {
  calls = {};
  auto d = std::make_shared<CudaDriver>();
  d->version = 13000;
  d->error_name = [](int, const char** name) {
    *name = "CUDA_ERROR_OF_THE_TEST";
    return 0;
  };
  d->device_count = [](int* n) {
    *n = 1;
    return 0;
  };
  d->device_get = [](int* device, int) {
    *device = 0;
    return 0;
  };
  d->device_name = [](char* name, int, int) {
    std::strcpy(name, "a GPU");
    return 0;
  };
  d->device_uuid = [](unsigned char*, int) { return 0; };
  d->device_attribute = [](int* value, int which, int) {
    *value = which == CudaDriver::kMajor ? 9 : 0;
    return 0;
  };
  d->primary_retain = [](Handle* context, int) {
    *context = handle(1);
    return 0;
  };
  d->context_current = [](Handle* context) {
    *context = calls.depth > 0 ? handle(1) : nullptr;
    return 0;
  };
  d->context_push = [](Handle) {
    ++calls.depth;
    return 0;
  };
  d->context_pop = [](Handle*) {
    --calls.depth;
    return 0;
  };
  d->context_synchronize = [] { return calls.add("context_synchronize"); };
  d->exchange_capture_mode = [](int* mode) {
    std::swap(*mode, calls.mode);
    return 0;
  };
  d->library_load = [](Handle* library, const void*, const int*, void* const*, unsigned, const int*,
                       void* const*, unsigned) {
    *library = handle(2);
    return calls.add("library_load");
  };
  d->library_unload = [](Handle) { return calls.add("library_unload"); };
  d->library_kernel = [](Handle* kernel, Handle, const char*) {
    *kernel = handle(3);
    return calls.add("library_kernel");
  };
  d->kernel_function = [](Handle* function, Handle) {
    *function = handle(4);
    return calls.add("kernel_function");
  };
  d->kernel_set_attribute = [](int, int, Handle, int) { return calls.add("kernel_set_attribute"); };
  d->launch = [](const CudaDriver::LaunchConfig* config, Handle, void**, void**) {
    const bool overlaps = config->count == 1 && config->attributes->id == CudaDriver::kStreamSerialization &&
                          config->attributes->value[0] == 1;
    return calls.add(overlaps ? "overlapping launch" : "launch", config->stream);
  };
  d->allocate = [](CudaDriver::DevicePointer* p, std::size_t) {
    *p = 0x1000;
    return calls.add("allocate");
  };
  d->release = [](CudaDriver::DevicePointer) { return calls.add("release"); };
  d->copy_to_device = [](CudaDriver::DevicePointer, const void*, std::size_t, Handle stream) {
    return calls.add("copy_to_device", stream);
  };
  d->copy_to_host = [](void*, CudaDriver::DevicePointer, std::size_t, Handle stream) {
    return calls.add("copy_to_host", stream);
  };
  d->fill_words = [](CudaDriver::DevicePointer, unsigned, std::size_t, Handle stream) {
    return calls.add("fill", stream);
  };
  d->stream_create = [](Handle* stream, unsigned flags) {
    static std::uintptr_t next = kFirstStream;
    *stream = handle(next++);
    CHECK(flags == CudaDriver::kNonBlockingStream);
    return calls.add("stream_create");
  };
  d->stream_synchronize = [](Handle stream) { return calls.add("stream_synchronize", stream); };
  d->stream_is_capturing = [](Handle stream, int* status) {
    *status = calls.capturing;
    return calls.add("stream_is_capturing", stream);
  };
  d->stream_begin_capture = [](Handle stream, int mode) {
    CHECK(mode == CudaDriver::kRelaxed); // a thread that captures must not forbid others to allocate
    ++calls.begun;
    return calls.add("stream_begin_capture", stream);
  };
  d->stream_end_capture = [](Handle stream, Handle* graph) {
    --calls.begun;
    ++calls.graphs;
    *graph = handle(5);
    return calls.add("stream_end_capture", stream);
  };
  d->graph_instantiate = [](Handle* executable, Handle, unsigned long long) {
    const int code = calls.add("graph_instantiate");
    if (code != 0) return code;
    ++calls.executables;
    *executable = handle(6);
    return 0;
  };
  d->graph_upload = [](Handle, Handle stream) { return calls.add("graph_upload", stream); };
  d->graph_launch = [](Handle, Handle stream) { return calls.add("graph_launch", stream); };
  d->graph_executable_destroy = [](Handle) {
    --calls.executables;
    return 0;
  };
  d->graph_destroy = [](Handle) {
    --calls.graphs;
    return 0;
  };
  d->event_create = [](Handle* event, unsigned) {
    ++calls.events;
    *event = handle(7);
    return 0;
  };
  d->event_destroy = [](Handle) {
    --calls.events;
    return 0;
  };
  d->event_record = [](Handle, Handle stream) { return calls.add("event_record", stream); };
  d->event_synchronize = [](Handle) { return calls.add("event_synchronize"); };
  d->event_elapsed = [](float* ms, Handle, Handle) {
    *ms = 0.25F;
    return 0;
  };
  return d;
}

std::shared_ptr<Backend> backend() {
  auto made = make_cuda_backend(driver(), 0, fail(ErrorCode::unavailable, "no NVRTC"));
  REQUIRE(made);
  REQUIRE((*made)->stream() != nullptr); // its thread has opened the context
  calls.all.clear();
  return *made;
}

/// A unit of one kernel and an image that unpacks.
std::pair<SourceUnit, Image> kernel() {
  SourceUnit unit;
  unit.name = "one.cu";
  unit.entries = {"one"};
  Image image;
  image.bytes = pack_cubins({"a cubin"});
  return {unit, image};
}

} // namespace

TEST_CASE("everything but launches and fills is done in relaxed capture mode, and the mode is put back") {
  const auto b = backend();
  const auto [unit, image] = kernel();
  {
    const auto module = b->load(unit, image);
    REQUIRE(module);
    void* const data = b->allocate(64).value();
    std::byte bytes[64]{};
    REQUIRE(b->copy_to_device(data, bytes, sizeof bytes));
    REQUIRE(b->copy_from_device(bytes, data, sizeof bytes));
    REQUIRE(b->wait(b->stream()));
    REQUIRE(b->synchronize());
    REQUIRE(
        b->time_us([&](void* stream) { return (*module)->launch({}, KernelArgs{}, stream); }, Replay::graph));
    b->release(data);
    CHECK(calls.mode == 0);
    CHECK(calls.depth == 0);
  }
  CHECK(calls.all.back().name == "library_unload");
  for (const Calls::Call& c : calls.all) {
    INFO(c.name);
    CHECK(c.mode == CudaDriver::kRelaxed);
  }
  // A call of the caller's: whatever mode he has.
  const auto module = b->load(unit, image).value();
  calls.all.clear();
  REQUIRE(module->launch({}, KernelArgs{}, handle(9)));
  REQUIRE(b->fill(nullptr, 0, 1, handle(9)));
  CHECK(calls.names() == std::vector<std::string>{"launch", "fill"});
  for (const Calls::Call& c : calls.all)
    CHECK((c.mode == 0 && c.stream == handle(9)));
}

TEST_CASE("a launch overlaps the kernel before it where it asks to and the driver can capture that") {
  const auto [unit, image] = kernel();
  for (const int version : {12020, 12030})
    for (const bool overlap : {false, true}) {
      const auto d = driver();
      d->version = version;
      const auto b = make_cuda_backend(d, 0, fail(ErrorCode::unavailable, "no NVRTC")).value();
      REQUIRE(b->stream() != nullptr); // its thread has opened the context
      const auto module = b->load(unit, image).value();
      calls.all.clear();
      Launch launch;
      launch.overlap = overlap;
      REQUIRE(module->launch(launch, KernelArgs{}, handle(9)));
      const bool overlaps = overlap && version >= 12030;
      CHECK(calls.names() == std::vector<std::string>{overlaps ? "overlapping launch" : "launch"});
    }
}

TEST_CASE("how one candidate is launched does not stay with the next") {
  const auto b = backend();
  const auto [unit, image] = kernel();
  const auto overlapping = b->load(unit, image).value(), plain = b->load(unit, image).value();
  calls.all.clear();
  Launch overlap;
  overlap.overlap = true;
  for (int i = 0; i < 3; ++i) {
    REQUIRE(overlapping->launch(overlap, KernelArgs{}, handle(9)));
    REQUIRE(plain->launch({}, KernelArgs{}, handle(9)));
  }
  for (std::size_t i = 0; i < 6; ++i)
    CHECK(calls.names()[i] == (i % 2 == 0 ? "overlapping launch" : "launch"));
}

TEST_CASE("no copy, wait or sample touches the default stream, which other captures forbid") {
  const auto b = backend();
  std::byte bytes[4]{};
  REQUIRE(b->copy_to_device(bytes, bytes, 4));
  REQUIRE(b->copy_from_device(bytes, bytes, 4));
  for (const Replay replay : {Replay::eager, Replay::graph})
    REQUIRE(b->time_us([&](void* stream) { return b->fill(bytes, 0, 1, stream); }, replay));
  REQUIRE(b->wait(b->stream()));
  for (const Calls::Call& c : calls.all)
    if (c.name != "event_synchronize" && c.name != "graph_instantiate") {
      INFO(c.name);
      CHECK(c.stream != nullptr);
    }
  // Copies wait for themselves, in a stream that no sample is captured from.
  CHECK(calls.all[0].stream == calls.all[1].stream);
  CHECK(calls.all[1].name == "stream_synchronize");
  CHECK(calls.all[0].stream != b->stream());
}

TEST_CASE("a sample with a graph captures, instantiates and uploads before the first event") {
  const auto b = backend();
  const auto us = b->time_us([&](void* stream) { return b->fill(nullptr, 0, 1, stream); }, Replay::graph);
  CHECK(us.value() == 250);
  CHECK(calls.names() == std::vector<std::string>{"stream_begin_capture", "fill", "stream_end_capture",
                                                  "graph_instantiate", "graph_upload", "event_record",
                                                  "graph_launch", "event_record", "event_synchronize"});
  CHECK((calls.graphs == 0 && calls.executables == 0 && calls.events == 0));
}

TEST_CASE("a sample that fails ends its capture and leaves nothing behind") {
  const auto b = backend();
  const auto work = [&](void* stream) { return b->fill(nullptr, 0, 1, stream); };
  SECTION("the work") {
    calls.errors["fill"] = 1;
  }
  SECTION("the capture") {
    calls.errors["stream_end_capture"] = 901;
  }
  SECTION("the graph") {
    calls.errors["graph_instantiate"] = 1;
  }
  SECTION("the launch") {
    calls.errors["graph_launch"] = 700;
  }
  SECTION("the device") {
    calls.errors["event_synchronize"] = 700;
  }
  const auto us = b->time_us(work, Replay::graph);
  REQUIRE_FALSE(us);
  CHECK(us.error().code == ErrorCode::device_error);
  CHECK((calls.begun == 0 && calls.graphs == 0 && calls.executables == 0 && calls.events == 0));
  CHECK((calls.mode == 0 && calls.depth == 0));
}

TEST_CASE("a stream that is captured, or must not be asked, counts as captured") {
  const auto b = backend();
  CHECK_FALSE(b->capturing(handle(9)));
  calls.capturing = 1;
  CHECK(b->capturing(handle(9)));
  calls.capturing = 0;
  calls.errors["stream_is_capturing"] = 906; // the default stream while a blocking one is captured
  CHECK(b->capturing(nullptr));
}
