// kda-jit check: every golden case on a device, forward and every gradient, against float64.
#include "command.h"
#include "kda/case_io.h"
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kda::tools {
namespace {

struct Options {
  std::string golden, device, dtype;
  bool json = false;
};

struct Row {
  std::string name, operation, variant, tensor, fault;
  double error = 0, limit = 0;
  [[nodiscard]] bool good() const { return fault.empty() && error <= limit; }
};

/// fp32 arithmetic, or 16-bit operands of tensor cores with fp32 accumulation. Sums over all tokens and gates
/// are the hardest.
double limit(const std::string& tensor, DType dtype) {
  const bool gradient = tensor.size() > 1 && tensor[0] == 'd';
  if (dtype == DType::fp32) return 2e-5;
  if (tensor == "o") return 5e-3;
  if (!gradient) return 4e-3;
  return tensor == "dg" || tensor == "dA_log" || tensor == "dbeta" ? 2e-2 : 1e-2;
}

class Check {
public:
  Check(const Engine& engine, Device device, std::optional<DType> dtype)
      : engine_(engine), device_(device),
        dtype_(dtype.value_or(device.kind == Device::Kind::host ? DType::fp32 : DType::bf16)) {}

  void file(const std::filesystem::path& path) {
    const auto c = read_case(path);
    if (!c) {
      rows.push_back({path.stem().string(), "read", "", "", c.error().message});
      return;
    }
    for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward}) {
      Problem p = c->problem;
      p.operation = operation;
      p.dtype = p.gate_dtype = p.beta_dtype = dtype_;
      p.state_dtype = DType::fp32;
      if (const Status ok = one(*c, p, path.stem().string()); !ok)
        rows.push_back({path.stem().string(), to_string(operation), "", "", ok.error().message});
    }
  }

  std::vector<Row> rows;

private:
  Status one(const Case& c, const Problem& p, const std::string& name) {
    const auto plan = engine_.plan(p, device_, c.sizes);
    if (!plan) return tl::unexpected(plan.error());
    const auto call = DeviceCase::upload(engine_, device_, c, p);
    if (!call) return tl::unexpected(call.error());
    if (Status ok = engine_.run(p, device_, c.sizes, call->args()); !ok) return ok;
    for (const std::string& tensor : call->output_names()) {
      const auto got = call->output(tensor);
      if (!got) return tl::unexpected(got.error());
      Row row{name, to_string(p.operation), to_string(plan->variant()), tensor, "", 0, limit(tensor, dtype_)};
      row.error = reference::relative_error(*got, values(c, tensor));
      if (!std::isfinite(row.error)) row.fault = "not finite";
      rows.push_back(std::move(row));
    }
    return {};
  }

  const Engine& engine_;
  Device device_;
  DType dtype_;
};

void print(const std::vector<Row>& rows, bool json) {
  if (json) {
    nlohmann::json out = nlohmann::json::array();
    for (const Row& r : rows)
      out.push_back({{"case", r.name},
                     {"operation", r.operation},
                     {"variant", r.variant},
                     {"tensor", r.tensor},
                     {"error", std::isfinite(r.error) ? nlohmann::json(r.error) : nlohmann::json()},
                     {"limit", r.limit},
                     {"fault", r.fault},
                     {"good", r.good()}});
    fmt::print("{}\n", nlohmann::json{{"schema", 1}, {"rows", out}}.dump(1));
    return;
  }
  std::vector<std::vector<std::string>> table{
      {"case", "operation", "tensor", "error", "limit", "", "variant"}};
  for (const Row& r : rows)
    table.push_back({r.name, r.operation, r.tensor, fmt::format("{:.2e}", r.error),
                     fmt::format("{:.0e}", r.limit), r.good() ? "ok" : "FAIL " + r.fault, r.variant});
  print_table(table, {3, 4});
}

int check(const Options& o) {
  const auto engine = make_engine_with_emulator();
  if (!engine) return report_error(engine.error());
  const auto device = o.device.empty() ? Result<Device>(engine->best_device()) : parse_device(o.device);
  if (!device) return report_error(device.error());
  std::optional<DType> dtype;
  if (!o.dtype.empty()) {
    const auto parsed = parse_dtype(o.dtype);
    if (!parsed) return report_error(parsed.error());
    dtype = *parsed;
  }
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(o.golden, error))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  if (error || files.empty())
    return report_error(
        {ErrorCode::invalid_argument, fmt::format("no .safetensors files in {}", o.golden), {}});
  std::sort(files.begin(), files.end());
  Check all(*engine, *device, dtype);
  Progress progress("check", static_cast<std::int64_t>(files.size()));
  for (const auto& file : files) {
    all.file(file);
    progress.step(file.stem().string());
  }
  print(all.rows, o.json);
  const auto bad = std::count_if(all.rows.begin(), all.rows.end(), [](const Row& r) { return !r.good(); });
  if (!o.json)
    fmt::print("{} cases on {}: {} tensors, {} bad\n", files.size(), to_string(*device), all.rows.size(),
               bad);
  return bad == 0 ? kOk : kFailed;
}

} // namespace

void add_check(CLI::App& app, int& exit) {
  auto* const sub =
      app.add_subcommand("check", "Run every golden case on a device and compare with its float64 results");
  auto o = std::make_shared<Options>();
  sub->add_option("--golden", o->golden, "directory of .safetensors files")->required();
  sub->add_option("--device", o->device, "host, cuda:N or emulator (default: the best there is)");
  sub->add_option("--dtype", o->dtype,
                  "tensors as bf16, fp16 or fp32 (default: fp32 on the host, else bf16)");
  sub->add_flag("--json", o->json, "JSON on stdout");
  sub->footer("Forward, token recurrence and every gradient. Exit code 1 when a tensor is beyond its limit.");
  sub->callback([o, &exit] { exit = check(*o); });
}

} // namespace kda::tools
