"""An update whose microbatches have widths of their own is the same on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from nla_jax import steps
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from tests.helpers import tiny

# With `remat`, full fine-tuning on a mesh sums the gradients of blocks in place.
SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=2), layer=0, remat=True)
B, G, T = 8, 4, 20
OPTS = tiny.rl_options(G, T, reward="mse", kl=0.1, micro_av=2, micro_ar=4, ar_group=2)
TX = optax.sgd(0.1)


def answers() -> dict:
    """Answers of all lengths; those of every other device are short."""
    rng, n = np.random.default_rng(2), B * G
    length = np.where(np.arange(n) % 2, rng.integers(1, 9, n), rng.integers(3, T + 1, n)).astype(np.int32)
    return {"ids_NT": tiny.random_ids(rng, (n, T)), "logp_NT": np.full((n, T), -5, np.float32),
            "length_N": length, "closed_N": length < T, "start_N": np.ones(n, np.int32),
            "end_N": length - 1, "ok_N": (length < T) & (length > 2)}


def updated(sizes, rank: int, n_widths: int):
    """(metrics, AV and AR after the update) on the host."""
    mesh = tiny.mesh(*sizes)
    base, tables, place = tiny.placed_pair(SPEC, rank, mesh)
    state = steps.RLState(**{role: jitted_steps.learner(place(role), TX, mesh) for role in tables})
    opts = dataclasses.replace(OPTS, update_widths=n_widths)
    step = jitted_steps.jit_step(
        functools.partial(steps.update, spec=SPEC, opts=opts, tx_av=TX, tx_ar=TX), state)
    rows = {"h_BD": tiny.activations(B), "row_B": np.arange(B, dtype=np.int32)}
    batch, given = (mesh_lib.shard_batch(tree, mesh) for tree in (rows, answers()))
    ref = place("av") if rank else {"params": base}
    state, metrics = step(state, base, ref, batch, given)
    whole = jax.jit(lambda t: t, out_shardings=mesh_lib.replicated_sharding(mesh))
    return jax.tree.map(np.asarray, metrics), tiny.flat(whole({"av": state.av.params, "ar": state.ar.params}))


@pytest.mark.parametrize("sizes, rank", [((2, 2, 2), 0), ((1, 8, 1), 2)])
def test_eight_devices_and_four_widths_make_the_update_of_one(sizes, rank):
    (want, roles), (got, there) = updated((1, 1, 1), rank, 1), updated(sizes, rank, 4)
    assert got.keys() == want.keys() and 0 < want["ok"] < 1
    for name, b in want.items():
        np.testing.assert_allclose(got[name], b, rtol=1e-3, atol=1e-5, err_msg=name)
    for name, b in roles.items():
        np.testing.assert_allclose(there[name], b, atol=1e-4 * max(np.abs(b).max(), 1e-6), err_msg=name)
