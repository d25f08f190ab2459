"""Plot the output of `nla data stats`."""

from pathlib import Path

import numpy as np

from nla_jax.data.stats import Stats


def plot(found: dict[str, Stats], png: Path) -> None:
    """Plot norms, principal components, dimensions and text lengths of each split to a PNG file.

    Raises UserError if matplotlib is missing."""
    from nla_jax.util.figures import new_figure

    figure, axes = new_figure(1, 4, (15, 3.6))
    for name, s in found.items():
        f, c = s.figures, s.curves
        axes[0].plot(np.sort(c["norms"]), np.linspace(0, 1, len(c["norms"])), lw=1.2, label=name)
        axes[1].plot(1 + np.arange(len(c["components"])), np.cumsum(c["components"]), lw=1.2)
        axes[2].plot(1 + np.arange(len(c["dimensions"])), c["dimensions"], lw=1.2)
        axes[3].plot(np.sort(c["lengths"]), np.linspace(0, 1, len(c["lengths"])), lw=1.2)
        axes[0].axvline(f["alpha"], lw=0.6, ls=":", color="grey")
    titles = ("norm of h: share of rows below (dots: alpha)", "variance in the first components",
              "share of the squared norm, by dimension", "tokens of texts: share of rows below")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    axes[1].set_xscale("log")
    axes[2].set(xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(png, dpi=90)
