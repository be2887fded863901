#pragma once
// One run of the tuner on one problem: enter every candidate, compile, check, time, decide, keep the rows.
//   tuner.cpp        the run: enter, compile, agree with other ranks, decide, keep
//   tuner_check.cpp  every candidate against a reference
//   tuner_time.cpp   samples
//   tune_worker.cpp  compile, check and time in a process of their own
#include "call_tensors.h"
#include "engine_impl.h"

namespace kda {

struct Contestant {
  TuneRow row;
  Variant variant;
  double estimate_us = 0;
  bool wanted = true;  ///< measured in this run; else the row is a stored one, or says why it is not
  bool always = false; ///< has its turn whatever the budget; where not wanted it may still be the reference
  bool stored = true;  ///< its row goes to the database
  bool barred = false; ///< it must not run, not even as the reference
  std::shared_ptr<const Kernel::Impl> kernel; ///< once compiled
  std::vector<double> samples{};              ///< microseconds
  int disturbed = 0;                          ///< of the samples
  [[nodiscard]] bool ok() const { return row.status == "ok"; }
  [[nodiscard]] bool runs() const { return wanted && ok() && kernel != nullptr; }
  void note(const std::string& text) { row.reason += (row.reason.empty() ? "" : "; ") + text; }
  void out(std::string status, std::string reason) {
    row.status = std::move(status);
    row.reason = std::move(reason);
  }
};

class Tuning {
public:
  /// `missing_only`: candidates with a row that counts today are not measured again.
  Tuning(std::shared_ptr<Engine::Impl> engine, std::shared_ptr<const Backend> backend, const Problem& p,
         Device device, const Sizes& s, const TuneRequest& request, bool missing_only)
      : engine_(std::move(engine)), backend_(std::move(backend)), p_(p), device_(device), s_(s),
        request_(request), missing_only_(missing_only) {}

  Result<TuneReport> run();

private:
  // tuner.cpp
  void enter();
  [[nodiscard]] bool anything_wanted() const;
  Status measure();
  void compile();
  /// Through EngineOptions::tune_reduce; does nothing without it.
  Status agree_on_wanted();
  Status agree_on_times();
  void decide();
  void keep();
  [[nodiscard]] TuneReport report() const;
  /// Whether this share of the budget is spent.
  [[nodiscard]] bool past(double share) const;
  [[nodiscard]] double spent_seconds() const { return backend_->seconds() - began_; }
  [[nodiscard]] std::string budget_text() const;
  /// Memory that is too small for any candidate is no failure of the tuner.
  Status unless_full(const Status&);
  /// Everything that has no time yet.
  void drop_rest(const std::string& status, const std::string& reason);
  /// A candidate whose run failed: failed, or faulted when the device does not work any more. Then everything
  /// else is out.
  void fault(Contestant&, const Error&);
  void tell(std::string_view stage, std::size_t done, std::size_t total, const Contestant&) const;
  /// That tensors are made, for which no candidate is to blame.
  void tell_preparing() const;

  // tuner_check.cpp
  Status check_all();
  Result<Contestant*> device_reference(const Sizes&);
  Status check_slabs(const Contestant& reference);
  /// The problem of fewer query/key heads and their value heads: kernel texts do not know how many there are.
  [[nodiscard]] Problem with_heads(int heads) const;
  /// What a call left on the device, as it lies there.
  struct Outputs {
    std::map<std::string, std::vector<std::byte>> bytes;
    bool inputs_preserved = true;
  };
  struct Verdict {
    double error = 0;  ///< the largest relative one
    std::string wrong; ///< why; empty: it is right
  };
  /// None when the call failed; the row says why.
  std::optional<Outputs> run_alone(Contestant&, const Kernel::Impl&, const CallTensors&, const Sizes&);
  [[nodiscard]] Verdict compare(const CallTensors&, const Outputs&,
                                const std::map<std::string, reference::Array>& expected) const;
  /// Whether it is right; else the row says why not.
  static bool accept(Contestant&, const Verdict&);
  Result<std::map<std::string, reference::Array>> expected_outputs(const CallTensors&) const;
  [[nodiscard]] double tolerance(const std::string& output) const;
  /// One call on `tensors`; does not wait for it.
  Status call(const Kernel::Impl&, const CallTensors&, void* workspace, void* stream) const;
  /// One call with a poisoned workspace of its own and poisoned outputs; waits for it.
  Status call_alone(const Kernel::Impl&, const CallTensors&, const Sizes&) const;
  /// Device memory beside `tensors`, within the budget.
  Result<void*> allocate(const CallTensors& tensors, std::size_t others, std::size_t bytes) const;

  // tuner_time.cpp
  /// What a sample needs.
  struct Bench {
    const CallTensors& tensors;
    void* workspace;
    void* flush;
    std::size_t flush_bytes;
    double calm_us = 0; ///< that a fill of the flush buffer takes undisturbed
  };
  Status time_all();
  Result<void*> fitting_workspace(const CallTensors&, std::size_t flush_bytes);
  void calibrate(Bench&);
  Status sample(Contestant&, const Bench&);
  void time_one(Contestant&, const Bench&, double best_us);
  void finals(const Bench&);

  // tune_worker.cpp
  Status measure_in_worker();
  /// False: done. True: a candidate faulted, and what is still wanted needs another worker.
  Result<bool> take_worker_report(const std::string& json);
  void bar(Contestant&, const std::string& why);

  std::shared_ptr<Engine::Impl> engine_;
  std::shared_ptr<const Backend> backend_;
  Problem p_;
  Device device_;
  Sizes s_;
  const TuneRequest& request_;
  bool missing_only_;
  Variant standard_;            ///< the untuned choice
  TuneReport head_;             ///< without rows
  bool broken_ = false;         ///< a candidate faulted in this process
  double began_ = 0;            ///< by the clock of the backend
  std::vector<Contestant> all_; ///< in order of the estimate, rejected ones last
};

/// Tunes, waiting for other tuners of the device.
[[nodiscard]] Result<TuneReport> tune_device(const std::shared_ptr<Engine::Impl>&, const Problem&, Device,
                                             const Sizes&, const TuneRequest&, bool missing_only);

} // namespace kda
