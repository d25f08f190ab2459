"""Continuous batching gives each row the tokens of `generate.sample`, whenever it enters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import verbalizer
from nla_jax.lm import decode_tp, generate, kv_cache, slots
from tests.helpers import tiny

T, N = 12, 3
FAMILIES = {
    "plain": {},
    "windows": dict(window=6, local=(True, False)),
}


KEYS = generate.row_keys(jax.random.key(0), jnp.arange(6))


def prefilled(cfg, params, draft):
    """(the prompt's shared part, six rows' own part, the draft's part, logits [6, 1 + draft, V])."""
    prompt = tiny.spec().av

    @jax.jit
    def run(h_BD):
        shared = verbalizer.prompt_kv(params, cfg, prompt)
        return shared, *verbalizer.prefill_draft(params, cfg, prompt, h_BD, draft, None, shared)

    return run(jnp.asarray(tiny.activations(6)))


@pytest.mark.parametrize("family, scanned, n_draft", [
    ("plain", False, 0), ("plain", False, 3), ("plain", True, 3), ("windows", False, 11),
    ("windows", True, 0)])
def test_rows_are_those_of_the_sampler(family, scanned, n_draft, monkeypatch):
    """Six rows in three slots: they enter at different times, in another order, one with a lower cap. The
    first tokens of row 0 are a draft, which the others leave at once."""
    if scanned:
        monkeypatch.setattr(decode_tp, "UNROLLED", 0)
    cfg = dataclasses.replace(tiny.lm(n_blocks=2), **FAMILIES[family])
    params = tiny.params(cfg)
    w = generate.decode_weights(params, cfg, jnp.float32)
    shared, own, _, logits = prefilled(cfg, params, ())
    whole = functools.partial(generate.sample, w, cfg, (shared, own), logits[:, 0], KEYS, max_new=T,
                              pad_id=301)
    free = np.asarray(jax.jit(whole)().ids_BT)
    ends = dict(stop_ids=(int(free[0, 3]), int(free[0, 4])), eos_ids=(int(free[1, 6]),))
    hot, cold = (jax.jit(functools.partial(whole, temperature=t, **ends))() for t in (1.0, 0.0))
    draft = tuple(free[0, :n_draft].tolist())
    shared, own, begun, logits = prefilled(cfg, params, draft)

    @jax.jit
    def enter(now, slot_A, rows_A, temperature_A, most_A):
        part = begun and begun.rows(rows_A)
        return slots.enter(cfg, now, slot_A, own.rows(rows_A), logits[rows_A], KEYS[rows_A], temperature_A,
                           most_A, dtype=jnp.float32, pad_id=301, draft=draft, begun=part, **ends)

    advance = jax.jit(lambda shared, now, n: slots.advance(w, cfg, shared, now, n, **ends))
    (level,) = kv_cache.make_levels(shared, N, jnp.float32, scanned)
    now = slots.empty(cfg, own.rows(np.arange(N)), N, T, jnp.float32, 301)
    assert bool(now.done_N.all()) and int(advance(level, now, 5).length_N.sum()) == 0
    first = enter(now, np.array([2, N], np.int32), np.zeros(2, int), np.ones(2, np.float32), np.full(2, T))
    assert first.length_N.tolist() == [0, 0, min(1 + n_draft, int(hot.length_B[0]))]
    most, temperature = np.array([T, T, T, T, 4, T]), np.float32([1, 1, 1, 0, 1, 0])
    waiting, held, found = [4, 0, 3, 5, 1, 2], [None] * N, {}
    for piece in (1, 3, 2, 1, 7, 4, 3, 12, 12, 12, 12):
        places = [i for i, row in enumerate(held) if row is None][:2]
        rows, waiting = waiting[: len(places)], waiting[len(places) :]
        if rows:
            at = [*places[: len(rows)], N, N + 1][:2]
            take = np.array([*rows, rows[0]][:2])
            now = enter(now, np.array(at, np.int32), take, temperature[take], most[take])
            for place, row in zip(places, rows, strict=False):
                held[place] = row
        now = advance(level, now, piece)
        for i, row in enumerate(held):
            if row is not None and now.done_N[i]:
                found[row], held[i] = np.asarray(now.ids_NT[i, : now.length_N[i]]).tolist(), None
    assert sorted(found) == list(range(6))
    lengths = set()
    for row, ids in found.items():
        out = hot if temperature[row] else cold
        n = min(int(out.length_B[row]), most[row])
        assert ids == np.asarray(out.ids_BT[row, :n]).tolist(), row
        lengths.add(n)
    assert 4 in lengths and len(lengths) > 2


def test_a_stop_is_found_across_pieces_and_not_before_the_row():
    ids = jnp.array([[7, 8, 9, 0], [8, 9, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]], jnp.int32)
    length = jnp.array([3, 2, 1, 0], jnp.int32)
    assert slots._ends_with(ids, length, (8, 9)).tolist() == [True, True, False, False]
    assert slots._ends_with(ids, length, (9,)).tolist() == [True, True, True, False]
