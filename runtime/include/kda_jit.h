/* The C API of kda-jit: plan, prepare, workspace size, execute, for every operation.
 *
 * Every struct starts with its size, so that a library and a caller of different versions refuse each other
 * clearly instead of misreading fields. Functions answer KDA_OK or a code; kda_last_error() has the sentence,
 * per thread. Nothing throws. Pointers are device pointers of the plan's device (host pointers for "host");
 * strides are 64-bit, in elements, all 0 meaning contiguous. Handles may be shared between threads; a kernel
 * outlives its plan and engine safely. */
#ifndef KDA_JIT_H
#define KDA_JIT_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KDA_JIT_API_VERSION 5

typedef enum kda_code {
  KDA_OK = 0,
  KDA_INVALID_ARGUMENT = 1,
  KDA_NOT_PREPARED = 2,
  KDA_COMPILE_FAILED = 3,
  KDA_LOAD_FAILED = 4,
  KDA_DEVICE_ERROR = 5,
  KDA_UNAVAILABLE = 6,
  KDA_OUT_OF_MEMORY = 7,
  KDA_IO_ERROR = 8,
  KDA_INTERNAL = 9
} kda_code;

typedef enum kda_operation {
  KDA_FORWARD = 0,
  KDA_BACKWARD = 1,
  KDA_RECURRENT = 2,
  KDA_GATE = 3,
  KDA_GATE_BACKWARD = 4,
  KDA_REPLAY = 5
} kda_operation;
typedef enum kda_dtype { KDA_BF16 = 0, KDA_FP16 = 1, KDA_FP32 = 2 } kda_dtype;
typedef enum kda_index_type { KDA_INT32 = 0, KDA_INT64 = 1 } kda_index_type;
typedef enum kda_state_layout { KDA_STATE_K_V = 0, KDA_STATE_V_K = 1 } kda_state_layout;
typedef enum kda_gate_kind {
  KDA_GATE_LOG_E = 0,
  KDA_GATE_LOG2 = 1,
  KDA_GATE_SOFTPLUS = 2,
  KDA_GATE_BOUNDED = 3,
  KDA_GATE_BOUNDED_NO_A = 4
} kda_gate_kind;
typedef enum kda_tune_mode {
  KDA_TUNE_OFF = 0,
  KDA_TUNE_CACHED = 1,
  KDA_TUNE_ON = 2,
  KDA_TUNE_FORCE = 3,
  KDA_TUNE_PINNED = 4 /* the pins of KDA_JIT_TUNE_PINS: read_environment must not be 0 */
} kda_tune_mode;

typedef enum kda_padding_policy {
  KDA_PADDING_NONE = 0,
  KDA_PADDING_NEGATIVE = 1,
  KDA_PADDING_ZERO = 2,
  KDA_PADDING_BOTH = 3
} kda_padding_policy;

typedef struct kda_engine kda_engine;
typedef struct kda_plan kda_plan;
typedef struct kda_kernel kda_kernel;

/* Of ranks that must choose alike: puts in place of each of n values its largest over all ranks, and returns
 * 0; anything else means that it could not, and leaves the untuned choice with a warning. Called on the
 * thread that prepares. */
typedef int32_t (*kda_tune_reduce)(void* user, double* values, size_t n);

typedef struct kda_engine_options {
  uint32_t struct_size;
  int32_t read_environment;    /* not 0: start from the KDA_JIT_ variables; fields below that are set override
                                  them */
  const char* cache_directory; /* NULL: the default; "": memory only */
  int32_t tune;                /* kda_tune_mode, or -1: the default */
  int32_t threads;             /* 0: hardware threads */
  double tune_budget_seconds;  /* 0: the default */
  const char* cache_packs;     /* files of `kda-jit cache pack`, separated by colons; NULL: the default */
  kda_tune_reduce tune_reduce; /* NULL: this process chooses for itself */
  void* tune_reduce_user;      /* what tune_reduce gets */
} kda_engine_options;

/* The fields of kda::Problem. */
typedef struct kda_problem {
  uint32_t struct_size;
  int32_t operation, heads, value_heads, key_dim, value_dim;
  int32_t dtype, gate_dtype, beta_dtype, state_dtype, state_layout;
  int32_t gate, dt_bias, beta_sigmoid, beta_times_two, qk_l2norm, varlen, cu_seqlens_type;
  int32_t state_pool, every_state, updates, tree, interior_states, batch_invariant;
  int32_t saved_interval;
} kda_problem;

typedef struct kda_sizes {
  int64_t batch, tokens, sequences;
} kda_sizes;

typedef struct kda_tensor {
  void* data; /* NULL: absent */
  int32_t dtype, rank;
  int64_t shape[4], stride[4];
} kda_tensor;

typedef struct kda_index_tensor {
  const void* data;
  int32_t dtype, reserved;
  int64_t size;
} kda_index_tensor;

/* Whole numbers, [N] or [N, columns]; strides are taken as they are. */
typedef struct kda_index_table {
  const void* data; /* NULL: absent */
  int32_t dtype, rank;
  int64_t shape[2], stride[2];
} kda_index_table;

/* The fields of kda::Args; shapes and dtypes, and what the slots of a state pool mean, are described there.
 */
typedef struct kda_args {
  uint32_t struct_size;
  float scale;       /* 0: K^-1/2 */
  float lower_bound; /* of the bounded gates */
  int32_t padding;   /* kda_padding_policy, with a state pool */
  kda_tensor q, k, v, g, beta, A_log, dt_bias, initial_state, o, final_state;
  kda_tensor d_o, d_final_state, d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial_state;
  kda_index_tensor cu_seqlens;
  kda_tensor update_u, update_k, update_decay;
  kda_index_table read_slots, write_slots, accepted, parents;
  int32_t* slot_error;
  kda_tensor interior_states;
  kda_index_table interior_slots, has_initial_state;
  int64_t interior_interval; /* 0: 64 */
} kda_args;

/* The fields of kda::SavedStates. */
typedef struct kda_saved_states {
  uint32_t struct_size;
  int64_t interval, slots, columns, bytes;
} kda_saved_states;

/* KDA_JIT_API_VERSION of the library. */
int32_t kda_api_version(void);
/* The last error of this thread: one sentence, then its context. Valid until the next call on this thread. */
const char* kda_last_error(void);

int32_t kda_engine_create(const kda_engine_options* options, kda_engine** engine);
void kda_engine_destroy(kda_engine* engine);
/* Images compiled since the engine was created. */
int64_t kda_engine_compile_count(const kda_engine* engine);

/* device: "host" or "cuda:0"; variant: NULL for the tuned or modelled choice, else one line such as "chunk
 * c=64 vt=32 pw=4 sw=4 st=2". */
int32_t kda_plan_create(kda_engine* engine, const kda_problem* problem, const char* device,
                        const kda_sizes* typical, const char* variant, kda_plan** plan);
/* The same for a variant that needs a workspace of `max_workspace` bytes at most for the typical sizes. */
int32_t kda_plan_create_within(kda_engine* engine, const kda_problem* problem, const char* device,
                               const kda_sizes* typical, const char* variant, size_t max_workspace,
                               kda_plan** plan);
void kda_plan_destroy(kda_plan* plan);

/* What a forward saves for its backward with states every `interval` tokens (0: nothing), one description for
 * both plans. The caller sets struct_size. */
int32_t kda_describe_saved_states(const kda_problem* problem, const kda_sizes* sizes, int64_t interval,
                                  kda_saved_states* saved);

/* Compiles or finds, loads, and tunes when the engine's mode says so. May block. */
int32_t kda_prepare(kda_engine* engine, const kda_plan* plan, kda_kernel** kernel);
void kda_kernel_destroy(kda_kernel* kernel);
/* One line: device, variant, where the choice and the image came from. Valid as long as the kernel. */
const char* kda_kernel_explain(const kda_kernel* kernel);
int32_t kda_kernel_workspace_bytes(const kda_kernel* kernel, const kda_sizes* sizes, size_t* bytes);
/* Launch only: no allocation, no synchronisation; may be captured into a CUDA graph. stream: a CUstream, NULL
 * for the default. */
int32_t kda_kernel_execute(const kda_kernel* kernel, const kda_args* args, void* workspace,
                           size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
