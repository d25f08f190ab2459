"""Rows that have ended leave the batch: the others are sampled as if these had stayed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm import decode_tp, generate, model
from nla_jax.sharding import placement
from tests.helpers import tiny

T = 56
N = 38  # rows; decoding continues with 19, then with 9
# So few tokens that each end occurs.
PLAIN = tiny.lm(n_blocks=2, vocab_size=12)
ENDS = dict(stop_ids=(3, 5), eos_ids=(2,), pad_id=11)
LOCAL = dataclasses.replace(PLAIN, window=9, local=(True, False), local_rope_theta=50.0, final_softcap=2.0)
HYBRID = dataclasses.replace(PLAIN, head_dim=16, rotary_dim=8, linear=(True, False), delta=(2, 4, 16, 12, 4))
GEMMA4 = dataclasses.replace(LOCAL, global_heads=(1, 16), global_k_is_v=True, v_norm=True)
CFGS = {"plain": PLAIN, "local": LOCAL, "hybrid": HYBRID, "gemma4": GEMMA4}
KEYS = generate.row_keys(jax.random.key(0), jnp.arange(N))


@functools.cache
def params(kind):
    return tiny.params(CFGS[kind])


def prompt(b):
    """Ids of a prefix of one row, and of b rows after it. Id 0 is padding."""
    rng = np.random.default_rng(0)
    ids_1P, ids_bS = (1 + tiny.random_ids(rng, shape, high=11) for shape in ((1, 7), (b, 4)))
    ids_bS[::2, :2] = 0
    return ids_1P, ids_bS


def prefill(params, cfg, ids_1P, ids_bS):
    """Return ((KV of one row, KV of b rows), the N rows' logits)."""
    embed = functools.partial(model.embed, params, cfg)
    _, kv = model.forward(params, cfg, embed(ids_1P), ids_1P > 0, keep_kv=True)
    x, own = model.forward(params, cfg, embed(ids_bS), ids_bS > 0, past=kv, keep_kv=True)
    return (kv, own), jnp.repeat(model.unembed(params, cfg, x[:, -1]), N // len(ids_bS), 0)


def write(params, ids_1P, ids_bS, keys_N, temperature, *, cfg, **options):
    kvs, logits_NV = prefill(params, cfg, ids_1P, ids_bS)
    w = generate.decode_weights(params, cfg, jnp.float32)
    return generate.sample(w, cfg, kvs, logits_NV, keys_N, max_new=T, temperature=temperature,
                           **(ENDS | options))


@functools.cache
def writer(kind, buckets, scanned=False):
    """`write` as one program. scanned: how the caller has set `decode_tp`."""
    return jax.jit(functools.partial(write, cfg=CFGS[kind], buckets=buckets))


@functools.cache
def reference(kind, b, temperature):
    """Every row stays until all have ended."""
    return writer(kind, 0)(params(kind), *prompt(b), KEYS, temperature)


def assert_same(got, want):
    for name in ("ids_BT", "length_B", "closed_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=1e-4)


def test_sizes():
    assert generate.compacted_sizes(64, 2) == (32, 16)
    assert generate.compacted_sizes(N, 2) == (19, 9)
    assert generate.compacted_sizes(37, 3) == (18, 9)
    assert generate.compacted_sizes(16, 3) == (8,)
    assert generate.compacted_sizes(15, 3) == generate.compacted_sizes(64, 0) == ()


def test_where_rows_leave(monkeypatch):
    """Three loops on one device; one if no row can end, and on a mesh."""
    loops, decode = [], generate.continue_decoding

    def spy(w, cfg, now, until, **options):
        loops.append((len(now.done_B), options.get("alive", 0)))
        return decode(w, cfg, now, until, **options)

    monkeypatch.setattr(generate, "continue_decoding", spy)
    args = params("plain"), *prompt(N), KEYS, 1.0
    run = functools.partial(write, cfg=PLAIN)
    jax.eval_shape(run, *args)
    assert loops == [(38, 19), (19, 9), (9, 0)]
    loops.clear()
    jax.eval_shape(functools.partial(run, stop_ids=(), eos_ids=()), *args)
    jax.eval_shape(placement.trace_under_mesh(tiny.mesh(2, 1, 1), run), *args)
    assert loops == [(38, 0), (38, 0)]


@pytest.mark.parametrize("kind, b, scanned", [
    ("plain", 38, False), ("local", 19, False), ("local", 19, True), ("hybrid", 19, False),
    ("hybrid", 19, True), ("gemma4", 2, False), ("gemma4", 2, True),
])
def test_the_same_samples(kind, b, scanned, monkeypatch):
    """One, two or nineteen rows with one row of the prompt."""
    for temperature in (1.0, 0.0):
        want = reference(kind, b, temperature)
        with monkeypatch.context() as patch:
            patch.setattr(decode_tp, "UNROLLED", 0 if scanned else 1e9)
            got = writer(kind, 2, scanned)(params(kind), *prompt(b), KEYS, temperature)
        assert_same(got, want)
    length = np.sort(reference(kind, b, 1.0).length_B)
    assert len(set(length.tolist())) > 5
    assert length[-1] > length[N - 10]  # the smallest batch has work to do


def test_rows_that_end_together():
    """Copies of one row end at once: at the first token, in the middle, and at the cap."""
    ids_1P, ids_bS = prompt(N)
    want = reference("plain", N, 1.0)
    length = np.asarray(want.length_B)
    for row in (length.argmin(), np.flatnonzero((length > 2) & (length < T))[1], length.argmax()):
        of_row = np.full(N, row)
        got = writer("plain", 2)(params("plain"), ids_1P, ids_bS[of_row], KEYS[of_row], 1.0)
        assert_same(got, jax.tree.map(lambda a, of_row=of_row: a[of_row], want))
    assert length.min() == 1 and length.max() == T
    closed = np.asarray(want.closed_B)
    assert closed.any() and (~closed & (length < T)).any()


def test_the_loop_stops_at_the_token_that_leaves_few_rows():
    @jax.jit
    def run(params, ids_1P, ids_bS, keys_N):
        kvs, logits_NV = prefill(params, PLAIN, ids_1P, ids_bS)
        w = generate.decode_weights(params, PLAIN, jnp.float32)
        now = generate.begin(PLAIN, kvs, logits_NV, keys_N, max_new=T, dtype=jnp.float32, **ENDS)
        return generate.continue_decoding(w, PLAIN, now, T, alive=9, **ENDS)

    now = run(params("plain"), *prompt(N), KEYS)
    length = np.asarray(reference("plain", N, 1.0).length_B)
    left = [(length > t).sum() for t in range(T)]
    assert int(now.t) == next(t for t, n in enumerate(left) if n <= 9)
    assert int((~now.done_B).sum()) == left[int(now.t)]
