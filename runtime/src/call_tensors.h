#pragma once
// The tensors of one call with random contents on a device, for validating and timing candidates.
#include "backend.h"
#include "kda/engine.h"
#include "kda/reference.h"
#include <map>

namespace kda {

class CallTensors {
public:
  /// `most_bytes` limits what create may take of the device; 0: nothing does.
  explicit CallTensors(std::shared_ptr<const Backend> backend, std::uint64_t most_bytes = 0)
      : backend_(std::move(backend)), most_bytes_(most_bytes) {}
  ~CallTensors();
  CallTensors(const CallTensors&) = delete;
  CallTensors& operator=(const CallTensors&) = delete;

  /// Allocates and fills every tensor of the problem; packed sequences are of equal length. out_of_memory
  /// when they do not fit.
  Status create(const Problem&, const Sizes&, std::uint64_t seed);
  [[nodiscard]] const Args& args() const { return args_; }
  /// Of the device, that the tensors take.
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  /// Fills every output with NaN, in the backend's stream.
  Status poison() const;
  /// An output in float64, states in [K,V], by the name of its member in Args.
  [[nodiscard]] Result<reference::Array> output(const std::string& name) const;
  /// The two steps of output: what the device holds, and what it means.
  [[nodiscard]] Result<std::vector<std::byte>> bytes_of(const std::string& name) const;
  [[nodiscard]] reference::Array values_of(const std::string& name,
                                           const std::vector<std::byte>& bytes) const;
  [[nodiscard]] std::vector<std::string> outputs() const;
  /// What the device read, rounded as there.
  [[nodiscard]] Result<reference::Inputs> reference_inputs() const;
  [[nodiscard]] Result<reference::OutputGradients> reference_output_gradients() const;
  /// Of a replay: what it was given.
  [[nodiscard]] Result<reference::Verified> reference_updates() const;
  [[nodiscard]] const std::vector<std::int64_t>& accepted() const { return accepted_; }
  [[nodiscard]] const std::vector<std::int64_t>& parents() const { return parents_; }
  /// By slot of the interior states: after which row of the token axis each is.
  [[nodiscard]] const std::vector<std::int64_t>& interior() const { return interior_; }
  /// Puts in place of the random saved states what a forward would have saved. For small calls: in float64.
  Status save_states();
  /// False when a call changed one of its inputs.
  [[nodiscard]] Result<bool> inputs_preserved() const;

private:
  struct Buffer {
    Tensor tensor;
    std::size_t bytes = 0;
    bool output = false, state = false;
    std::vector<std::byte> before; ///< inputs, as uploaded
  };
  Status add(const std::string& name, Tensor& slot, DType dtype, std::initializer_list<std::int64_t> shape,
             bool output, bool state, double mean, double deviation);
  [[nodiscard]] Result<void*> allocate(std::size_t bytes);
  /// Numbers on the device.
  [[nodiscard]] Result<void*> upload(const std::vector<std::int64_t>& numbers, IndexType type);
  Status add_tables();
  [[nodiscard]] std::int64_t first_token(std::int64_t sequence) const;
  [[nodiscard]] std::int64_t length(std::int64_t sequence) const;

  std::shared_ptr<const Backend> backend_;
  std::uint64_t most_bytes_ = 0, bytes_ = 0;
  Problem problem_;
  Sizes sizes_;
  Args args_;
  std::uint64_t seed_ = 0;
  std::vector<std::int64_t> interior_;
  std::vector<std::int64_t> cu_seqlens_, accepted_, parents_; ///< parents_: as reference::verify has them
  std::vector<void*> tables_;
  std::map<std::string, Buffer> buffers_;
};

} // namespace kda
