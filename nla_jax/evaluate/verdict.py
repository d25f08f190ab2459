"""Summarise a table of figures in sentences that claim no more than the intervals show."""

from collections.abc import Sequence

from nla_jax.evaluate.probe_types import Figure

MUCH = 0.5  # a larger share of copied words gives a warning
SMALL = 0.02  # a smaller FVE in the ids alone gives no warning


def verdict(figures: Sequence[Figure]) -> list[str]:
    """Return one sentence for each question that the figures answer; "not shown" where intervals overlap."""
    f = {x.name: x for x in figures}
    said = (
        _frozen(f),
        _text_fve(f),
        _shuffled_control(f),
        _description(f),
        _tokens(f),
        _other_ar(f),
        _reader(f, "embed", "a sentence embedder"),
        _reader(f, "logp", "the target as a reader"),
        _surface(f),
        _counterfactual(f),
        _opposite(f),
        _opposite_language(f),
        _target(f),
        _copied(f),
        _english(f),
    )
    return [s for s in said if s]


def _above(a: Figure, b: Figure) -> bool:
    """Return whether a is above b and their intervals are disjoint."""
    return a.low is not None and b.high is not None and a.low > b.high


def _frozen(f):
    if not {"fve_frozen_target", "fve_mean_direction"} <= f.keys():
        return ""
    a, m = f["fve_frozen_target"], f["fve_mean_direction"]
    told = f"FVE {_interval(a)}; no private code can raise this, because the target is never trained"
    if _above(a, m) and a.low > 0:
        return f"The frozen target can read the bare words: {told}."
    if _above(a, m):
        return f"The frozen target gets something from the bare words: {told}."
    return f"Not shown that the frozen target can read the bare words: {told}."


def _text_fve(f):
    if not {"fve", "fve_mean_direction"} <= f.keys():
        return ""
    a, m = f["fve"], f["fve_mean_direction"]
    told = f"{_with_interval(a)}; the mean direction, the same for every h, has {m.value:.2f}"
    if _above(a, m) and a.low > 0:
        return f"Words carry {told}."
    if _above(a, m):
        return f"Words say something, FVE {told}."
    return f"Not shown that words carry anything: FVE {told}."


def _shuffled_control(f):
    if not {"fve", "fve_shuffled"} <= f.keys():
        return ""
    told = f"another document's explanation scores {f['fve_shuffled'].value:.2f}"
    if _above(f["fve"], f["fve_shuffled"]):
        return f"They are about this activation: {told}."
    return f"Not shown that they are about this activation: {told}."


def _description(f):
    if not (g := f.get("description_gain")):
        return ""
    told = f"{_interval(g)} FVE beside the ending line, read by AR"
    if frozen := f.get("description_gain_frozen"):
        told += f", and {_interval(frozen)}, read by the frozen target"
    if g.low is not None and g.low > 0:
        return f"The description lines add {told}."
    return f"Not shown that the description lines add anything: {told}."


def _tokens(f):
    if not (g := f.get("token_path_gain")):
        return ""
    if g.low is not None and g.low > SMALL:
        return f"CHANNEL: the tokens carry {g.value:.2f} more than their text; it hides in how words are cut."
    return f"No hidden channel to speak of: the tokens carry {_interval(g)} more than their text."


def _other_ar(f):
    name, who = next(
        ((n, w) for n, w in (("fve_other_ar", "an AR that never met this AV"),
                             ("fve_warm_ar", "AR as it was before joint training")) if n in f),
        ("", ""),
    )
    if not {"fve", name, f"{name}_shuffled", "fve_mean_direction"} <= f.keys():
        return ""
    a, s, m = f["fve"], f[name], f["fve_mean_direction"]
    told = f"{who} has FVE {_interval(s)} from them"
    if not (_above(s, f[f"{name}_shuffled"]) and _above(s, m)):
        return f"Not shown that anyone but their own AR can read them: {told}."
    if a.value <= m.value:
        return f"A stranger can read them: {told}."
    share = (s.value - m.value) / (a.value - m.value)
    return f"A stranger can read them: {told}, {share:.0%} of what their own AR has over the mean direction."


def _reader(f, way, who):
    n = next((n for n in (16, 4) if f"retrieval_{way}_{n}" in f), None)
    if n is None:
        return ""
    g, chance = f[f"retrieval_{way}_{n}"], 1 / n
    told = f"its text among {n} in {g.value:.0%} of cases (chance {chance:.0%})"
    if g.low is not None and g.low > chance:
        return f"Given an explanation, {who} finds {told}."
    return f"Not shown that {who} can use them: it finds {told}."


def _surface(f):
    return " ".join(filter(None, (_beyond(f), _equal(f))))


def _equal(f):
    if not {"fve", "fve_quotation_equal", "fve_quotation_equal_frozen"} <= f.keys():
        return ""
    best = max(f["fve_quotation_equal"], f["fve_quotation_equal_frozen"], key=lambda x: x.value)
    told = f"a quotation of the same length gives {_interval(best)}, the explanation {f['fve'].value:.2f}"
    r = f.get("over_quotation")
    if r is None or r.low is None:
        return f"Of equal length: {told}."
    if r.low > 1:
        return f"Of equal length they say more: {told}."
    return f"Of equal length they say {'less' if r.high < 1 else 'as much, or it is not shown'}: {told}."


def _beyond(f):
    for n in (30, 4):
        if not {f"beyond_last_{n}", f"beyond_last_{n}_shuffled", f"fve_last_{n}"} <= f.keys():
            continue
        b, control, words = f[f"beyond_last_{n}"], f[f"beyond_last_{n}_shuffled"], f[f"fve_last_{n}"]
        if b.low is not None and b.low > 0 and _above(b, control):
            return (
                f"They say more than the last {n} words of the text: these give {words.value:.2f} to the "
                f"better of two readers, and the explanation adds {b.value:.2f}."
            )
    if "beyond_last_4" not in f:
        return ""
    return (
        "Not shown that they say more than a quotation of the last four words: those alone give "
        f"{f['fve_last_4'].value:.2f} to the better of two readers, and the explanation adds "
        f"{_interval(f['beyond_last_4'])}."
    )


def _counterfactual(f):
    if not {"counterfactual_cos", "counterfactual_margin"} <= f.keys():
        return ""
    c, m = f["counterfactual_cos"], f["counterfactual_margin"]
    if m.low is not None and m.low > 0:
        return (
            "With a word swapped in text and explanation alike AR moves where the target moves: cosine "
            f"{c.value:.2f}, {m.value:.2f} more than for another word."
        )
    return f"Not shown that AR moves with the target when a word is swapped: margin {_interval(m)}."


def _opposite_language(f):
    m = f.get("opposite_margin_frozen")
    if not m or m.high is None or m.high >= 0:
        return ""
    return (f"OPPOSITES: reversed claims bring the frozen target nearer to h than reworded ones: margin "
            f"{_interval(m)}. Read them with their sense turned round.")


def _opposite(f):
    if not (m := f.get("opposite_margin")):
        return ""
    if m.low is not None and m.low > 0:
        return (
            f"Turned into the opposite they lose {m.value:.3f} more FVE than reworded at the same "
            "places."
        )
    return f"Not shown that AR tells a claim from its opposite: margin {_interval(m)}."


def _target(f):
    if not (k := f.get("kl_recovered")):
        return ""
    if k.low is not None and k.low > 0:
        return (
            f"With the reconstruction in place of h the target recovers {k.value:.0%} of what the "
            "mean direction loses (KL of its next token)."
        )
    return f"Not shown that the target agrees: share of KL recovered {_interval(k)}."


def _copied(f):
    c = f.get("copied")
    if not c or c.value < MUCH:
        return ""
    return f"COPIED: {c.value:.0%} of the words are in passages of training texts."


def _english(f):
    if not {"logp_target", "logp_target_written"} <= f.keys():
        return ""
    a, w = f["logp_target"], f["logp_target_written"]
    return (
        f"As English they cost the target {-a.value:.1f} nats a token, explanations by an LLM "
        f"{-w.value:.1f}."
    )


def _interval(x: Figure) -> str:
    return f"{x.value:.2f}" if x.low is None else f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"


def _with_interval(x: Figure) -> str:
    return f"{x.value:.2f} of the variance" + ("" if x.low is None else f" [{x.low:.2f}, {x.high:.2f}]")
