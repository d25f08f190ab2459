"""Probe families on the tiny run: what a figure is, and that it moves when it must."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import probe_table
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import endings, form, independent, patch, surface
from nla_jax.evaluate.words import edits
from nla_jax.lm.tokenizer import plain_ids
from tests.helpers import world

TEXTS = ['ends on "an old town", so "has"', "one line\nand a second one; of three claims", "plain words"]


@pytest.fixture(scope="module")
def evidence(nla, finished):
    """Eight rows of the RL split with explanations put in by hand; the last one failed."""
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {k: v[::4] for k, v in columns.items()}  # of several documents
    explanations = [*(TEXTS * 3)[:7], ""]
    h = columns["h"]
    trip = nla.runner.round_trip(h, jax.random.key(0), temperature=1.0, max_new=16, label="")
    ok = np.arange(8) < 7
    trip = dataclasses.replace(
        trip, explanations=explanations, ok=ok, h_text=nla.runner.reconstruct(explanations)
    )
    return Evidence(nla.runner, columns, trip, np.asarray(nla.mean_direction), bootstrap=300)


def test_form_is_fve_of_the_edited_texts(evidence, nla):
    got = {f.name: f for f in form.form(evidence)}
    h, ok, texts = evidence.columns["h"], evidence.trip.ok, evidence.trip.explanations
    var = F.variances(h)

    def fve(edit, rows=slice(None)):
        error = F.errors(nla.runner.reconstruct([edit(t) for t in texts]), h, ok)
        return F.fve(error[rows], var[rows])

    assert got["fve_quotes_only"].value == pytest.approx(fve(edits.keep_quotes), abs=1e-5)
    assert got["fve_prose_only"].value == pytest.approx(fve(edits.remove_quotes), abs=1e-5)
    assert got["fve_words_shuffled"].value == pytest.approx(fve(edits.shuffle_words), abs=1e-5)
    five = lambda t: nla.tokenizer.decode(plain_ids(nla.tokenizer, t)[:5])
    assert got["fve_prefix_5"].value == pytest.approx(fve(five), abs=1e-5)
    assert len({f.value for name, f in got.items() if "prefix" in name}) == len(form.PREFIXES)
    several = [i for i, t in enumerate(texts) if t == TEXTS[1]]
    lost = fve(lambda t: t, several) - fve(lambda t: edits.remove_claim(t, -1), several)
    assert got["lost_no_last"].value == pytest.approx(lost, abs=1e-5) != 0
    assert got["lost_no_last"].n == got["lost_lines_shuffled"].n == len(several) == 2
    for f in got.values():
        assert f.asks and (f.low is None or f.low - 1e-9 <= f.value <= f.high + 1e-9), f
    assert got["fve_quotes_only"].low < got["fve_quotes_only"].high
    # "an old town" is in no text of this world.
    assert got["quotes_verbatim"].value == 0 and got["quotes_verbatim"].n == 3


ENDED = ["about an old town\n… by the old town", "… by the old town", "no ending line"]


def test_description_gain_is_the_whole_less_its_ending_line(evidence, nla):
    explanations = [*(ENDED * 3)[:7], ""]
    trip = dataclasses.replace(
        evidence.trip, explanations=explanations, h_text=nla.runner.reconstruct(explanations)
    )
    ev = dataclasses.replace(evidence, trip=trip)
    h, rows = ev.columns["h"], [0, 3, 6]
    var = F.variances(h)[rows]
    readers = nla.runner.reconstruct, nla.runner.read_frozen
    for f, read in zip(endings.description_gain(ev), readers, strict=True):
        whole, end = (F.errors(read([t] * 8), h)[rows] for t in ENDED[:2])
        assert f.value == pytest.approx(F.fve(whole, var) - F.fve(end, var), abs=1e-5) != 0
        assert f.n == 3 and f.low is None  # fewer than four documents
    assert endings.description_gain(evidence) == []


def test_a_quotation_is_as_long_as_the_explanation(evidence, nla):
    """Readable rows: in tokens of their own explanation; failed ones: of the mean one."""
    left_out = []
    ev = dataclasses.replace(evidence, left_out=left_out)
    found = {f.name: f for f in surface._equal_length_quotations(ev, "")}
    tok, h = nla.tokenizer, ev.columns["h"]
    sizes = [len(plain_ids(tok, t)) for t in ev.trip.explanations]
    sizes[-1] = round(np.mean(sizes[:-1]))
    words = []
    for text, size in zip(ev.columns["text"], sizes, strict=True):
        tail = text.split()
        fits = [n for n in range(1, len(tail) + 1)
                if len(plain_ids(tok, "… " + " ".join(tail[-n:]))) <= size]
        words.append("… " + " ".join(tail[-max(fits, default=1) :]))
    assert len({len(w.split()) for w in words}) > 1
    for name, read in (("", nla.runner.reconstruct), ("_frozen", nla.runner.read_frozen)):
        fve = F.fve(F.errors(read(words), h), F.variances(h))
        assert found[f"fve_quotation_equal{name}"].value == pytest.approx(fve, abs=1e-5)
    # A ratio to nothing is no figure.
    assert ("over_quotation" in found) == (not left_out)
    perfect = dataclasses.replace(ev, left_out=[])
    perfect._read.update(dict(zip(words, h, strict=True)))
    ratio = {f.name: f for f in surface._equal_length_quotations(perfect, "")}["over_quotation"]
    own = F.fve(ev.errors(ev.trip.h_text, ev.trip.ok), F.variances(h))
    best = F.fve(perfect.errors(perfect.reconstruct(words)), F.variances(h))
    assert ratio.value == pytest.approx(own / best, abs=1e-5) and "by AR" in ratio.asks


def test_a_frozen_ar_has_no_strangers_and_its_quotations_a_reader(evidence, finished, monkeypatch):
    for name, value in {"ROWS": 8, "STEPS": 2, "BATCH": 4}.items():
        monkeypatch.setattr(surface, name, value)
    train = store.load_columns(finished / "run" / "data", "warm")
    runner = evidence.runner.with_trees(ar={})
    trip = dataclasses.replace(evidence.trip, h_text=runner.reconstruct(evidence.trip.explanations))
    ev = dataclasses.replace(evidence, runner=runner, trip=trip, train=train, max_new=8, left_out=[])
    assert independent.independent(ev) == []
    assert ev.left_out == ["fve_other_ar, fve_warm_ar: AR is the frozen target, which was not trained"]
    found = {f.name: f for f in surface.surface(ev)}
    h = ev.columns["h"]
    for n in surface.LAST:
        words = [f"… {' '.join(t.split()[-n:])}" for t in ev.columns["text"]]
        frozen = F.fve(F.errors(runner.read_frozen(words), h), F.variances(h))
        by_target = "by the frozen target" in found[f"fve_last_{n}"].asks
        assert found[f"fve_last_{n}"].value >= frozen - 1e-6
        assert by_target == (found[f"fve_last_{n}"].value == pytest.approx(frozen, abs=1e-6))
    assert found["beyond_last_4"].n == len(h)


def test_putting_h_back_changes_nothing_and_zero_does(evidence, nla):
    """`run_patched` with the very h, at another scale, is the untouched pass."""
    ids = np.random.default_rng(0).integers(5, 60, (3, 32)).astype(np.int32)
    length, at = np.array([32, 20, 26]), np.array([12, 10, 25])
    valid = np.arange(32)[None] < length[:, None]
    n = length - 1 - at
    h = np.asarray(
        nla._capture(nla.base, nla.spec.lm, nla.spec.layer, ids, valid, at[:, None].astype(np.int32))
    )[:, 0]
    run = jax.jit(functools.partial(patch.run_patched, spec=nla.spec))
    kl, ce, clean, mask = map(
        np.asarray, run(nla.base, ids_BT=ids, valid_BT=valid, at_B=at, n_B=n,
                        vectors_CBD=np.stack([7 * h, np.zeros_like(h), -h])),
    )
    assert mask.shape == (3, patch.AHEAD) and mask.sum(1).tolist() == [19, 9, 0]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert ce[0] == pytest.approx(clean, abs=1e-4)
    assert (kl[1:, :, 0] > 1e-3).all() and (kl >= -1e-5).all()
    # The untouched cross-entropy is that of the plain model.
    logits = nla_logits(nla, ids, valid)
    logp = np.asarray(jax.nn.log_softmax(logits[0, 12:31]))
    assert clean[0, :19] == pytest.approx(-logp[np.arange(19), ids[0, 13:]], abs=1e-4)


def nla_logits(nla, ids, valid):
    from nla_jax.lm.model import embed, forward, unembed

    x, _ = forward(nla.base, nla.spec.lm, embed(nla.base, nla.spec.lm, ids), valid)
    return unembed(nla.base, nla.spec.lm, x)


def test_patch_recovers_all_with_h_itself(evidence):
    """The scale of the table: h in the place of ĥ recovers everything, the mean as much as the mean."""
    cols = evidence.columns
    perfect = dataclasses.replace(evidence.trip, h_text=cols["h"], ok=np.ones(8, bool))
    got = {f.name: f.value for f in patch.patch(dataclasses.replace(evidence, trip=perfect))}
    assert got["kl_next_words"] == pytest.approx(0, abs=1e-4) and got["kl_ahead_words"] < 1e-3
    assert got["kl_recovered"] == pytest.approx(1, abs=1e-3)
    assert got["loss_recovered"] == pytest.approx(1, abs=1e-2)
    assert got["kl_next_shuffled"] > 1e-3 and got["kl_next_zero"] > 1e-3
    # Failed answers fall back to the mean direction.
    failed = dataclasses.replace(evidence.trip, ok=np.zeros(8, bool))
    got = {f.name: f.value for f in patch.patch(dataclasses.replace(evidence, trip=failed))}
    assert got["kl_next_words"] == got["kl_next_mean"] and got["kl_recovered"] == 0
    assert got["loss_recovered"] == got["loss_recovered_mean"]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_evaluate_command_runs_the_probes_it_is_asked_for(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    shutil.copytree(finished / "run", tmp_path / "run")  # readers are kept beside a bundle
    command = ("evaluate", "--bundle", tmp_path / "run" / "bundle", "--splits", "heldout")
    assert world.nla(*command, "--json", tmp_path / "out.json") == 0
    text = (tmp_path / "out.json").read_text("utf-8")
    assert all(f'"{name}"' in text for name in ("fve", "fve_quotes_only", "loss_recovered"))
    assert world.nla(*command, "--probes", "patch", "--json", tmp_path / "one.json") == 0
    text = (tmp_path / "one.json").read_text("utf-8")
    assert '"fve"' not in text and '"loss_recovered"' in text
    capsys.readouterr()
    assert world.nla(*command, "--probes", "form,magic") == 2
    known = ", ".join(map(repr, probe_table.PROBES))
    assert f"probe='magic': must be one of {known}, or your own" in capsys.readouterr().err
