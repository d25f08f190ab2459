"""RL from documents, the target's forward pass inside the step: the numbers of stored activations."""

import json

import jax
import numpy as np
import pytest
import tiny
import world

from nla_jax import configs, metrics, stages, steps
from nla_jax import context as C
from nla_jax.data import online, order, store
from nla_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def fresh(finished):
    c = world.config(finished)
    return online.Fresh(c.data, c.seed, tiny.tokenizer(), c.rl.batch)


def test_the_first_pass_is_what_a_store_holds(finished, fresh):
    c = world.config(finished)
    columns = store.load_columns(finished / "run" / "data", "rl")
    draws = order.epoch_indices(len(columns["h"]), c.rl.batch, c.seed, "rl")
    r = C.open_run(c, finished / "run")
    spec = C.ready(r).spec
    read = jax.jit(lambda base, batch: steps.read(base, spec, batch))
    for step in (0, 3, fresh.steps_per_pass - 1):
        batch = fresh.at(step)
        assert batch["read_ids_BT"].shape == (c.rl.batch, 64)
        got, want = read(r.base, batch), columns["h"][np.asarray(draws[step])]
        np.testing.assert_allclose(got["h_BD"], want, rtol=1e-4, atol=1e-5)
        assert got.keys() == {"h_BD", "row_B"}
    assert steps.read(r.base, spec, got) is got


def texts(batch):
    return {(row[valid].tobytes(), at) for row, valid, at in zip(
        batch["read_ids_BT"], batch["read_valid_BT"], batch["read_at_B"], strict=True)}  # fmt: skip


def test_a_later_pass_is_new_and_a_step_is_a_function_of_its_number(finished, fresh):
    n = fresh.steps_per_pass
    first = set().union(*(texts(fresh.at(i)) for i in range(n)))
    second = set().union(*(texts(fresh.at(i)) for i in range(n, 2 * n)))
    assert len(second - first) > len(second) / 2
    c = world.config(finished)
    again = online.Fresh(c.data, c.seed, tiny.tokenizer(), c.rl.batch)
    for name, value in fresh.at(n + 1).items():
        np.testing.assert_array_equal(again.at(n + 1)[name], value)


def test_rl_online_equals_rl_from_the_store(finished, programs, tmp_path):
    run = finished / "run"
    with world.one_device(), world.quick_compiles(programs):
        summary = stages.run(world.config(finished, activations="online"), tmp_path / "run", source=run)
    got, want = (metrics.read(w / "metrics" / "rl.jsonl") for w in (tmp_path / "run", run))
    assert len(got) == len(want) == 2
    for a, b in zip(got, want, strict=True):
        for name in ("reward", "mse", "kl", "length", "av_grad_norm", "ar_grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    stored = json.loads((run / "summary.json").read_text("utf-8"))
    for a, b in zip(summary["rl"]["heldout"], stored["rl"]["heldout"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-2, abs=1e-3), a["name"]


def test_what_cannot_be_online(finished):
    for section, key, value in [("rl", "shuffle_h", True), ("data", "store", "x")]:
        c = world.config(finished, activations="online")
        c[section][key] = value
        with pytest.raises(UserError, match=f"not with {section}.{key}"):
            configs.validate(c)
