"""Texts of all lengths go through few programs. An RL step is compiled once. What reads texts, as a
warm-start step does, is compiled once for each of a few widths."""

import numpy as np
import pytest

from nla_jax.data import request_batches
from nla_jax.data.capture_requests import Request
from nla_jax.pipeline import stages
from nla_jax.training import jitted_steps, loop
from nla_jax.util.batching import width_for
from tests.helpers import world


def test_training_steps_are_compiled_once_a_width(finished, quick, monkeypatch, tmp_path):
    """Whatever the lengths of what they read, and with checkpoints in between."""
    programs, lengths, widths = [], {}, {}
    fit, jit_step = loop.fit, jitted_steps.jit_step

    def keeping(step, state):
        programs.append(jit_step(step, state))
        return programs[-1]

    def looking(stage, state, step, batch, n_steps, **options):
        def one(state, b, i):
            for name in ("mask_BT", "valid_BT"):
                if name in b:
                    widths.setdefault(stage, set()).add(b[name].shape[1])
                    lengths.setdefault(stage, set()).update(np.asarray(b[name]).sum(1).tolist())
            return step(state, b, i)

        return fit(stage, state, one, batch, n_steps, **options)

    monkeypatch.setattr(jitted_steps, "jit_step", keeping)
    monkeypatch.setattr(loop, "fit", looking)
    stages.run(world.config(finished, checkpoint_every=1), tmp_path / "run", only="rl")
    warm = ("lessons_ar", "warm_ar", "warm_av")
    assert [p._cache_size() for p in programs] == [*(len(widths[stage]) for stage in warm), 1]
    assert set().union(*widths.values()) <= {width_for(n) for n in range(1, 65)}
    # Batches of written explanations are of similar length.
    assert all(len(lengths[stage]) > 1 for stage in warm) and len(lengths["lessons_ar"]) > 3, lengths


def test_reading_explanations_of_all_lengths(nla):
    """AR on texts: one program a width."""
    runner = nla.runner
    before = runner._read._cache_size()
    runner.reconstruct(["word " * n for n in range(1, 90)])
    prompt = len(runner.spec.ar.before) + len(runner.spec.ar.after)
    widths = {width_for(n) for n in range(prompt, prompt + 10 * 90)}
    assert 2 < runner._read._cache_size() - before <= len(widths) <= 12


@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 64, 65, 97, 150, 1000, 4097])
def test_widths(length):
    width = width_for(length)
    assert length <= width < max(1.51 * length, length + 16) and width % (16 if length > 8 else 8) == 0


def test_widths_are_few():
    assert len({width_for(n) for n in range(1, 1025)}) == 13


def test_extraction_has_a_shape_for_each_bucket():
    rng = np.random.default_rng(0)
    wanted = [
        Request(f"doc {n}", rng.integers(0, 9, n).astype(np.int32), (n - 1,), ("t",), ("",), ("",))
        for n in range(1, 513)
    ]
    shapes = {b.ids_BT.shape for b in request_batches.batches(wanted, 8)}
    assert shapes == {(8, width) for width in request_batches.BUCKETS}
