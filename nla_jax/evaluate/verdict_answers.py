"""Answers to the questions of the verdict (`verdict_table`), computed from figures and their intervals."""

from collections.abc import Callable
from typing import NamedTuple

from nla_jax.evaluate.probe_types import Figure

MUCH = 0.5  # a larger share of copied words gives a warning
SMALL = 0.02  # a smaller FVE in the ids alone gives no warning
NOT_SHOWN, PARTLY, SHOWN, NO_RATIO = range(4)


class Shown:
    """A figure for a sentence: {x} is the value with its interval, {x:v} the value, {x:%} a percentage."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def __format__(self, spec: str) -> str:
        x = self.figure
        if spec == "%":
            return f"{x.value:.0%}"
        if spec == "v":
            return f"{x.value:.2f}"
        if spec == "cost":  # of a log-probability
            return f"{-x.value:.1f}"
        if spec == "small":
            return f"{x.value:.3f}"
        unit = " of the variance" if spec == "variance" else ""
        between = "" if x.low is None else f" [{x.low:.2f}, {x.high:.2f}]"
        return f"{x.value:.2f}{unit}{between}"


class Question(NamedTuple):
    """needs: figures. answer: figures by name -> NOT_SHOWN, PARTLY, SHOWN, or None for no sentence.
    says: the sentence for each answer. more: figures by name -> further fields of the sentences."""

    needs: tuple[str, ...]
    answer: Callable[[dict], int | None]
    says: dict[int, str]
    more: Callable[[dict], dict] = lambda f: {}


def above(a: Figure, b: Figure) -> bool:
    """Return whether a is above b and their intervals are disjoint."""
    return a.low is not None and b.high is not None and a.low > b.high


def positive(name: str, least: float = 0.0):
    """Return an answer: SHOWN if the interval of a figure is above `least`."""
    return lambda f: SHOWN if f[name].low is not None and f[name].low > least else NOT_SHOWN


def negative(name: str):
    """Return an answer: SHOWN if the interval of a figure is below 0, else no sentence."""
    return lambda f: SHOWN if f[name].high is not None and f[name].high < 0 else None


def at_least(name: str, least: float):
    """Return an answer: SHOWN if the value of a figure is at least `least`, else no sentence."""
    return lambda f: SHOWN if f[name].value >= least else None


def beats(name: str, control: str):
    """Return an answer: SHOWN if the interval of a figure is above that of its control."""
    return lambda f: SHOWN if above(f[name], f[control]) else NOT_SHOWN


def reads(name: str):
    """Return an answer: SHOWN if FVE is above the mean direction and 0, PARTLY if only above the former."""

    def answer(f):
        a, m = f[name], f["fve_mean_direction"]
        if not above(a, m):
            return NOT_SHOWN
        return SHOWN if a.low > 0 else PARTLY

    return answer


def description_fields(f) -> dict:
    """Return what the frozen target gets from the description lines, as a part of the sentence."""
    g = f.get("description_gain_frozen")
    return {"frozen": f", and {Shown(g)}, read by the frozen target" if g else ""}


_STRANGERS = {
    "fve_other_ar": "an AR that never met this AV",
    "fve_warm_ar": "AR as it was before joint training",
}


def _stranger(f) -> str | None:
    return next((n for n in _STRANGERS if n in f and f"{n}_shuffled" in f), None)


def stranger_answer(f):
    """Answer whether an AR that is not trained with this AV reads it. PARTLY: it does, its own does not."""
    if not (name := _stranger(f)):
        return None
    s, m = f[name], f["fve_mean_direction"]
    if not (above(s, f[f"{name}_shuffled"]) and above(s, m)):
        return NOT_SHOWN
    return SHOWN if f["fve"].value > m.value else PARTLY


def stranger_fields(f) -> dict:
    """Return who the other AR is, its FVE, and its share of what AV's own AR has over the mean direction."""
    name, m = _stranger(f), f["fve_mean_direction"].value
    over = f["fve"].value - m
    share = f"{(f[name].value - m) / over:.0%}" if over > 0 else ""
    return {"told": f"{_STRANGERS[name]} has FVE {Shown(f[name])} from them", "share": share}


def retrieval(way: str, who: str) -> list[Question]:
    """Return the question whether a reader finds the text among 16, or among 4 where 16 is missing."""

    def answer(n):
        def found(f):
            if n == 4 and f"retrieval_{way}_16" in f:
                return None
            x = f[f"retrieval_{way}_{n}"]
            return SHOWN if x.low is not None and x.low > 1 / n else NOT_SHOWN

        return found

    told = "its text among {n} in {{retrieval_{way}_{n}:%}} of cases (chance {chance:.0%})."
    out = []
    for n in (16, 4):
        end = told.format(n=n, way=way, chance=1 / n)
        says = {SHOWN: f"Given an explanation, {who} finds {end}",
                NOT_SHOWN: f"Not shown that {who} can use them: it finds {end}"}
        out.append(Question((f"retrieval_{way}_{n}",), answer(n), says))
    return out


def beyond(f):
    """Answer whether explanations add to the last 30 words of the text (SHOWN), or to the last 4 (PARTLY)."""

    def adds(n):
        names = (f"beyond_last_{n}", f"beyond_last_{n}_shuffled", f"fve_last_{n}")
        if not set(names) <= f.keys():
            return False
        b = f[names[0]]
        return b.low is not None and b.low > 0 and above(b, f[names[1]])

    return SHOWN if adds(30) else PARTLY if adds(4) else NOT_SHOWN


def equal_length(f):
    """Answer whether an explanation says more than a quotation of its length. PARTLY: as much, or unclear."""
    r = f.get("over_quotation")
    if r is None or r.low is None:
        return NO_RATIO
    return SHOWN if r.low > 1 else NOT_SHOWN if r.high < 1 else PARTLY


def best_quotation(f) -> dict:
    """Return FVE of the quotation by the better of the two readers, beside that of the explanation."""
    best = max((f["fve_quotation_equal"], f["fve_quotation_equal_frozen"]), key=lambda x: x.value)
    told = f"a quotation of the same length gives {Shown(best)}, the explanation {f['fve'].value:.2f}"
    return {"told": told}
