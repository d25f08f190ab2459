"""Ways for h to come into AV, all the way through a run: warm start, RL, bundle, a run that was stopped."""

import os
import signal

import jax
import numpy as np
import pytest

import nla_jax
from nla_jax import bundle, specs
from nla_jax.errors import UserError
from nla_jax.lm import weights
from nla_jax.pipeline import context, stages
from nla_jax.training import feeds
from nla_jax.util import distributed, metrics_log
from tests.helpers import tiny, world

pytestmark = pytest.mark.usefixtures("quick")

WAYS = {
    "norm_matched, full": dict(rank=0, injection="norm_matched", affine="identity"),
    "replace, adapters": dict(rank=2, injection="replace", affine="identity"),
}


@pytest.fixture(scope="module", params=WAYS)
def ran(request, finished, tmp_path_factory):
    """(settings of AV, workdir) of a run that was stopped in RL and went on, over the store of `finished`."""
    workdir = tmp_path_factory.mktemp("injection") / "run"
    c, source = world.config(finished, av=WAYS[request.param]), finished / "run"
    c.rl.lr_av = 1e-2
    if c.av.injection == "norm_matched":  # the others have two blocks
        c.target, source = str(world.write_target(workdir.parent / "target", n_blocks=3)), ""
    rl_batch = feeds.rl_batch

    def stopping(*args, step, **kw):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rl_batch(*args, step=step, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "rl_batch", stopping)
        with pytest.raises(distributed.Stopped, match="rl is saved at step 1"):
            stages.run(c, workdir, source=source)
    stages.run(c, workdir)
    return WAYS[request.param], workdir


def test_it_is_trained_by_every_stage_and_kept(ran):
    settings, workdir = ran
    nla = nla_jax.load(workdir / "bundle", batch=8)
    beside = workdir / "bundle_warm"
    warm = bundle.read_trees(beside, bundle.read_sidecar(beside), nla.spec.lm)
    start = {"w": np.eye(32), "b": np.zeros(32)}
    for part, begun in start.items():
        after_warm, after_rl = np.asarray(warm["av"]["inject"][part]), np.asarray(nla.av["inject"][part])
        assert np.abs(after_warm - begun).max() > 1e-4 and np.abs(after_rl - after_warm).max() > 1e-4
    assert nla.spec.av.injection == settings["injection"]
    assert (nla.spec.alpha == 1.0) == (settings["injection"] == "norm_matched")
    assert nla.verbalize(tiny.activations(2), key=jax.random.key(0))


def test_the_first_update_is_on_policy_and_the_stopped_run_went_on(ran):
    _, workdir = ran
    rows = metrics_log.read(workdir / "metrics" / "rl.jsonl")
    assert [r["step"] for r in rows] == [0, 1]
    assert rows[0]["ratio_off_max"] < 1e-4 and abs(rows[0]["kl"]) < 1e-6 < rows[1]["kl"]


def test_a_run_that_begins_from_the_bundle_takes_its_way(ran, finished):
    settings, workdir = ran
    c = world.config(finished, init=f"{workdir / 'bundle'}", av=dict(rank=settings["rank"]))
    c.target = bundle.read_sidecar(c.init)["base_checkpoint"]
    assert {k: context.apply_bundle(c).av[k] for k in settings} == settings
    c.av.injection = "norm_matched" if settings["injection"] == "replace" else "replace"
    if c.av.injection != "replace":  # the default, which a bundle may change
        with pytest.raises(UserError, match="av.injection='norm_matched', but init="):
            context.apply_bundle(c)


def test_a_target_of_two_blocks_has_no_room_for_it(finished):
    lm = weights.read_config(finished / "target")
    with pytest.raises(UserError, match="after block 1, where only later blocks .* has blocks 0 to 1"):
        specs.make_spec(lm, tiny.tokenizer(), layer=0, dtype="float32", alpha=1.0, injection="norm_matched")
