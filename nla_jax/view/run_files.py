"""Read the directory of a run, finished or not, into plain values for the reports."""

import dataclasses
import json
from pathlib import Path

from nla_jax import configs
from nla_jax.configs import RUN_STAGES
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Figure
from nla_jax.training.stage_display import LOGGED_STAGES
from nla_jax.util import metrics_log, path_kinds, paths

BUNDLES = {"warm start": "eval_warm", "RL": "eval_rl"}


@dataclasses.dataclass(frozen=True)
class Run:
    """The state of a run, finished or not.

    config: as stored; newer settings have their defaults. done: the outcome of each finished stage. logged:
    rows of metrics of each stage that has any. figures: {"warm start" or "RL": {split: figures}}. samples:
    {the same: {split: the first rows and their explanations}}. store: nla_store.json, {} if there is none.
    summary: {} until the run is finished. evaluation: {split: {"verdict", "figures", "left_out"}} of
    `nla evaluate --json`, {} if there is none.
    """

    path: Path
    name: str
    config: dict
    done: dict
    logged: dict
    figures: dict
    samples: dict
    store: dict
    summary: dict
    evaluation: dict

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of each finished stage, including stages reused from another run."""
        return {s: self.done[s]["seconds"] for s in RUN_STAGES if s in self.done}

    @property
    def notes(self) -> dict[str, str]:
        """Return what a reader of a split's figures must know (`store.split_notes`)."""
        return store.split_notes(self.store)

    @property
    def last(self) -> str:
        """Return the last of BUNDLES that was evaluated, or ""."""
        return next((b for b in reversed(BUNDLES) if b in self.figures), "")

    def figure(self, name: str, bundle: str = "", split: str = "heldout") -> Figure | None:
        """Return a figure of the run's own evaluation of `bundle` (default: `last`), or None."""
        found = self.figures.get(bundle or self.last, {}).get(split, [])
        return next((f for f in found if f.name == name), None)


def read(workdir, evaluation="") -> Run:
    """Read a run's directory.

    Args:
      evaluation: a file of `nla evaluate --json`; default: `evaluation.json` in the run, if it exists.

    Raises:
      UserError: there is no run, or a file does not have the expected content.
    """
    path = paths.path(workdir)
    if not (path / "config.json").exists():
        hint = path_kinds.hint(path) or "give a --workdir of `nla train`"
        raise UserError(f"{workdir}: no run here (config.json is missing); {hint}")
    known = configs.default().to_dict()
    config = _read_json(path / "config.json", lambda c: _with_defaults(known, c))
    done = {s: _read_json(p, _done) for s in RUN_STAGES if (p := path / "done" / f"{s}.json").exists()}
    evaluated = {b: done[s] for b, s in BUNDLES.items() if s in done}
    found = paths.path(evaluation) if evaluation else path / "evaluation.json"
    if evaluation and not found.exists():
        raise UserError(f"{evaluation}: no such file; `nla evaluate --json` writes one")
    return Run(
        path=path,
        name=path.absolute().name if not paths.is_remote(path) else path.name,
        config=config,
        done=done,
        logged={s: rows for s in LOGGED_STAGES if (rows := _rows(path / "metrics" / f"{s}.jsonl"))},
        figures={b: d.get("figures", {}) for b, d in evaluated.items()},
        samples={b: d.get("samples", {}) for b, d in evaluated.items()},
        store=_read_json(p, _store) if (p := path / "data" / "nla_store.json").exists() else {},
        summary=_read_json(p, _summary) if (p := path / "summary.json").exists() else {},
        evaluation=_read_json(found, _evaluation) if found.exists() else {},
    )


def _read_json(path: Path, checked) -> dict:
    """Read a JSON file and convert it with `checked`. Raises UserError if the content is not as expected."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}); the file is damaged or was cut short") from None
    try:
        return checked(value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not what nla_jax writes there ({type(e).__name__}: {e})") from None


def _with_defaults(default: dict, stored: dict) -> dict:
    """Return `default` updated with `stored`, section by section."""
    found = {k: _with_defaults(v, stored.get(k, {})) if isinstance(v, dict) else stored.get(k, v)
             for k, v in default.items()}
    return {**stored, **found}


def _done(d: dict) -> dict:
    out = {"seconds": float(d.get("seconds", 0))}
    if "figures" in d or "samples" in d:
        out["figures"] = {split: [_figure(f) for f in found] for split, found in d["figures"].items()}
        samples = d.get("samples", {}).items()
        out["samples"] = {split: [{k: str(v) for k, v in s.items()} for s in rows] for split, rows in samples}
    return out


def _figure(f: dict) -> Figure:
    numbers = {k: f[k] if f[k] is None else float(f[k]) for k in ("low", "high")}
    return Figure(**{**f, **numbers, "value": float(f["value"])})


def _store(d: dict) -> dict:
    splits = {
        name: {"rows": int(s["rows"]), "documents": int(s["documents"]),
               "norm": {k: float(v) for k, v in s.get("norm", {}).items()}}
        for name, s in d["splits"].items()
    }
    return {"plan": dict(d.get("plan", {})), "drops": dict(d.get("drops", {})), "splits": splits}


def _summary(d: dict) -> dict:
    return {"device": str(d.get("device", "")), "versions": dict(d.get("versions", {}))}


def _evaluation(d: dict) -> dict:
    return {
        split: {"verdict": [str(s) for s in t["verdict"]], "left_out": [str(s) for s in t["left_out"]],
                "figures": [_figure(f) for f in t["figures"]]}
        for split, t in d.items()
    }


def _rows(path: Path) -> list[dict]:
    return [r for r in metrics_log.read(path) if isinstance(r, dict) and isinstance(r.get("step"), int)]
