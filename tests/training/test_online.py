"""Training from documents, the target's forward pass inside the step: the numbers of stored activations."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import online as benchmark
from nla_jax import bundle, target
from nla_jax.data import lessons, online, shuffle, split_requests, store
from nla_jax.errors import UserError
from nla_jax.pipeline import activations, config_checks, context, stages
from nla_jax.training import feeds
from nla_jax.util import metrics_log
from tests.helpers import tiny, world

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def fresh(finished):
    c = world.config(finished)
    return online.OnlineBatches(c.data, c.seed, tiny.tokenizer(), c.rl.batch)


def test_the_first_pass_is_what_a_store_holds(finished, fresh):
    c = world.config(finished)
    columns = store.load_columns(finished / "run" / "data", "rl")
    draws = shuffle.epoch_indices(len(columns["h"]), c.rl.batch, c.seed, "rl")
    r = context.open_run(c, finished / "run")
    spec = context.with_spec(r).spec
    read = jax.jit(lambda base, batch: target.add_activations(base, spec, batch))
    for step in (0, 3, fresh.steps_per_pass - 1):
        batch = fresh.at(step)
        assert batch["read_ids_BT"].shape == (c.rl.batch, 64)
        got, want = read(r.base, batch), columns["h"][np.asarray(draws[step])]
        np.testing.assert_allclose(got["h_BD"], want, rtol=1e-4, atol=1e-5)
        assert got.keys() == {"h_BD", "row_B"}
    assert target.add_activations(r.base, spec, got) is got


def texts(batch, ordered=False):
    found = [(row[valid].tobytes(), at) for row, valid, at in zip(
        batch["read_ids_BT"], batch["read_valid_BT"], batch["read_at_B"], strict=True)]
    return found if ordered else set(found)


def test_a_later_pass_is_new_and_a_step_is_a_function_of_its_number(finished, fresh):
    n = fresh.steps_per_pass
    first = set().union(*(texts(fresh.at(i)) for i in range(n)))
    second = set().union(*(texts(fresh.at(i)) for i in range(n, 2 * n)))
    assert len(second - first) > len(second) / 2
    c = world.config(finished)
    again = online.OnlineBatches(c.data, c.seed, tiny.tokenizer(), c.rl.batch)
    for name, value in fresh.at(n + 1).items():
        np.testing.assert_array_equal(again.at(n + 1)[name], value)


@pytest.mark.parametrize("kind", ["lessons", "written"])
def test_warm_starts_read_what_a_store_holds_and_then_what_is_new(finished, kind):
    c = world.config(finished)
    columns = store.load_columns(finished / "run" / "data", "warm")
    tok = tiny.tokenizer()
    end = functools.partial(lessons.quote_ends, tok, most=6)
    options = dict(batch=8, seed=c.seed, which="last", end=end)
    stored = feeds.WarmStartPairs(columns, kind, **options)
    fresh = feeds.OnlinePairs(online.Passes(c.data, c.seed, tiny.tokenizer(), "warm"), kind, **options)
    assert len(fresh.rows) == len(stored.rows)
    r = context.open_run(c, finished / "run")
    spec = context.with_spec(r).spec
    read = jax.jit(lambda base, batch: target.add_activations(base, spec, batch))
    n, old, new = fresh.steps_per_pass, set(), set()
    for step in (0, n - 1):
        (batch, words), (want, said) = fresh.drawn(step, "ar"), stored.drawn(step, "ar")
        assert words == said
        np.testing.assert_allclose(read(r.base, batch)["h_BD"], want["h_BD"], rtol=1e-4, atol=1e-5)
        assert np.abs(want["h_BD"]).max() > 0.1
    for step in range(2 * n):
        batch, words = fresh.drawn(step, "av")
        (old if step < n else new).update(zip(texts(batch, ordered=True), words, strict=True))
    assert all(words.rpartition("\n")[2].startswith(lessons.MARK) for _, words in new | old)
    if kind == "lessons":  # the explained texts come again; most of the windows do not
        assert len(new) > n and len(new & old) < sum(map(bool, columns["explanation"])) + len(new) / 4
        assert len({t for t, _ in new} - {t for t, _ in old}) > n
    else:
        assert new == old


def test_a_run_that_trains_online_writes_no_vector_and_has_the_numbers_of_stored(
        finished, programs, tmp_path):
    run, workdir = finished / "run", tmp_path / "run"
    with world.one_device(), world.quick_compiles(programs):
        summary = stages.run(world.config(finished, activations="online"), workdir)
    assert not (workdir / "data").exists() and not list(workdir.rglob("*array_record*"))
    for stage, names in {
        "lessons_ar": ("loss", "grad_norm"),
        "warm_ar": ("loss", "grad_norm"),
        "warm_av": ("loss", "grad_norm"),
        "rl": ("reward", "mse", "kl", "length", "av_grad_norm", "ar_grad_norm"),
    }.items():
        got, want = (metrics_log.read(w / "metrics" / f"{stage}.jsonl") for w in (workdir, run))
        assert len(got) == len(want) == 2
        for a, b in zip(got, want, strict=True):
            for name in names:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (stage, name)
    stored = json.loads((run / "summary.json").read_text("utf-8"))
    for split in ("heldout", "ood"):
        for a, b in zip(summary["rl"][split], stored["rl"][split], strict=True):
            assert a["value"] == pytest.approx(b["value"], rel=1e-2, abs=1e-3), a["name"]
    metas = [bundle.read_sidecar(w / "bundle") for w in (workdir, run)]
    assert metas[0]["extraction"] == metas[1]["extraction"]
    np.testing.assert_allclose(*(m["mean_direction"] for m in metas), atol=1e-6)

    # A store is written when it is asked for, of all that evaluations look at.
    with world.one_device(), world.quick_compiles(programs):
        stages.run(world.config(finished, activations="online"), workdir, only="extract")
    assert set(store.read_meta(workdir / "data")["splits"]) == {"warm", "heldout", "ood"}


def test_alpha_and_mean_come_from_some_of_the_rows_where_there_are_many(finished):
    c = world.config(finished)
    wanted = split_requests.requests(c.data, c.seed, tiny.tokenizer())[0]["warm"]
    rows = sum(len(q.positions) for q in wanted)
    some = split_requests.sample_rows(wanted, rows // 2)
    assert rows // 4 < sum(len(q.positions) for q in some) < 3 * rows // 4
    assert [q for q in wanted if any(q is s for s in some)] == some
    assert split_requests.sample_rows(wanted, rows) == wanted and activations.MEASURED_ROWS > rows


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_benchmark_times_both_sides_on_the_same_rows(finished, tmp_path, capsys):
    out = tmp_path / "out.json"
    benchmark.main(["--config", f"{finished / 'experiment.py'}", "--repeats", "2", "--json", f"{out}"])
    found = json.loads(out.read_text("utf-8"))
    for name, rows in (("rl", 16), ("lessons_ar", 8)):
        f = found["steps"][name]
        assert f["rows"] == rows and 0 < f["tokens"] <= rows * 64 and len(f["ratios"]) == 2
        assert f["ratios"] == [b / a for a, b in zip(f["stored"]["all"], f["online"]["all"], strict=True)]
    assert found["capture"]["rows"] == 8 * 4
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 6


def test_what_cannot_be_online(finished):
    for section, key, value in [("rl", "shuffle_h", True), ("data", "store", "x")]:
        c = world.config(finished, activations="online")
        c[section][key] = value
        with pytest.raises(UserError, match=f"unset {section}.{key}"):
            config_checks.validate(c)
