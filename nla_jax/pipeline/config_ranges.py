"""The range of every number in a config (`nla_jax.configs`).

`config_checks.validate` refuses all other values. docs/api/configs.md contains the table as `markdown`.
"""

import dataclasses
import functools

from ml_collections import ConfigDict

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.util.keys import SEEDS
from nla_jax.util.tables import markdown_table

MOST = 10**9  # the largest count: int32 holds it


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, and `also`, a number with a meaning of its own."""

    low: float
    high: float
    also: float | None = None
    means: str = ""

    def __contains__(self, value: float) -> bool:
        return value == self.also or self.low <= value <= self.high  # NaN is in no range

    def __str__(self) -> str:
        span = f"from {_plain(self.low)} to {_plain(self.high)}"
        return span if self.also is None else f"{_plain(self.also)} ({self.means}), or {span}"


def _plain(x: float) -> str:
    return f"{x:,.10g}"


_LR = Range(1e-7, 1)  # float32 parameters near 1 do not change by less
_SHARE = Range(0.001, 0.999)
_COUNT, _FROM_0, _FROM_2 = Range(1, MOST), Range(0, MOST), Range(2, MOST)

# By name, in every section; a name with its section comes first.
RANGES = {
    "seed": Range(0, SEEDS - 1),
    "layer": Range(0, MOST, -1, "at two thirds of the depth"),
    "vocab_chunk": _COUNT,
    "alpha": Range(0.001, 1e8, 0, "automatic"),  # the squares of larger ones overflow in some models
    "mesh.data": Range(1, MOST, -1, "all remaining devices"),
    "mesh.fsdp": Range(1, MOST, -1, "all remaining devices"),
    "mesh.tensor": Range(0, MOST, -1, "all remaining devices; 0: as many as decode fastest"),
    "checkpoint_every": Range(1, MOST, 0, "only at the end of a stage"),
    "log_every": _COUNT,
    "documents": Range(1, MOST, 0, "all"),
    "near_duplicates": Range(0.001, 1, 0, "off"),
    "ending_tokens": Range(1, MOST, 0, "no ending line"),
    "explained_rows": Range(1, MOST, 0, "all"),
    "cuts_per_text": Range(1, 13),  # `capture_requests.explanation_requests` has so many
    "explained_positions": _COUNT,
    "warm_windows": _FROM_0,
    "rl_windows": _FROM_0,
    "window_tokens": _COUNT,
    "positions": _COUNT,
    "min_position": _FROM_0,
    "warm_fraction": _SHARE,
    "ood_positions": _COUNT,
    "heldout_rows": _FROM_2,  # a single row has no variance
    "ood_rows": _FROM_2,
    "rank": Range(1, MOST, 0, "full fine-tuning"),
    "steps": _FROM_0,
    "minutes": Range(0.001, 1e6, 0, "no limit"),
    "batch": _COUNT,
    "micro": _COUNT,
    "micro_av": _COUNT,
    "micro_ar": _COUNT,
    "update_widths": _COUNT,
    "lr": _LR,
    "lr_av": _LR,
    "lr_ar": _LR,
    "warmup": _FROM_0,
    "final_lr": Range(0, 1),
    "clip": Range(0.001, 1e6, 0, "no clipping"),  # Adam's epsilon hides smaller gradients
    "weight_decay": Range(0, 1),
    "max_tokens": _COUNT,
    "lessons": Range(0, 0.999),
    "watch_every": Range(1, MOST, 0, "none"),
    "watch_rows": _FROM_2,
    "choose_loss": Range(0, 1),
    "group": _FROM_2,  # advantages are relative to the group
    "max_new": _COUNT,
    "eval.max_new": Range(1, MOST, 0, "rl.max_new"),
    "kl": Range(0, 1000),
    "prefix_min": Range(1, MOST, 0, "the whole explanation"),
    "prefix_max": Range(1, MOST, 0, "max_new"),
    "paraphrase": Range(0, 1),
    "patch_kl": Range(0, 1),
    "false_claims": Range(0, 1000),
    "fewest_claims": _COUNT,
    "ar_reset": Range(1, MOST, 0, "never"),
    "length_penalty": Range(0, 1000),
    "length_free": _FROM_0,
    "update_group": Range(2, MOST, 0, "all"),
    "ar_group": Range(1, MOST, 0, "all"),
    "written_ar": _FROM_0,
    "max_skipped": _COUNT,
    "temperature": Range(0.001, 100, 0, "greedy"),
    "bootstrap": Range(1, 100_000, 0, "no intervals"),
}


@functools.cache
def numbers() -> dict[str, type]:
    """Return {dotted name: int or float} of every number in a config."""
    found = {key: type(value_of(configs.default(), key)) for key in sorted(configs.keys(configs.default()))}
    return {key: kind for key, kind in found.items() if kind in (int, float)}


def value_of(c: ConfigDict, key: str):
    """Return the value of a dotted name, such as "rl.steps"."""
    section, _, name = key.rpartition(".")
    return c[section][name] if section else c[name]


def range_of(key: str) -> Range:
    """Return the range of the setting with this dotted name."""
    return RANGES[_entry(key)]


def _entry(key: str) -> str:
    return key if key in RANGES else key.rpartition(".")[2]


def check(c: ConfigDict) -> None:
    """Raise UserError for a number that is outside its range."""
    for key, kind in numbers().items():
        check_value(f"config {key}", value_of(c, key), kind, range_of(key))


def check_value(what: str, value, kind: type, within: Range) -> None:
    """Raise UserError unless `value` is a number in a range. kind: float, or int for a whole number."""
    is_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (is_kind and value in within):
        whole = "a whole number: " if kind is int and not is_kind else "" if is_kind else "a number: "
        raise UserError(f"{what}={value!r}: must be {whole}{within}")


def markdown() -> str:
    """Return the table of ranges for the documentation."""
    rows = [(f"`{name}`", str(within), ", ".join(f"`{key}`" for key in numbers() if _entry(key) == name))
            for name, within in RANGES.items()]
    return "\n".join(markdown_table(("number", "values", "settings"), rows))
