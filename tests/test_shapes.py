"""Texts of all lengths go through few programs: a training step is compiled once, and what reads texts once
for each of a few widths."""

import jax
import numpy as np
import pytest
import world
from jax import monitoring

from nla_jax import reconstructor, stages, train
from nla_jax.data import batching
from nla_jax.data.rows import Request

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """A list that grows by one whenever a program is compiled."""
    found = []

    def listen(event, *_, **__):
        if event == COMPILED:
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


def test_the_listener_hears(compiled):
    double = jax.jit(lambda x: x * 2)
    double(np.zeros(3)), double(np.ones(3))
    before = len(compiled)
    double(np.zeros(4))
    assert before >= 1 and len(compiled) == before + 1


def test_training_steps_are_compiled_once(finished, quick, compiled, monkeypatch, tmp_path):
    """From the second step on nothing is, in any stage, whatever the lengths of what it reads."""
    counts, lengths = {}, {}
    fit = train.fit

    def counting(stage, state, step, batch, n_steps, **options):
        def one(state, b, i):
            out = step(state, b, i)
            counts.setdefault(stage, []).append(len(compiled))
            for name in ("mask_BT", "valid_BT"):
                if name in b:
                    lengths.setdefault(stage, set()).update(np.asarray(b[name]).sum(1).tolist())
            return out

        return fit(stage, state, one, batch, n_steps, **options)

    monkeypatch.setattr(train, "fit", counting)
    more = {stage: {"steps": 3} for stage in ("warm_ar", "warm_av", "rl")}
    none = {stage: {"steps": 0} for stage in ("lessons_ar", "lessons_av")}
    c = world.config(finished, **more, **none, checkpoint_every=2)
    stages.run(c, tmp_path / "run", only="rl")
    for stage in more:
        assert len(counts[stage]) == 3 and len(set(counts[stage][1:])) == 1, (stage, counts[stage])
    assert counts["warm_av"][-1] < counts["rl"][0]  # RL's step is another program, and was heard
    for stage in ("warm_ar", "warm_av"):
        assert len(lengths[stage]) > 3, lengths


def test_reading_explanations_of_all_lengths(nla):
    """AR on texts: one program a width."""
    runner = nla.runner
    before = runner._read._cache_size()
    runner.reconstruct(["word " * n for n in range(1, 90)])
    prompt = len(runner.spec.ar.before) + len(runner.spec.ar.after)
    widths = {reconstructor.width_for(n) for n in range(prompt, prompt + 10 * 90)}
    assert 2 < runner._read._cache_size() - before <= len(widths) <= 12


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 97, 150, 1000, 4097])
def test_widths(length):
    width = reconstructor.width_for(length)
    assert length <= width < max(1.51 * length, length + 16) and width % 16 == 0


def test_widths_are_few():
    assert len({reconstructor.width_for(n) for n in range(1, 1025)}) == 12


def test_extraction_has_a_shape_for_each_bucket():
    rng = np.random.default_rng(0)
    wanted = [
        Request(f"doc {n}", rng.integers(0, 9, n).astype(np.int32), (n - 1,), ("t",), ("",), ("",))
        for n in range(1, 513)
    ]
    shapes = {b.ids_BT.shape for b in batching.batches(wanted, 8)}
    assert shapes == {(8, width) for width in batching.BUCKETS}
