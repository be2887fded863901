// kda_jit.h over the C++ API. Nothing throws across it.
#include "kda/engine.h"
#include "kda_jit.h"
#include <cstring>
#include <exception>
#include <fmt/format.h>
#include <new>

struct kda_engine {
  kda::Engine engine;
};
struct kda_plan {
  kda::Plan plan;
};
struct kda_kernel {
  kda::Kernel kernel;
  std::string explain;
};

namespace {

using namespace kda; // NOLINT(google-build-using-namespace): a file of its own over two APIs with equal words

std::string& last_error() {
  thread_local std::string text;
  return text;
}

int32_t set_error(int32_t code, std::string text) {
  last_error() = std::move(text);
  return code;
}
int32_t set_error(const Error& e) {
  // kda_code is ErrorCode shifted by KDA_OK.
  return set_error(static_cast<int32_t>(e.code) + 1,
                   e.context.empty() ? e.message : fmt::format("{}\n{}", e.message, e.context));
}

template <class Body>
int32_t guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return set_error(KDA_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& e) {
    return set_error(KDA_INTERNAL, e.what());
  } catch (...) {
    return set_error(KDA_INTERNAL, "unknown exception");
  }
}

template <class T>
bool sized(const T* s) {
  return s != nullptr && s->struct_size == sizeof(T);
}
int32_t wrong_size(const char* what, std::size_t size) {
  return set_error(KDA_INVALID_ARGUMENT,
                   fmt::format("{} is NULL or its struct_size is not {}: caller and library are of different "
                               "versions (kda_api_version is {})",
                               what, size, KDA_JIT_API_VERSION));
}

template <class E>
bool in_range(int32_t value, E last) {
  return value >= 0 && value <= static_cast<int32_t>(last);
}

Result<Problem> to_problem(const kda_problem& c) {
  if (!in_range(c.operation, Operation::replay) || !in_range(c.dtype, DType::fp32) ||
      !in_range(c.gate_dtype, DType::fp32) || !in_range(c.beta_dtype, DType::fp32) ||
      !in_range(c.state_dtype, DType::fp32) || !in_range(c.state_layout, StateLayout::v_k) ||
      !in_range(c.gate, GateKind::bounded_no_a) || !in_range(c.cu_seqlens_type, IndexType::int64))
    return fail(ErrorCode::invalid_argument, "kda_problem holds a value that is not of its enumeration");
  Problem p;
  p.operation = static_cast<Operation>(c.operation);
  p.heads = c.heads;
  p.value_heads = c.value_heads;
  p.key_dim = c.key_dim;
  p.value_dim = c.value_dim;
  p.dtype = static_cast<DType>(c.dtype);
  p.gate_dtype = static_cast<DType>(c.gate_dtype);
  p.beta_dtype = static_cast<DType>(c.beta_dtype);
  p.state_dtype = static_cast<DType>(c.state_dtype);
  p.state_layout = static_cast<StateLayout>(c.state_layout);
  p.gate = static_cast<GateKind>(c.gate);
  p.dt_bias = c.dt_bias != 0;
  p.beta_sigmoid = c.beta_sigmoid != 0;
  p.beta_times_two = c.beta_times_two != 0;
  p.qk_l2norm = c.qk_l2norm != 0;
  p.varlen = c.varlen != 0;
  p.cu_seqlens_type = static_cast<IndexType>(c.cu_seqlens_type);
  p.state_pool = c.state_pool != 0;
  p.every_state = c.every_state != 0;
  p.updates = c.updates != 0;
  p.tree = c.tree != 0;
  p.interior_states = c.interior_states != 0;
  p.batch_invariant = c.batch_invariant != 0;
  p.saved_interval = c.saved_interval;
  return p;
}

Sizes to_sizes(const kda_sizes& c) {
  return {c.batch, c.tokens, c.sequences};
}

/// An unknown value stays out of the enumeration and is refused by the checks of the call.
template <class E>
E to_enum(int32_t value, E last) {
  return static_cast<E>(in_range(value, last) ? value : 255);
}

Tensor to_tensor(const kda_tensor& c) {
  Tensor t;
  t.data = c.data;
  t.dtype = to_enum(c.dtype, DType::fp32);
  t.rank = c.rank;
  std::memcpy(t.shape, c.shape, sizeof t.shape);
  std::memcpy(t.stride, c.stride, sizeof t.stride);
  return t;
}

IndexTable to_table(const kda_index_table& c) {
  IndexTable t;
  t.data = c.data;
  t.dtype = to_enum(c.dtype, IndexType::int64);
  t.rank = c.rank;
  std::memcpy(t.shape, c.shape, sizeof t.shape);
  std::memcpy(t.stride, c.stride, sizeof t.stride);
  return t;
}

Args to_args(const kda_args& c) {
  Args a;
  const std::pair<const kda_tensor*, Tensor*> tensors[] = {{&c.q, &a.q},
                                                           {&c.k, &a.k},
                                                           {&c.v, &a.v},
                                                           {&c.g, &a.g},
                                                           {&c.beta, &a.beta},
                                                           {&c.A_log, &a.A_log},
                                                           {&c.dt_bias, &a.dt_bias},
                                                           {&c.initial_state, &a.initial_state},
                                                           {&c.o, &a.o},
                                                           {&c.final_state, &a.final_state},
                                                           {&c.d_o, &a.d_o},
                                                           {&c.d_final_state, &a.d_final_state},
                                                           {&c.d_q, &a.d_q},
                                                           {&c.d_k, &a.d_k},
                                                           {&c.d_v, &a.d_v},
                                                           {&c.d_g, &a.d_g},
                                                           {&c.d_beta, &a.d_beta},
                                                           {&c.d_A_log, &a.d_A_log},
                                                           {&c.d_dt_bias, &a.d_dt_bias},
                                                           {&c.d_initial_state, &a.d_initial_state},
                                                           {&c.update_u, &a.update_u},
                                                           {&c.update_k, &a.update_k},
                                                           {&c.update_decay, &a.update_decay},
                                                           {&c.interior_states, &a.interior_states}};
  for (const auto& [from, to] : tensors)
    *to = to_tensor(*from);
  a.cu_seqlens = {c.cu_seqlens.data, to_enum(c.cu_seqlens.dtype, IndexType::int64), c.cu_seqlens.size};
  a.read_slots = to_table(c.read_slots);
  a.write_slots = to_table(c.write_slots);
  a.accepted = to_table(c.accepted);
  a.parents = to_table(c.parents);
  a.interior_slots = to_table(c.interior_slots);
  a.has_initial_state = to_table(c.has_initial_state);
  if (c.interior_interval != 0) a.interior_interval = c.interior_interval;
  a.padding = to_enum(c.padding, PaddingPolicy::both);
  a.slot_error = c.slot_error;
  a.scale = c.scale;
  a.lower_bound = c.lower_bound;
  return a;
}

} // namespace

extern "C" {

int32_t kda_api_version(void) {
  return KDA_JIT_API_VERSION;
}

const char* kda_last_error(void) {
  return last_error().c_str();
}

int32_t kda_engine_create(const kda_engine_options* c, kda_engine** out) {
  return guarded([&]() -> int32_t {
    if (!sized(c)) return wrong_size("kda_engine_options", sizeof *c);
    if (out == nullptr) return set_error(KDA_INVALID_ARGUMENT, "engine is NULL");
    EngineOptions options;
    if (c->read_environment != 0) {
      auto environment = EngineOptions::from_environment();
      if (!environment) return set_error(environment.error());
      options = std::move(*environment);
    }
    if (c->cache_directory != nullptr) options.cache_directory = c->cache_directory;
    if (c->tune >= 0) {
      if (!in_range(c->tune, TuneMode::pinned))
        return set_error(KDA_INVALID_ARGUMENT, "tune is not a kda_tune_mode");
      options.tune = static_cast<TuneMode>(c->tune);
    }
    if (c->threads > 0) options.threads = c->threads;
    if (c->tune_budget_seconds > 0) options.tune_budget_seconds = c->tune_budget_seconds;
    if (c->cache_packs != nullptr) options.cache_packs = parse_paths(c->cache_packs);
    if (c->tune_reduce != nullptr)
      options.tune_reduce = [reduce = c->tune_reduce, user = c->tune_reduce_user](std::span<double> values) {
        const std::int32_t code = reduce(user, values.data(), values.size());
        return code == 0 ? Status{}
                         : fail(ErrorCode::internal, fmt::format("tune_reduce returned {}, not 0", code));
      };
    auto engine = Engine::create(std::move(options));
    if (!engine) return set_error(engine.error());
    *out = new kda_engine{std::move(*engine)};
    return KDA_OK;
  });
}
void kda_engine_destroy(kda_engine* engine) {
  delete engine;
}
int64_t kda_engine_compile_count(const kda_engine* engine) {
  return engine == nullptr ? 0 : engine->engine.compile_count();
}

int32_t kda_plan_create(kda_engine* engine, const kda_problem* problem, const char* device,
                        const kda_sizes* typical, const char* variant, kda_plan** out) {
  return kda_plan_create_within(engine, problem, device, typical, variant, kNoLimit, out);
}
int32_t kda_plan_create_within(kda_engine* engine, const kda_problem* problem, const char* device,
                               const kda_sizes* typical, const char* variant, size_t max_workspace,
                               kda_plan** out) {
  return guarded([&]() -> int32_t {
    if (!sized(problem)) return wrong_size("kda_problem", sizeof *problem);
    if (engine == nullptr || device == nullptr || typical == nullptr || out == nullptr)
      return set_error(KDA_INVALID_ARGUMENT, "engine, device, typical and plan must not be NULL");
    const auto p = to_problem(*problem);
    if (!p) return set_error(p.error());
    const auto d = parse_device(device);
    if (!d) return set_error(d.error());
    std::optional<Variant> given;
    if (variant != nullptr) {
      const auto v = parse_variant(variant);
      if (!v) return set_error(v.error());
      given = *v;
    }
    auto plan = engine->engine.plan(*p, *d, to_sizes(*typical), given, max_workspace);
    if (!plan) return set_error(plan.error());
    *out = new kda_plan{std::move(*plan)};
    return KDA_OK;
  });
}
void kda_plan_destroy(kda_plan* plan) {
  delete plan;
}

int32_t kda_describe_saved_states(const kda_problem* problem, const kda_sizes* sizes, int64_t interval,
                                  kda_saved_states* out) {
  return guarded([&]() -> int32_t {
    if (!sized(problem)) return wrong_size("kda_problem", sizeof *problem);
    if (!sized(out)) return wrong_size("kda_saved_states", sizeof *out);
    if (sizes == nullptr) return set_error(KDA_INVALID_ARGUMENT, "sizes must not be NULL");
    const auto p = to_problem(*problem);
    if (!p) return set_error(p.error());
    const auto saved = saved_states(*p, to_sizes(*sizes), interval);
    if (!saved) return set_error(saved.error());
    out->interval = saved->interval;
    out->slots = saved->slots;
    out->columns = saved->columns;
    out->bytes = saved->bytes;
    return KDA_OK;
  });
}

int32_t kda_prepare(kda_engine* engine, const kda_plan* plan, kda_kernel** out) {
  return guarded([&]() -> int32_t {
    if (engine == nullptr || plan == nullptr || out == nullptr)
      return set_error(KDA_INVALID_ARGUMENT, "engine, plan and kernel must not be NULL");
    auto kernel = engine->engine.prepare(plan->plan);
    if (!kernel) return set_error(kernel.error());
    const KernelInfo& info = kernel->info();
    std::string text = fmt::format("{} on {} ({}; image from {})", info.variant, info.device, info.choice,
                                   to_string(info.origin));
    *out = new kda_kernel{std::move(*kernel), std::move(text)};
    return KDA_OK;
  });
}
void kda_kernel_destroy(kda_kernel* kernel) {
  delete kernel;
}

const char* kda_kernel_explain(const kda_kernel* kernel) {
  return kernel == nullptr ? "" : kernel->explain.c_str();
}

int32_t kda_kernel_workspace_bytes(const kda_kernel* kernel, const kda_sizes* sizes, size_t* bytes) {
  return guarded([&]() -> int32_t {
    if (kernel == nullptr || sizes == nullptr || bytes == nullptr)
      return set_error(KDA_INVALID_ARGUMENT, "kernel, sizes and bytes must not be NULL");
    const auto needed = kernel->kernel.workspace_bytes(to_sizes(*sizes));
    if (!needed) return set_error(needed.error());
    *bytes = *needed;
    return KDA_OK;
  });
}

int32_t kda_kernel_execute(const kda_kernel* kernel, const kda_args* args, void* workspace,
                           size_t workspace_bytes, void* stream) {
  return guarded([&]() -> int32_t {
    if (kernel == nullptr) return set_error(KDA_NOT_PREPARED, "execute needs a kernel from kda_prepare");
    if (!sized(args)) return wrong_size("kda_args", sizeof *args);
    const Status status = kernel->kernel.execute(to_args(*args), workspace, workspace_bytes, stream);
    return status ? static_cast<int32_t>(KDA_OK) : set_error(status.error());
  });
}

} // extern "C"
