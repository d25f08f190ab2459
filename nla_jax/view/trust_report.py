"""Plot what `nla trust` measured: calibration, and precision by coverage."""

from pathlib import Path

import numpy as np

COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed")
STYLES = {"all": "-", "description": "--"}


def plot(measured: dict[str, dict], png: Path) -> None:
    """Plot the curves of each split (`bundle_trust.Measured.as_json`) to a PNG file.

    Bars and bands are 95 % intervals over documents. Raises UserError if matplotlib is missing.
    """
    from nla_jax.util.figures import new_figure

    figure, (left, right) = new_figure(1, 2, (8.4, 3.5))
    least = min(1 / b["claims"] for m in measured.values() for b in m["curve"])  # one claim of a bin
    left.plot([least, 1], [least, 1], lw=0.8, ls=":", color="grey")
    for colour, (split, m) in zip(_cycle(len(measured)), measured.items(), strict=True):
        trust, true, low, high = (_column(m["curve"], k) for k in ("trust", "true", "low", "high"))
        shown = np.maximum(true, least)
        bars = np.nan_to_num(np.abs([shown - np.maximum(low, least), high - shown]))
        left.errorbar(trust, shown, yerr=bars, fmt="o-", ms=3.5, lw=1, capsize=2, color=colour, label=split)
        for part, rows in m["coverage"].items():
            share, precision, low, high = (_column(rows, k) for k in ("coverage", "precision", "low", "high"))
            right.plot(share, precision, STYLES[part], lw=1.3, color=colour, label=f"{split}, {part}")
            right.fill_between(share, low, high, color=colour, alpha=0.15, lw=0)
    left.set(xscale="log", yscale="log", xlabel="mean trust of a tenth of the claims",
             ylabel="share of them that is true", title="calibration (dots: perfect)")
    right.set(xlim=(0, 1), ylim=(0, None), xlabel="share of claims that is kept, the most trusted first",
              ylabel="share of them that is true", title="precision by coverage")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(lw=0.3)
    figure.tight_layout()
    figure.savefig(png, dpi=80)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([r[name] for r in rows], float)  # None becomes NaN
