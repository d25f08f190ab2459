"""What a run's directory says, as plain values: for pages about runs that are finished, or are not."""

import dataclasses
import json
from pathlib import Path

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Figure
from nla_jax.training.stage_display import LOGGED_STAGES, RUN_STAGES
from nla_jax.util import metrics_log, paths

BUNDLES = {"warm start": "eval_warm", "RL": "eval_rl"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as far as it has come.

    config: as stored, with the defaults of settings that are younger. done: outcome of each finished
    stage. logged: rows of metrics of each stage that has any. figures: {"warm start" or "RL": {split:
    figures}}. samples: likewise, what was written about the first rows. store: nla_store.json, {} where
    there is none. summary: {} while the run is not finished. evaluation: {split: {"verdict", "figures",
    "left_out"}} of `nla evaluate --json`, {} where there is none.
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
        """Of each finished stage, those taken over from another run included."""
        return {s: self.done[s]["seconds"] for s in RUN_STAGES if s in self.done}

    @property
    def last(self) -> str:
        """The furthest of BUNDLES that was evaluated, or ""."""
        return next((b for b in reversed(BUNDLES) if b in self.figures), "")

    def figure(self, name: str, bundle: str = "", split: str = "heldout") -> Figure | None:
        """A figure of the run's own evaluation of `bundle` (default: the furthest)."""
        found = self.figures.get(bundle or self.last, {}).get(split, [])
        return next((f for f in found if f.name == name), None)


def read(workdir, evaluation="") -> Run:
    """Read a run's directory.

    Args:
      evaluation: what `nla evaluate --json` wrote; default: `evaluation.json` in the run, if it is there.

    Raises:
      UserError: no run there, or a file that is not what a run or an evaluation writes.
    """
    path = paths.path(workdir)
    if not (path / "config.json").exists():
        raise UserError(f"{workdir}: no run here (config.json is missing); give a --workdir of `nla train`")
    known = configs.default().to_dict()
    config = _plain(path / "config.json", lambda c: _over(known, c))
    done = {s: _plain(p, _done) for s in RUN_STAGES if (p := path / "done" / f"{s}.json").exists()}
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
        store=_plain(p, _store) if (p := path / "data" / "nla_store.json").exists() else {},
        summary=_plain(p, _summary) if (p := path / "summary.json").exists() else {},
        evaluation=_plain(found, _evaluation) if found.exists() else {},
    )


def _plain(path: Path, checked) -> dict:
    """What `checked` makes of the JSON in a file. Raises UserError where the file is of another kind."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}); the file is damaged or was cut short") from None
    try:
        return checked(value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not what nla_jax writes there ({type(e).__name__}: {e})") from None


def _over(default: dict, stored: dict) -> dict:
    """`default` with what is stored put over it, section by section."""
    found = {k: _over(v, stored.get(k, {})) if isinstance(v, dict) else stored.get(k, v)
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
