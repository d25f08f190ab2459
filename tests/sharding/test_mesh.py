"""Meshes, and where the table puts every parameter; what is computed on them is in test_meshes.py."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nla_jax import reconstructor, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import lora, optimize
from nla_jax.lm import params as params_lib
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import rules
from nla_jax.training import jitted_steps
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=1), layer=0)
ADAM = optimize.optimizer(1e-3, 10)


def test_learner_places_moments_like_parameters():
    mesh = tiny.mesh(1, 2, 2)
    params = verbalizer.init({}, SPEC.lm, rank=4, affine=True, key=jax.random.key(0))
    table = verbalizer.table(SPEC.lm, rank=4, affine=True)
    role = jitted_steps.learner(mesh_lib.shard_params(params, table, mesh), ADAM, mesh)
    adam = next(s for s in jax.tree.leaves(role.opt, is_leaf=lambda s: hasattr(s, "mu"))
                if hasattr(s, "mu"))
    for tree in (role.params, adam.mu, adam.nu):
        tiny.assert_placed(tree, table, mesh)
    sharded = [n for n, a in tiny.leaves(adam.mu).items() if not a.sharding.is_fully_replicated]
    assert len(sharded) > 10
    for counter in (adam.count, role.skipped, role.skipped_run):
        assert counter.sharding.is_fully_replicated and counter.sharding.mesh == mesh


@pytest.mark.parametrize("name, spec, shard", [
    ("embed", P("tensor", "fsdp"), (152, 16)),
    ("blocks/wq", P(None, "fsdp", "tensor"), (1, 16, 16)),
    ("blocks/wk", P(None, "fsdp", "tensor"), (1, 16, 8)),
    ("blocks/wo", P(None, "tensor", "fsdp"), (1, 16, 16)),
    ("blocks/w_down", P(None, "tensor", "fsdp"), (1, 32, 16)),
    ("blocks/attn_norm", P(None, None), (1, 32)),
    ("final_norm", P(None), (32,)),
    ("lm_head", P("fsdp", "tensor"), (16, 152)),
])
def test_where_parameters_go(name, spec, shard):
    """By hand, so that a change of the rules is seen."""
    mesh = tiny.mesh(1, 2, 2)
    entry = params_lib.table(SPEC.lm)[name]
    assert mesh_lib.spec_of(entry.shape, entry.axes, mesh) == spec
    placed = mesh_lib.shard_params({"x": np.zeros(entry.shape)}, {"x": entry}, mesh)["x"]
    assert placed.addressable_shards[0].data.shape == shard


def test_rules_cover_every_axis_of_every_table():
    """And no rule is left over; matrices are split over both axes, so none hides as None."""
    tables = [
        params_lib.table(tiny.lm(tied=True)), params_lib.table(tiny.lm(tied=False)),
        lora.table(tiny.lm(), 4), verbalizer.table(tiny.lm(), affine=True),
        verbalizer.table(tiny.lm(), rank=4), reconstructor.table(tiny.lm(), 2),
        reconstructor.table(tiny.lm(), 2, rank=4),
        params_lib.table(dataclasses.replace(tiny.lm(), experts=(8, 2, 16))),
    ]
    used = {axis for table in tables for spec in table.values() for axis in spec.axes}
    assert used == set(rules.PARAMETERS)
    for table in tables:
        for name, spec in table.items():
            assert len(spec.axes) == len(spec.shape), name
    for name, spec in params_lib.table(tiny.lm(tied=False)).items():
        if "norm" not in name:
            assert {axis for a in spec.axes for axis in rules.TABLE[a].at_rest} == {"fsdp", "tensor"}, name
    split = {axis for rule in rules.TABLE.values() for axes in rule[1:] for axis in axes or ()}
    assert split == set(mesh_lib.AXES)


def test_the_docs_show_the_table():
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
    _, table = text.split("| logical axis | what it counts | at rest | in use | in decoding |\n")
    shown = {}
    for line in table.split("\n\n")[0].splitlines()[1:]:
        name, counts, *when = (cell.strip() for cell in line.strip("|").split("|"))
        axes = [None if not cell else tuple(re.findall("`(.*?)`", cell)) for cell in when]
        assert all(cell in ("", "whole") or found for cell, found in zip(when, axes, strict=True)), line
        shown[name.strip("`")] = rules.Rule(counts, *axes)
    assert list(shown.items()) == list(rules.TABLE.items())


def test_a_wrong_axis_name_fails():
    mesh = tiny.mesh(1, 2, 2)
    wrong = {"w": params_lib.Spec((4, 4), ("model", "modle"))}
    with pytest.raises(KeyError, match="modle"):
        mesh_lib.shard_params({"w": jnp.ones((4, 4))}, wrong, mesh)
    with pytest.raises(KeyError, match="other"):
        mesh_lib.shard_params({"other": jnp.ones((4, 4))}, wrong, mesh)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = tiny.mesh(1, 2, 2)
    assert mesh_lib.spec_of((5, 6), ("vocab", "model"), mesh) == P(None, "fsdp")


def test_sizes():
    assert mesh_lib.make().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_lib.make(1, -1, 2).shape == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_lib.make(2, devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize("sizes, named", [
    ((3, 1, 1), "needs 3 devices; there are 8"),
    ((16, 1, 1), "needs 16 devices; there are 8"),
    ((-1, 3, 1), "needs 6 devices; there are 8"),
    ((-1, 16, 1), "needs 16 devices; there are 8"),
    ((-1, -1, 1), "at most one of them -1"),
    ((0, 1, 1), "positive numbers"),
    ((10**9, 10**9, 10**9), "needs 1000000000000000000000000000 devices"),
    ((-2, 1, 1), "positive numbers"),
])
def test_sizes_refused(sizes, named):
    with pytest.raises(UserError, match=named):
        mesh_lib.make(*sizes)


def test_batch_over_devices():
    mesh = tiny.mesh(1, 2, 2)
    placed = mesh_lib.shard_batch({"h": np.ones((4, 3)), "row": np.arange(4)}, mesh)
    assert placed["h"].addressable_shards[0].data.shape == (2, 3)
    assert {tuple(s.data.tolist()) for s in placed["row"].addressable_shards} == {(0, 1), (2, 3)}
    with pytest.raises(UserError, match="a batch of 3 rows does not divide over 2 devices"):
        mesh_lib.shard_batch({"h": np.ones((3, 3))}, mesh)
    for leaf in jax.tree.leaves(mesh_lib.replicate({"a": np.ones(3)}, mesh)):
        assert leaf.sharding.is_fully_replicated
