"""Prompts that rows share: kept once a level, what is written is as if every row had its own copy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm import decode_tp, generate, kv_cache, ops
from nla_jax.lm.model import KV
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from tests.helpers import tiny

T = 12
PLAIN = tiny.lm(n_blocks=2)
# The window is shorter than what is written: it begins in the prompt and leaves it.
LOCAL = dataclasses.replace(PLAIN, window=9, local=(True, False), local_rope_theta=50.0, qk_norm=True,
                            post_norms=True, final_softcap=2.0, attn_softcap=0.5)
CFGS = {"plain": PLAIN, "local, capped": LOCAL}
BATCHES = [(1, 2), (1, 8), (8,), (1, 1, 4), (2, 2, 8)]  # of levels, under eight rows
SLOTS = (7, 3, 2)


@functools.cache
def params(cfg):
    return tiny.params(cfg)


def prompt(cfg, batches, padded=True):
    """Random keys and values, the first rows of each level padded on the left."""
    rng, out = np.random.default_rng(0), []
    for b, S in zip(batches, SLOTS, strict=False):
        k, v = (rng.normal(size=(cfg.n_blocks, b, cfg.n_kv_heads, S, cfg.head_dim)) for _ in "kv")
        valid = np.arange(S) >= (np.arange(b)[:, None] == 0) * (S // 3 * padded)
        out.append(KV(np.float32(2 * k), np.float32(v), valid))
    return tuple(out)


def copied(kvs, n: int) -> KV:
    """The same, every row with its own copy: one cache of n rows."""
    parts = [jax.tree.map(lambda a, kv=kv: np.repeat(a, n // kv.batch, int(a.ndim == 5)), kv) for kv in kvs]
    return KV(*(np.concatenate([getattr(kv, name) for kv in parts], axis)
                for name, axis in (("k_LBKSd", 3), ("v_LBKSd", 3), ("valid_BS", 1))))


def written(cfg, kvs, n=8, mesh=None):
    """(`Writing` after its last token) of n rows."""
    logits = 2 * np.random.default_rng(1).normal(size=(n, cfg.vocab_size)).astype(np.float32)
    keys = generate.row_keys(jax.random.key(0), jnp.arange(n))

    def run(params, kvs, logits, keys):
        w = generate.decode_weights(params, cfg, jnp.float32)
        now = generate.begin(cfg, kvs, logits, keys, max_new=T, dtype=jnp.float32)
        return generate.continue_decoding(w, cfg, now, T)

    args = params(cfg), kvs, logits, keys
    if mesh is not None:
        args = jax.tree.map(lambda a: mesh_lib.shard_array(a, mesh_lib.replicated_sharding(mesh)), args)
    return jax.jit(placement.trace_under_mesh(mesh, run))(*args)


def assert_same(got, want):
    np.testing.assert_array_equal(got.ids_BT, want.ids_BT)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=1e-4)


@functools.cache
def reference(kind, batches, n=8):
    """One device, one cache."""
    return written(CFGS[kind], copied(prompt(CFGS[kind], batches), n), n)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_attention_to_levels_is_attention_to_all_of_it(n, cap):
    """Against `attend` over the joined keys, with masks that differ by row; some rows do not see a level."""
    rng, b, H, K, d = np.random.default_rng(n), 2, 4, 2, 8
    batches, slots = (1, b, b * n), (6, 3, 5)
    q = rng.normal(size=(b * n, H, d)).astype(np.float32)
    parts = [[3 * rng.normal(size=(x, K, S, d)).astype(np.float32) for _ in "kv"]
             for x, S in zip(batches, slots, strict=True)]
    masks = [rng.random((x, b * n // x, S)) < 0.5 for x, S in zip(batches, slots, strict=True)]
    masks[0][:, 0], masks[1][:, 0], masks[2][..., 0] = False, False, True
    got = jax.jit(functools.partial(ops.attend_levels, dtype=jnp.float32, cap=cap))(q, parts, masks)
    k, v = (np.concatenate([np.repeat(p[i], b * n // len(p[i]), 0) for p in parts], 2) for i in (0, 1))
    mask = np.concatenate([m.reshape(b * n, 1, -1) for m in masks], -1)
    want = ops.attend(q[:, None], k, v, mask, jnp.float32, cap=cap)[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("kind", CFGS)
def test_levels_write_what_copies_write(kind, batches):
    cfg = CFGS[kind]
    got, want = written(cfg, prompt(cfg, batches)), reference(kind, batches)
    assert_same(got, want)
    assert len(np.unique(np.asarray(want.ids_BT), axis=0)) == 8
    # Parts of one batch are one, and none was copied.
    assert [level.batch for level in got.prompt] == sorted(set(batches))
    if batches == (1, 2):  # the prompt is seen: another one, other words
        other = written(cfg, tuple(kv.replace(v_LBKSd=-kv.v_LBKSd) for kv in prompt(cfg, batches)))
        assert (np.asarray(other.ids_BT) != want.ids_BT).any(1).all()


def test_padding_of_a_level_does_not_matter():
    """Slots that hold no token, against a prompt without them."""
    kvs = prompt(LOCAL, (1, 2), padded=False)
    grow = lambda a: np.concatenate([np.full_like(a, 9.0)[:, :, :, :2], a], 3)
    wide = tuple(KV(grow(kv.k_LBKSd), grow(kv.v_LBKSd), np.pad(kv.valid_BS, ((0, 0), (2, 0)))) for kv in kvs)
    assert_same(written(LOCAL, wide), written(LOCAL, kvs))


@pytest.mark.parametrize("n, batches", [(1, (1, 1)), (4, (1, 1)), (2, (1, 2))])
def test_one_activation_or_one_sample(n, batches):
    assert_same(written(LOCAL, prompt(LOCAL, batches), n), reference("local, capped", batches, n))


def test_a_batch_that_rows_cannot_share():
    with pytest.raises(ValueError, match="3 rows of a prompt cannot be shared by 8 rows"):
        kv_cache.make_levels(prompt(PLAIN, (1, 3)), 8, jnp.float32)


# Fewer activations than devices; as many; 12 for 8 devices, so that some devices have rows of two; and rows
# that cannot be dealt to all devices.
@pytest.mark.parametrize("sizes, n, batches, kept", [
    ((8, 1, 1), 8, (1, 2), 1), ((1, 2, 4), 16, (1, 8), 1), ((2, 2, 2), 24, (1, 12), 3),
    ((1, 1, 2), 3, (1, 3), 3), ((1, 2, 2), 6, (1, 3), 3),
])
@pytest.mark.parametrize("scanned", [False, True])
def test_on_a_mesh(sizes, n, batches, kept, scanned, monkeypatch):
    """The same words; the first level whole on every device, of the second what a device's rows need."""
    monkeypatch.setattr(decode_tp, "UNROLLED", 0 if scanned else 1e9)
    got = written(LOCAL, prompt(LOCAL, batches), n, tiny.mesh(*sizes))
    assert_same(got, reference("local, capped", batches, n))
    first, second = got.prompt
    for a in jax.tree.leaves(first):
        assert a.sharding.is_fully_replicated
    axis = 1 if scanned else 0
    for a in jax.tree.leaves((second.k, second.v)):
        assert a.ndim == 4 + axis and a.addressable_shards[0].data.shape[axis] == kept
