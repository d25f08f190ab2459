"""The display of a stage that trains: what it says, that model output does nothing in it, and `nla watch`."""

import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from nla_jax import cli, configs
from nla_jax.errors import UserError
from nla_jax.training import loop, stage_display
from nla_jax.util import distributed, metrics_log, progress
from nla_jax.view import watch
from tests.helpers import world

NASTY = "[red]x[/red] [link=http://a.test]y[/] [bold \x1b]0;title\x07\x1b[2J\x9b1m \u202e\u2066 \ud800 世界"
TIMES = [{"step": i, "seconds": {"device": 2.0, "data": 0.5, "other": 0.0}} for i in range(40)]


def drawn(shown, width=90, **kw) -> str:
    console = Console(width=width, file=io.StringIO(), **kw)
    console.print(stage_display.panel(shown, width) if isinstance(shown, stage_display.Stage) else shown)
    return console.file.getvalue()


def rows(n=40, **more) -> list[dict]:
    best = {"text": "a town", "reward": -0.5}
    return [{"step": i, "reward": i / 10, "kl": 0.5, "ok": 0.75, "best": best, **more} for i in range(n)]


def rl(found, **changes) -> stage_display.Stage:
    given = dict(run="mine", name="rl", done=len(found), total=100, rows=found, times=TIMES, sample=found[-1])
    return stage_display.Stage(**{**given, **changes})


def write_run(run, finished=("extract",), rows=(), stage="warm_ar", steps=5):
    """A directory as `nla train` leaves it in the middle of a stage."""
    config = configs.default()
    config[stage].steps = steps
    for folder in ("done", "metrics", "times"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
    for name in finished:
        (run / "done" / f"{name}.json").write_text('{"seconds": 1.0}', "utf-8")
    log = metrics_log.MetricsLog(run, stage)
    for row in rows:
        log.write(row["step"], {"loss": row["loss"]}, {"device": 3.0})
    log.close()
    return run


# --- what is drawn --------------------------------------------------------------------------------


def test_it_says_where_it_is_how_fast_and_what_the_values_are():
    found = rows(av_grad_norm=float("nan"), av_skipped=3, ar_skipped=0)
    found[20]["heldout_fve"] = -0.25
    text = drawn(rl(found, finished=["rl_drill"], foot="last step logged 0:14 ago"))
    words = [" ".join(line.strip("│").split()) for line in text.splitlines()]
    assert words[0].startswith("╭─ mine: rl ─")
    assert words[1] == "stage 9 of 10 rl_drill ✓ rl eval_rl"
    assert words[2].startswith("step 40 of 100 ━") and words[2].endswith(" 2.5 s a step 2:30 left")
    assert words[3] == "a step: device 2 s, data 0.5 s"
    assert "FVE, held out -0.25 ▁ -0.25 … -0.25" in words
    (reward,) = (w for w in words if w.startswith("reward"))
    assert reward.startswith("reward 3.9 ▁") and reward.endswith("█ 0 … 3.9")
    assert "failed 0.25 " + "▁" * 34 + " 0.25 … 0.25" in words
    assert "gradient of AV nan" in words
    assert "skipped updates (gradients are not finite): AV 3" in words
    assert "step 39, the best of one activation's answers (reward -0.5):" in words and "a town" in words
    assert words[-2] == "last step logged 0:14 ago"


def test_what_a_model_wrote_is_drawn_and_not_obeyed():
    nasty = rl(rows(), sample={"step": 1, "best": {"text": NASTY, "reward": NASTY}}, run=NASTY, foot=NASTY)
    for text in (drawn(nasty), drawn(nasty, force_terminal=True, color_system="truecolor")):
        assert "[red]x[/red] [link=http://a.test]y[/] [bold \ufffd]0;title\ufffd\ufffd[2J\ufffd1m" in text
        # What rich itself writes begins with an escape: styles, of which there is no link.
        obeyed = ("\x1b]", "\x1b[2J", "\x9b", "\x07", "\u202e", "\u2066", "\ud800")
        assert not any(bad in text for bad in obeyed)
    for line in drawn(nasty, width=61).splitlines():
        assert cell_len(line) == 61


def test_a_damaged_row_is_drawn_too(tmp_path):
    lines = [
        '{"step": "x", "seconds": {}}',
        '{"step": 1, "seconds": 3}',
        "4",
        '{"step": 1, "seconds": {"a": "b"}}',
    ]
    (tmp_path / "rl.jsonl").write_text("\n".join(lines), "utf-8")
    odd = [{"step": 1, "reward": "high", "kl": None, "ok": True, "best": "a town"}]
    text = drawn(rl(odd, times=(times := stage_display.read_times(tmp_path / "rl.jsonl"))))
    assert "step 1 of 100" in text and "reward" not in text and len(times) == 1


def test_a_whole_rl_stage_fits_a_terminal_of_24_lines():
    full = {name: 1.0 for _, name in stage_display.CURVES if name not in ("loss", "grad_norm")}
    text = drawn(rl(rows(**full, best={"text": "word " * 60, "reward": -1.0})), width=100)
    assert len(text.splitlines()) <= 24


def test_sparklines():
    assert stage_display.sparkline(range(8), 8) == stage_display.BARS
    assert stage_display.sparkline([0, 0, 4, 4, 7, 7], 3) == "▁▅█"
    assert stage_display.sparkline([3.0, 3.0], 8) == "▁▁"
    assert stage_display.sparkline([1.0, float("nan"), float("inf"), 2.0], 9) == "▁  █"
    assert stage_display.sparkline([float("nan")], 9) == " "


def test_the_pace_counts_steps_and_leaves_compiling_out():
    first = {"step": 4, "seconds": {"compile": 60.0, "device": 1.0}}
    times = [first, {"step": 6, "seconds": {"device": 4.0}}]
    assert stage_display.seconds_per_step(times) == {"device": 5 / 3}
    again = {"step": 5, "seconds": {"compile": 1.0, "device": 3.0}}  # killed, and taken up at an earlier step
    assert stage_display.seconds_per_step([*times, again]) == {"device": 2.0}
    every_tenth = [{"step": 10 * i, "seconds": {"device": 5.0}} for i in range(99)]
    assert stage_display.seconds_per_step(every_tenth) == {"device": 0.5}
    assert stage_display.seconds_per_step([]) == {}
    assert stage_display.format_seconds_per_step([*times, again]) == "a step: device 2 s; compiling 61 s"


# --- in the process that trains -------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal, whose text this is."""
    screen = Console(width=90, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    for module in (stage_display, watch):
        monkeypatch.setattr(module, "Console", lambda **kw: screen)
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    return screen.file


def fit(workdir, step=lambda i: None, steps=6):
    add = jax.jit(lambda s, b: ({"sum": s["sum"] + b}, {"loss": s["sum"], "all": jnp.ones(2)}))

    def one(state, batch, i):
        step(i)
        return add(state, batch)

    return loop.fit(
        "rl", {"sum": jnp.float32(0)}, one, lambda i: np.float32(i + 1), steps, workdir=workdir, every=2,
        notes=lambda arrays: {"best": {"text": NASTY, "reward": 1.0}},
        watch=lambda s, i: {"heldout_fve": 0.5},
        watch_every=3,
    )


def test_it_follows_a_stage_through_sigterm_and_after(tmp_path, terminal):
    with pytest.raises(distributed.Stopped, match="rl is saved at step 3"):
        fit(tmp_path, lambda i: os.kill(os.getpid(), signal.SIGTERM) if i == 2 else None)
    first = terminal.getvalue()
    assert "step 3 of 6" in first and first.endswith("\x1b[?25h")  # the cursor is back
    assert float(fit(tmp_path)["sum"]) == 21
    last = terminal.getvalue()[len(first) :].split("╭")[-1]
    assert "step 6 of 6" in last and "[red]x[/red]" in last
    assert "loss" in last and "0 … 15" in last  # of all six steps
    assert "FVE, held out" in last and "\x1b]" not in last


def test_times_stand_apart_from_the_numbers(tmp_path):
    fit(tmp_path)
    found = {d: metrics_log.read(tmp_path / d / "rl.jsonl") for d in ("metrics", "times")}
    assert [r["step"] for r in found["metrics"]] == [r["step"] for r in found["times"]] == list(range(6))
    assert not any("second" in name for r in found["metrics"] for name in r)
    phases = {p for r in found["times"] for p in r["seconds"]}
    assert phases == {"compile", "device", "data", "watch", "save", "other"}
    assert "compile" in found["times"][0]["seconds"] and "compile" not in found["times"][1]["seconds"]


def test_times_of_an_earlier_process_are_kept(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, "rl")
    for step in range(3):
        log.write(step, {"loss": 1.0}, {"device": 1.0})
    log.close()
    with open(tmp_path / "times" / "rl.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 3, "sec')  # killed while writing
    log = metrics_log.MetricsLog(tmp_path, "rl", start=2)
    log.write(2, {"loss": 1.0}, {"device": 2.0})
    log.close()
    assert [r["step"] for r in metrics_log.read(tmp_path / "metrics" / "rl.jsonl")] == [0, 1, 2]
    assert [r["step"] for r in metrics_log.read(tmp_path / "times" / "rl.jsonl")] == [0, 1, 2, 2]


def test_the_clock_gives_all_time_to_something(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    clock = progress.Clock()
    for phase, seconds in (("data", 1.0), ("device", 2.0), ("data", 4.0)):
        with clock(phase):
            now[0] += seconds
        now[0] += 0.5
    assert clock.lap() == {"data": 5.0, "device": 2.0, "other": 1.5}
    assert clock.lap() == {"other": 0.0}


def test_lines_where_nobody_looks_or_lines_are_wanted(tmp_path, monkeypatch, capsys):
    assert isinstance(
        stage_display.display("rl", 3, 0, tmp_path), stage_display.Lines
    )  # pytest's is no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(stage_display.display("rl", 3, 0, tmp_path), stage_display.Display)
    with progress.plain_progress(), stage_display.display("rl", 3, 2, tmp_path) as shown:
        assert isinstance(shown, stage_display.Lines)
        shown.saw({"step": 2, "reward": 0.5, "mse": 1.0, "best": {"text": "x"}})
        shown.advance()
    assert "rl 3/3" in (line := " ".join(capsys.readouterr().err.split()))
    assert line.endswith("left reward 0.500 mse 1.000")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    assert isinstance(stage_display.display("rl", 3, 0, tmp_path), stage_display.Lines)


# --- in another terminal --------------------------------------------------------------------------


def test_watch_prints_once_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    run = write_run(tmp_path / "mine", ("extract", "lessons_ar", "lessons_av"), [{"step": 0, "loss": 2.5}])
    assert world.nla("watch", run) == 0
    text = capsys.readouterr().out
    assert "mine: warm_ar" in text and "step 1 of 5" in text and "2.5 … 2.5" in text
    assert "3 s a step" in text and "last step logged 0:0" in text
    assert world.nla("watch", tmp_path / "none") == 2
    assert "no run here" in capsys.readouterr().err


def test_watch_follows_until_the_run_is_finished(tmp_path, monkeypatch, terminal):
    run = write_run(tmp_path / "mine", ())
    shown = ["this stage logs no steps"]

    def wait(seconds):
        if len(shown) == 1:
            write_run(run, ("extract", "lessons_ar", "lessons_av"))
            shown.append("nothing is logged of this stage yet")
        elif len(shown) == 2:
            write_run(run, rows=[{"step": i, "loss": 3.0 - i} for i in range(2)])
            shown.append("step 2 of 5")
        else:
            write_run(run, watch.RUN_STAGES, [{"step": i, "loss": 3.0 - i} for i in range(5)])
            (run / "summary.json").write_text("{}", "utf-8")
            shown.append("step 5 of 5")

    monkeypatch.setattr(watch.time, "sleep", wait)
    watch.follow(run)
    text = terminal.getvalue()
    assert [text.index(s) for s in shown] == sorted(text.index(s) for s in shown)
    assert text.split("╭")[-1].count("finished") == 1
    with pytest.raises(UserError, match="no run here"):
        watch.follow(tmp_path)
