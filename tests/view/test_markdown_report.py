"""The Markdown page of a run: its charts, and which step became the bundle."""

import json

import matplotlib.pyplot as plt

from nla_jax.view import curves, markdown_report


def log_drift(run, n: int):
    """Log n steps of RL, of which every second has held-out figures."""
    (run / "metrics").mkdir(parents=True)
    held_out = [metric for _, _, lines in curves.DRIFT for _, metric, _ in lines]
    rows = [{"step": i, "reward": 1.0, "kl": 0.1 * i} | ({m: 0.5 for m in held_out} if i % 2 else {})
            for i in range(n)]
    (run / "metrics" / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")


def test_charts_have_the_drift_curve(tmp_path, monkeypatch):
    log_drift(tmp_path, 8)
    shown = {}
    monkeypatch.setattr(plt, "close", lambda figure: shown.update(
        {ax.get_title(): [line.get_xydata().tolist() for line in ax.lines]
         for ax in figure.axes if ax.get_visible()}))
    markdown_report.plot(tmp_path, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert set(shown) == {"rl: reward", "rl: kl", *(title for title, _, _ in curves.DRIFT)}
    for title, _, lines in curves.DRIFT:
        assert shown[title] == [[[i, 0.5] for i in (1, 3, 5, 7)]] * len(lines)


def test_a_run_without_logs_has_an_empty_figure(tmp_path):
    markdown_report.plot(tmp_path, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_which_step_was_chosen(tmp_path):
    assert markdown_report._chosen_step(tmp_path) == ""
    (tmp_path / "done").mkdir()
    done = tmp_path / "done" / "rl.json"
    done.write_text(json.dumps({"steps": 48}), "utf-8")
    assert markdown_report._chosen_step(tmp_path) == ""
    done.write_text(json.dumps({"chosen": {"step": 40, "why": "the best score by product"}}), "utf-8")
    said = "The bundle is that of step 40 of RL: the best score by product."
    assert markdown_report._chosen_step(tmp_path) == said
