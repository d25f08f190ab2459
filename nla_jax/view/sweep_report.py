"""Write a sweep (`nla_jax.pipeline.sweep`) as a Markdown table and as a plot."""

from pathlib import Path

from nla_jax.util.tables import markdown_table


def table(found: dict) -> list[list[str]]:
    """Return a header and a line for each layer: AR's figures, and AV's gap at each alpha, with intervals."""
    by_layer: dict = {}
    for cell in found["cells"]:
        by_layer.setdefault(cell["layer"], []).append(cell)
    multiples = sorted({round(c["multiple"], 3) for c in found["cells"] if c["role"] == "av"})
    head = ["block", "norm p75", "FVE", "shuffled", "mean direction"]
    head += [f"gap at {m:g}" if found["share_of_marker"] else f"gap at {m:g} × p75" for m in multiples]
    lines = [head]
    for layer, cells in by_layer.items():
        ar = next(c for c in cells if c["role"] == "ar")
        gaps = {round(c["multiple"], 3): _cell(c["gap"], 3) for c in cells if c["role"] == "av"}
        lines.append([
            str(layer), f"{found['layers'][layer]['p75']:.3g}",
            *(_cell(ar[n]) for n in ("fve", "fve_shuffled", "fve_mean_direction")),
            *(gaps.get(m, "") for m in multiples)])
    return lines


def _cell(figure, digits: int = 2) -> str:
    value, low, high = figure
    text = f"{value:.{digits}f}"
    return text if low is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def about(found: dict) -> str:
    """Return a line that says on which rows and after which training the figures are."""
    rows, steps = found["rows"], found["steps"]
    words = "reading lessons" if found["words"] == "lessons" else "written explanations"
    return (
        f"{rows['heldout']} held-out rows of {found['documents']} documents, paired with {words}; warm "
        f"starts on {rows['warm']:,} rows, AR {steps['ar']} steps, AV {steps['av']}. Gap: how much more a "
        "token of the answer costs AV with the h of another document, in nats."
    )


def markdown(found: dict, command: str, png: str = "") -> list[str]:
    header, *body = table(found)
    picture = ["", f"![by layer and by alpha]({png})"] if png else []
    head = ["# Which layer, which alpha", "", "Made by:", "", f"    {command}", "", about(found), ""]
    return [*head, *markdown_table(header, body), *picture, ""]


def plot(found: dict, png: Path) -> None:
    """Plot FVE by layer, and the gap by alpha, to a PNG file. Raises UserError if matplotlib is missing."""
    from nla_jax.util.figures import new_figure

    figure, (left, right) = new_figure(1, 2, (11, 3.8))
    ar = [c for c in found["cells"] if c["role"] == "ar"]
    names = {"fve": "own words", "fve_shuffled": "another document's", "fve_mean_direction": "mean direction"}
    for name, label in names.items():
        _line(left, [c["layer"] for c in ar], [c[name] for c in ar], label)
    left.set_title("FVE of AR, by block", fontsize=9)
    for layer in found["layers"]:
        cells = [c for c in found["cells"] if c["role"] == "av" and c["layer"] == layer]
        if cells:
            _line(right, [c["multiple"] for c in cells], [c["gap"] for c in cells], f"block {layer}")
    right.axhline(0.0, lw=0.6, ls=":", color="grey")
    right.set_xscale("log")
    unit = "the marker's own norm" if found["share_of_marker"] else "p75 of the norms"
    right.set_title(f"AV's gap in nats a token, by alpha in units of {unit}", fontsize=9)
    for ax in (left, right):
        ax.legend(fontsize=7)
        ax.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(png, dpi=90)


def _line(ax, xs, figures, label: str) -> None:
    values = [f[0] for f in figures]
    known = all(f[1] is not None for f in figures)
    errors = [[f[0] - f[1] for f in figures], [f[2] - f[0] for f in figures]] if known else None
    ax.errorbar(xs, values, errors, marker="o", ms=3, lw=1.1, capsize=2, label=label)
