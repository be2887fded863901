"""Thin ctypes binding of libkda_jit (runtime/include/kda_jit.h). No logic: everything is decided by the library.

    import kda_jit
    engine = kda_jit.Engine()
    kernel = engine.prepare(dict(operation="forward", heads=32, value_heads=32, gate="bounded", ...), "cuda:0", (1, 8192, 1))
    kernel.execute(dict(q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, o=o), workspace, stream)

Tensors are PyTorch tensors, or anything with data_ptr(), shape, stride() and dtype. The library is found through
KDA_JIT_LIBRARY, beside this file, or by the loader.
"""

import ctypes as C
import os
import pathlib

OPERATIONS = ("forward", "backward", "recurrent", "gate", "gate_backward", "replay")
DTYPES = ("bf16", "fp16", "fp32")
INDEX_TYPES = ("int32", "int64")
STATE_LAYOUTS = ("k_v", "v_k")
PADDING_POLICIES = ("none", "negative", "zero", "both")
GATES = ("log_e", "log2", "softplus", "bounded", "bounded_no_a")
TUNE = ("off", "cached", "on", "force", "pinned")
TENSORS = ("q k v g beta A_log dt_bias initial_state o final_state d_o d_final_state d_q d_k d_v d_g d_beta d_A_log "
           "d_dt_bias d_initial_state").split()
UPDATES = ("update_u", "update_k", "update_decay")
TABLES = ("read_slots", "write_slots", "accepted", "parents")
FORWARD_TABLES = ("interior_slots", "has_initial_state")
API_VERSION = 5


class KdaError(RuntimeError):
    """A call that the library refused; `code` is a kda_code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class _EngineOptions(C.Structure):
    _fields_ = [("struct_size", C.c_uint32), ("read_environment", C.c_int32), ("cache_directory", C.c_char_p),
                ("tune", C.c_int32), ("threads", C.c_int32), ("tune_budget_seconds", C.c_double),
                ("cache_packs", C.c_char_p), ("tune_reduce", C.c_void_p), ("tune_reduce_user", C.c_void_p)]


_TuneReduce = C.CFUNCTYPE(C.c_int32, C.c_void_p, C.POINTER(C.c_double), C.c_size_t)


_PROBLEM = ("operation heads value_heads key_dim value_dim dtype gate_dtype beta_dtype state_dtype state_layout gate dt_bias "
             "beta_sigmoid beta_times_two qk_l2norm varlen cu_seqlens_type state_pool every_state updates tree interior_states batch_invariant "
             "saved_interval").split()


class _Problem(C.Structure):
    _fields_ = [("struct_size", C.c_uint32)] + [(name, C.c_int32) for name in _PROBLEM]


class _Sizes(C.Structure):
    _fields_ = [("batch", C.c_int64), ("tokens", C.c_int64), ("sequences", C.c_int64)]


class _Tensor(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("rank", C.c_int32), ("shape", C.c_int64 * 4),
                ("stride", C.c_int64 * 4)]


class _IndexTensor(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("reserved", C.c_int32), ("size", C.c_int64)]


class _IndexTable(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("rank", C.c_int32), ("shape", C.c_int64 * 2), ("stride", C.c_int64 * 2)]


class _Args(C.Structure):
    _fields_ = ([("struct_size", C.c_uint32), ("scale", C.c_float), ("lower_bound", C.c_float), ("padding", C.c_int32)] +
                [(name, _Tensor) for name in TENSORS] + [("cu_seqlens", _IndexTensor)] + [(name, _Tensor) for name in UPDATES] + [(name, _IndexTable) for name in TABLES] +
                [("slot_error", C.c_void_p), ("interior_states", _Tensor)] + [(name, _IndexTable) for name in FORWARD_TABLES] +
                [("interior_interval", C.c_int64)])


class _SavedStates(C.Structure):
    _fields_ = [("struct_size", C.c_uint32)] + [(name, C.c_int64) for name in ("interval", "slots", "columns", "bytes")]


def _load():
    here = pathlib.Path(__file__).parent / "libkda_jit.so"
    path = os.environ.get("KDA_JIT_LIBRARY") or (str(here) if here.exists() else "libkda_jit.so")
    lib = C.CDLL(path)
    lib.kda_last_error.restype = C.c_char_p
    lib.kda_kernel_explain.restype = C.c_char_p
    lib.kda_engine_compile_count.restype = C.c_int64
    for name in ("kda_engine_destroy", "kda_plan_destroy", "kda_kernel_destroy"):
        getattr(lib, name).restype = None
    if lib.kda_api_version() != API_VERSION:
        raise ImportError(f"{path} has API version {lib.kda_api_version()}, this binding needs {API_VERSION}")
    return lib


_lib = _load()


def _check(code):
    if code:
        raise KdaError(code, _lib.kda_last_error().decode(errors="replace"))


_TORCH_DTYPES = {"torch.bfloat16": 0, "torch.float16": 1, "torch.float32": 2}


def _tensor(t):
    out = _Tensor()
    if t is None:
        return out
    name = str(t.dtype)
    if name not in _TORCH_DTYPES:
        raise TypeError(f"dtype {name} is not supported; use bfloat16, float16 or float32")
    if not any(t.stride()) and t.numel() > 1:  # all 0 means contiguous to the library
        raise ValueError("a tensor that repeats one element (expand) must be made contiguous first")
    out.data, out.dtype, out.rank = t.data_ptr(), _TORCH_DTYPES[name], len(t.shape)
    for i, (size, stride) in enumerate(zip(t.shape, t.stride())):
        out.shape[i], out.stride[i] = size, stride
    return out


_TORCH_INDEX_TYPES = {"torch.int32": 0, "torch.int64": 1}


def _index_type(name, t):
    if str(t.dtype) not in _TORCH_INDEX_TYPES:
        raise TypeError(f"{name} is {t.dtype}; use int32 or int64")
    return _TORCH_INDEX_TYPES[str(t.dtype)]


def _table(name, t):
    if t is None:
        return _IndexTable()
    if len(t.shape) not in (1, 2):
        raise TypeError(f"{name} has {len(t.shape)} dimensions, expected 1 or 2")
    return _IndexTable(t.data_ptr(), _index_type(name, t), len(t.shape), (C.c_int64 * 2)(*t.shape), (C.c_int64 * 2)(*t.stride()))


def _problem(problem):
    spelled = dict(operation=OPERATIONS, dtype=DTYPES, gate_dtype=DTYPES, beta_dtype=DTYPES, state_dtype=DTYPES,
                   state_layout=STATE_LAYOUTS, gate=GATES, cu_seqlens_type=INDEX_TYPES)
    fields = dict(key_dim=128, value_dim=128, dtype="bf16", state_dtype="fp32", cu_seqlens_type="int64", **{
        name: problem.get("dtype", "bf16") for name in ("gate_dtype", "beta_dtype") if name not in problem}) | problem
    unknown = set(fields) - set(_PROBLEM)
    if unknown:
        raise TypeError(f"unknown problem field {', '.join(sorted(unknown))}")
    p = _Problem(C.sizeof(_Problem))
    for name, value in fields.items():
        setattr(p, name, spelled[name].index(value) if name in spelled else int(value))
    return p


def saved_states(problem, sizes, interval):
    """What a forward saves for the backward with saved_interval=interval: slots of interior_states, columns of interior_slots,
    and the bytes of both."""
    saved = _SavedStates(C.sizeof(_SavedStates))
    _check(_lib.kda_describe_saved_states(C.byref(_problem(problem)), C.byref(_Sizes(*sizes)), C.c_int64(interval), C.byref(saved)))
    return {name: getattr(saved, name) for name in ("interval", "slots", "columns", "bytes")}


class Engine:
    """Plans, compiles, caches and tunes. Arguments left at None come from the KDA_JIT_ environment or the defaults.

    tune_reduce: of ranks that must choose alike; gets a list of floats and returns the largest of each over all ranks. What it raises,
    prepare raises."""

    def __init__(self, cache_directory=None, tune=None, threads=0, tune_budget_seconds=0.0, cache_packs=None, tune_reduce=None):
        options = _EngineOptions(C.sizeof(_EngineOptions), 1, None if cache_directory is None else os.fsencode(cache_directory),
                                 -1 if tune is None else TUNE.index(tune), threads, tune_budget_seconds,
                                 None if cache_packs is None else b":".join(map(os.fsencode, cache_packs)))
        self._reduce_error = None
        if tune_reduce is not None:
            self._tune_reduce = _TuneReduce(lambda _, values, n: self._reduce(tune_reduce, values, n))  # as long as the engine
            options.tune_reduce = C.cast(self._tune_reduce, C.c_void_p)
        self._handle = C.c_void_p()
        _check(_lib.kda_engine_create(C.byref(options), C.byref(self._handle)))

    def __del__(self):
        if getattr(self, "_handle", None):
            _lib.kda_engine_destroy(self._handle)

    def _reduce(self, tune_reduce, values, n):
        try:
            most = list(tune_reduce(values[:n]))
            if len(most) != n:
                raise ValueError(f"tune_reduce returned {len(most)} values of {n}")
            for i, value in enumerate(most):
                values[i] = value
            return 0
        except BaseException as error:  # must not pass through C
            self._reduce_error = error
            return 1

    def compile_count(self):
        return _lib.kda_engine_compile_count(self._handle)

    def prepare(self, problem, device, sizes, variant=None, max_workspace=None):
        """problem: the fields of kda::Problem by name, enums as strings; sizes: (batch, tokens, sequences). max_workspace: bytes that
        the kernel may ask for at these sizes."""
        p = _problem(problem)
        plan, kernel = C.c_void_p(), C.c_void_p()
        most = C.c_size_t(-1 if max_workspace is None else max_workspace)
        _check(_lib.kda_plan_create_within(self._handle, C.byref(p), device.encode(), C.byref(_Sizes(*sizes)),
                                           None if variant is None else variant.encode(), most, C.byref(plan)))
        try:
            _check(_lib.kda_prepare(self._handle, plan, C.byref(kernel)))
        finally:
            _lib.kda_plan_destroy(plan)
        kernel, error, self._reduce_error = Kernel(kernel), self._reduce_error, None
        if error is not None:
            raise error
        return kernel


class Kernel:
    def __init__(self, handle):
        self._handle = handle

    def __del__(self):
        _lib.kda_kernel_destroy(self._handle)

    def explain(self):
        return _lib.kda_kernel_explain(self._handle).decode()

    def workspace_bytes(self, sizes):
        size = C.c_size_t()
        _check(_lib.kda_kernel_workspace_bytes(self._handle, C.byref(_Sizes(*sizes)), C.byref(size)))
        return size.value

    def bind(self, tensors, cu_seqlens=None, scale=0.0, lower_bound=-5.0, padding="none", slot_error=None, interior_interval=64, **tables):
        """The C arguments of a call; keep the tensors alive as long as the result is used. With a state pool: a padding
        policy, slot_error (one int32) and the tables read_slots, write_slots, accepted, parents: int32 or int64, of any strides.
        With interior states, kept or saved: the tensor interior_states, its interval and the table interior_slots. Also: has_initial_state."""
        unknown = set(tensors) - set(TENSORS) - set(UPDATES) - {"interior_states"}
        if unknown:
            raise TypeError(f"unknown tensor {', '.join(sorted(unknown))}")
        unknown = set(tables) - set(TABLES) - set(FORWARD_TABLES)
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
        args = _Args(C.sizeof(_Args), scale, lower_bound, PADDING_POLICIES.index(padding), interior_interval=interior_interval)
        for name, t in tensors.items():
            setattr(args, name, _tensor(t))
        if cu_seqlens is not None:
            if cu_seqlens.numel() > 1 and cu_seqlens.stride() != (1,):
                raise ValueError("cu_seqlens must be contiguous")
            args.cu_seqlens = _IndexTensor(cu_seqlens.data_ptr(), _index_type("cu_seqlens", cu_seqlens), 0, cu_seqlens.numel())
        for name, t in tables.items():
            setattr(args, name, _table(name, t))
        if slot_error is not None:
            if str(slot_error.dtype) != "torch.int32" or slot_error.numel() < 1:
                raise TypeError("slot_error must be one int32")
            args.slot_error = slot_error.data_ptr()
        return args

    def launch(self, args, workspace_pointer, workspace_bytes, stream=0):
        _check(_lib.kda_kernel_execute(self._handle, C.byref(args), C.c_void_p(workspace_pointer), C.c_size_t(workspace_bytes),
                                       C.c_void_p(stream)))

    def execute(self, tensors, workspace, stream=0, **options):
        """workspace: a byte tensor of at least workspace_bytes, or None when that is 0."""
        pointer, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel() * workspace.element_size())
        self.launch(self.bind(tensors, **options), pointer, size, stream)
