/* The C API from C: a decode step on the host against the recurrence written out, then what is refused and how. */
#include "kda_jit.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { T = 3, H = 2, K = 16, V = 16 };
static int failures = 0;

static void expect(int ok, const char* what) {
  if (ok) return;
  ++failures;
  fprintf(stderr, "FAILED: %s (last error: %s)\n", what, kda_last_error());
}

static kda_tensor tensor(float* data, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
  kda_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = KDA_FP32;
  t.rank = rank;
  t.shape[0] = a, t.shape[1] = b, t.shape[2] = c, t.shape[3] = d;
  return t;
}

/* S <- diag(e^g) S; u = beta (v - S^T k); S <- S + k u^T; o = K^-1/2 S^T q. */
static void recurrence(const float* q, const float* k, const float* v, const float* g, const float* beta, float* o) {
  static double S[H][K][V];
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      for (int j = 0; j < V; ++j) {
        const int row = (t * H + h) * K;
        double read = 0, out = 0;
        for (int i = 0; i < K; ++i) read += (S[h][i][j] *= exp(g[row + i])) * k[row + i];
        for (int i = 0; i < K; ++i) out += (S[h][i][j] += k[row + i] * beta[t * H + h] * (v[row + j] - read)) * q[row + i];
        o[row + j] = (float)(out / sqrt((double)K));
      }
}

int main(void) {
  static _Alignas(64) float q[T * H * K], k[T * H * K], v[T * H * V], g[T * H * K], beta[T * H], o[T * H * V], want[T * H * V];
  for (int i = 0; i < T * H * K; ++i) {
    q[i] = sinf(i * 1.3f), k[i] = 0.25f * cosf(i * 0.7f), v[i] = sinf(i * 0.37f + 1), g[i] = -0.1f * (1 + (i % 7)), o[i] = NAN;
  }
  for (int i = 0; i < T * H; ++i) beta[i] = 0.2f + 0.1f * i;

  kda_engine_options options;
  memset(&options, 0, sizeof options);
  kda_engine* engine = NULL;
  expect(kda_engine_create(&options, &engine) == KDA_INVALID_ARGUMENT, "a struct without its size is refused");
  options.struct_size = sizeof options;
  options.cache_directory = ""; /* memory only */
  options.cache_packs = "absent.kdapack:"; /* costs a warning, not the engine */
  options.tune = -1;
  expect(kda_engine_create(&options, &engine) == KDA_OK, "engine");

  kda_problem problem;
  memset(&problem, 0, sizeof problem);
  problem.struct_size = sizeof problem;
  problem.operation = KDA_RECURRENT;
  problem.heads = problem.value_heads = H;
  problem.key_dim = K, problem.value_dim = V;
  problem.dtype = problem.gate_dtype = problem.beta_dtype = problem.state_dtype = KDA_FP32;
  const kda_sizes sizes = {1, T, 1};
  kda_plan* plan = NULL;
  problem.key_dim = 17;
  expect(kda_plan_create(engine, &problem, "host", &sizes, NULL, &plan) == KDA_INVALID_ARGUMENT, "K = 17 is refused");
  expect(strstr(kda_last_error(), "multiples of 4") != NULL, "the error says what is supported");
  problem.key_dim = K;
  expect(kda_plan_create(engine, &problem, "moon", &sizes, NULL, &plan) == KDA_INVALID_ARGUMENT, "an unknown device is refused");
  const int32_t planned = kda_plan_create(engine, &problem, "host", &sizes, NULL, &plan);
  expect(planned == KDA_OK, "plan");
  kda_kernel* kernel = NULL;
  expect(planned == KDA_OK && kda_prepare(engine, plan, &kernel) == KDA_OK, "prepare");
  kda_plan_destroy(plan);
  if (kernel != NULL) {
    size_t bytes = 1;
    expect(kda_kernel_workspace_bytes(kernel, &sizes, &bytes) == KDA_OK && bytes == 0, "the host needs no workspace");
    kda_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.q = tensor(q, 4, 1, T, H, K), args.k = tensor(k, 4, 1, T, H, K), args.v = tensor(v, 4, 1, T, H, V);
    args.g = tensor(g, 4, 1, T, H, K), args.beta = tensor(beta, 3, 1, T, H, 0), args.o = tensor(o, 4, 1, T, H, V);
    expect(kda_kernel_execute(kernel, &args, NULL, 0, NULL) == KDA_OK, "execute");
    recurrence(q, k, v, g, beta, want);
    double error = 0, norm = 0;
    for (int i = 0; i < T * H * V; ++i) error += pow(o[i] - want[i], 2), norm += pow(want[i], 2);
    expect(sqrt(error / norm) < 1e-5, "o agrees with the recurrence");
    args.k = tensor(k, 4, 1, T, H, K + 4);
    expect(kda_kernel_execute(kernel, &args, NULL, 0, NULL) == KDA_INVALID_ARGUMENT, "a wrong shape is refused");
    args.struct_size = 8;
    expect(kda_kernel_execute(kernel, &args, NULL, 0, NULL) == KDA_INVALID_ARGUMENT, "a foreign struct is refused");
    kda_kernel_destroy(kernel);
  }
  kda_saved_states saved;
  memset(&saved, 0, sizeof saved);
  expect(kda_describe_saved_states(&problem, &sizes, 64, &saved) == KDA_INVALID_ARGUMENT, "a struct without its size is refused");
  saved.struct_size = sizeof saved;
  const kda_sizes longer = {1, 130, 1};
  expect(kda_describe_saved_states(&problem, &longer, 64, &saved) == KDA_OK && saved.slots == 2 && saved.bytes == 2 * H * K * V * 4 + 2 * 4,
         "what a forward saves");
  expect(kda_plan_create_within(engine, &problem, "host", &sizes, NULL, 0, &plan) == KDA_OK, "the host fits any limit");
  kda_plan_destroy(plan);
  kda_engine_destroy(engine);
  printf("%s\n", failures == 0 ? "capi ok" : "capi failed");
  return failures != 0;
}
