#!/usr/bin/env python3
"""Ours beside fla and FlashKDA, where they can be imported, in one process, in three gate regimes. Writes JSON.

    KDA_JIT_LIBRARY=build-gpu/runtime/libkda_jit.so PYTHONPATH=python python3 bench/compare.py --output compare.json

Every case is first checked on fresh random inputs with poisoned outputs against a float64 token recurrence over a sample of
heads and the first --check tokens, with --against in full against a variant of ours as well, then timed: L2 flushed before every sample, CUDA graph for ours and eager for the peers (fla cannot
be captured), median and 10-90 % spread. Gate regimes: fast (bounded -5 on random inputs), slow (most channels -1e-4 to -0.05 a
token, a few strong), unbounded (softplus, down to -60 a token).
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time

import torch

import kda_jit

DEVICE = "cuda:0"


def inputs(batch, tokens, heads, regime, seed, dim=128):
    """q, k, v, raw gate, beta logits in bf16; A_log, dt_bias in fp32; an initial state."""
    gen = torch.Generator(device="cuda").manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, device="cuda")
    rand = lambda *shape: torch.rand(*shape, generator=gen, device="cuda")
    shape = (batch, tokens, heads, dim)
    x = {name: randn(*shape).bfloat16() for name in "qkv"}
    x["beta"] = randn(batch, tokens, heads).bfloat16()
    if regime == "fast":
        x["g"], x["A_log"], x["dt_bias"] = randn(*shape).bfloat16(), torch.log(1 + 15 * rand(heads)), torch.zeros(heads, dim, device="cuda")
    elif regime == "slow":
        x["g"], x["A_log"] = (0.5 * randn(*shape)).bfloat16(), torch.zeros(heads, device="cuda")
        x["dt_bias"] = torch.where(rand(heads, dim) < 0.05, 3 * rand(heads, dim), -11 + 6.4 * rand(heads, dim))
    else:
        x["g"], x["A_log"] = (-1 + 1.5 * randn(*shape)).bfloat16(), torch.log(1 + 15 * rand(heads))
        x["dt_bias"] = torch.zeros(heads, dim, device="cuda")
    x["initial_state"] = randn(batch, heads, dim, dim)
    return x


def activated(x, regime, h, tokens):
    raw = x["g"][:, :tokens, h].double() + x["dt_bias"][h].double()
    a = x["A_log"][h].double().exp()
    return -a * torch.nn.functional.softplus(raw) if regime == "unbounded" else -5 * torch.sigmoid(a * raw)


def reference(x, regime, h, tokens):
    """Float64 token recurrence of head h over the first `tokens` tokens; o and the state after them."""
    norm = lambda t: t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6)
    q, k = (norm(x[n][:, :tokens, h].double()) for n in "qk")
    v, beta = x["v"][:, :tokens, h].double(), torch.sigmoid(x["beta"][:, :tokens, h].double())
    decay = activated(x, regime, h, tokens).exp()
    S, o, scale = x["initial_state"][:, h].double(), [], q.shape[-1] ** -0.5
    for t in range(tokens):
        S = S * decay[:, t, :, None]
        u = beta[:, t, None] * (v[:, t] - torch.einsum("bkv,bk->bv", S, k[:, t]))
        S = S + k[:, t, :, None] * u[:, None, :]
        o.append(scale * torch.einsum("bkv,bk->bv", S, q[:, t]))
    return torch.stack(o, 1), S


def relative(a, b):
    return float("inf") if not torch.isfinite(a).all() else float((a.double() - b).norm() / b.norm())


class Timer:
    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, call, samples):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(samples):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        times.sort()
        return dict(median_us=round(statistics.median(times), 1),
                    spread_us=round(times[int(0.9 * len(times))] - times[int(0.1 * len(times))], 1))


def graphed(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call(stream.cuda_stream)
    return graph.replay, graph


def our_problem(operation, heads, regime, dim=128):
    return dict(operation=operation, heads=heads, value_heads=heads, key_dim=dim, value_dim=dim, dtype="bf16",
                gate="softplus" if regime == "unbounded" else "bounded", dt_bias=True, beta_sigmoid=True, qk_l2norm=True)


def ours_forward(engine, x, regime, variant, timer, samples, check_tokens):
    batch, tokens, heads, dim = x["q"].shape
    sizes = (batch, tokens, batch)
    kernel = engine.prepare(our_problem("forward", heads, regime, dim), DEVICE, sizes, variant)
    size = kernel.workspace_bytes(sizes)
    workspace = torch.full((max(size, 1),), 255, dtype=torch.uint8, device="cuda")
    o, state = torch.full_like(x["v"], math.nan), torch.full_like(x["initial_state"], math.nan)
    tensors = {**{n: x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")}, "o": o, "final_state": state}
    args = kernel.bind(tensors)
    call = lambda stream=0: kernel.launch(args, workspace.data_ptr(), size, stream)
    call()
    torch.cuda.synchronize()
    result = dict(variant=kernel.explain(), workspace_mb=round(size / 1e6, 1), finite=bool(torch.isfinite(o).all() and torch.isfinite(state).all()))
    errors, state_errors = [], []
    for h in sorted({0, heads // 2, heads - 1}):
        n = min(check_tokens, tokens)
        want, S = reference(x, regime, h, n)
        errors.append(relative(o[:, :n, h], want))
        if n == tokens:
            state_errors.append(relative(state[:, h], S))
    result["o_error"] = max(errors)
    if state_errors:
        result["state_error"] = max(state_errors)
    replay, keep = graphed(call)
    result |= timer(replay, samples)
    del keep
    return result, o, state


def ours_backward(engine, x, regime, variant, timer, samples, want):
    """want: fla's gradients of the same inputs, or None."""
    batch, tokens, heads, dim = x["q"].shape
    sizes = (batch, tokens, batch)
    kernel = engine.prepare(our_problem("backward", heads, regime, dim), DEVICE, sizes, variant)
    size = kernel.workspace_bytes(sizes)
    workspace = torch.full((max(size, 1),), 255, dtype=torch.uint8, device="cuda")
    grads = {"d_" + n: torch.full_like(x[n], math.nan) for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")}
    tensors = {n: x[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")}
    tensors |= {"d_o": x["do"], "d_final_state": x["dht"], **grads}
    args = kernel.bind(tensors)
    call = lambda stream=0: kernel.launch(args, workspace.data_ptr(), size, stream)
    call()
    torch.cuda.synchronize()
    result = dict(variant=kernel.explain(), workspace_mb=round(size / 1e6, 1), finite=all(bool(torch.isfinite(t).all()) for t in grads.values()))
    if want is not None:
        result["difference_to_fla"] = {n: float((grads[n].double() - want[n].double()).norm() / want[n].double().norm()) for n in want}
    replay, keep = graphed(call)
    result |= timer(replay, samples)
    del keep
    return result


def compile_one(job):
    problem, sizes, variant = job
    try:
        kda_jit.Engine(tune="off").prepare(problem, DEVICE, sizes, variant)
    except kda_jit.KdaError:
        pass  # said where it is measured


def compile_all(cases, regimes, variants):
    """Forwards into the cache on disk, by many processes: a compiler compiles one kernel at a time. Before this process uses the GPU."""
    jobs = {}
    for batch, tokens, heads in cases:
        for regime in regimes:
            for variant in [None] + variants:
                problem, sizes = our_problem("forward", heads, regime), (batch, tokens, batch)
                key = (problem["gate"], variant) if variant else (str(problem), sizes)  # heads are no part of a kernel's text
                jobs.setdefault(key, (problem, sizes, variant))
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count())) as pool:
        pool.map(compile_one, jobs.values(), chunksize=1)


def fla_arguments(x, regime):
    return dict(A_log=x["A_log"], dt_bias=x["dt_bias"].reshape(-1), initial_state=x["initial_state"], output_final_state=True,
                use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                safe_gate=regime != "unbounded", lower_bound=None if regime == "unbounded" else -5.0)


def fla_forward(chunk_kda, x, regime, timer, samples, check_tokens):
    call = lambda: chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], **fla_arguments(x, regime))
    began = time.time()
    with torch.inference_mode():
        o, state = call()[:2]
        torch.cuda.synchronize()
        first = time.time() - began
        n = min(check_tokens, x["q"].shape[1])
        error = max(relative(o[:, :n, h], reference(x, regime, h, n)[0]) for h in (0, x["q"].shape[2] - 1))
        return dict(first_call_s=round(first, 1), o_error=error, **timer(call, samples))


def fla_backward(chunk_kda, x, regime, timer, samples):
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    leaf = {n: x[n].clone().requires_grad_() for n in names}
    kw = fla_arguments(leaf, regime)
    o, state = chunk_kda(leaf["q"], leaf["k"], leaf["v"], leaf["g"], leaf["beta"], **kw)[:2]
    call = lambda: torch.autograd.grad((o, state), list(leaf.values()), (x["do"], x["dht"]), retain_graph=True)
    began = time.time()
    grads = dict(zip(["d_" + n for n in names], call()))
    torch.cuda.synchronize()
    first = time.time() - began
    return dict(first_call_s=round(first, 1), **timer(call, samples)), grads


def flash_kda_forward(flash_kda, x, timer, samples):
    batch, tokens, heads, dim = x["q"].shape
    o, final = torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])
    first = x["initial_state"].transpose(-1, -2).contiguous()
    call = lambda: flash_kda.fwd(x["q"], x["k"], x["v"], x["g"], x["beta"], dim ** -0.5, o, x["A_log"], x["dt_bias"], -5.0,
                                 initial_state=first, final_state=final)
    return timer(call, samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--cases", default="1x8192x32,1x8192x96", help="BxTxH, comma separated")
    parser.add_argument("--regimes", default="fast,slow,unbounded")
    parser.add_argument("--operations", default="forward,backward")
    parser.add_argument("--variants", default="", help="semicolon separated variants of ours to time besides the default choice")
    parser.add_argument("--backward-variants", default="")
    parser.add_argument("--against", default="", help="a variant of ours that every forward is compared with, all tokens and heads")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--check", type=int, default=256, help="tokens checked against float64")
    parser.add_argument("--peers", default="fla,flash_kda")
    parser.add_argument("--peer-regimes", default="fast,slow,unbounded")
    parser.add_argument("--tune", default="cached")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()

    cases = [tuple(int(n) for n in case.split("x")) for case in options.cases.split(",")]
    if "forward" in options.operations.split(","):
        compile_all(cases, options.regimes.split(","), list(filter(None, options.variants.split(";") + [options.against])))
    peers = {}
    for name in filter(None, options.peers.split(",")):
        try:
            peers[name] = __import__("fla.ops.kda", fromlist=["chunk_kda"]).chunk_kda if name == "fla" else __import__(name)
        except Exception as error:  # a peer that is not there is reported, not required
            print(f"{name}: not importable ({error})", file=sys.stderr)
    timer, engine = Timer(), kda_jit.Engine(tune=options.tune)
    report = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, seed=options.seed,
                  method="cold L2 (256 MB flush), CUDA graph for ours, eager for peers, median of samples, spread = p90 - p10", cases=[])
    copy = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(copy)
    report["copy_gbs"] = round(2 * copy.numel() / timer(lambda: target.copy_(copy), 10)["median_us"] / 1e3, 1)
    del copy, target
    for batch, tokens, heads in cases:
        for regime in options.regimes.split(","):
            x = inputs(batch, tokens, heads, regime, options.seed)
            row = dict(case=f"B{batch} T{tokens} H{heads}", regime=regime)
            with_peers = regime in options.peer_regimes.split(",")
            if "forward" in options.operations.split(","):
                row["floor_us"] = round((batch * tokens * heads * 1282 + 2 * batch * heads * 65536) / report["copy_gbs"] / 1e3, 1)
                if options.against:
                    _, whole_o, whole_state = ours_forward(engine, x, regime, options.against, timer, 1, 1)
                for variant in [None] + list(filter(None, options.variants.split(";"))):
                    try:
                        result, o, state = ours_forward(engine, x, regime, variant, timer, options.samples, options.check)
                        if options.against:
                            result["whole_error"] = max(relative(o, whole_o), relative(state, whole_state))
                        del o, state
                    except kda_jit.KdaError as error:
                        result = dict(error=str(error).splitlines()[0])
                    row.setdefault("forward", []).append(result)
                if "fla" in peers and with_peers:
                    row["fla_forward"] = fla_forward(peers["fla"], x, regime, timer, options.samples, options.check)
                if "flash_kda" in peers and with_peers and regime != "unbounded":
                    row["flash_kda_forward"] = flash_kda_forward(peers["flash_kda"], x, timer, options.samples)
            if "backward" in options.operations.split(","):
                gen = torch.Generator(device="cuda").manual_seed(options.seed + 1)
                x["do"] = torch.randn(x["v"].shape, generator=gen, device="cuda").bfloat16()
                x["dht"] = torch.randn(x["initial_state"].shape, generator=gen, device="cuda")
                want = None
                if "fla" in peers and with_peers:
                    row["fla_backward"], want = fla_backward(peers["fla"], x, regime, timer, options.samples)
                for variant in [None] + list(filter(None, options.backward_variants.split(";"))):
                    try:
                        result = ours_backward(engine, x, regime, variant, timer, options.samples, want)
                    except kda_jit.KdaError as error:
                        result = dict(error=str(error).splitlines()[0])
                    row.setdefault("backward", []).append(result)
                del want
            report["cases"].append(row)
            del x
            torch.cuda.empty_cache()
            with open(options.output, "w") as out:
                json.dump(report, out, indent=1)
    for row in report["cases"]:
        for direction in ("forward", "backward"):
            peer = row.get(f"fla_{direction}", {}).get("median_us")
            for ours in row.get(direction, []):
                if "error" in ours:
                    print(f"{row['case']:18} {row['regime']:10} {direction:8} {ours['error'][:100]}")
                    continue
                ratio = f"{peer / ours['median_us']:5.2f}x" if peer else "    -"
                whole = f"  all {ours['whole_error']:.1e}" if "whole_error" in ours else ""
                extra = f"o {ours['o_error']:.1e}{whole}" if "o_error" in ours else f"worst vs fla {max(ours.get('difference_to_fla', {'': math.nan}).values()):.1e}"
                print(f"{row['case']:18} {row['regime']:10} {direction:8} ours {ours['median_us']:8.1f} +- {ours['spread_us']:5.1f} us  "
                      f"fla {peer if peer else '-':>8}  {ratio}  finite {ours['finite']}  {extra}  {ours['variant'][:90]}")


if __name__ == "__main__":
    main()
