"""Int8 matrices: their rounding, their products, and decoding with adapters beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import steps, verbalizer
from nla_jax.lm import decode_tp, lora, model
from nla_jax.lm import params as params_lib
from nla_jax.lm.ops import dense
from nla_jax.rl import roles
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.util import int8
from nla_jax.util.keys import new_key
from tests.helpers import tiny


def matrix(*shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_the_error_is_at_most_half_a_level_of_its_channel():
    w = matrix(3, 16, 8).at[:, :, 2].multiply(100.0).at[:, :, 5].set(0.0)
    q = int8.quantize(w)
    assert q.q.dtype == jnp.int8 and q.scale.shape == (3, 1, 8) and q.shape == w.shape
    error = np.abs(np.asarray(int8.dequantize(q)) - np.asarray(w))
    assert (error <= 0.5001 * np.asarray(q.scale)).all()
    assert not error[:, :, 5].any()
    assert np.abs(np.asarray(q.q)).max() == 127


@pytest.mark.parametrize("compute, limit", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_products_are_those_of_the_dequantized_matrix(compute, limit):
    w, x = matrix(16, 8), matrix(5, 16, seed=1)
    q = int8.quantize(w, compute=compute)
    assert tiny.relative(dense(x, q), dense(x, int8.dequantize(q))) < limit
    table = int8.quantize(w, -1, compute)  # one scale for each of 16 tokens
    rows = int8.take_rows(table, jnp.array([[3, 0], [7, 15]]))
    assert rows.dtype == compute
    want = int8.dequantize(table)[jnp.array([[3, 0], [7, 15]])]
    assert tiny.relative(rows.astype(jnp.float32), want) < limit
    y = matrix(5, 8, seed=2)
    want = dense(y, int8.dequantize(table), True)
    assert tiny.relative(dense(y, table, True), want) < limit
    assert tiny.relative(dense(y, table.T), want) < limit
    assert jax.grad(lambda x: dense(x, q).sum())(x).shape == x.shape


def test_a_cast_changes_products_only():
    tree = {"blocks": {"wq": int8.quantize(matrix(2, 8, 8)), "attn_norm": jnp.ones((2, 8))}}
    got = model.cast(tree, jnp.float32)
    assert got["blocks"]["wq"].dtype == jnp.float32 and got["blocks"]["wq"].q.dtype == jnp.int8
    copy = params_lib.float32_copy(tree)["blocks"]["wq"]
    np.testing.assert_array_equal(copy, int8.dequantize(tree["blocks"]["wq"]))


def quantized(params: dict) -> dict:
    """Return a tiny model as `sharded_load` stores it in int8, with products in float32."""
    one = lambda a, axis: int8.quantize(a, axis, "float32")
    blocks = {n: a if "norm" in n else one(a, -2) for n, a in params["blocks"].items()}
    rest = {"embed": one(params["embed"], -1), "lm_head": one(params["lm_head"], -2)}
    return {**params, **rest, "blocks": blocks}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_rollouts_are_those_of_the_dequantized_model(adapters, scanned, monkeypatch):
    """On one device and on a mesh, with the blocks unrolled and scanned."""
    monkeypatch.setattr(decode_tp, "UNROLLED", 0 if scanned else 1e9)
    spec = tiny.talker(lm=tiny.lm(tied=False))
    base = quantized(tiny.talker_params(spec.lm))
    av = {"params": base}
    if adapters:
        factors = lora.init(spec.lm, 2, jax.random.key(5))
        av = {"lora": jax.tree.map(lambda a: a + 0.05 * matrix(*a.shape, seed=a.size), factors)}
    h, rows = jnp.asarray(tiny.activations(8)), jnp.arange(8, dtype=jnp.int32)

    def written(av, base, mesh=None):
        run = lambda av, base: steps.rollout(av, base, spec, h, rows, new_key(0), group=1, max_new=10)[0]
        return jax.jit(placement.trace_under_mesh(mesh, run))(av, base)

    want = written(int8.dequantize(av), int8.dequantize(base))
    got = written(av, base)
    np.testing.assert_array_equal(got.ids_BT, want.ids_BT)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=1e-4)
    mesh = tiny.mesh(1, 2, 4)
    on = lambda tree: jax.tree.map(lambda a: jax.device_put(a, mesh_lib.replicated_sharding(mesh)), tree)
    spread = written(on(av), on(base), mesh)
    np.testing.assert_array_equal(spread.ids_BT, want.ids_BT)
    np.testing.assert_allclose(spread.logp_BT, want.logp_BT, atol=1e-4)
    assert len({tuple(r) for r in np.asarray(want.ids_BT)}) > 1
    scores = roles.answer_logp(av, base, spec, h, got.ids_BT)  # one policy: the scorer agrees
    used = np.arange(10)[None] < np.asarray(got.length_B)[:, None]
    np.testing.assert_allclose(np.where(used, scores, 0), np.where(used, got.logp_BT, 0), atol=1e-4)
    assert verbalizer.weights(base, av)["blocks"]["wq"].dtype == jnp.float32
