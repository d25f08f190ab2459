"""Frozen bfloat16 blocks on one CPU are indexed, and give the same numbers as a scan over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm import lora, model, params
from nla_jax.util import int8
from tests.helpers import tiny

LM = tiny.lm(n_blocks=4)
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, LM.vocab_size, (3, 9)))
VALID = jnp.asarray(np.arange(9)[None] < np.array([[9], [5], [7]]))


@pytest.fixture(scope="module")
def base():
    return model.cast(params.init(LM, jax.random.key(0)), jnp.bfloat16)


@pytest.fixture(scope="module")
def adapter():
    ab = lora.init(LM, 2, jax.random.key(1), jnp.bfloat16)
    return jax.tree.map(lambda a: a + jnp.asarray(0.05 * RNG.standard_normal(a.shape), a.dtype), ab)


def run(tree, **options):
    return model.forward(tree, LM, model.embed(tree, LM, IDS), VALID, **options)[0]


def without_index(monkeypatch):
    monkeypatch.setattr(params, "is_indexed", lambda w: False)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_frozen_blocks_give_the_same_residual_stream(base, n, monkeypatch):
    short = params.truncate(base, n, whole=True)
    assert len(short["blocks"]["wq"]) == 4 and len(short["blocks"]["attn_norm"]) == n
    got = run(short, frozen=True)
    without_index(monkeypatch)
    assert np.array_equal(got, run(params.truncate(base, n)))
    assert np.array_equal(got, run(short))  # whole stacks are cut where they are scanned over


def test_the_compiled_loop_has_no_float32_copy_of_the_blocks(base):
    def temporary_bytes(**options):
        lowered = jax.jit(lambda tree: run(tree, **options)).lower(base)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    copy = sum(4 * w.size for w in base["blocks"].values() if params.is_indexed(w))
    assert temporary_bytes(frozen=True) < copy < temporary_bytes()


@pytest.mark.parametrize("options", [{"remat": True}, {"frozen": True}])
def test_gradients_beside_adapters_are_those_of_a_scan(base, adapter, options, monkeypatch):
    def loss(trees):
        x = run(lora.attach(trees["base"], trees["adapter"]), **options)
        return jnp.sum(jnp.where(VALID[..., None], x, 0.0) ** 2)

    trees = {"base": base, "adapter": adapter}
    value, got = jax.jit(jax.value_and_grad(loss))(trees)
    without_index(monkeypatch)
    want_value, want = jax.jit(jax.value_and_grad(lambda trees: loss(trees)))(trees)
    assert value == want_value
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=1e-2 * np.abs(b).max())


def test_only_bfloat16_arrays_are_indexed(base):
    w = base["blocks"]["wq"]
    assert params.is_indexed(w)
    assert not params.is_indexed(w.astype(jnp.float32))
    assert not params.is_indexed(int8.quantize(w))
    assert not params.is_indexed({"a": w})
