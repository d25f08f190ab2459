"""Score explanations row by row, and results as lists that print well and become tables."""

import dataclasses

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.words import edits

READERS = ("ar", "frozen")
SHOWN = 20  # rows that a repr has


class Rows(list):
    """A list of results, one dataclass per row, with `to_dicts` and `to_pandas`. Its repr is a table."""

    def to_dicts(self) -> list[dict]:
        """Return each row as a dict of plain values."""
        return [dataclasses.asdict(row) for row in self]

    def to_pandas(self):
        """Return the rows as a pandas.DataFrame. Raises UserError if pandas is not installed."""
        try:
            import pandas
        except ImportError as e:
            raise UserError("to_pandas needs pandas: pip install 'nla_jax[pandas]', or use to_dicts()") from e
        return pandas.DataFrame(self.to_dicts())

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Rows(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        if not self:
            return "no rows"
        names = [f.name for f in dataclasses.fields(self[0])]
        cells = [names, *([_cell(getattr(row, name)) for name in names] for row in self[:SHOWN])]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join(lines + [f"… {len(self) - SHOWN} more rows"] * (len(self) > SHOWN))


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = " / ".join(str(value).splitlines()) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


@dataclasses.dataclass(frozen=True, repr=False)
class RowScore:
    """The scores of one explanation by the bundle's AR, and by the frozen target that reads the words alone.

    fve, cos: as in `TokenReport`. Without words (ok is False) the scores are those of an orthogonal vector.
    """

    fve: float
    cos: float
    fve_frozen: float
    cos_frozen: float
    ok: bool

    def __repr__(self) -> str:
        return (f"RowScore(fve={self.fve:.3f}, cos={self.cos:.3f}, fve_frozen={self.fve_frozen:.3f}, "
                f"cos_frozen={self.cos_frozen:.3f}, ok={self.ok})")


def fve_and_cos(h_hat_ND, h_ND, mean_D, ok_N) -> tuple[np.ndarray, np.ndarray]:
    """Return FVE [N] and cosine [N] of each row's reconstruction; those of an orthogonal one where not ok.

    mean_D: the mean direction; None: distances are measured from zero.
    """
    error = F.errors(h_hat_ND, h_ND, ok_N)
    unit, mean = F.normalise(h_ND), 0.0 if mean_D is None else np.asarray(mean_D)[None]
    cos = np.sum(unit * F.normalise(h_hat_ND), 1) / unit.shape[1]
    return 1 - error / np.sum((unit - mean) ** 2, 1), np.where(ok_N, cos, 0.0)


def score_columns(runner: Runner, mean_D, h_ND, texts: list[str], readers=READERS) -> dict[str, np.ndarray]:
    """Return {"fve", "cos", "fve_frozen", "cos_frozen"} of N explanations, [N] each, by these readers."""
    ok = np.array([bool(t) for t in texts])
    out = {}
    for reader, end, read in (("ar", "", runner.reconstruct), ("frozen", "_frozen", runner.read_frozen)):
        if reader in readers:
            out["fve" + end], out["cos" + end] = fve_and_cos(read(texts), h_ND, mean_D, ok)
    return out


def score_rows(runner: Runner, mean_D, h_ND, texts: list[str]) -> Rows:
    """Return the RowScore of each explanation."""
    found = {name: a.tolist() for name, a in score_columns(runner, mean_D, h_ND, texts).items()}
    return Rows(RowScore(**{name: a[i] for name, a in found.items()}, ok=bool(texts[i]))
                for i in range(len(texts)))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two activations (or texts) a and b have in common.

    cos: cosine of the two vectors. cos_centered: the same after the mean direction of training activations
    is subtracted; any two activations share that direction. None without a mean direction.
    explanation_a, explanation_b: AV's greedy words, or the given texts.
    fve: of each one's own words. crossed: FVE of b's words on a, and of a's words on b. If the crossed values
    are near the own ones, the two explanations say the same to AR.
    shared_a, shared_b: claims of a that recur in b's explanation, and of b that recur in a's
    (`nla_jax.evaluate.probes.recurrence`).
    """

    cos: float
    cos_centered: float | None
    explanation_a: str
    explanation_b: str
    fve: tuple[float, float]
    crossed: tuple[float, float]
    shared_a: tuple[str, ...]
    shared_b: tuple[str, ...]


def compare_vectors(runner: Runner, mean_D, h_2D, said: list[str]) -> Comparison:
    """Return the Comparison of two vectors and their explanations."""
    ok = np.array([bool(t) for t in said])
    h_hat, unit = runner.reconstruct(said), F.normalise(h_2D)
    own, _ = fve_and_cos(h_hat, h_2D, mean_D, ok)
    crossed, _ = fve_and_cos(h_hat[::-1], h_2D, mean_D, ok[::-1])
    centered = None if mean_D is None else _cosine(*(unit - np.asarray(mean_D)[None]))
    shared = [shared_claims(a, [b]) for a, b in (said, said[::-1])]
    return Comparison(_cosine(*unit), centered, *said, tuple(own.tolist()), tuple(crossed.tolist()), *shared)


def shared_claims(text: str, others: list[str]) -> tuple[str, ...]:
    """Return the claims of an explanation that recur in one of the others."""
    kinds = recurrence.recurring_claims(text, others)
    return tuple(c for c, kind in zip(edits.claims(text), kinds, strict=True) if kind)


def _cosine(a_D, b_D) -> float:
    return float(a_D @ b_D / max(np.linalg.norm(a_D) * np.linalg.norm(b_D), 1e-12))
