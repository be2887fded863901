"""The binding on the host: a decode step on a state pool against the recurrence written out, and what it refuses. Tensors are a small
stand-in for PyTorch's, which the binding knows by data_ptr(), shape, stride(), dtype and numel() only."""

import array
import math
import unittest

import kda_jit

CODES = {"torch.float32": "f", "torch.int32": "i", "torch.int64": "q"}


class Tensor:
    def __init__(self, shape, dtype="torch.float32", fill=lambda i: 0, stride=None, storage=None, offset=0):
        self.shape, self.dtype, self.offset = tuple(shape), dtype, offset
        self._stride = tuple(stride) if stride else tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
        self.storage = storage or array.array(CODES[dtype], [fill(i) for i in range(math.prod(shape))] or [0])

    def view(self, shape, stride, offset=0):
        return Tensor(shape, self.dtype, stride=stride, storage=self.storage, offset=offset)

    def stride(self):
        return self._stride

    def numel(self):
        return math.prod(self.shape)

    def data_ptr(self):
        return self.storage.buffer_info()[0] + self.offset * self.storage.itemsize


N, H, K, V, SLOTS = 3, 2, 16, 16, 5
PROBLEM = dict(operation="recurrent", heads=H, value_heads=H, key_dim=K, value_dim=V, dtype="fp32", state_pool=True)


def call_tensors(pool):
    wave = lambda a, b: lambda i: a * math.sin(i * b + a)
    x = {name: Tensor((N, 1, H, K), fill=wave(a, b)) for name, a, b in (("q", 1, 1.3), ("k", 0.25, 0.7), ("v", 1, 0.37))}
    x["g"] = Tensor((N, 1, H, K), fill=lambda i: -0.1 * (1 + i % 7))
    x["beta"] = Tensor((N, 1, H), fill=lambda i: 0.2 + 0.1 * i)
    return x | dict(o=Tensor((N, 1, H, V), fill=lambda i: math.nan), initial_state=pool, final_state=pool)


def step(x, states, n, h):
    """o and the state after the token of sequence n, from `states`, a copy of a slot's matrices."""
    row = (n * H + h) * K
    at = lambda name, i: x[name].storage[row + i]
    S = [[math.exp(at("g", i)) * states[(h * K + i) * V + j] for j in range(V)] for i in range(K)]
    for j in range(V):
        u = x["beta"].storage[n * H + h] * (at("v", j) - sum(S[i][j] * at("k", i) for i in range(K)))
        for i in range(K):
            S[i][j] += at("k", i) * u
    return [sum(S[i][j] * at("q", i) for i in range(K)) / math.sqrt(K) for j in range(V)], S


class Binding(unittest.TestCase):
    def setUp(self):
        self.kernel = kda_jit.Engine(cache_directory="", tune="off").prepare(PROBLEM, "host", (N, 1, N))
        self.pool = Tensor((SLOTS, H, K, V), fill=lambda i: math.cos(i))

    def test_a_decode_step_in_the_slots_of_a_pool(self):
        x, before = call_tensors(self.pool), self.pool.storage[:]
        size = H * K * V
        table = Tensor((N, 2), "torch.int64", fill=lambda i: (4, 99, -1, 99, 1, 99)[i])
        slots, error = table.view((N,), (2,)), Tensor((1,), "torch.int32")
        self.kernel.execute(x, None, read_slots=slots, write_slots=slots, padding="negative", slot_error=error)
        self.assertEqual(error.storage[0], 0)
        for n, slot in ((0, 4), (2, 1)):
            for h in range(H):
                o, S = step(x, before[slot * size:(slot + 1) * size], n, h)
                for j in range(V):
                    self.assertAlmostEqual(x["o"].storage[(n * H + h) * V + j], o[j], places=5)
                    for i in range(K):
                        self.assertAlmostEqual(self.pool.storage[((slot * H + h) * K + i) * V + j], S[i][j], places=5)
        self.assertEqual(set(x["o"].storage[H * V:2 * H * V]), {0.0})  # padding
        for slot in (0, 2, 3):
            self.assertEqual(self.pool.storage[slot * size:(slot + 1) * size], before[slot * size:(slot + 1) * size])

    def test_a_slot_past_the_pool_raises_the_error_word(self):
        slots, error = Tensor((N,), "torch.int32", fill=lambda i: (0, SLOTS, 1)[i]), Tensor((1,), "torch.int32")
        self.kernel.execute(call_tensors(self.pool), None, read_slots=slots, write_slots=slots, slot_error=error)
        self.assertEqual(error.storage[0], 2)

    def test_updates_are_kept_and_replayed_as_a_call_of_those_tokens_leaves_them(self):
        engine, sizes, T = kda_jit.Engine(cache_directory="", tune="off"), (1, 3, 1), 3
        wave = lambda *shape: Tensor(shape, fill=lambda i: 0.3 * math.sin(1.7 * i))
        x = dict(q=wave(1, T, H, K), k=wave(1, T, H, K), v=wave(1, T, H, V), g=Tensor((1, T, H, K), fill=lambda i: -0.1), beta=wave(1, T, H))
        kept = dict(update_u=wave(1, T, H, V), update_k=wave(1, T, H, K), update_decay=wave(1, T, H, K))
        state, start = wave(1, H, K, V), wave(1, H, K, V)
        dense = PROBLEM | dict(state_pool=False)
        keep = engine.prepare(dense | dict(updates=True), "host", sizes)
        keep.execute(x | kept | dict(o=wave(1, T, H, V), initial_state=start), None)
        replay = engine.prepare(dense | dict(operation="replay"), "host", sizes)
        replay.execute(kept | dict(initial_state=state, final_state=state), None, accepted=Tensor((1,), "torch.int64", fill=lambda i: 2))
        first = {name: t.view((1, 2) + t.shape[2:], t.stride()) for name, t in x.items()}
        plain = engine.prepare(dense, "host", (1, 2, 1))
        plain.execute(first | dict(o=wave(1, 2, H, V), initial_state=start, final_state=start), None)
        self.assertEqual(state.storage, start.storage)

    def refused(self, sentence, error=kda_jit.KdaError, **options):
        slots = Tensor((N,), "torch.int32")
        with self.assertRaisesRegex(error, sentence):
            self.kernel.execute(call_tensors(self.pool), None, **(dict(read_slots=slots, write_slots=slots) | options))

    def test_tables_of_another_kind_are_refused(self):
        slots = Tensor((N,), "torch.int32")
        self.refused("stride 0", read_slots=slots.view((N,), (0,)))
        self.refused("read_slots is required", read_slots=None)
        self.refused("expected 1 or 2", TypeError, write_slots=slots.view((N, 1, 1), (1, 1, 1)))
        self.refused("use int32 or int64", TypeError, write_slots=Tensor((N,)))
        self.refused("one int32", TypeError, slot_error=Tensor((1,), "torch.int64"))
        self.refused("not in tuple", ValueError, padding="some")
        self.refused("unknown option slots", TypeError, slots=slots)

    def test_an_expanded_tensor_is_not_taken_for_a_contiguous_one(self):
        x = call_tensors(self.pool)
        x["beta"] = x["beta"].view((N, 1, H), (0, 0, 0))
        with self.assertRaisesRegex(ValueError, "expand"):
            self.kernel.bind(x)

    def test_what_a_forward_saves_is_described_and_a_plan_keeps_to_its_workspace(self):
        problem = PROBLEM | dict(operation="backward", state_pool=False, saved_interval=64)
        state = H * K * V * 4
        self.assertEqual(kda_jit.saved_states(problem, (1, 200, 1), 64), dict(interval=64, slots=3, columns=3, bytes=3 * state + 12))
        with self.assertRaisesRegex(kda_jit.KdaError, "multiples of 64"):
            kda_jit.saved_states(problem, (1, 200, 1), 100)
        kernel = kda_jit.Engine(cache_directory="", tune="off").prepare(problem, "host", (1, 200, 1), max_workspace=0)
        self.assertEqual(kernel.workspace_bytes((1, 200, 1)), 0)
        x = {"interior_states": Tensor((3, H, K, V))}
        args = kernel.bind(x, interior_slots=Tensor((1, 3), "torch.int32"), interior_interval=64)
        self.assertEqual((args.interior_states.shape[0], args.interior_slots.shape[1], args.interior_interval), (3, 3, 64))

    def test_ranks_agree_through_the_reduce_hook(self):
        def choice(rank_can_time):
            calls = []

            def reduce(values):  # the other ranks can time one candidate only
                calls.append(len(values))
                return [1.0] * len(values) if len(calls) == 1 else [
                    x if i // 2 == rank_can_time else math.inf for i, x in enumerate(values)]

            engine = kda_jit.Engine(cache_directory="", tune="force", tune_budget_seconds=20, tune_reduce=reduce)
            explained = engine.prepare(PROBLEM, "host", (N, 1, N)).explain()
            self.assertEqual(calls, [calls[0], 2 * calls[0]])
            return explained

        self.assertNotEqual(choice(0), choice(1))

        def broken(values):
            raise ConnectionError("a rank is gone")

        with self.assertRaisesRegex(ConnectionError, "a rank is gone"):
            kda_jit.Engine(cache_directory="", tune="force", tune_reduce=broken).prepare(PROBLEM, "host", (N, 1, N))
        with self.assertRaisesRegex(ValueError, "returned 1 values"):
            kda_jit.Engine(cache_directory="", tune="force", tune_reduce=lambda x: [0.0]).prepare(PROBLEM, "host", (N, 1, N))

    def test_an_unknown_field_is_refused(self):
        with self.assertRaisesRegex(TypeError, "state_v_first"):
            kda_jit.Engine(cache_directory="", tune="off").prepare(PROBLEM | dict(state_v_first=True), "host", (N, 1, N))


class Forward(unittest.TestCase):
    def test_interior_states_and_mask(self):
        tokens, heads, dim = 130, 1, 16
        wave = lambda a, b: lambda i: a * math.sin(i * b + a)
        shape = (2, tokens, heads, dim)
        x = {name: Tensor(shape, fill=wave(a, b)) for name, a, b in (("q", 1, 1.3), ("k", 0.25, 0.7), ("v", 1, 0.37))}
        x["g"] = Tensor(shape, fill=lambda i: -0.01 * (1 + i % 7))
        x["beta"] = Tensor((2, tokens, heads), fill=lambda i: 0.5)
        x["initial_state"] = Tensor((2, heads, dim, dim), fill=lambda i: math.cos(i))
        problem = dict(operation="forward", heads=heads, value_heads=heads, key_dim=dim, value_dim=dim, dtype="fp32",
                       interior_states=True)
        kernel = kda_jit.Engine(cache_directory="", tune="off").prepare(problem, "host", (2, tokens, 2))

        def run(count, **options):
            cut = lambda t: t.view((2, count) + t.shape[2:], t.stride())
            o, final = Tensor((2, count, heads, dim)), Tensor((2, heads, dim, dim))
            tensors = {n: cut(t) if n != "initial_state" else t for n, t in x.items()}
            interior = Tensor((3, heads, dim, dim), fill=lambda i: 7.0)
            kernel.execute(tensors | dict(o=o, final_state=final, interior_states=interior), None,
                           interior_slots=Tensor((2, 2), "torch.int32", fill=lambda i: (2, -1, -1, 0)[i]), **options)
            return list(final.storage), list(interior.storage)

        size = heads * dim * dim
        after_64, after_128 = run(64)[0], run(128)[0]
        interior = run(tokens)[1]
        self.assertEqual(interior[2 * size:], after_64[:size])
        self.assertEqual(interior[:size], after_128[size:])
        self.assertEqual(interior[size:2 * size], [7.0] * size)
        masked = run(64, has_initial_state=Tensor((2,), "torch.int64", fill=lambda i: i))[0]
        self.assertEqual(masked[size:], after_64[size:])
        self.assertNotEqual(masked[:size], after_64[:size])
        with self.assertRaisesRegex(kda_jit.KdaError, "multiple of 64"):
            run(64, interior_interval=32)


if __name__ == "__main__":
    unittest.main()
