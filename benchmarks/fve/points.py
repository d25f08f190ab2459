"""The figures of `benchmarks.time_to_fve`: FVE of exported pairs, the time to a level, table and plot."""

from pathlib import Path

import numpy as np

from nla_jax.evaluate import fve
from nla_jax.evaluate.runner import Runner
from nla_jax.util.keys import key_for
from nla_jax.util.tables import markdown_table

READERS = {"ar": "own AR", "frozen_target": "frozen target"}


class Evaluator:
    """Measure the pairs of all sides in the same way: held-out rows, through text, with the same keys.

    Args:
      runner: with trees of the pairs' shapes. columns: held-out rows. rows: how many of them.
      written: for the stage warm_ar: the texts of these rows, which AR reads in the place of AV's words.
    """

    def __init__(self, runner: Runner, columns: dict, rows: int, *, seed: int, temperature: float,
                 max_new: int, bootstrap: int, written: list[str] | None = None):
        self.runner, self.written = runner, written
        self.h, self.docs = columns["h"][:rows], columns["doc_id"][:rows]
        self.variance, self.seed, self.bootstrap = fve.variances(self.h), seed, bootstrap
        self.settings = {"temperature": temperature, "max_new": max_new}

    def measure(self, trees: dict) -> dict:
        """Return {"ar": {"fve", "low", "high"}, "frozen_target": the same, "ok": share with words}."""
        now = self.runner.with_trees(**trees)
        texts = self.written
        if texts is None:
            texts = now.explain(self.h, key_for(self.seed, "watch"), **self.settings)
        ok = np.array([bool(t) for t in texts])
        out = {"ar": self._figure(now.reconstruct(texts), ok)}
        if self.written is None:
            out["frozen_target"] = self._figure(now.read_frozen(texts), ok)
        return out | {"ok": float(ok.mean())}

    def _figure(self, h_hat, ok) -> dict:
        error = fve.errors(h_hat, self.h, ok)
        low, high = fve.interval(error, self.variance, self.docs, n=self.bootstrap, seed=self.seed)
        return {"fve": fve.fve(error, self.variance), "low": low, "high": high}


def time_to(points: list[dict], reader: str, level: float) -> float | None:
    """Return the seconds of training until FVE first reaches `level`, between points on a straight line.

    None: it was not reached. points: {"seconds", reader: {"fve"}}, in their order."""
    before = None
    for p in points:
        if reader not in p:
            return None
        t, value = p["seconds"], p[reader]["fve"]
        if value >= level:
            if before is None:
                return t
            t0, v0 = before
            return t0 + (t - t0) * (level - v0) / (value - v0)
        before = t, value
    return None


def levels_of(sides: dict, reader: str, wanted: list[float]) -> list[float]:
    """Return the levels of a table: `wanted`, or multiples of .05 between the start and the best value."""
    if wanted:
        return wanted
    values = [p[reader]["fve"] for s in sides.values() for p in s["points"] if reader in p]
    if not values:
        return []
    starts = [s["points"][0][reader]["fve"] for s in sides.values() if reader in s["points"][0]]
    low, high = np.ceil(min(starts) / 0.05 + 1e-9), np.floor(max(values) / 0.05)
    return [round(0.05 * i, 2) for i in np.arange(low, high + 1)]


def summarise(sides: dict, wanted: list[float]) -> dict:
    """Return {reader: [{"level", "seconds": {side: seconds or None}, "ratios": {side: ours / side}}]}."""
    out: dict = {}
    for reader in READERS:
        rows = []
        for level in levels_of(sides, reader, wanted):
            seconds = {name: time_to(s["points"], reader, level) for name, s in sides.items()}
            mine = seconds.get("ours")
            ratios = {n: mine / s for n, s in seconds.items() if n != "ours" and mine is not None and s}
            rows.append({"level": level, "seconds": seconds, "ratios": ratios})
        if rows:
            out[reader] = rows
    return out


def table(found: dict) -> list[str]:
    """Return the table "time to FVE x" of a run's JSON as lines of Markdown."""
    names = list(found["sides"])
    others = [n for n in names if n != "ours"] if "ours" in names else []
    head = ["reader", "FVE", *(f"{n}, s" for n in names), *(f"ours / {n}" for n in others)]
    rows = []
    for reader, levels in found["time_to"].items():
        for row in levels:
            seconds = ["-" if row["seconds"][n] is None else f"{row['seconds'][n]:.3g}" for n in names]
            ratios = [f"{row['ratios'][n]:.2f}" if n in row["ratios"] else "-" for n in others]
            rows.append([READERS[reader], f"{row['level']:.2f}", *seconds, *ratios])
    return markdown_table(head, rows)


def plot(found: dict, path: Path) -> None:
    """Plot FVE against seconds of training, one panel for each reader, with the bootstrap intervals."""
    import matplotlib.pyplot as plt

    readers = [r for r in READERS if any(r in p for s in found["sides"].values() for p in s["points"])]
    fig, axes = plt.subplots(1, len(readers), figsize=(5 * len(readers), 3.4), squeeze=False)
    for ax, reader in zip(axes[0], readers, strict=True):
        for name, side in found["sides"].items():
            points = [p for p in side["points"] if reader in p]
            x, y = ([p["seconds"] for p in points], [p[reader]["fve"] for p in points])
            line, = ax.plot(x, y, "o-", label=name, markersize=3)
            if all(p[reader]["low"] is not None for p in points):
                ax.fill_between(x, [p[reader]["low"] for p in points], [p[reader]["high"] for p in points],
                                color=line.get_color(), alpha=0.12, linewidth=0)
        ax.set_title(f"read by {READERS[reader]}", fontsize=9)
        ax.set_xlabel("seconds of training")
        ax.set_ylabel("held-out FVE")
    axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
