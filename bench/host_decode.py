#!/usr/bin/env python3
"""The host's recurrence beside ONNX Runtime's LinearAttention (CPU), H=32, K=V=128, fp32, T=1 and T=4 tokens a sequence. Writes JSON.

    KDA_JIT_LIBRARY=build/libkda_jit.so PYTHONPATH=python python3 bench/host_decode.py --output host_decode.json

Needs numpy; onnxruntime and onnx (pip install onnxruntime onnx) where the peer is wanted. One thread on one core for both, interleaved,
the minimum and the median over rounds; ours updates the state in place, the peer copies it. Both are checked against float64 first.
Precomputed decay and beta, no norm: what the peer can do. --competitor also runs two threads while another process keeps one core busy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

import kda_jit

H, D = 32, 128


class Array:
    """What the binding needs of a tensor."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, "torch.float32"

    def stride(self):
        return tuple(s // 4 for s in self.x.strides)

    def numel(self):
        return self.x.size

    def data_ptr(self):
        return self.x.ctypes.data


def aligned(x):
    """A copy whose address is a multiple of 64, as an allocator of tensors gives it."""
    raw = np.empty(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start:start + x.nbytes].view(np.float32).reshape(x.shape)
    out[...] = x
    return out


def inputs(tokens, seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    x = dict(q=unit(normal(1, tokens, H, D)), k=unit(normal(1, tokens, H, D)), v=normal(1, tokens, H, D),
             g=-np.abs(normal(1, tokens, H, D)), beta=1 / (1 + np.exp(-normal(1, tokens, H))))
    return {name: aligned(a.astype(np.float32)) for name, a in x.items()}, 0.5 * normal(1, H, D, D)


def reference(x, state):
    S, o = state[0].astype(np.float64), []
    for t in range(x["q"].shape[1]):
        q, k, v, g, beta = (x[name][0, t].astype(np.float64) for name in ("q", "k", "v", "g", "beta"))
        S = S * np.exp(g)[:, :, None]
        u = beta[:, None] * (v - np.einsum("hkv,hk->hv", S, k))
        S = S + k[:, :, None] * u[:, None, :]
        o.append(D ** -0.5 * np.einsum("hkv,hk->hv", S, q))
    return np.stack(o), S


def error(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def ours(x, state, layout, threads, variant):
    turned = state if layout == "k_v" else state.transpose(0, 1, 3, 2)
    problem = dict(operation="recurrent", heads=H, value_heads=H, key_dim=D, value_dim=D, dtype="fp32", gate="log_e", state_layout=layout)
    engine = kda_jit.Engine(cache_directory="", tune="off", threads=threads)
    kernel = engine.prepare(problem, "host", (1, x["q"].shape[1], 1), variant)
    S, o = aligned(np.ascontiguousarray(turned)), aligned(np.empty_like(x["v"]))
    args = kernel.bind({name: Array(a) for name, a in (x | dict(o=o, initial_state=S, final_state=S)).items()})
    call = lambda: kernel.launch(args, 0, 0)
    call()
    want_o, want_S = reference(x, state)
    errors = (error(o[0], want_o), error(S[0] if layout == "k_v" else S[0].transpose(0, 2, 1), want_S))
    return call, dict(variant=kernel.explain(), o_error=errors[0], state_error=errors[1], right=max(errors) < 2e-6), (engine, kernel, S, o)


def peer(x, state, threads):
    import onnx
    import onnxruntime
    tokens, helper = x["q"].shape[1], onnx.helper
    shapes = dict(query=[1, tokens, H * D], key=[1, tokens, H * D], value=[1, tokens, H * D], past_state=[1, H, D, D],
                  decay=[1, tokens, H * D], beta=[1, tokens, H])
    tensor = lambda name, shape: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    node = helper.make_node("LinearAttention", list(shapes), ["output", "present_state"], domain="com.microsoft", q_num_heads=H,
                            kv_num_heads=H, update_rule="gated_delta", scale=D ** -0.5)
    graph = helper.make_graph([node], "g", [tensor(*item) for item in shapes.items()],
                              [tensor("output", [1, tokens, H * D]), tensor("present_state", [1, H, D, D])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    flat = dict(query=x["q"], key=x["k"], value=x["v"], decay=x["g"], beta=x["beta"], past_state=state)
    bound = session.io_binding()
    for name, shape in shapes.items():
        bound.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(flat[name].reshape(shape))))
    for name in ("output", "present_state"):
        shape = [1, tokens, H * D] if name == "output" else shapes["past_state"]
        bound.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32)))
    call = lambda: session.run_with_iobinding(bound)
    call()
    o, S = (np.asarray(t.numpy()) for t in bound.get_outputs())
    want_o, want_S = reference(x, state)
    errors = (error(o.reshape(tokens, H, D), want_o), error(S[0], want_S))
    return call, dict(version=onnxruntime.__version__, o_error=errors[0], state_error=errors[1], right=max(errors) < 1e-4), session


def time_us(call, seconds):
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1e3)
    return samples


def measure(tokens, threads, options):
    x, state = inputs(tokens, options.seed)
    rows, calls, keep = {}, {}, []
    for layout in ("v_k", "k_v"):
        for variant in [None] + list(filter(None, options.variants.split(";"))):
            name = f"ours {layout}" + (f" {variant}" if variant else "")
            calls[name], rows[name], kept = ours(x, state, layout, threads, variant)
            keep.append(kept)
    try:
        calls["onnxruntime"], rows["onnxruntime"], kept = peer(x, state, threads)
        keep.append(kept)
    except ImportError as missing:  # a peer that is not there is reported, not required
        print(f"onnxruntime: not importable ({missing})", file=sys.stderr)
    samples = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            samples[name] += time_us(call, options.seconds)
    for name, all_us in samples.items():
        rows[name] |= dict(min_us=round(min(all_us), 1), median_us=round(statistics.median(all_us), 1))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokens", default="1,4")
    parser.add_argument("--variants", default="", help="semicolon separated variants of ours to time besides the default choice")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a subject in a round")
    parser.add_argument("--competitor", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    report = dict(numpy=np.__version__, heads=H, dim=D, seed=options.seed, cases=[])
    runs = [(1, False)] + ([(2, False), (2, True)] if options.competitor and len(cores) > 1 else [])
    right = True
    for threads, contested in runs:
        os.sched_setaffinity(0, cores[-threads:])
        busy = subprocess.Popen(["taskset", "-c", str(cores[-1]), sys.executable, "-c", "while True: pass"]) if contested else None
        try:
            for tokens in (int(t) for t in options.tokens.split(",")):
                rows = measure(tokens, threads, options)
                report["cases"].append(dict(tokens=tokens, threads=threads, competitor=contested, rows=rows))
                for name, row in rows.items():
                    right = right and row["right"]
                    print(f"T{tokens} threads {threads}{' contested' if contested else ''}  {name:24} min {row['min_us']:8.1f}  median "
                          f"{row['median_us']:8.1f} us  {'right' if row['right'] else 'WRONG'}  o {row['o_error']:.1e} state {row['state_error']:.1e}  "
                          f"{row.get('variant', row.get('version', ''))[:60]}")
        finally:
            if busy:
                busy.kill()
    with open(options.output, "w") as out:
        json.dump(report, out, indent=1)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
