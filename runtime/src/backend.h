#pragma once
// What the engine needs of a device. Three implementations: the CUDA driver, the host (LLVM ORC), and the
// emulator of tests/emulator. Everything is thread-safe. While another thread captures a stream into a graph,
// everything but `launch`, `fill` and `wait` on that stream, and `synchronize`, leaves the capture valid.
#include "codegen/source_unit.h"
#include "cuda/kernel_args.cuh"
#include <chrono>
#include <functional>
#include <memory>

namespace kda {

/// Bytes that `load` takes, and the figures that the compiler reported, one entry a kernel.
struct KernelFigures {
  std::string entry;
  int registers = 0, shared_bytes = 0, stack_bytes = 0, spill_bytes = 0;
};
struct Image {
  std::string bytes; ///< cubin, host object, emulator shared object
  std::string log;
  std::vector<KernelFigures> kernels;
};

/// How time_us runs its work on a GPU: launched, or captured into a graph that is replayed. Elsewhere the
/// same.
enum class Replay : std::uint8_t { eager, graph };

/// A loaded image. `launch` runs entry `launch.entry`, with Launch::slab in the arguments; on the host grid.x
/// items are spread over the pool.
class Module {
public:
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  virtual ~Module() = default;
  virtual Status launch(const Launch&, const KernelArgs&, void* stream) const = 0;
  /// Those of one call, in order.
  virtual Status launch_all(const LaunchList& list, const KernelArgs& args, void* stream) const {
    for (int i = 0; i < list.count; ++i)
      if (Status ok = launch(list.items[static_cast<std::size_t>(i)], args, stream); !ok) return ok;
    return {};
  }
};

class Backend {
public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual const Target& target() const = 0;
  [[nodiscard]] virtual std::string name() const = 0; ///< "NVIDIA H100 80GB HBM3"
  /// Tells this device from others of its kind: the UUID of a GPU.
  [[nodiscard]] virtual std::string id() const { return name(); }
  [[nodiscard]] virtual std::string driver() const = 0; ///< "13.0"; "" on the host
  /// Identity of the compiler for keys: "nvrtc 13.0.88", "llvm 19.1.7".
  [[nodiscard]] virtual Result<std::string> compiler() const = 0;
  [[nodiscard]] virtual Result<Image> compile(const SourceUnit&) const = 0;
  [[nodiscard]] virtual Result<std::shared_ptr<const Module>> load(const SourceUnit&, const Image&) const = 0;

  [[nodiscard]] virtual Result<void*> allocate(std::size_t bytes) const = 0;
  virtual void release(void*) const = 0;
  /// Copies do not wait for kernels of the caller's streams, and are complete on return.
  virtual Status copy_to_device(void* to, const void* from, std::size_t bytes) const = 0;
  virtual Status copy_from_device(void* to, const void* from, std::size_t bytes) const = 0;
  /// Waits for all of the device's work; not while a stream of it is being captured.
  virtual Status synchronize() const = 0;
  /// The stream of time_us and of a tuner's work, which waits for no other stream.
  [[nodiscard]] virtual void* stream() const { return nullptr; }
  /// Waits for the work of one stream.
  virtual Status wait(void* /*stream*/) const { return synchronize(); }
  /// Whether calls into `stream` are being captured into a graph.
  [[nodiscard]] virtual bool capturing(void* /*stream*/) const { return false; }
  /// Sets 32-bit words; poisons outputs and flushes L2.
  virtual Status fill(void* to, std::uint32_t word, std::size_t words, void* stream) const = 0;
  /// Microseconds that `work`, put into the stream it is given, keeps the device busy: events on a GPU, a
  /// clock on the host.
  [[nodiscard]] virtual Result<double> time_us(const std::function<Status(void* stream)>& work,
                                               Replay replay) const = 0;
  /// The clock of a tuner's budget.
  [[nodiscard]] virtual double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
};

} // namespace kda
