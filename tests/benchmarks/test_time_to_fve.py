"""benchmarks.time_to_fve: the sides do the same training, and one evaluator measures them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, time_to_fve
from benchmarks.fve import child, ours, points, reference
from benchmarks.fve import problem as problems
from nla_jax import objectives, reconstructor, verbalizer
from nla_jax.errors import UserError
from nla_jax.prompts import ARPrompt, AVPrompt
from tests.helpers import world

STEPS = 2
SETTINGS = ["rl.update_group=2", "rl.written_ar=4", "rl.kl=0.05"]


class InProcess:
    """A side in this process, in the place of `benchmarks.child.Process`."""

    def __init__(self, side):
        self.side, self.ready = side, {"device": "none"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, **more):
        return child.answer_request(self.side, {"do": do, **more})


@pytest.fixture(scope="module")
def sides():
    return {}


@pytest.fixture
def in_process(monkeypatch, sides):
    """Start sides in this process, and keep them in `sides`."""

    def start(name, kind, directory, links, release, torch_compile, torch_dtype):
        sides[name] = {"ours": ours, "torch": reference}[kind].Side(directory)
        return InProcess(sides[name])

    monkeypatch.setattr(child, "start", start)


def run(finished, tmp_path, *argv):
    path = tmp_path / "out.json"
    with world.one_device(), world.quick_compiles(finished):
        assert time_to_fve.main(["--from", str(finished / "run"), "--json", str(path), *argv]) == 0
    return json.loads(path.read_text())


def test_the_sides_train_alike(finished, tmp_path, in_process, sides, capsys):
    argv = [word for s in SETTINGS for word in ("--set", s)]
    found = run(finished, tmp_path, "--steps", str(STEPS), "--every", "1", "--rows", "6",
                "--plot", str(tmp_path / "plot.png"), *argv)
    assert {"logp_fp32", "ar_fp32", "ar.loss", "ar.grad_norm", "av.kl", "av.av_grad_norm"} == set(
        found["checks"]["torch"])
    for side in found["sides"].values():
        assert [p["step"] for p in side["points"]] == [0, 1, 2]
        assert all(np.isfinite(p[r]["fve"]) for p in side["points"] for r in points.READERS)
        assert [m["ok"] > 0 and 0 < m["length"] <= 16 for m in side["steps"]] == [True] * STEPS
    starts = [{k: v for k, v in s["points"][0].items()} for s in found["sides"].values()]
    assert starts[0] == starts[1] and (tmp_path / "plot.png").stat().st_size
    assert "ours / torch" in capsys.readouterr().out
    # An export is a pair of the same shapes, which training has changed; a reset side has the start again.
    begin = problems.flatten(sides["torch"].problem.trees)
    for side in sides.values():
        trained = problems.flatten(side.export())
        assert {k: a.shape for k, a in trained.items()} == {k: a.shape for k, a in begin.items()}
        assert any(not np.allclose(trained[k], begin[k], atol=1e-6) for k in begin)
        side.reset()
        again = problems.flatten(side.export())
        assert all(np.allclose(again[k], begin[k], atol=1e-7) for k in begin)


def test_the_lessons_of_ar_are_the_same_training(finished, tmp_path, in_process):
    """No sampling: both sides see the same rows, so that FVE must agree after the steps."""
    found = run(finished, tmp_path, "--stage", "warm_ar", "--every", "2")
    (ours_end, torch_end) = (found["sides"][n]["points"][-1] for n in ("ours", "torch"))
    assert ours_end["step"] == torch_end["step"] == 2
    assert ours_end["ar"]["fve"] == pytest.approx(torch_end["ar"]["fve"], abs=2e-3)
    assert ours_end["ar"]["fve"] != found["sides"]["ours"]["points"][0]["ar"]["fve"]
    assert "frozen_target" not in found["time_to"]


AV = AVPrompt(before=(1,), marker=2, after=(3,), open=(10,), close=(11, 12), newline=(9,), end_of_turn=13,
              eos=(13, 14), pad=0)
ANSWERS = np.array([
    [10, 5, 6, 11, 12, 7],  # closed; what follows is padding
    [10, 5, 9, 11, 12, 0],  # the line break belongs to the tag
    [10, 11, 12, 0, 0, 0],  # no words
    [5, 6, 11, 12, 0, 0],  # no opening tag
    [10, 5, 13, 0, 0, 0],  # ended without the tag
    [10, 5, 6, 7, 8, 8],  # cut at the cap
], np.int32)


def test_answers_are_read_as_by_nla_jax():
    length, start, end, closed, ok = reference.parse(AV, ANSWERS)
    assert length.tolist() == [5, 5, 3, 4, 3, 6]
    assert closed.tolist() == [True, True, True, True, False, False]
    want = verbalizer.parse_ids(AV, jnp.asarray(ANSWERS), jnp.asarray(length), jnp.asarray(closed))
    assert [a.tolist() for a in (start, end, ok)] == [np.asarray(a).tolist() for a in want]
    prompt = ARPrompt(before=(21, 22), after=(23,), pad=0, breaks=((6, 4),))
    ids, valid, last = reconstructor.splice(prompt, jnp.asarray(ANSWERS), *want[:2])
    rows = reference.splice(prompt, ANSWERS, start, end)
    assert rows == [np.asarray(r)[: n + 1].tolist() for r, n in zip(ids, last, strict=True)]


def test_the_same_answers_are_picked():
    import torch

    reward = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    for k in (2, 3, 4):
        assert reference.most_different(torch.tensor(reward), k).tolist() == np.asarray(
            objectives.most_different(jnp.asarray(reward), k)).tolist()


def test_a_microbatch_has_rows_of_similar_length():
    parts = reference._by_length([5, 1, 9, 3] * 5)
    assert [len(p) for p in parts] == [10, 10] and sorted(sum(parts, [])) == list(range(20))
    assert max(([5, 1, 9, 3] * 5)[i] for i in parts[0]) == 3


def points_of(*values):
    return [{"seconds": 10.0 * i, "ar": {"fve": v}} for i, v in enumerate(values)]


def test_the_time_to_a_level_is_between_two_points():
    at = points_of(0.1, 0.2, 0.15, 0.4)
    assert points.time_to(at, "ar", 0.15) == pytest.approx(5.0)
    assert points.time_to(at, "ar", 0.25) == pytest.approx(24.0)
    assert points.time_to(at, "ar", 0.05) == 0.0
    assert points.time_to(at, "ar", 0.5) is None and points.time_to(at, "frozen_target", 0.1) is None


def test_levels_and_ratios():
    sides = {"ours": {"points": points_of(0.11, 0.31)}, "torch": {"points": points_of(0.11, 0.16, 0.21)}}
    rows = points.summarise(sides, [])["ar"]
    assert [r["level"] for r in rows] == [0.15, 0.2, 0.25, 0.3]
    assert rows[0]["ratios"]["torch"] == pytest.approx(2.0 / 8.0)
    assert rows[3]["ratios"] == {} and rows[3]["seconds"]["torch"] is None
    lines = points.table({"sides": sides, "time_to": {"ar": rows}})
    assert "| own AR | 0.15 | 2 | 8 | 0.25 |" in lines and lines[-1].endswith("| 9.5 | - | - |")


def test_faults_of_the_arguments(finished, tmp_path):
    for settings, message in ((["rl.no=1"], "KEY=VALUE"), (["rl.steps"], "KEY=VALUE")):
        with pytest.raises(UserError, match=message):
            problems.read_config(finished / "run", settings)
    with pytest.raises(UserError, match="not a run"):
        problems.read_config(tmp_path, [])
    with pytest.raises(UserError, match="rl.reader='frozen_target'"):
        problems.refuse_for_torch(problems.read_config(finished / "run", ["rl.reader=frozen_target"]))
    with pytest.raises(UserError, match="neither a checkout"):
        time_to_fve.find_release("no-such-ref", tmp_path)
    with pytest.raises(UserError, match="NAME:KEY=VALUE"):
        time_to_fve.sides_of(time_to_fve.parser().parse_args(["--from", "x", "--variant", "k2"]), tmp_path)


def test_a_spec_survives_json_and_unknown_fields(finished):
    from nla_jax import bundle

    spec = bundle.load(finished / "run" / "bundle").spec
    found = json.loads(json.dumps(dataclasses.asdict(spec)))
    found["lm"]["field_of_a_later_version"] = 1
    assert ours.read_spec(found) == spec


def test_sides_that_differ_are_refused():
    a = {"logp_fp32": [-1.0], "h_fp32": [[1.0, 0.0]], "ar": {"loss": 1.0, "grad_norm": 1.0}}
    assert time_to_fve.check_agreement(a, a)["ar.loss"] == 0
    with pytest.raises(agreement.SidesDisagree, match="ar: loss is 1 in nla_jax, 2 in torch"):
        time_to_fve.check_agreement(a, a | {"ar": {"loss": 2.0, "grad_norm": 1.0}})


def test_a_release_must_be_what_python_imports(monkeypatch, tmp_path):
    class Canned:
        def __init__(self, name, argv, env):
            self.ready = {"source": str(tmp_path / "installed")}
            assert argv[0] == "-P" and env["PYTHONPATH"].split(":")[1] == str(tmp_path / "release")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(child.child, "Process", Canned)
    with pytest.raises(UserError, match="Python imports nla_jax from"):
        child.start("release", "ours", tmp_path, tmp_path / "links", tmp_path / "release")
    assert (tmp_path / "links" / "benchmarks" / "fve" / "child.py").is_file()
