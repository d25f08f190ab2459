"""A run that is stopped on one mesh goes on on another: parameters, optimizers, data and keys."""

import contextlib
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from nla_jax import bundle, verbalizer
from nla_jax.lm import optimize
from nla_jax.pipeline import stages
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import feeds, jitted_steps
from nla_jax.util import checkpoint, distributed
from tests.helpers import parity, tiny, world

ONE, EIGHT = (1, 1, 1), (2, 2, 2)
# As in test_pod.py: sums are taken in another order.
TOLERANCE = 1e-4


@contextlib.contextmanager
def devices(sizes):
    """Meshes are made of as many devices as `sizes` ask for."""
    with pytest.MonkeyPatch.context() as patch:
        made = functools.partial(mesh_lib.make, devices=jax.devices()[: int(np.prod(sizes))])
        patch.setattr(mesh_lib, "make", made)
        yield


def before_rl(finished, workdir):
    """A copy of the finished run, without RL and what comes after it."""
    shutil.copytree(finished / "run", workdir)
    for name in ("summary.json", "done/rl.json", "done/eval_rl.json", "metrics/rl.jsonl"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "bundle")


def train_on(finished, programs, workdir, sizes, stop: bool):
    """The run goes on on a mesh; `stop`: SIGTERM comes during RL's first step."""
    rl_batch = feeds.rl_batch

    def stopping(*args, step, **kw):
        if stop and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rl_batch(*args, step=step, **kw)

    config = world.config(finished, mesh=dict(zip(mesh_lib.AXES, sizes, strict=True)))
    with devices(sizes), world.quick_compiles(programs), pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "rl_batch", stopping)
        return stages.run(config, workdir)


@pytest.mark.parametrize("first, second", [(ONE, EIGHT), (EIGHT, ONE)], ids=str)
def test_a_run_goes_on_on_another_mesh(finished, programs, tmp_path, first, second):
    workdir = tmp_path / "run"
    before_rl(finished, workdir)
    with pytest.raises(distributed.Stopped, match="rl is saved at step 1"):
        train_on(finished, programs, workdir, first, stop=True)
    got = train_on(finished, programs, workdir, second, stop=False)
    assert got["device"].startswith("cpu")
    apart = parity.differences(finished / "run", workdir, "rl")
    assert len(apart) > 10 and {name: d for name, d in apart.items() if d > TOLERANCE} == {}
    want = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    for split in ("heldout", "ood"):
        for a, b in zip(got["rl"][split], want["rl"][split], strict=True):
            np.testing.assert_allclose(a["value"], b["value"], rtol=1e-3, atol=1e-5, err_msg=a["name"])
    assert bundle.read_sidecar(workdir / "bundle")["training"]["config"]["mesh"]["fsdp"] == second[1]


def learner(sizes, seed: int):
    """An AV with Adam's moments, all numbers random, on a mesh."""
    lm = tiny.lm(tied=False, n_blocks=1)
    table, mesh = verbalizer.table(lm, rank=4, affine=True), tiny.mesh(*sizes)
    tx = optimize.optimizer(1e-3, 10)
    tree = mesh_lib.shard_params(
        verbalizer.init({}, lm, rank=4, affine=True, key=jax.random.key(0)), table, mesh
    )
    state, rng = jitted_steps.learner(tree, tx, mesh), np.random.default_rng(seed)
    filled = [
        jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding) for a in jax.tree.leaves(state)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), filled), table, mesh


@pytest.mark.parametrize("first, second", [(ONE, EIGHT), (EIGHT, ONE)], ids=str)
def test_a_checkpoint_comes_back_to_the_bit_in_the_places_of_the_other_mesh(tmp_path, first, second):
    saved, *_ = learner(first, 1)
    manager = checkpoint.manager(tmp_path)
    checkpoint.save(manager, 3, saved)
    manager.wait_until_finished()
    manager.close()
    other, table, mesh = learner(second, 2)
    manager = checkpoint.manager(tmp_path)
    step, found = checkpoint.restore_latest(manager, other)
    manager.close()
    assert step == 3
    tiny.assert_trees_close(found, saved)
    moments = [s for s in jax.tree.leaves(found.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    for tree in (found.params, moments[0].mu, moments[0].nu):
        tiny.assert_placed(tree, table, mesh)
