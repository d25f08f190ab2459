"""A step with every setting of the reward, whose answers the host edits, is the same on one device and on
eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import configs, steps
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=3), layer=1)
B, G, T, RANK = 8, 4, 12, 2


def settings():
    c = configs.default()
    c.dtype = "float32"
    c.av.rank = c.ar.rank = RANK
    c.rl.update(batch=B, group=G, max_new=T, reader="warm_ar", paraphrase=0.5, patch_kl=0.5, false_claims=0.5,
                lr_av=1e-2, lr_ar=1e-2, warmup=0, kl=0.1)
    return c


def edit(i, answers):
    """Words that depend on the answer, for every second row."""
    ids_NT, rows = answers["ids_NT"], np.arange(B * G)
    return {"edited_ids_NT": (ids_NT * 7 + i) % 250, "edited_end_N": np.minimum(answers["end_N"], 6),
            "edited_N": rows % 2 == 0, "claims_N": np.float32(np.cos(rows))}, {"seen": float(ids_NT.sum())}


def ran(*sizes):
    """(metrics of two steps, AV and AR at the end), on the host."""
    mesh = tiny.mesh(*sizes)
    base, tables, place = tiny.placed_pair(SPEC, RANK, mesh)
    c = settings()
    tx = {role: jitted_steps.optimizer(c, "rl", f"lr_{role}") for role in tables}
    state = steps.RLState(**{role: jitted_steps.learner(place(role), tx[role], mesh) for role in tables})
    step = jitted_steps.edited_rl_step(c, SPEC, state, edit)
    rng, length = np.random.default_rng(0), np.arange(3, 3 + B)
    rows = {"h_BD": tiny.activations(B), "row_B": np.arange(B, dtype=np.int32),
            "prefix_B": np.int32(2 + np.arange(B) % 5), "text_ids_BT": tiny.random_ids(rng, (B, 12)),
            "text_valid_BT": np.arange(12)[None] < length[:, None], "text_at_B": np.int32(length - 1)}
    logs, ref, reader = [], place("av"), place("ar")
    for i in range(2):
        batch = mesh_lib.shard_batch(rows, mesh)
        state, metrics = step(state, base, ref, batch, jax.random.key(i), reader, i)
        logs.append(jax.tree.map(np.asarray, metrics))
    whole = jax.jit(lambda t: t, out_shardings=mesh_lib.replicated_sharding(mesh))
    return logs, tiny.flat(whole({"av": state.av.params, "ar": state.ar.params}))


@pytest.fixture(scope="module")
def alone():
    return ran(1, 1, 1)


def test_eight_devices_take_the_steps_of_one(alone):
    (want, roles), (got, there) = alone, ran(2, 2, 2)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        assert {"seen", "patch_kl", "reader_fve", "prefix", "paraphrased"} <= a.keys()
        np.testing.assert_array_equal(a["ids_BGT"], b["ids_BGT"])
        for name in a.keys() - {"ids_BGT", "ratio_off_max", "ratio_off_mean"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for name, b in roles.items():  # Adam makes steps of one size from gradients of any, near zero too
        np.testing.assert_allclose(there[name], b, atol=1e-3 * max(np.abs(b).max(), 1e-6), err_msg=name)


def test_the_first_step_is_on_policy_though_it_is_two_programs(alone):
    assert alone[0][0]["ratio_off_max"] < 1e-4 and jnp.isfinite(alone[0][0]["reward"])
