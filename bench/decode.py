#!/usr/bin/env python3
"""Decode and verify on a GPU, as a server calls them, beside fla, FlashInfer and cuDNN-frontend where they can be imported. Writes JSON.

    KDA_JIT_LIBRARY=build-gpu/libkda_jit.so PYTHONPATH=python python3 bench/decode.py --output decode.json

States lie in one pool; every call has slots of its own, shuffled over the pool. Policies: `last` (the state after the last token, in
place), `every` (the state after every token, to a table of slots), `updates` (u, k and decay of every token, no state) and `replay`
(the state after the accepted tokens, in place). Every row is first checked: one call, o and states against float64 on some heads. Then it
is timed: one CUDA graph holds calls on different slots, at least --rotate MB of states and at least 1.2 ms in all, so no call finds its
states in L2; the figure is the median over replays of the time a call. `share` is the time that the device copy, measured in the same
run, takes for the bytes a call must move, over the figure. The copy is the fastest of the driver's, PyTorch's and one in Triton: on some
machines the driver's is a fifth slower than the others. Gate: bounded -5; it does not matter for the time. Token inputs stay in L2,
as after a projection. Peers get the states as one tensor, which is the best case for them, and are not held to update them in place.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time

import torch

import kda_jit

DEVICE = "cuda:0"
STATE_TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
ALLOWED_STATE_ERROR = dict(fp32=1e-6, bf16=2.5e-3, fp16=3e-4)  # fp32 arithmetic and one rounding of the result
ALLOWED_O_ERROR = 2.5e-3
PEERS = dict(fla=("fla.ops.kda", "fused_recurrent_kda"), flashinfer=("flashinfer.kda_kernels.recurrent_kda", "run_recurrent_kda"),
             cudnn=("cudnn.linear_attention.ops", "kimi_delta_attention"))
# fp32 state in [V,K], H=32, K=V=128, one token: what a prototype without options took on an H100, in us.
PROTOTYPE_US = {1: 3.5, 8: 12.7, 32: 47.7, 128: 186, 512: 737}


def inputs(batch, tokens, heads, dim, seed):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, device="cuda")
    shape = (batch, tokens, heads, dim)
    x = {name: randn(*shape).bfloat16() for name in "qkvg"}
    x["beta"] = randn(batch, tokens, heads).bfloat16()
    x["A_log"] = torch.log(1 + 15 * torch.rand(heads, generator=gen, device="cuda"))
    x["dt_bias"] = 0.5 * randn(heads, dim)
    return x


def reference(x, state, h):
    """Float64 recurrence of head h of every sequence from its state [B, K, V]: o [B, T, V] and the states [B, T, K, V]."""
    norm = lambda t: t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6)
    q, k = (norm(x[n][:, :, h].double()) for n in "qk")
    v, beta = x["v"][:, :, h].double(), torch.sigmoid(x["beta"][:, :, h].double())
    decay = (-5 * torch.sigmoid(x["A_log"][h].double().exp() * (x["g"][:, :, h].double() + x["dt_bias"][h].double()))).exp()
    S, o, states = state.double(), [], []
    for t in range(q.shape[1]):
        S = S * decay[:, t, :, None]
        u = beta[:, t, None] * (v[:, t] - torch.einsum("bkv,bk->bv", S, k[:, t]))
        S = S + k[:, t, :, None] * u[:, None, :]
        o.append(q.shape[-1] ** -0.5 * torch.einsum("bkv,bk->bv", S, q[:, t]))
        states.append(S)
    return torch.stack(o, 1), torch.stack(states, 1)


def relative(a, b):
    return float("inf") if not torch.isfinite(a).all() else float((a.double() - b).norm() / b.norm())


def time_calls(calls, replays, floor_us):
    """Median time a call, in us, of one graph that runs `calls` (functions of a stream) in turn until it takes about 1.2 ms."""
    stream = torch.cuda.Stream()
    rounds = max(1, round(1200 / max(floor_us, 1.0) / len(calls)))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call(stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call(stream.cuda_stream)
    times = []
    with torch.cuda.stream(stream):
        for i in range(replays + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:
                times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    times.sort()
    return dict(median_us=round(statistics.median(times), 2), spread_us=round(times[int(0.9 * len(times))] - times[int(0.1 * len(times))], 2))


class Shape:
    """A batch of sequences whose states lie in a pool, slots of `columns` states for each of them in each of `count` calls."""

    def __init__(self, options, batch, tokens, state, layout, policy):
        self.batch, self.tokens, self.state, self.layout, self.policy = batch, tokens, state, layout, policy
        self.heads, self.dim, self.seed = options.heads, options.dim, options.seed
        self.columns = tokens if policy == "every" else 1
        matrix = self.heads * self.dim ** 2 * STATE_TYPES[state].itemsize
        self.count = max(2, -(-options.rotate * 1_000_000 // (batch * self.columns * matrix)))
        reads = 1
        writes = dict(last=1, every=tokens, updates=0, replay=1)[policy]
        tensors = 0 if policy == "replay" else batch * tokens * self.heads * (5 * self.dim + 1) * 2
        updates = batch * tokens * self.heads * 3 * self.dim * 4 if policy in ("updates", "replay") else 0
        self.bytes = batch * (reads + writes) * matrix + tensors + updates
        self.rotated_mb = round(self.count * batch * self.columns * matrix / 1e6)

    def name(self):
        return f"B{self.batch:<4} T{self.tokens} {self.state}/{self.layout} {self.policy}"

    def problem(self, **changes):
        return dict(operation="replay" if self.policy == "replay" else "recurrent", heads=self.heads, value_heads=self.heads,
                    key_dim=self.dim, value_dim=self.dim, dtype="bf16", state_dtype=self.state, state_layout=self.layout, gate="bounded",
                    dt_bias=True, beta_sigmoid=True, qk_l2norm=True, state_pool=True, every_state=self.policy == "every",
                    updates=self.policy == "updates") | changes

    def prepare(self, engine, variant=None, **changes):
        return engine.prepare(self.problem(**changes), DEVICE, (self.batch, self.tokens, self.batch), variant)


class Data:
    """The tensors of a shape, shared by all variants."""

    def __init__(self, s):
        gen = torch.Generator(device="cuda").manual_seed(s.seed + 1)
        self.s, self.x = s, inputs(s.batch, s.tokens, s.heads, s.dim, s.seed)
        slots = s.count * s.batch * s.columns
        self.pool = torch.empty(slots, s.heads, s.dim, s.dim, dtype=STATE_TYPES[s.state], device="cuda")
        for part in self.pool.split(max(1, 2 ** 28 // self.pool[0].numel())):
            part.copy_(torch.randn(part.shape, generator=gen, device="cuda"))
        self.slots = torch.randperm(slots, generator=gen, device="cuda").int().view(s.count, s.batch, s.columns)
        self.accepted = torch.randint(1, s.columns + 1, (s.batch,), generator=gen, device="cuda").int()
        self.o = torch.full_like(self.x["v"], float("nan"))
        rows = lambda: torch.full((s.batch, s.tokens, s.heads, s.dim), float("nan"), device="cuda")
        self.updates = dict(update_u=rows(), update_k=rows(), update_decay=rows())
        self.all_tokens = torch.full((s.batch,), s.tokens, dtype=torch.int32, device="cuda")
        self.error = torch.zeros(1, dtype=torch.int32, device="cuda")

    def bind(self, kernel, i, policy=None):
        """The arguments of call number i."""
        s, slots, policy = self.s, self.slots[i], policy or self.s.policy
        tensors, tables = dict(initial_state=self.pool), dict(read_slots=slots[:, 0])
        if policy != "updates":
            tensors["final_state"], tables["write_slots"] = self.pool, slots[:, 0]
        if policy == "every":
            tables = dict(read_slots=slots, write_slots=slots, accepted=self.accepted)
        if policy == "replay":
            tables["accepted"] = self.all_tokens
        else:
            tensors |= self.x | dict(o=self.o)
        if policy in ("updates", "replay"):
            tensors |= self.updates
        return kernel.bind(tensors, scale=s.dim ** -0.5, padding="negative", slot_error=self.error, **tables)

    def heads_of(self, slots):
        """The states [B, n, K, V] of three heads in `slots` [B], and those heads."""
        heads = sorted({0, self.s.heads // 2, self.s.heads - 1})
        states = self.pool[slots.long()[:, None], torch.tensor(heads, device="cuda")]
        return (states.transpose(-1, -2) if self.s.layout == "v_k" else states).double(), heads


def check(engine, data, kernel):
    """Largest relative errors of o and of every state of call 0 over three heads; a call of updates is followed by its replay."""
    s, slots, last = data.s, data.slots[0], torch.arange(data.s.batch, device="cuda")
    start = slots[last, (data.accepted - 1).long()] if s.policy == "every" else slots[:, 0]
    before, heads = data.heads_of(start)
    if s.policy == "replay":
        s_updates = Shape.__new__(Shape)
        s_updates.__dict__ = s.__dict__ | dict(policy="updates")
        other = s_updates.prepare(engine, operation="recurrent", updates=True)
        other.launch(data.bind(other, 0, "updates"), 0, 0)
    data.o.fill_(float("nan")) if s.policy != "replay" else None
    torch.cuda.synchronize()
    kernel.launch(data.bind(kernel, 0), 0, 0)
    torch.cuda.synchronize()
    o_error, state_error = [], []
    after = [data.heads_of(slots[:, t] if s.policy == "every" else slots[:, 0])[0] for t in range(s.columns)]
    for i, h in enumerate(heads):
        want_o, want_states = reference(data.x, before[:, i], h)
        o_error.append(relative(data.o[:, :, h], want_o))
        if s.policy == "updates":  # the state is as it was, and what a replay makes of the updates is checked in its own row
            state_error.append(float((after[0][:, i] != before[:, i]).sum()))
        else:
            wanted = want_states if s.policy == "every" else want_states[:, -1:]
            state_error += [relative(after[t][:, i], wanted[:, t]) for t in range(s.columns)]
    row = dict(o_error=max(o_error), state_error=max(state_error), slot_error=int(data.error))
    row["right"] = row["o_error"] <= ALLOWED_O_ERROR and row["state_error"] <= ALLOWED_STATE_ERROR[s.state] and row["slot_error"] == 0
    return row


def ours(engine, data, kernel, replays, floor_us):
    row = dict(variant=kernel.explain(), **check(engine, data, kernel))
    bound = [data.bind(kernel, i) for i in range(data.s.count)]
    calls = [lambda stream, args=args: kernel.launch(args, 0, 0, stream) for args in bound]
    row |= time_calls(calls, replays, floor_us)
    row["share"] = round(floor_us / row["median_us"], 3)
    return row


def fla(function, s, x, o):
    flags = dict(A_log=x["A_log"], dt_bias=x["dt_bias"].reshape(-1), output_final_state=True, use_qk_l2norm_in_kernel=True,
                 use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=-5.0, state_v_first=s.layout == "v_k")
    return lambda state: function(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=state, **flags)[0]


def flashinfer(function, s, x, o):
    """In place, bf16 states in [V,K], one token."""
    if (s.tokens, s.state, s.layout) != (1, "bf16", "v_k"):
        raise ValueError("not among what it has")
    return lambda state: function(x["q"], x["k"], x["v"], x["g"], x["beta"], x["A_log"], x["dt_bias"].reshape(-1), initial_state=state,
                                  use_gate_in_kernel=True, lower_bound=-5.0, beta_is_logit=True, output=o)[0]


def cudnn(function, s, x, o):
    """On Hopper it has a prefill only, whose gate, norm and sigmoid the caller computes; that is not counted here."""
    if s.layout != "v_k":
        raise ValueError("not among what it has")
    norm = lambda t: (t.float() * torch.rsqrt((t.float() ** 2).sum(-1, keepdim=True) + 1e-6)).bfloat16().flatten(0, 1)
    gate = -5 * torch.sigmoid(x["A_log"].exp()[:, None] * (x["g"].float() + x["dt_bias"]))
    given = norm(x["q"]), norm(x["k"]), x["v"].flatten(0, 1), gate.flatten(0, 1), torch.sigmoid(x["beta"].float()).flatten(0, 1)
    starts = torch.arange(0, s.batch * s.tokens + 1, s.tokens, dtype=torch.int32, device="cuda")
    return lambda state: function(*given, starts, initial_state=state, output_final_state=True)[0].view_as(o)


def peer(name, function, data, replays, floor_us):
    """A peer's time; its error is that of the first head."""
    s, x = data.s, data.x
    call = globals()[name](function, s, x, torch.empty_like(data.o))
    states = [data.pool[i * s.batch:(i + 1) * s.batch] for i in range(s.count)]
    start = states[0][:, 0].transpose(-1, -2) if s.layout == "v_k" else states[0][:, 0]
    want_o, _ = reference(x, start.clone(), 0)
    o = call(states[0])
    torch.cuda.synchronize()
    row = dict(o_error=relative(o[:, :, 0], want_o))
    return row | time_calls([lambda stream, state=state: call(state) for state in states], replays, floor_us)


def copy_bandwidth(replays):
    """GB/s read and written, of every way to copy that is there."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").fill_(1)
    target = torch.empty_like(source)
    ways = dict(driver=lambda stream: target.copy_(source), pytorch=lambda stream: torch.mul(source, 1.0, out=target))
    try:
        import triton
        import triton.language as tl

        @triton.jit
        def copy_kernel(source, target, block: tl.constexpr):
            at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
            tl.store(target + at, tl.load(source + at))

        ways["triton"] = lambda stream: copy_kernel[(source.numel() // 4096,)](source, target, 4096)
    except ImportError:
        pass
    bytes_moved, gbs = 2 * source.numel() * source.element_size(), {}
    for name, way in ways.items():
        try:
            gbs[name] = round(bytes_moved / time_calls([way], replays, 700)["median_us"] / 1e3, 1)
        except Exception as error:  # Triton without a C compiler
            print(f"copy of {name}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    return gbs


def every_variant():
    """What the kernel offers for few tokens; those that a problem has not are refused."""
    for rows in (2, 4, 8, 16, 32):
        for warps in (1, 4):
            for flags in ("", " pdl=1", " cs=1 pdl=1"):
                yield f"token sw={warps} r={rows} st=1{flags}"
    for chunk in (4, 16):
        for rows in (4, 8, 16):
            for lanes in ("", " l=8", " l=16"):
                for streaming in ("", " cs=1"):
                    yield f"token c={chunk} sw=4 r={rows} st=1{lanes}{streaming} pdl=1"


def variants_of(options):
    return list(every_variant()) if options.variants == "all" else list(filter(None, options.variants.split(";")))


def compile_one(job):
    problem, sizes, variant = job
    try:
        kda_jit.Engine(tune="off").prepare(problem, DEVICE, sizes, variant)
    except kda_jit.KdaError:
        pass  # said where it is measured


def compile_all(shapes, options):
    """Into the cache on disk, by many processes: a compiler compiles one kernel at a time. Before this process uses the GPU."""
    jobs = [(s.problem(), (s.batch, s.tokens, s.batch), variant) for s in shapes for variant in [None] + variants_of(options)]
    jobs += [(s.problem(operation="recurrent", updates=True), (s.batch, s.tokens, s.batch), None) for s in shapes if s.policy == "replay"]
    unique = {}
    for problem, sizes, variant in jobs:
        unique.setdefault((str(problem), variant, sizes if variant is None else None), (problem, sizes, variant))
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count())) as pool:
        pool.map(compile_one, unique.values(), chunksize=1)


def measure(engine, s, peers, options, copy_gbs):
    data, floor_us = Data(s), s.bytes / copy_gbs / 1e3
    row = dict(shape=s.name(), batch=s.batch, tokens=s.tokens, state=s.state, layout=s.layout, policy=s.policy, calls=s.count,
               rotated_mb=s.rotated_mb, copy_us=round(floor_us, 2), ours=[], refused={}, peers={})
    variants = variants_of(options)

    def prepare(variant):
        try:
            return s.prepare(engine, variant)
        except kda_jit.KdaError as error:
            return str(error).splitlines()[0]

    for variant in [None] + variants:
        kernel = prepare(variant)
        if isinstance(kernel, str):
            if variant is None:
                row["ours"].append(dict(variant="the choice", error=kernel, right=False))
            elif options.variants != "all":
                row["refused"][variant] = kernel
            continue
        row["ours"].append(ours(engine, data, kernel, options.replays, floor_us) | dict(given=variant))
    if s.policy == "last":
        with torch.inference_mode():
            for name, call in peers.items():
                try:
                    row["peers"][name] = peer(name, call, data, options.replays, floor_us)
                except Exception as error:  # what a peer refuses is reported, not hidden
                    row["peers"][name] = dict(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return row


def print_table(rows):
    print(f"\n{'shape':30} {'us':>9} {'+-':>6} {'share':>6} {'best us':>9}  {'peers us':20} check   choice")
    for row in rows:
        chosen = row["ours"][0]
        if "error" in chosen:
            print(f"{row['shape']:30} {chosen['error'][:110]}")
            continue
        best = min((r for r in row["ours"] if "error" not in r and r["right"]), key=lambda r: r["median_us"], default=chosen)
        beside = " ".join(f"{n} {p.get('median_us', '-')}" for n, p in row["peers"].items())
        wrong = sum(not r["right"] for r in row["ours"])
        note = f" [{best['given']}]" if best is not chosen else ""
        note += f" {len(row['refused'])} refused" if row["refused"] else ""
        if row["policy"] == "last" and row["tokens"] == 1 and row["state"] == "fp32" and row["layout"] == "v_k" and row["prototype"]:
            note += f" {chosen['median_us'] / row['prototype']:.3f} of the prototype"
        print(f"{row['shape']:30} {chosen['median_us']:9.2f} {chosen['spread_us']:6.2f} {chosen['share']:6.1%} {best['median_us']:9.2f}  "
              f"{beside:20} {'right' if not wrong else f'{wrong} WRONG'}  {chosen['variant'].split(',')[0][:60]}{note}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batches", default="1,8,32,128,512")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", default="1:last,4:last,4:every,4:updates,4:replay", help="tokens:policy of the rows, comma separated")
    parser.add_argument("--states", default="fp32,bf16")
    parser.add_argument("--layouts", default="v_k,k_v")
    parser.add_argument("--variants", default="", help="semicolon separated variants to time besides the choice, or all")
    parser.add_argument("--rotate", type=int, default=200, help="MB of distinct states in a graph, at least 150")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--tune", default="cached")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long and say what was left out; 0: never")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    if options.rotate < 150:
        parser.error("--rotate below 150 MB lets L2 hold part of the states")

    began, peers = time.monotonic(), {}
    shapes = [Shape(options, int(batch), int(tokens), state, layout, policy)
              for state in options.states.split(",") for layout in options.layouts.split(",")
              for tokens, policy in (row.split(":") for row in options.rows.split(",")) for batch in options.batches.split(",")]
    compile_all(shapes, options)
    for name, (module, function) in {} if options.no_peers else PEERS.items():
        try:
            peers[name] = getattr(importlib.import_module(module), function)
        except Exception as error:  # a peer that is not there is reported, not required
            print(f"{name}: not importable ({error})", file=sys.stderr)
    copies = copy_bandwidth(options.replays)
    copy_gbs = max(copies.values())
    report = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, seed=options.seed, copy_gbs=copy_gbs, copies=copies,
                  heads=options.heads, dim=options.dim, gate="bounded -5",
                  method="CUDA graph of calls on rotated slots, median over replays, spread = p90 - p10", rows=[], left_out=[])
    engine = kda_jit.Engine(tune=options.tune)
    for s in shapes:
        if options.seconds and time.monotonic() - began > options.seconds:
            report["left_out"].append(s.name())
            continue
        row = measure(engine, s, peers, options, copy_gbs)
        row["prototype"] = PROTOTYPE_US.get(s.batch) if (options.heads, options.dim) == (32, 128) else None
        report["rows"].append(row)
        with open(options.output, "w") as out:
            json.dump(report, out, indent=1)
        torch.cuda.empty_cache()
    print(f"{report['card']}, copy {copy_gbs:.0f} GB/s of {copies}, H={options.heads} K=V={options.dim}, {time.monotonic() - began:.0f} s")
    print_table(report["rows"])
    if report["left_out"]:
        print(f"left out for time: {', '.join(report['left_out'])}")
    return 0 if all(r.get("right", False) for row in report["rows"] for r in row["ours"]) else 1


if __name__ == "__main__":
    sys.exit(main())
