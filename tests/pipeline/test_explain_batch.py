"""`nla explain --file` and `--activations`: the rows, their figures, and any number of kills."""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nla_jax
from nla_jax import cli
from nla_jax.data import entropy_positions, lessons, store
from nla_jax.errors import UserError
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.words import edits
from nla_jax.evaluate.writer import Writer
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.pipeline import explain_batch, explain_columns, explain_inputs, explain_output
from nla_jax.pipeline.explain_inputs import parse_positions
from tests.helpers import world

pytestmark = pytest.mark.usefixtures("quick")
TEXTS = ["an old town by the sea", "oil", "the lost net\nof a sailor", "rest and toil on land", "tea", "iron"]
CHAT = [{"role": "user", "content": "an old"}, {"role": "assistant", "content": "sea"}]


@pytest.fixture(scope="module")
def h(finished):
    return store.load_columns(finished / "run" / "data", "heldout", ["h"])["h"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of texts with further columns, one of which has the name of a column of the output."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"id": f"t{i}", "text": t, "token": i} for i, t in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_those_of_single_texts(nla, file):
    """Every token of each text, and what `round_trip` gives for it; the input's columns are carried."""
    rows = list(nla_jax.explain_rows(nla, texts=str(file), positions="all", temperature=1.0))
    assert [r["row"] for r in rows] == list(range(len(rows)))
    for i, text in enumerate(TEXTS):
        own, names = [r for r in rows if r["item"] == i], nla.tokens(text)
        assert [(r["position"], r["token"]) for r in own] == list(enumerate(names))
        assert {(r["id"], r["text"], r["input_token"]) for r in own} == {(f"t{i}", text, i)}
    h_ND, said = np.concatenate([nla.capture(t) for t in TEXTS]), [r["explanation"] or "" for r in rows]
    assert said == nla.verbalize(h_ND) and any(said) and [r["failed"] for r in rows] == [not t for t in said]
    scores = nla.score(h_ND, said)
    for name in ("fve", "cos", "fve_frozen", "cos_frozen"):
        got = [r[name] for r in rows]
        np.testing.assert_allclose(got, [getattr(s, name) for s in scores], atol=1e-3)
    single = nla.round_trip(TEXTS[0])
    assert [w.explanation for w in single] == said[: len(single)]
    assert [r["norm_percentile"] for r in rows] == [
        pytest.approx(f.norm_percentile, abs=0.1) for f in nla.fit(h_ND)]


def test_samples_are_keyed_by_row(nla, h):
    rows = list(nla_jax.explain_rows(nla, activations=h, samples=3, seed=5))
    assert [(r["item"], r["sample"]) for r in rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    wanted = nla.verbalize(np.repeat(h, 3, 0), key=jax.random.key(5))
    assert [r["explanation"] or "" for r in rows] == wanted
    assert {r["seed"] for r in rows} == {5} and {r["position"] for r in rows} == {None}


@pytest.mark.parametrize("spec, chosen", [
    ("last", [6]), ("all", [0, 1, 2, 3, 4, 5, 6]), ("every:3", [0, 3, 6]), ("every:8", [6]),
    ("entropy:2", [1, 4]), ("surprise:9", [0, 1, 2, 3, 4, 5, 6]),
])
def test_positions(spec, chosen):
    positions, score = parse_positions(spec), np.array([0, 5, 1, 1, 9, 2, 3])
    assert positions.choose(range(7), score) == chosen
    assert positions.count(7) == len(chosen)


@pytest.mark.parametrize("bad", ["first", "every", "every:0", "every:-1", "entropy:x", "last:2", ""])
def test_positions_that_cannot_be(bad):
    with pytest.raises(UserError, match="must be last, all, every:N"):
        explain_columns.Options(positions=bad)


def test_positions_by_entropy_are_those_of_the_target(nla):
    (rows,) = [list(nla_jax.explain_rows(nla, texts=TEXTS[:1], positions="entropy:3", scores=()))]
    ids = tok_lib.plain_ids(nla.tokenizer, TEXTS[0])
    assert [r["position"] for r in rows] == entropy_positions.telling_positions(nla.base, nla.spec, ids, 3)
    assert "fve" not in rows[0] and "fve_frozen" not in rows[0]


def test_recurrence_compares_with_the_explained_tokens_before(nla):
    rows = list(nla_jax.explain_rows(nla, texts=TEXTS[:1], positions="every:2", samples=2))
    seen = 0
    for r in rows:
        before = [b["explanation"] or "" for b in rows
                  if b["sample"] == r["sample"] and b["position"] < r["position"]][-recurrence.BACK :]
        about = lessons.split_end(r["explanation"] or "")[0]
        kinds = [k for k in recurrence.recurring_claims(about, before) if k is not None] if before else []
        assert r["recurrence"] == (round(sum(kinds) / len(kinds), 4) if kinds else None)
        assert len(r["recurring"] or []) == sum(kinds) and set(r["recurring"] or []) <= {*edits.claims(about)}
        seen += bool(kinds)
    assert seen and rows[0]["recurring"] is None


def test_a_chat_is_read_in_the_template(nla):
    """Only words of turns are explained; the template's tokens around them are read."""
    given = [{"messages": CHAT, "id": 7}, CHAT, "oil"]
    rows = list(nla_jax.explain_rows(nla, texts=given, positions="all", temperature=1.0))
    one = [r for r in rows if r["item"] == 0]
    assert "".join(r["token"] for r in one) == "an oldsea" and {r["id"] for r in one} == {7}
    text = nla.tokenizer.apply_chat_template(CHAT, tokenize=False)
    wanted = nla.round_trip(text, positions=[r["position"] for r in one], rendered=True)
    assert [r["explanation"] or "" for r in one] == [w.explanation for w in wanted]
    assert [r["position"] for r in rows if r["item"] == 1] == [r["position"] for r in one]
    with pytest.raises(UserError, match="text 0: the chat cannot be read: empty"):
        list(nla_jax.explain_rows(nla, texts=[[{"role": "user", "content": ""}]]))


def test_trust_of_the_claims(nla, monkeypatch, trust_model):
    with pytest.raises(UserError, match="this bundle has no trust model"):
        nla_jax.explain_rows(nla, texts=TEXTS, trust=0.5)
    monkeypatch.setattr(nla, "trust", trust_model)
    said = lambda writer, answer: "<explanation>a river\n… the town</explanation>" * (answer.number % 3 > 0)
    monkeypatch.setattr(Writer, "text", said)
    rows = list(nla_jax.explain_rows(nla, texts=TEXTS[:2], positions="all", trust=0.999))
    assert {r["failed"] for r in rows} == {True, False}
    for r in rows:
        assert [c["text"] for c in r["claims"]] == ([] if r["failed"] else ["river", "the", "town"])
        assert r["trusted"] == (None if r["failed"] else "a […]\n… […]")
    own = nla.claims(TEXTS[0], [r["position"] for r in rows if r["item"] == 0],
                     [r["explanation"] or "" for r in rows if r["item"] == 0])
    assert [[c["kind"] for c in r["claims"]] for r in rows if r["item"] == 0] == [
        [c.kind for c in row] for row in own]
    alone = list(nla_jax.explain_rows(nla, activations=nla.capture(TEXTS[0]), trust=0.0))
    assert [len(r["claims"]) for r in alone] == [len(r["claims"]) for r in rows if r["item"] == 0]
    assert [r["trusted"] for r in alone] == [r["explanation"] for r in alone]


@pytest.fixture(scope="module")
def trust_model():
    from nla_jax.evaluate.trust import features, model
    from nla_jax.evaluate.words import claims

    rng = np.random.default_rng(0)
    made = [claims.Claim(kind, 0, 1, "x") for kind in claims.KINDS for _ in range(60)]
    x = rng.normal(size=(len(made), len(features.FEATURES)))
    found, docs = features.Claims(made, np.arange(len(made)), x), np.arange(len(made)).astype(str)
    return model.fit_trust(found, rng.integers(0, 2, len(made)).astype(bool), docs)


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_killed_run_goes_on(nla, file, tmp_path, monkeypatch, ending):
    """Whatever a kill left of the lines, the next start writes what a run without kills wrote."""
    options = dict(texts=str(file), positions="all", samples=2, seed=3, label="")
    whole = tmp_path / f"whole.{ending}"
    outcome = nla_jax.explain_file(nla, whole, **options)
    assert (outcome.rows, outcome.new) == (n := outcome.rows, n) and n > 3 * nla.runner.batch
    lines = tmp_path / "lines.jsonl"
    nla_jax.explain_file(nla, lines, **options)
    data = lines.read_bytes()
    if ending == "parquet":
        assert pq.read_table(whole).to_pylist() == rows_of(lines)
    numbers, submit = [], Writer.submit
    monkeypatch.setattr(Writer, "submit", lambda w, h, i, **kw: numbers.append(i) or submit(w, h, i, **kw))
    ends = np.cumsum([len(line) for line in data.splitlines(keepends=True)])
    batch = nla.runner.batch
    for at in (0, 5, ends[0], ends[batch - 1], ends[batch - 1] + 7, ends[2 * batch + 3], ends[-2], ends[-1]):
        out = tmp_path / f"cut-{at}.{ending}"
        journal = out if ending == "jsonl" else out.with_name(f"{out.name}.rows")
        journal.write_bytes(data[:at])
        settings = whole.with_name(f"{whole.name}.settings")
        out.with_name(f"{out.name}.settings").write_bytes(settings.read_bytes())
        numbers.clear()
        kept = int((ends <= at).sum())
        outcome = nla_jax.explain_file(nla, out, **options)
        kept = kept if kept == n else kept // batch * batch
        assert (outcome.new, numbers) == (n - kept, [*range(kept, n)])
        if ending == "jsonl":
            assert out.read_bytes() == data
        else:
            assert out.read_bytes() == whole.read_bytes() and not journal.exists()
    assert nla_jax.explain_file(nla, out, **options).new == 0
    assert sorted(p.name for p in tmp_path.glob("cut-0*")) == [f"cut-0.{ending}", f"cut-0.{ending}.settings"]


def test_a_failure_keeps_what_was_written(nla, file, tmp_path, monkeypatch):
    out, text = tmp_path / "o.jsonl", Writer.text

    def failing(writer, answer):
        if answer.number == 2 * nla.runner.batch:
            raise RuntimeError("the device is gone")
        return text(writer, answer)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "text", failing)
        with pytest.raises(RuntimeError, match="the device is gone"):
            nla_jax.explain_file(nla, out, texts=str(file), positions="all")
    assert len(rows_of(out)) == 2 * nla.runner.batch
    nla_jax.explain_file(nla, out, texts=str(file), positions="all")
    assert rows_of(out) == list(nla_jax.explain_rows(nla, texts=str(file), positions="all"))


def test_other_settings_are_refused(nla, file, tmp_path):
    out = tmp_path / "o.jsonl"
    nla_jax.explain_file(nla, out, texts=str(file), samples=2)
    whole = out.read_bytes()
    for change, message in [
        (dict(samples=3), "was begun with samples 2, not 3: give the same settings, name another --out"),
        (dict(seed=1), "with seed 0, not 1"), (dict(positions="all"), 'with positions "last", not "all"'),
        (dict(texts=TEXTS), "with input "), (dict(trust=None, scale="2"), 'scale "mean", not "2"'),
    ]:
        with pytest.raises(UserError) as e:
            nla_jax.explain_file(nla, out, **{"texts": str(file), "samples": 2, **change})
        assert message in str(e.value)
    out.write_bytes(whole[20:])
    with pytest.raises(UserError, match="o.jsonl:1: not row 0 of this command"):
        nla_jax.explain_file(nla, out, texts=str(file), samples=2)
    (tmp_path / "o.jsonl.settings").unlink()
    with pytest.raises(UserError, match="exists, and o.jsonl.settings does not say how it was made"):
        nla_jax.explain_file(nla, out, texts=str(file), samples=2)
    assert out.read_bytes() == whole[20:]


# --- inputs ---------------------------------------------------------------------------------------


def test_texts_that_cannot_be_read(nla, tmp_path):
    """All are found before anything is computed; with skip_bad they get a row with the reason."""
    path, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    texts = ["oil", "", "the <|im_end|> sea", 3, "a" * 2000, "\ud800", "tea"]
    path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)), "utf-8")
    with pytest.raises(UserError, match=r"t.jsonl:2: the text is empty.*, and 4 more; correct the file, or"):
        nla_jax.explain_file(nla, out, texts=str(path))
    assert not out.exists()
    outcome = nla_jax.explain_file(nla, out, texts=str(path), skip_bad=True, samples=2)
    rows = rows_of(out)
    assert (outcome.errors, [r["n"] for r in rows]) == (5, [0, 0, 1, 2, 3, 4, 5, 6, 6])
    assert [r["error"] and r["error"].split(": ")[1].split(";")[0][:25] for r in rows[2:7]] == [
        "the text is empty", "the text spells '<|im_end|>', a special token of "[:25],
        "the text must be a string", "the text has 2000 tokens", "the text is not valid Unicode "[:25]]
    assert [r["explanation"] for r in rows[2:7]] == [None] * 5 and rows[0]["error"] is None


def test_files_of_texts(nla, tmp_path):
    lines, table = tmp_path / "t.txt", tmp_path / "t.parquet"
    lines.write_text("oil\n\ntea\r\n", "utf-8")
    rows = list(nla_jax.explain_rows(nla, texts=lines))
    assert [(r["line"], r["text"]) for r in rows] == [(1, "oil"), (3, "tea")]
    days = pa.array([1, 1], pa.date32())
    pq.write_table(pa.table({"body": ["oil", "tea"], "day": days, "x": [float("nan"), 1.0]}), table)
    out = tmp_path / "o.jsonl"
    nla_jax.explain_file(nla, out, texts=table, field="body", carry=("day", "x"))
    assert [(r["day"], r["x"], "body" in r) for r in rows_of(out)] == [
        ("1970-01-02", None, False), ("1970-01-02", 1.0, False)]
    with pytest.raises(UserError, match="no 'text' .fields: body, day, x.; name the text's field with"):
        list(nla_jax.explain_rows(nla, texts=table))


def test_a_long_text_is_captured_alone(nla, monkeypatch):
    """A batch of the target has a limited number of tokens; the activations are the same."""
    texts = [("the sea " * n).strip() for n in (1, 40, 2, 90, 3)]
    ids = {i: tok_lib.plain_ids(nla.tokenizer, t) for i, t in enumerate(texts)}
    wanted = {i: [0, len(x) - 1] for i, x in ids.items()}
    shapes, capture = [], nla._capture
    monkeypatch.setattr(nla, "_capture", lambda *a, **kw: shapes.append(a[3].shape) or capture(*a, **kw))
    monkeypatch.setattr(explain_inputs, "WINDOW_TOKENS", 512)
    found = explain_inputs.capture_positions(nla, ids, wanted)
    assert all(B * T <= max(512, T) for B, T in shapes) and len(shapes) > 1
    for i, text in enumerate(texts):
        np.testing.assert_allclose(found[i], nla.capture(text)[[0, -1]], rtol=1e-3, atol=1e-3)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)

    def run(*argv) -> str:
        capsys.readouterr()
        assert world.nla(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_flags_that_do_not_go_together(refused, file, tmp_path):
    out = str(tmp_path / "o.jsonl")
    for argv, message in [
        ((), "there is nothing to explain: give --text TEXT, --file FILE, or --activations FILE"),
        (("--text", "a", "--file", file), "--text and --file do not go together"),
        (("--file", file), "--file needs --out"),
        (("--text", "a", "--out", out), "--out is for --file and --activations"),
        (("--file", file, "--out", out, "--tokens=-1"), "--tokens is for --text: use --positions"),
        (("--file", file, "--out", out, "--json"), "--json is for --text: use --out FILE.jsonl"),
        (("--activations", "h.npy", "--out", out, "--positions", "all"), "--positions is for --file"),
        (("--file", file, "--out", out, "--positions", "some"), "positions 'some': must be last"),
        (("--file", file, "--out", out, "--scale", "-1"), "scale -1: must be mean, raw, or a number"),
        (("--file", file, "--out", out, "--scores", "arr"), "scores 'arr': must be of ar, frozen"),
        (("--file", file, "--out", "o.csv"), "o.csv: the output must end in .jsonl or .parquet"),
        (("--file", file, "--out", "gs://b/o.jsonl"), "object storage cannot append lines"),
        (("--file", tmp_path / "none.jsonl", "--out", out), "no file matches"),
        (("--activations", tmp_path / "none.npy", "--out", out), "none.npy does not exist"),
    ]:
        assert message in refused("explain", *argv)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_the_command(finished, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    out = tmp_path / "o.parquet"
    argv = ["explain", "--bundle", finished / "run" / "bundle", "--file", file, "--out", out, "--batch", 8]
    assert world.nla(*argv) == 0
    assert "rows/s; AV's sampling took" in capsys.readouterr().out
    assert pq.read_table(out).num_rows == len(TEXTS)
    assert world.nla(*argv) == 0
    assert f"{out}: all {len(TEXTS)} rows were there" in capsys.readouterr().out


def test_columns_are_described():
    names = {n for o in (explain_columns.Options(trust=0.5),) for n in explain_columns._names(o)}
    assert names == set(explain_columns.COLUMNS)
    assert explain_batch.Options is explain_columns.Options


def test_columns_without_a_common_type_become_json(tmp_path, monkeypatch):
    monkeypatch.setattr(explain_output, "GROUP", 2)
    rows = [{"row": i, "item": i, "x": x, "tags": t, "claims": c, "none": None, "n": n} for i, (x, t, c, n) in
            enumerate([(1, ["a"], [], 1), ("b", None, [], None), ({"k": 1}, ["b"], [{"t": 0.5}], 2.5)])]
    with explain_output.Output(tmp_path / "o.parquet", {"a": 1}, 3, 2) as out:
        out.add(rows)
        out.finish()
    found = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [r["x"] for r in found] == ["1", "b", '{"k": 1}'] and [r["none"] for r in found] == [None] * 3
    assert [r["claims"] for r in found] == [[], [], [{"t": 0.5}]]
    assert [r["n"] for r in found] == [1.0, None, 2.5]
    assert [r["tags"] for r in found] == [["a"], None, ["b"]]
