#!/usr/bin/env python3
"""One token a sequence, the state updated in place: ours beside fla's fused_recurrent_kda, where it can be imported. Writes JSON.

    KDA_JIT_LIBRARY=build-gpu/libkda_jit.so PYTHONPATH=python python3 bench/decode.py --output decode.json

Every row is first checked: one call on a copy of the states, o and the new states against float64 on some heads. Then it is timed: one
CUDA graph holds calls on different states, at least --rotate MB of them and at least 1.2 ms in all, so no call finds its state in
L2; the figure is the median over replays of the time a call. The device copy and an update of the states in place by PyTorch, which
moves the same bytes, stand beside it. Gate: bounded -5; it does not matter for the time. Token inputs stay in L2, as after a projection.
"""

import argparse
import json
import statistics
import sys
import time

import torch

import kda_jit

DEVICE = "cuda:0"
STATE_TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
ALLOWED_STATE_ERROR = dict(fp32=1e-6, bf16=2.5e-3, fp16=3e-4)  # fp32 arithmetic and one rounding of the result
ALLOWED_O_ERROR = 2.5e-3


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
    """Float64 recurrence of head h of every sequence from its state [B, K, V]; o [B, T, V] and the state after the tokens."""
    norm = lambda t: t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6)
    q, k = (norm(x[n][:, :, h].double()) for n in "qk")
    v, beta = x["v"][:, :, h].double(), torch.sigmoid(x["beta"][:, :, h].double())
    decay = (-5 * torch.sigmoid(x["A_log"][h].double().exp() * (x["g"][:, :, h].double() + x["dt_bias"][h].double()))).exp()
    S, o = state.double(), []
    for t in range(q.shape[1]):
        S = S * decay[:, t, :, None]
        u = beta[:, t, None] * (v[:, t] - torch.einsum("bkv,bk->bv", S, k[:, t]))
        S = S + k[:, t, :, None] * u[:, None, :]
        o.append(q.shape[-1] ** -0.5 * torch.einsum("bkv,bk->bv", S, q[:, t]))
    return torch.stack(o, 1), S


def relative(a, b):
    return float("inf") if not torch.isfinite(a).all() else float((a.double() - b).norm() / b.norm())


def errors(x, before, o, after, v_first):
    """Largest relative errors of o and of the state over the first, the middle and the last head."""
    k_v = lambda state, h: state[:, h].transpose(-1, -2) if v_first else state[:, h]
    pairs = []
    for h in sorted({0, o.shape[2] // 2, o.shape[2] - 1}):
        want_o, want_S = reference(x, k_v(before, h), h)
        pairs.append((relative(o[:, :, h], want_o), relative(k_v(after, h), want_S)))
    return dict(o_error=max(p[0] for p in pairs), state_error=max(p[1] for p in pairs))


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


def ours(engine, x, states, options, variant):
    """The error of one call on a fresh state, and the calls to time, one a state."""
    batch, tokens, heads, dim = x["q"].shape
    sizes = (batch, tokens, batch)
    problem = dict(operation="recurrent", heads=heads, value_heads=heads, key_dim=dim, value_dim=dim, dtype="bf16",
                   state_dtype=options.state, state_layout=options.layout, gate="bounded", dt_bias=True, beta_sigmoid=True, qk_l2norm=True)
    kernel = engine.prepare(problem, DEVICE, sizes, variant)
    size = kernel.workspace_bytes(sizes)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    o = torch.full_like(x["v"], float("nan"))
    bind = lambda state: kernel.bind({**x, "o": o, "initial_state": state, "final_state": state}, scale=dim ** -0.5)
    calls = [lambda stream, args=bind(state): kernel.launch(args, workspace.data_ptr(), size, stream) for state in states]
    before = torch.randn_like(states[0])
    after = before.clone()
    torch.cuda.synchronize()
    kernel.launch(bind(after), workspace.data_ptr(), size)
    torch.cuda.synchronize()
    row = dict(variant=kernel.explain(), **errors(x, before, o, after, options.layout == "v_k"))
    row["right"] = row["o_error"] <= ALLOWED_O_ERROR and row["state_error"] <= ALLOWED_STATE_ERROR[options.state]
    return row, calls


def fla(call_kda, x, states, options):
    """The same for fla, which has no update in place: it writes a new fp32 state."""
    flags = dict(A_log=x["A_log"], dt_bias=x["dt_bias"].reshape(-1), output_final_state=True, use_qk_l2norm_in_kernel=True,
                 use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=-5.0, state_v_first=options.layout == "v_k")
    run = lambda state: call_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=state, **flags)[:2]
    before = torch.randn_like(states[0])
    o, after = run(before)
    torch.cuda.synchronize()
    return errors(x, before, o, after, options.layout == "v_k"), [lambda stream, state=state: run(state) for state in states]


def measure(engine, call_fla, batch, options, copy_gbs):
    shape = (batch, options.heads, options.dim, options.dim)
    x = inputs(batch, options.tokens, options.heads, options.dim, options.seed)
    state_bytes = batch * options.heads * options.dim ** 2 * STATE_TYPES[options.state].itemsize
    count = max(2, -(-options.rotate * 1_000_000 // state_bytes))
    gen = torch.Generator(device="cuda").manual_seed(options.seed + 1)
    fresh = lambda: torch.randn(*shape, generator=gen, device="cuda").to(STATE_TYPES[options.state])
    states = [fresh() for _ in range(count)]
    token_bytes = batch * options.tokens * options.heads * (5 * options.dim + 1) * 2
    floor = (2 * state_bytes + token_bytes) / copy_gbs / 1e3
    row = dict(batch=batch, states=count, rotated_mb=round(count * state_bytes / 1e6), copy_us=round(floor, 2), ours=[])
    row["update_in_place"] = time_calls([lambda stream, s=s: s.mul_(0.999) for s in states], options.replays, floor)
    for variant in [None] + list(filter(None, options.variants.split(";"))):
        try:
            result, calls = ours(engine, x, states, options, variant)
            result |= time_calls(calls, options.replays, floor)
            result["share_of_copy"] = round(floor / result["median_us"], 3)
        except kda_jit.KdaError as error:
            result = dict(variant=variant, error=str(error).splitlines()[0])
        row["ours"].append(result)
    if call_fla:
        with torch.inference_mode():
            row["fla"], calls = fla(call_fla, x, states, options)
            try:
                row["fla"] |= time_calls(calls, options.replays, floor)
            except RuntimeError as error:  # a capture that fails is reported, not hidden behind an eager time
                row["fla"]["error"] = str(error).splitlines()[0]
    return row


def print_row(row, options):
    peer = row.get("fla", {}).get("median_us")
    ratio = lambda us: f"{peer / us:.2f}x" if peer else "-"
    for result in row["ours"]:
        head = f"B{row['batch']:<4} H{options.heads} T{options.tokens} {options.state}/{options.layout}"
        if "error" in result:
            print(f"{head}  {result['error'][:110]}")
            continue
        print(f"{head}  ours {result['median_us']:8.2f} +- {result['spread_us']:5.2f} us  {result['share_of_copy']:4.0%} of copy  in place "
              f"{row['update_in_place']['median_us']:8.2f}  fla {peer or '-':>8}  {ratio(result['median_us']):>6}  "
              f"{'right' if result['right'] else 'WRONG'} o {result['o_error']:.1e} state {result['state_error']:.1e}  {result['variant'][:70]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batches", default="1,8,32,128,512")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1, help="tokens a sequence in one call")
    parser.add_argument("--state", choices=STATE_TYPES, default="fp32")
    parser.add_argument("--layout", choices=("v_k", "k_v"), default="v_k")
    parser.add_argument("--variants", default="", help="semicolon separated variants of ours to time besides the default choice")
    parser.add_argument("--rotate", type=int, default=200, help="MB of distinct state in a graph, at least 150")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--tune", default="cached")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    if options.rotate < 150:
        parser.error("--rotate below 150 MB lets L2 hold part of the states")

    try:
        from fla.ops.kda import fused_recurrent_kda as call_fla
    except Exception as error:  # a peer that is not there is reported, not required
        print(f"fla: not importable ({error})", file=sys.stderr)
        call_fla = None
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = time_calls([lambda stream: target.copy_(source)], options.replays, 700)["median_us"]
    copy_gbs = 2 * source.numel() / copy / 1e3
    del source, target
    report = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, seed=options.seed, copy_gbs=round(copy_gbs, 1), heads=options.heads,
                  dim=options.dim, tokens=options.tokens, state=options.state, layout=options.layout, gate="bounded -5",
                  method="CUDA graph of calls on rotated states, median over replays, spread = p90 - p10", cases=[])
    engine, right = kda_jit.Engine(tune=options.tune), True
    for batch in (int(b) for b in options.batches.split(",")):
        row = measure(engine, call_fla, batch, options, copy_gbs)
        right = right and all(r.get("right", False) for r in row["ours"])
        report["cases"].append(row)
        print_row(row, options)
        with open(options.output, "w") as out:
            json.dump(report, out, indent=1)
        torch.cuda.empty_cache()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
