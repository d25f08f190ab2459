"""`nla report`: what stands on the page, that nothing on it can act, and how it refuses."""

import html.parser
import json
import math
import re
import shutil

import pytest

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.view import html_report, run_files, svg_charts
from tests.helpers import world

NASTY = "</style></title><script>alert(1)</script><img src=//x.test/a onerror=alert(2)>\" ' & {{ 7*7 }}"
FIGURE = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 9, "asks": "what?", "reference": ""}


class Seen(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def write_run(path, name="first", words="a town", steps=5, finished=True, **changes):
    """A directory as `nla train` leaves it, without its arrays."""
    config = configs.default()
    config.update(changes)
    run = path / name
    for folder in ("done", "metrics", "data"):
        (run / folder).mkdir(parents=True)
    write = lambda name, value: (run / name).write_text(json.dumps(value), "utf-8")
    write("config.json", config.to_dict())
    figures = [{"name": n, **FIGURE, "value": v} for n, v in [
        ("fve", 0.25), ("fve_frozen_target", 0.21), ("fve_mean_direction", -0.5)]]
    samples = {"heldout": [{"doc_id": "d:1", "text": f"once there was {words}", "explanation": words,
                            "written": f"about {words}"}]}
    for stage in ("eval_warm", "eval_rl"):
        write(f"done/{stage}.json", {"seconds": 3, "figures": {"heldout": figures}, "samples": samples})
    write("done/rl.json", {"seconds": 90.0})
    same = {"ok": 0.75, "truncated": 0.1, "odd_one": 1.0, "best": {"text": words}}
    rows = [{"step": i, "reward": i / 2, **same} for i in range(steps)]
    (run / "metrics" / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    norm = {"min": 1.0, "p25": 2.0, "p50": 3.0, "p75": 4.0, "max": 5.5}
    splits = {"heldout": {"rows": 12, "documents": 11, "norm": norm}}
    write("data/nla_store.json", {"plan": {"layer": 7}, "drops": {words: 2}, "splits": splits})
    if finished:
        write("summary.json", {"device": "cpu x 1", "versions": {"jax": "0.0.7"}})
    return run


def report(*workdirs, **options) -> Seen:
    out = workdirs[0].parent / "report.html"
    return Seen(html_report.write(workdirs, out, **options).read_text("utf-8"))


def test_a_finished_run(finished, tmp_path, capsys):
    """Through the command line, of a run that `nla train` made."""
    out = tmp_path / "pages" / "report.html"
    assert world.nla("report", finished / "run", "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    seen, summary = Seen(out.read_text("utf-8")), json.loads((finished / "run" / "summary.json").read_text())
    f = next(f for f in summary["rl"]["heldout"] if f["name"] == "fve")
    assert f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" in seen.text
    assert f"{f['value']:.2f}".replace("-", "−") in seen.texts
    for wanted in ("Reward", "Gradient norms", "KL to the warm start", "All figures, ood", "fve_shuffled",
                   "What differs from the default", "rl.group", summary["versions"]["jax"], summary["device"],
                   "can be wrong", f"nla report {finished / 'run'}"):
        assert wanted in seen.text, wanted
    done = json.loads((finished / "run" / "done" / "eval_rl.json").read_text("utf-8"))
    for sample in done["samples"]["heldout"]:
        assert sample["text"] in seen.text and sample["explanation"] in seen.text
    assert "is not finished" not in seen.text and seen.open == []


def test_the_frozen_target_is_named_right_after_fve(tmp_path):
    texts = [t.strip() for t in report(write_run(tmp_path)).texts if t.strip()]
    for bundle in ("RL", "warm start"):
        at = texts.index(f"FVE, {bundle}")
        nearby = texts[at : at + 6]
        assert "0.25" in nearby and f"by the frozen target, {bundle}" in nearby and "0.21" in nearby
    assert any("RL, by the frozen target" in t or "by the frozen target" == t for t in texts)


def test_nothing_leaves_the_page(tmp_path):
    """No script, no request, and a policy that forbids both; links stay on the page."""
    seen = report(write_run(tmp_path))
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use"}
    source = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"Content-Security.*", "", source))
    policy = next(a["content"] for t, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script" not in policy
    for _, found in seen.tags:
        assert not [k for k in found if k.startswith("on") or k in ("src", "srcset", "style")]
        assert found.get("href", "#").startswith("#")


def test_what_models_and_files_say_is_escaped(tmp_path):
    """A text that tries to be a page, in every place where something is read from a file."""
    run = write_run(tmp_path, name="a<b>&'", words=NASTY, target=NASTY)
    evaluation = tmp_path / "evaluation.json"
    figure = {"name": NASTY, **FIGURE, "asks": NASTY, "reference": NASTY}
    found = {NASTY: {"verdict": [NASTY], "figures": [figure], "left_out": [NASTY]}}
    evaluation.write_text(json.dumps(found), "utf-8")
    for path, change in [("summary.json", {"device": NASTY, "versions": {NASTY: NASTY}}),
                         ("done/rl.json", {"seconds": 2})]:
        (run / path).write_text(json.dumps(change), "utf-8")
    (run / "metrics" / "rl.jsonl").write_text(json.dumps({"step": 0, NASTY: 2.0, "reward": 1.0}) + "\n")
    harmless = report(write_run(tmp_path, name="harmless"), command="nla report")
    seen = report(run, evaluations=[evaluation], command=NASTY)
    assert {t for t, _ in seen.tags} <= {t for t, _ in harmless.tags} | {"ul", "li"}
    # Target, device, versions, verdict, figure (3), left out, sample (3), drops, setting, command, chart.
    assert seen.text.count(NASTY) >= 14
    assert f"rl: {NASTY} over step" in [a.get("aria-label") for _, a in seen.tags]
    assert seen.open == []


def test_halves_of_characters(tmp_path):
    assert "a ? b" in report(write_run(tmp_path, words="a \ud800 b")).text


def test_evaluation_beside_the_run(tmp_path):
    run = write_run(tmp_path)
    table = {"verdict": ["Words carry much.", "Not shown that they mean it."], "left_out": ["patch: no text"],
             "figures": [{"name": "fve_quotes_only", **FIGURE}]}
    assert "Grounding" not in report(run).text
    (run / "evaluation.json").write_text(json.dumps({"heldout": table}), "utf-8")
    seen = report(run)
    for wanted in (*table["verdict"], "patch: no text", "fve_quotes_only", "0.250 [0.125, 0.500]"):
        assert wanted in seen.text
    assert [a.get("class") for t, a in seen.tags if t == "li"] == [None, "not"]


def test_two_runs(tmp_path):
    a = write_run(tmp_path, "one")
    b = write_run(tmp_path, "two", seed=9, finished=False)
    samples = json.loads((b / "done" / "eval_rl.json").read_text("utf-8"))
    samples["samples"]["heldout"][0]["explanation"] = "another thing"
    (b / "done" / "eval_rl.json").write_text(json.dumps(samples), "utf-8")
    seen = report(a, b)
    assert "two is not finished" in seen.text and "one is not finished" not in seen.text
    between = seen.text[seen.text.index("What differs between") : seen.text.index("in all of them")]
    assert re.search(r"seed\s*0\s*0\s*9\s", between) and "rl.group" not in between
    assert seen.text.count("once there was a town") == 2  # tail and whole text, once for both runs
    assert "another thing" in seen.text and "one, RL" in seen.text and "two, warm start" in seen.text
    titles = [t for t in seen.texts if t.startswith(("one, reward:", "two, reward:"))]
    assert len(titles) == 10
    same = report(a, shutil.copytree(a, tmp_path / "other" / "one"))
    assert str(a) in same.text and str(tmp_path / "other" / "one") in same.text
    assert "Nothing." in same.text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}", "utf-8")
    seen = report(tmp_path / "run")
    assert "Done so far: nothing" in seen.text and "No activations" in seen.text


@pytest.mark.parametrize(
    "path,text,message",
    [
        ("config.json", None, "no run here"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: not what"),
        ("config.json", '{"data": 3}', "config.json: not what nla_jax writes there"),
        ("done/rl.json", '{"seconds": "long"}', "rl.json: not what nla_jax writes there (ValueError"),
        ("done/eval_rl.json", '{"figures": {"heldout": [{"name": "fve"}]}}', "eval_rl.json: not what"),
        ("evaluation.json", '{"heldout": 3}', "evaluation.json: not what nla_jax writes there"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("data/nla_store.json", '{"splits": {"heldout": 3}}', "nla_store.json: not what"),
    ],
)
def test_refusals(tmp_path, path, text, message):
    run = write_run(tmp_path)
    if text is None:
        (run / path).unlink()
    else:
        (run / path).write_text(text, "utf-8")
    with pytest.raises(UserError) as e:
        report(run)
    assert message in str(e.value) and str(run) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "report.html").exists()


def test_wrong_numbers_of_things(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(UserError, match="2 evaluations for 1 runs"):
        report(run, evaluations=["a", "b"])
    with pytest.raises(UserError, match="a report compares at most 6"):
        report(*[run] * 7)
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        report(run, evaluations=[tmp_path / "nowhere.json"])
    assert run_files.read(run).seconds == {"eval_warm": 3.0, "rl": 90.0, "eval_rl": 3.0}


def test_lines_keep_gaps_and_spikes():
    points = [(i, math.nan if 100 <= i < 200 else 7.0 if i == 555 else 1.0) for i in range(1000)]
    svg = svg_charts.lines("t", [svg_charts.Line("x", points)])
    assert svg.count('class="line"') == 2 and 100 < svg.count("<circle") <= svg_charts.MOST
    (top,) = {m for m in re.findall(r'class="band" d="([^"]*)"', svg)}
    highest = min(float(y) for y in re.findall(r" (\d+\.\d)", top))
    sevenths = svg_charts.TOP + (svg_charts.H - svg_charts.BOTTOM - svg_charts.TOP) * (8 - 7) / 8
    assert highest == pytest.approx(sevenths, abs=0.06)  # the axis goes from 0 to 8
    assert svg_charts.lines("t", [svg_charts.Line("x", [(0, math.inf)])]) == "" == svg_charts.lines("t", [])


@pytest.mark.parametrize(
    "low,high,wanted",
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (-3e-8, 0.3, [0, 0.1, 0.2, 0.3]), (0, 0, [0, 0.25, 0.5, 0.75, 1]),
     (-1.47, -0.96, [-1.6, -1.4, -1.2, -1, -0.8]), (4, 4, [2, 3, 4, 5, 6])],
)
def test_ticks(low, high, wanted):
    assert svg_charts.ticks(low, high) == pytest.approx(wanted)


def test_ticks_of_steps_are_whole():
    assert svg_charts.ticks(0, 13, 5, whole=True) == [0, 5, 10]
    assert svg_charts.ticks(0, 1, 5, whole=True) == [0, 1] and svg_charts.ticks(3, 3, 5, whole=True) == [3]
