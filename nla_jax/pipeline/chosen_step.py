"""Choose the step of RL whose AV and AR become the bundle, by a rule on held-out figures (`rl.choose`).

FVE by the trained AR rises in any RL. The rules look at figures that a private code, or made-up claims, do
not raise. Only steps with held-out figures (`rl.watch_every`, and the last) can be chosen.
"""

from collections.abc import Callable
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import checkpoint, distributed, metrics_log, paths
from nla_jax.util.choices import choose


def frozen_target(row: dict) -> float:
    """Score by FVE of the frozen target."""
    return row["heldout_fve_frozen_target"]


def claims(row: dict) -> float:
    """Score by the precision of all claims."""
    return row["heldout_claim_precision"]


def product(row: dict) -> float:
    """Score by the precision of all claims times FVE of the frozen target, which counts as 0 below 0."""
    return claims(row) * max(frozen_target(row), 0.0)


# A rule takes a row of held-out figures (`heldout_watch`) and returns a score; the largest is chosen.
# "last" takes the last step whatever its figures.
RULES = {"last": None, "frozen_target": frozen_target, "claims": claims, "product": product}


class Chooser:
    """Keep AV and AR of the steps that may be chosen.

    Args:
      directory: of the trees. rule: of RULES, or "module:function". most_lost: the largest share of the best
        held-out FVE that the chosen step may lose. stage_log: the metrics that a resumed run has already.
    """

    def __init__(self, directory: Path, rule: str, most_lost: float, stage_log: Path):
        self.directory, self.rule, self.most_lost = directory, rule, most_lost
        self._score = choose(RULES, rule, "rl.choose")
        self._seen: dict[int, tuple[float, float]] = {}  # step -> (score, FVE)
        for row in metrics_log.read(stage_log):
            if "heldout_fve" in row and (directory / str(row["step"] + 1)).exists():
                self._seen[row["step"] + 1] = self._of(row)

    def _of(self, row: dict) -> tuple[float, float]:
        try:
            return float(self._score(row)), row["heldout_fve"]
        except KeyError as e:
            raise UserError(
                f"rl.choose={self.rule!r} needs the held-out figure {e.args[0]}, which this run does not "
                "have (texts in the store, and WordNet for claims); choose another rule, or 'last'"
            ) from e

    def saw(self, step: int, row: dict, trees: Callable[[], dict]) -> None:
        """Note the figures after `step` steps. Save the trees, unless a step before is as good in score and
        FVE. All processes of a pod call this."""
        score, fve = self._of(row)
        self._seen = {s: v for s, v in self._seen.items() if s < step}  # a resumed run repeats steps
        if any(s >= score and f >= fve for s, f in self._seen.values()):
            return
        checkpoint.save_tree(self.directory / str(step), trees())
        worse = [s for s, (a, b) in self._seen.items() if a <= score and b <= fve]
        self._seen[step] = score, fve
        for s in worse:
            del self._seen[s]
            distributed.run_on_first(lambda s=s: paths.remove(self.directory / str(s)))

    def pick(self) -> dict:
        """Return the chosen step, its score and held-out FVE, and why it was chosen."""
        best = max(fve for _, fve in self._seen.values())
        least = best - self.most_lost * abs(best)
        step, (score, fve) = max(
            ((s, v) for s, v in self._seen.items() if v[1] >= least), key=lambda item: (item[1][0], item[0])
        )
        why = (f"the best score by {self.rule} ({score:.3f}) of the steps whose held-out FVE is at least "
               f"{least:.3f}; the best FVE is {best:.3f}")
        return {"step": step, "rule": self.rule, "score": score, "heldout_fve": fve, "why": why}
