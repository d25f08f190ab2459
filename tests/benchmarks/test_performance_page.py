"""benchmarks.performance_page writes the figures of its files, and gpu_session keeps what it measured."""

import json

import pytest

from benchmarks import cases, gpu_session, performance_page, rl_step, time_to_fve
from nla_jax.errors import UserError

SUBJECT = {
    "title": "a case", "short": "here", "machine": "one machine", "row_name": "phase",
    "rows": {"step": "whole step", "rollout": "rollout"},
    "columns": [{"head": "ours, s", "key": "ours_s", "form": ".2f"},
                {"head": "ratio", "key": "ratio", "form": ".2f"}],
    "runs": [
        {"commit": "abc1234", "date": "2026-01-02", "command": "python -m x", "versions": "jax 1",
         "note": "It was idle.",
         "figures": {"step": {"ours_s": 4.0, "ratio": 0.5}, "rollout": {"ours_s": 1.0}}},
        {"commit": "def5678", "date": "2026-01-03", "command": "python -m x",
         "figures": {"step": {"ours_s": 3.0, "ratio": 0.4}}},
    ],
}
GOAL = {"name": "step", "limit": 0.45, "limit_text": ".45", "better": "less", "form": ".2f",
        "figures": ["a:step/ratio", "b:step/ratio"], "limits": "the products"}
PHASE = {"ours_s": 2.0, "torch_s": 5.0, "ratio": 0.4, "floor_s": 1.0, "ours_over_floor": 2.0,
         "ours_all_s": [2.0]}
OUT = {"machine": {"rates": {"gemm_bf16": 1.0}}, "cases": {"cpu_full": {
    "phases": {"step": PHASE}, "about": {"ours": {"jax": "0.10.2"}, "torch": {"torch": "2.13.0"}},
    "memory": {"ours": {"rss": 2**31, "device": None}, "torch": {"rss": 2**30, "device": None}}}}}


def test_the_page_is_up_to_date():
    assert performance_page.main(["--check"]) == 0


def test_every_goal_is_about_a_file_that_is_there():
    subjects = performance_page.read_subjects()
    goals = json.loads((performance_page.RESULTS / "goals.json").read_text("utf-8"))["goals"]
    for goal in goals:
        for place in goal["figures"]:
            name, _, at = place.partition(":")
            assert name in subjects and "/" in at, place
    for name, subject in subjects.items():
        for run in subject["runs"]:
            assert run["commit"] and run["date"] and run["command"], name
            assert "figures" in run and subject["machine"]


def test_a_table_is_of_the_newest_whole_run():
    lines = performance_page.subject_table(SUBJECT)
    assert lines[2:4] == ["| whole step | 4.00 | 0.50 |", "| rollout | 1.00 |  |"]
    assert lines[-1] == ("Measured on 2026-01-02 at `abc1234` on one machine with jax 1. It was idle.\n\n"
                         "    python -m x")
    assert performance_page.subject_table(SUBJECT | {"runs": []}) == ["Not measured on one machine."]


def test_goals_have_the_newest_value_and_history_has_all():
    subjects = {"a": SUBJECT, "b": SUBJECT | {"runs": []}}
    assert "| step | ≤ .45 | 0.40 (here) | the products |" in performance_page.goals_table([GOAL], subjects)
    missed = performance_page.goals_table([GOAL | {"limit": 0.3}], subjects)
    assert "0.40 (here: not reached)" in missed[-1]
    other = performance_page.goals_table([GOAL | {"figures": ["b:step/ratio"]}], subjects)
    assert "not measured" in other[-1]
    lines = performance_page.history_table([GOAL], subjects)
    assert [line.split(" | ")[3:] for line in lines[2:]] == [["`abc1234`", "0.50 |"], ["`def5678`", "0.40 |"]]


def test_rendering_twice_changes_nothing_and_an_unknown_table_is_refused():
    page = "before\n\n<!-- table a -->\nold\n<!-- end -->\n\nafter\n"
    once = performance_page.render(page, {"a": SUBJECT}, [GOAL])
    assert "whole step" in once and "old" not in once
    assert once.startswith("before") and once.endswith("after\n")
    assert performance_page.render(once, {"a": SUBJECT}, [GOAL]) == once
    with pytest.raises(UserError, match="'c' without"):
        performance_page.render(page.replace("table a", "table c"), {"a": SUBJECT}, [])


def test_a_measurement_is_added(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SUBJECT))
    performance_page.add_run(path, OUT, case="", command="python -m y", note="Two rounds.")
    run = json.loads(path.read_text())["runs"][-1]
    assert run["figures"]["step"] == {"ours_s": 2.0, "torch_s": 5.0, "ratio": 0.4, "floor_s": 1.0,
                                      "ours_over_floor": 2.0, "speedup": 2.5}
    assert run["figures"]["memory"] == {"ours_gib": 2.0, "torch_gib": 1.0, "ratio": 2.0}
    assert (run["versions"], run["command"], run["note"]) == ("jax 0.10.2, torch 2.13.0", "python -m y",
                                                              "Two rounds.")
    assert run["rates"] == {"gemm_bf16": 1.0} and len(run["date"]) == 10
    with pytest.raises(UserError, match="no .*b.json"):
        performance_page.add_run(tmp_path / "b.json", OUT, case="", command="x")
    for found, case, message in ((OUT, "gpu", "--case gpu"), ({"x": 1}, "", "not the JSON of")):
        with pytest.raises(UserError, match=message):
            performance_page.figures_of(found, case)


def test_a_time_to_fve_is_added():
    found = {
        "time_to": {"ar": [
            {"level": 0.3, "seconds": {"ours": 20.0, "torch": None}, "ratios": {}},
            {"level": 0.2, "seconds": {"ours": 10.0, "torch": 40.0}, "ratios": {"torch": 0.25}}]},
        "sides": {"ours": {"about": {"jax": "1"}, "steps": [{"seconds": 3.0}, {"seconds": 5.0}]}}}
    figures, versions = performance_page.figures_of(found)
    assert figures["ar 0.30"] == {"ours_s": 20.0}
    assert figures["ar 0.20"] == {"ours_s": 10.0, "torch_s": 40.0, "over_torch": 0.25}
    assert figures["step ours"] == {"seconds": 4.0} and versions == "jax 1"


def python(code: str, name: str = "one", seconds: float = 30.0) -> gpu_session.Part:
    return gpu_session.Part(name, seconds, ("-c", code, "{out}"), "nothing")


def test_a_session_keeps_what_each_part_wrote(tmp_path):
    writes = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}')"
    hangs = writes.replace("sys.argv[1]", "sys.argv[1] + 'l'") + "; import time; time.sleep(600)"
    chosen = [python(writes), python(hangs, "two", 3.0), python("raise SystemExit(4)", "three")]
    late = gpu_session.run_all(chosen, tmp_path / "late", -1.0)
    assert late["left_out"] == ["one", "two", "three"] and not late["parts"]
    session = gpu_session.run_all(chosen, tmp_path, 90.0)
    got = {name: (p["status"], p["stopped"], p["json"]) for name, p in session["parts"].items()}
    assert got == {"one": (0, False, "one.json"), "two": (None, True, None), "three": (4, False, None)}
    assert json.loads((tmp_path / "session.json").read_text())["parts"].keys() == got.keys()


def test_the_parts_fit_and_their_commands_are_understood(tmp_path, capsys):
    found = gpu_session.parts("runs/quickstart", "bundle")
    assert sum(p.seconds for p in found) <= 540 and len({p.name for p in found}) == len(found)
    assert "time_to_fve" not in {p.name for p in gpu_session.parts("", "bundle")}
    modules = {"benchmarks.rl_step": rl_step, "benchmarks.time_to_fve": time_to_fve}
    for part in found:
        _, module, *argv = part.argv
        if module in modules:
            args = modules[module].parser().parse_args(argv)
            if module == "benchmarks.rl_step":
                assert cases.choose(args.case, args.set, args.phases)
    assert gpu_session.main(["--list"]) == 0 and "full_135m" in capsys.readouterr().out
    with pytest.raises(UserError, match="--parts time_to_fve"):
        gpu_session.main(["--parts", "time_to_fve", "--out", str(tmp_path)])
