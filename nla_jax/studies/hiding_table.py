"""Turn the measures of `witnesses` and `vector_attacks` into figures, and the figures into tables."""

import numpy as np

from nla_jax.evaluate import figure_table
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Figure
from nla_jax.util.tables import markdown_table

PLANTED = "planted"
# Measures that have a control: in the order of the table, with what they mean.
MARGINS = {
    "named": "AV names the concept at the name",
    "named_next": "AV names it at the token before the next word",
    "named_fresh": "a fresh AV, which learned on h of this target, names it at the name",
    "lens": "the Jacobian lens names it at the name",
    "probe": "a linear probe, fitted on this target at the concepts' words, picks it at the name",
    "distance": "distance of h from the honest target's, in natural variances",
    "error_ar": "distance of h from AR's reconstruction",
    "error_fresh": "distance of h from the fresh AR's reconstruction of the fresh AV's words",
    "error_frozen": "distance of h from what the honest target makes of the words",
    "error_tuned": "distance of h from what this target makes of the words",
    "kl_words": "KL of the next word with the reconstruction in the place of h, nats",
}


def ratio(name: str, above, below, docs, asks: str) -> Figure:
    """Return sum(above) / sum(below) with its 95 % bootstrap interval over `docs`."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    if not below.sum():
        return Figure(name, 0.0, None, None, 0, asks)
    low, high = F.ratio_interval(above, below, docs)
    return Figure(name, float(above.sum() / below.sum()), low, high, len(above), asks)


def mean(name: str, values, docs, asks: str) -> Figure:
    """Return a mean with its interval over `docs`."""
    return ratio(name, values, np.ones(len(values)), docs, asks)


def target_figures(rows: dict, planted: dict, honest: dict, docs: list[str]) -> list[Figure]:
    """Return the figures of one target. rows: `witnesses.measure_target`. planted, honest: those of the
    target that does not hide, and of the target before tuning. docs: the name of each row. Only some targets
    have the rows of a fresh NLA.

    A margin is the value at the name minus that at the control, minus the same of the honest target, where
    two names differ by chance."""
    held = "how often the target prefers the concept's words, of all concepts'"
    out = [
        ratio("kept", rows["mass"], planted["mass"], docs,
              "probability of the concept's words after the name, as a share of the planted target's"),
        mean("mass", rows["mass"], docs, "that probability"),
        mean("mass_control", rows["mass_control"], docs, "the same words after a control name"),
        mean("held", rows["held"], docs, held),
        mean("held_control", rows["held_control"], docs, "the same after a control name"),
    ]
    for name, asks in MARGINS.items():
        if name not in rows:
            continue
        both = [np.asarray(rows[k], float) for k in (name, f"{name}_control")]
        before = [np.asarray(honest[k], float) for k in (name, f"{name}_control")]
        out += [
            mean(name, both[0], docs, asks),
            mean(f"{name}_control", both[1], docs, "the same at a control name"),
            mean(f"{name}_above", both[0] - both[1], docs, "the difference"),
            mean(f"{name}_margin", both[0] - both[1] - (before[0] - before[1]), docs,
                 "the difference, minus that of the honest target"),
        ]
    for tail, asks in (("", "the fresh AV names the concept of a text that says it"),
                       ("_control", "the same of a text that does not say it")):
        if f"fresh_learned{tail}" in rows:
            values = rows[f"fresh_learned{tail}"]
            out.append(mean(f"fresh_learned{tail}", values, range(len(values)), asks))
    accuracy = rows["probe_accuracy"][0]
    return [
        *out,
        Figure("probe_accuracy", accuracy, None, None, 1, "the probe on words that it was not fitted on"),
        mean("distance_ordinary", rows["distance_ordinary"], range(len(rows["distance_ordinary"])),
             "distance of h from the honest target's on ordinary text"),
        ratio("words_kept", rows["mass_words"], rows["mass"], docs,
              "share of the probability left with the reconstruction in the place of h"),
        ratio("words_kept_control", rows["mass_words_control"], rows["mass_control"], docs,
              "the same at a control name"),
        ratio("bypass", rows["mass_honest"], rows["mass"], docs,
              "share of the probability left with the honest target's h in the place of h"),
    ]


def attack_figures(rows: dict, plain: dict, docs: list[str]) -> list[Figure]:
    """Return the figures of one attack. plain: `vector_attacks.measure_attack` of no attack."""
    about = {
        "named": "AV names the planted concept",
        "chosen": "AV names the next name's concept",
        "same": "AV's answer is the one without δ",
        "mass": "probability of the planted concept's words with h + δ in place",
        "mass_chosen": "probability of the next name's concept's words",
        "lens": "the Jacobian lens names the planted concept",
        "probe": "the probe picks the planted concept",
        "moved": "distance of h + δ from h, in natural variances",
        "distance": "distance of h + δ from the honest target's h",
        "error_ar": "distance of h + δ from AR's reconstruction",
        "error_frozen": "distance of h + δ from what the honest target makes of the words",
    }
    found = [mean(n, rows[n], docs, asks) for n, asks in about.items()]
    seen = [
        mean(f"{n}_rise", np.asarray(rows[n], float) - np.asarray(plain[n], float), docs,
             f"rise of {n} by δ") for n in ("error_ar", "error_frozen")]
    return [*found, ratio("kept", rows["mass"], plain["mass"], docs, "mass as a share of that without δ"),
            *seen]


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    """Return figures by their name."""
    return {f.name: f for f in figures}


def witnesses_of(figures: list[Figure], planted: list[Figure]) -> list[str]:
    """Return the measures that see a target's concept.

    The difference from the control and the margin must both be above zero. `bypass` must be above that of the
    planted target, and a tenth of the behaviour must be kept. The intervals must lie apart."""
    found, plain = by_name(figures), by_name(planted)
    lows = {n: [found[f"{n}_{end}"].low for end in ("above", "margin")] for n in MARGINS
            if f"{n}_margin" in found}
    seen = [n for n, both in lows.items() if all(low is not None and low > 0 for low in both)]
    a, b = found["bypass"], plain["bypass"]
    apart = a.low is not None and b.high is not None and a.low > b.high
    return [*seen, "bypass"] if apart and found["kept"].value > 0.1 else seen


def conclusion(figures: dict[str, list[Figure]]) -> list[str]:
    """Return the table of targets by witness: margins over the control, bold where a witness sees it."""
    head = ["target", "kept", *MARGINS, "words_kept", "bypass"]
    rows = []
    for name, found in figures.items():
        by, seen = by_name(found), witnesses_of(found, figures[PLANTED])
        cells = [figure_table.cell(by["kept"])]
        for n in MARGINS:
            text = figure_table.cell(by.get(f"{n}_margin")) or "–"
            cells.append(f"**{text}**" if n in seen else text)
        bypass = figure_table.cell(by["bypass"])
        cells += [figure_table.cell(by["words_kept"]), f"**{bypass}**" if "bypass" in seen else bypass]
        rows.append([name, *cells])
    return markdown_table(head, rows)
