"""Figures: their formulas, their intervals, the tag, the pairing, the text path; the log of a run."""

import dataclasses
import json
import struct
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from nla_jax import target
from nla_jax.data import store
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import probe_table
from nla_jax.evaluate.heldout_watch import make_watch
from nla_jax.evaluate.probe_types import Evidence, rows_of_other_documents
from nla_jax.evaluate.probes import endings, round_trip
from nla_jax.evaluate.runner import Runner, read_tag
from nla_jax.evaluate.written_explanations import written
from nla_jax.rl import reading, roles
from nla_jax.training import feeds
from nla_jax.util import metrics_log, progress, terminal_text
from nla_jax.util.batching import pad_rows

D = 16


def rows(n: int, seed: int = 0, mean: float = 1.5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, D)) + mean) * rng.uniform(1, 50, (n, 1))


# --- formulas -------------------------------------------------------------------------------------


def test_fve_of_perfect_mean_and_orthogonal():
    h = rows(200)
    var = F.variances(h)
    assert F.fve(F.errors(7 * h, h), var) == pytest.approx(1)  # scale is free
    # Written out: normalise to sqrt(D), then squared distances.
    unit = h / np.linalg.norm(h, axis=1, keepdims=True) * np.sqrt(D)
    mean = unit.mean(0)
    assert F.mean_direction(h) == pytest.approx(mean)
    assert var == pytest.approx(((unit - mean) ** 2).sum(1))
    guess = rows(200, 1)
    cos = (unit * guess).sum(1) / np.linalg.norm(guess, axis=1) / np.sqrt(D)
    assert F.errors(guess, h) == pytest.approx(2 * D * (1 - cos))


def test_meannorm_and_mean_direction_follow_from_the_mean():
    """With r = |mean| / sqrt(D): the other FVE is 1 - (1 - FVE)(1 + r) / 2, the mean's -(1-r)/(1+r)."""
    for seed, mean in ((0, 0.2), (1, 1.5), (2, 6.0)):
        h = rows(300, seed, mean)
        error = F.errors(rows(300, seed + 9, mean), h)
        r = np.linalg.norm(F.mean_direction(h)) / np.sqrt(D)
        fve = F.fve(error, F.variances(h))
        assert F.fve(error, F.variances(h, meannorm=True)) == pytest.approx(1 - (1 - fve) * (1 + r) / 2)
        nothing = F.errors(np.broadcast_to(F.mean_direction(h), h.shape), h)
        assert F.fve(nothing, F.variances(h)) == pytest.approx(-(1 - r) / (1 + r))


def test_failed_rows_are_charged_an_orthogonal_error():
    h = rows(4)
    error = F.errors(h, h, np.array([True, False, True, False]))
    assert error == pytest.approx([0, 2 * D, 0, 2 * D], abs=1e-9)
    # Zeros, which have no direction, raise no warning and score no better than orthogonal.
    assert F.errors(np.zeros((4, D)), h) == pytest.approx(D)


# --- intervals ------------------------------------------------------------------------------------


def test_bootstrap_resamples_documents():
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.5, 1.5, 60)
    error = variance * rng.uniform(0.2, 0.9, 60)
    docs = [f"d{i}" for i in range(60)]
    low, high = F.interval(error, variance, docs)
    assert low < F.fve(error, variance) < high
    # Ten copies of each row of a document say nothing new; as documents they would.
    copies = np.repeat(error, 10), np.repeat(variance, 10)
    assert F.interval(*copies, np.repeat(docs, 10)) == pytest.approx((low, high))
    naive = F.interval(*copies, np.arange(600))
    assert naive[1] - naive[0] < 0.5 * (high - low)
    # The order of rows is nothing; the seed is something; one document has no spread.
    mixed = rng.permutation(600)
    assert F.interval(copies[0][mixed], copies[1][mixed], np.repeat(docs, 10)[mixed]) == pytest.approx(
        (low, high)
    )
    assert F.interval(error, variance, docs, seed=1) != (low, high)
    assert len(set(F.interval(error, variance, ["one"] * 60))) == 1
    # Only documents that have something below count: three of eight are too few.
    below = np.array([1, 1, 1, 0, 0, 0, 0, 0.0])
    assert F.ratio_interval(np.ones(8), below, list("abcdefgh")) == (None, None)


def test_interval_covers():
    """About 95 % of intervals hold the true value, rows of a document being alike."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        error = np.repeat(rng.uniform(0, 1, 40), 3)
        low, high = F.interval(error, np.ones(120), np.repeat(np.arange(40), 3), n=300)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199


# --- tag and pairing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response,words",
    [
        ("<explanation>\nab\ncd\n</explanation>", "ab\ncd"),
        ("<explanation>ab</explanation>", "ab"),
        ("well: <explanation> ab </explanation> and <explanation>cd</explanation>", "ab"),
        ("<explanation>\na <explanation> b\n</explanation>", "a <explanation> b"),
        ("<explanation>\n\n</explanation>", None),
        ("<explanation>\nab", None),
        ("ab\n</explanation>", None),
        ("</explanation>ab<explanation>", None),
        ("", None),
    ],
)
def test_read_tag(response, words):
    assert read_tag(response) == words


@pytest.mark.parametrize(
    "docs,once",
    [
        ("aabbcc", True),
        ("abababab", True),
        ("aaabbb", True),
        ("aabcd", True),
        ("abcabcabc", True),
        ("abbbacaca", True),
        ("aaab", False),
        ("baaaa", False),
    ],
)
def test_shuffled_pairs_are_of_other_documents(docs, once):
    pick = rows_of_other_documents(list(docs))
    assert all(docs[i] != docs[j] for i, j in enumerate(pick))
    assert (len(set(pick)) == len(docs)) == once
    assert (rows_of_other_documents(list(docs)) == pick).all()


def test_a_single_document_still_has_other_rows():
    assert sorted(rows_of_other_documents(["a"] * 3)) == [0, 1, 2]
    assert all(rows_of_other_documents(["a"] * 3) != np.arange(3))


# --- the round trip of a run ----------------------------------------------------------------------


def test_paths_agree_where_ids_agree(nla, finished):
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {name: [*values, *values] for name, values in columns.items()}  # each twice, other words
    columns["h"] = h = np.stack(columns["h"])
    docs = columns["doc_id"]
    key = jax.random.key(4)
    trip = nla.runner.round_trip(h, key, temperature=1.0, max_new=16, label="")
    ids, length, closed, logp, start, end, ok = nla.runner.write(
        h, key, temperature=1.0, max_new=16, label=""
    )
    _, by_token = reading.score(nla.ar, nla.base, nla.spec, ids, start, end, h)
    by_token = np.asarray(by_token)
    good = trip.ok & trip.ok_token
    same = good & ~trip.retokenised
    assert same.sum() > 10 and (good & trip.retokenised).any() and not good.all()
    np.testing.assert_allclose(trip.h_text[same], by_token[same], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trip.h_token[good], by_token[good], rtol=1e-4, atol=1e-4)
    other = good & trip.retokenised
    assert not np.allclose(trip.h_text[other], trip.h_token[other], rtol=1e-3)
    assert (trip.ok_token == ok).all() and (trip.length == length).all()
    assert trip.explanations == [read_tag(r) or "" for r in trip.responses]
    assert (trip.logp <= 0).all() and trip.length.max() <= 16
    np.testing.assert_allclose(
        trip.logp, [p[:n].mean() for p, n in zip(logp, length, strict=True)], rtol=1e-5
    )

    figures, _ = probe_table.evaluate(
        nla.runner, columns, nla.mean_direction, key, temperature=1.0, max_new=16, label=""
    )
    got = {f.name: f for f in figures}
    var = F.variances(h)
    error = F.errors(trip.h_text, h, trip.ok)
    assert got["fve"].value == pytest.approx(F.fve(error, var))
    assert (got["fve"].low, got["fve"].high) == F.interval(error, var, docs)
    assert got["ok"].value == trip.ok.mean() and got["tokens"].value == trip.length.mean()
    assert got["retokenization_mismatch"].value == trip.retokenised[good].mean()
    assert got["fve_token_path"].value != got["fve"].value
    assert figures[1].name == "fve_frozen_target"  # beside FVE, at the head of the table
    bare = np.stack([nla.capture(t)[-1] if t else h[0] for t in trip.explanations])
    error = F.errors(bare, h, trip.ok)
    assert got["fve_frozen_target"].value == pytest.approx(F.fve(error, var), abs=1e-5)
    assert (got["fve_frozen_target"].low, got["fve_frozen_target"].high) == pytest.approx(
        F.interval(error, var, docs), abs=1e-5
    )
    greedy = nla.runner.explain(h, key, temperature=0.0, max_new=16)
    error = F.errors(nla.runner.reconstruct(greedy), h, np.array([bool(t) for t in greedy]))
    assert got["fve_greedy"].value == pytest.approx(F.fve(error, var), abs=1e-5) != got["fve"].value
    assert got["last_word_greedy"].value == endings.last_word(greedy, columns["text"]).mean()
    r = np.linalg.norm(F.mean_direction(h)) / np.sqrt(32)
    assert got["fve_meannorm"].value == pytest.approx(1 - (1 - got["fve"].value) * (1 + r) / 2)
    assert not {"fve_written", "av_gap"} & got.keys()  # rows of RL have no written explanation
    assert all(f.low <= f.value <= f.high for f in figures if f.low is not None)


def test_the_gap_is_what_another_documents_h_costs(nla, finished):
    """On the lines that AV learned, tags included."""
    columns = store.load_columns(finished / "run" / "data", "heldout")
    h, other = columns["h"], rows_of_other_documents(columns["doc_id"])
    last = [written.split("\n")[-1] for written in columns["explanation"]]
    ids, mask, _ = pad_rows(feeds.response_rows(nla.runner.tok, nla.spec.av, last), 0, 48)
    logp = jax.jit(lambda h: roles.answer_logp(nla.av, nla.base, nla.spec, h, ids) * mask)
    nats, tokens = float((logp(h) - logp(h[other])).sum()), mask.sum()
    trip = nla.runner.round_trip(h, jax.random.key(0), temperature=1.0, max_new=8, label="")
    learned = {"data": {"explanation_lines": "last"}}
    ev = Evidence(nla.runner, columns, trip, nla.mean_direction, settings=learned)
    (gap,) = (f for f in round_trip.round_trip(ev) if f.name == "av_gap")
    assert gap.value == pytest.approx(nats / tokens, rel=1e-3, abs=1e-6) and abs(gap.value) > 1e-5
    assert gap.n == len(h)


def test_the_frozen_target_reads_what_the_tokenizer_puts_before_a_text(nla):
    """Bare words behind the lead, whatever AR's tree and template."""
    r, text = nla.runner, "ab cd the town"
    spec = dataclasses.replace(r.spec, lead=(r.tok.bos_token_id,))
    led = Runner(spec, r.base, r.av, {}, r.tok, r.ar_template, 2)
    ids = np.array([nla.tokenizer(text)["input_ids"]])
    at = np.array([[ids.shape[1] - 1]])
    h = target.capture(r.base, spec.lm, spec.layer, ids, ids >= 0, at, spec.lead)[:, 0]
    np.testing.assert_allclose(led.read_frozen([text]), h, rtol=1e-4, atol=1e-5)
    assert not np.allclose(r.read_frozen([text]), h, rtol=1e-2)
    assert np.isfinite(r.read_frozen(["", text])).all()
    # A frozen AR with our template is the same reader.
    bare = Runner(r.spec, r.base, r.av, {}, r.tok, "{explanation}", 2)
    np.testing.assert_allclose(bare.reconstruct([text]), r.read_frozen([text]), rtol=1e-5, atol=1e-6)


def test_no_text_is_read_twice(nla, finished):
    columns = {k: v[:4] for k, v in store.load_columns(finished / "run" / "data", "rl").items()}
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    asked = []
    counting = SimpleNamespace(
        reconstruct=lambda texts, label: asked.extend(texts) or np.ones((len(texts), 32)),
        read_frozen=lambda texts, label: asked.extend(texts) or np.ones((len(texts), 32)),
    )
    ev = Evidence(counting, columns, trip, nla.mean_direction)
    assert ev.reconstruct(["a", "b", "a"]).shape == (3, 32) and asked == ["a", "b"]
    ev.reconstruct(["b", "c", "a"])
    assert asked == ["a", "b", "c"]
    # The frozen target is another reader.
    ev.read_frozen(["b", "c"])
    ev.read_frozen(["c", "b"])
    assert asked == ["a", "b", "c", "b", "c"]


@pytest.mark.parametrize(
    "explanation,text,agree",
    [
        ("A report.\n… a big town", "once in a big town", (True, True, True)),
        ("A report.\n… a small town", "once in a big town", (True, False, False)),
        ("A report.\n… big tow", "once in a big tow", (True, True, False)),
        ("A report of a\n… big town", "once in a big town", (True, True, False)),
        ("A report.\n… big towns", "once in a big town", (False, False, False)),
        ("a big town", "once in a big town", (True, True, True)),
        ("", "once in a big town", (False, False, False)),
    ],
)
def test_last_words_agree(explanation, text, agree):
    assert tuple(endings.has_last_words(explanation, text, n) for n in (1, 2, 3)) == agree


def test_written_explanations_are_read_in_the_form_that_ar_learned(nla, finished):
    columns = store.load_columns(finished / "run" / "data", "heldout")
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    settings = {"data": {"explanation_lines": "first", "ending_tokens": 400}}
    ours = SimpleNamespace(tok=nla.tokenizer, spec=SimpleNamespace(ar=SimpleNamespace(after=())))
    rows, words = written(Evidence(ours, columns, trip, nla.mean_direction, settings=settings))
    assert rows.tolist() == list(range(len(columns["h"])))
    assert words == [
        f"{e.splitlines()[0]}\n… {' '.join(t.split())}"
        for e, t in zip(columns["explanation"], columns["text"], strict=True)
    ]
    # Official templates go on behind the explanation; of unknown settings nothing is known.
    official = Evidence(nla.runner, columns, trip, nla.mean_direction, settings=settings)
    assert written(official)[1] == [e.splitlines()[0] for e in columns["explanation"]]
    assert written(dataclasses.replace(official, settings=None))[1] == columns["explanation"]
    none = dataclasses.replace(official, columns={**columns, "explanation": [""] * len(columns["h"])})
    assert written(none)[1] == [] and not len(written(none)[0])


def test_the_watched_figures(nla, finished):
    columns = {k: v[:6] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    options = dict(temperature=1.0, max_new=16)
    found = make_watch(nla.runner, columns, 6, jax.random.key(1), **options)(nla.av, nla.ar)
    texts = nla.runner.explain(columns["h"], jax.random.key(1), **options)
    ok, h = np.array([bool(t) for t in texts]), columns["h"]
    assert found["heldout_ok"] == ok.mean()
    error = F.errors(nla.runner.read_frozen(texts), h, ok)
    assert found["heldout_fve_frozen_target"] == pytest.approx(F.fve(error, F.variances(h)))
    assert found["heldout_last_word"] == endings.last_word(texts, columns["text"]).mean()
    bare = {**columns, "text": [""] * 6}
    again = make_watch(nla.runner, bare, 6, jax.random.key(1), **options)(nla.av, nla.ar)
    assert "heldout_last_word" not in again and "heldout_fve_frozen_target" in again


def test_the_summary_has_greedy_figures_and_the_frozen_target(finished):
    summary = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    for bundle in ("warm_start", "rl"):
        for name in ("fve", "fve_greedy", "fve_frozen_target"):
            f = next(f for f in summary[bundle]["heldout"] if f["name"] == name)
            assert summary[f"{name}_{bundle}"] == f["value"]
            assert summary[f"{name}_{bundle}_interval"] == [f["low"], f["high"]]


# --- the log --------------------------------------------------------------------------------------


def events(path) -> list:
    """What TensorBoard reads in a file: records of a length, a checksum, the event and a checksum."""
    data, out = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        out.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return out


def scalars(event) -> dict:
    return {value.tag: value.simple_value for value in event.summary.value}


def test_metrics_are_rewound(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, "rl")
    for step in range(6):
        log.write(step, {"loss": float(step)}, best={"text": "a\nb"})
    log.close()
    path = tmp_path / "metrics" / "rl.jsonl"
    path.write_text(path.read_text("utf-8") + '{"step": 6, "lo', "utf-8")  # killed while writing
    assert [r["step"] for r in metrics_log.read(path)] == list(range(6))
    log = metrics_log.MetricsLog(tmp_path, "rl", start=4)
    log.write(4, {"loss": 40.0})
    log.close()
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(r["step"], r["loss"]) for r in found] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    assert found[0]["best"] == {"text": "a\nb"}
    first, second = sorted((tmp_path / "tensorboard" / "rl").iterdir(), key=lambda p: p.suffix)
    assert [scalars(e) for e in events(first)] == [{}, *({"loss": float(i)} for i in range(6))]
    _, restart, last = events(second)
    assert (restart.step, restart.session_log.status) == (4, SessionLog.START)
    assert (last.step, scalars(last)) == (4, {"loss": 40.0})
    assert metrics_log.read(tmp_path / "none.jsonl") == []


def test_progress_without_a_terminal(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: clock[0])
    with progress.Progress("capture", 200, done=20, unit="texts") as bar:
        for _ in range(9):
            clock[0] += 4
            bar.advance(20, "loss 1")
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in err.splitlines()]
    assert out == ""
    assert lines == [
        "capture 80/200 5 texts/s 0:24 left loss 1",
        "capture 140/200 5 texts/s 0:12 left loss 1",
        "capture 200/200 5 texts/s 0:00 left loss 1",
    ]
    with progress.Progress("", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_short():
    assert terminal_text.shorten("a\n  b\tc ") == "a b c"
    assert terminal_text.shorten("x" * 200, 10) == "x" * 9 + "…"
