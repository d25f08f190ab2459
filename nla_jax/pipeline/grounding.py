"""The grounding table of a bundle: its rows, its probes, and their further inputs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nla_jax import api, bundle
from nla_jax.data import store
from nla_jax.errors import UserError, did_you_mean
from nla_jax.evaluate import fve, probe_table
from nla_jax.evaluate.probe_types import Figure, evenly_spaced
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.verdict import verdict
from nla_jax.pipeline import held_out_rows
from nla_jax.util import paths, writable
from nla_jax.util.keys import key_for

SPLITS = ("heldout", "ood", "rl", "warm")  # a split's index is part of its random key


@dataclasses.dataclass(frozen=True)
class Table:
    """The grounding table of one split.

    left_out: a line for each figure or probe that could not be computed, with what it needs.
    note: what a reader must know about the rows (`store.split_notes`), or "".
    """

    figures: list[Figure]
    left_out: list[str]
    note: str = ""

    @property
    def verdict(self) -> list[str]:
        """Return the note, if any, and the conclusions from the figures, one sentence per question."""
        return [*filter(None, [self.note]), *verdict(self.figures)]

    def as_json(self) -> dict:
        """Return the table as JSON values."""
        figures = [dataclasses.asdict(f) for f in self.figures]
        return {"verdict": self.verdict, "figures": figures, "left_out": self.left_out, "note": self.note}


def evaluate_bundle(
    directory: str | Path,
    *,
    data: str | Path = "",
    splits: Sequence[str] = ("heldout",),
    probes: Sequence[str] = (),
    rows: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    target: str | None = None,
    batch: int = 64,
    paraphraser=None,
    judge=None,
    dtype: str = "",
) -> dict[str, Table]:
    """Compute the figures of `probes` (`probe_table.find_probes`; default: all) on splits of a store.

    Args:
      directory: a bundle. The directory `bundle_warm` next to it is its warm start. `readers` in
        `held_out_rows.evaluation_dir` has the trained readers of some probes.
      data: the store; default: `held_out_rows.store_of`, the run's own, or one that is made for a packed
        bundle.
      rows: number of evenly spaced rows of each split; 0: all.
      target: location of the target, by default that in the sidecar.
      paraphraser: texts -> an LLM's paraphrases, None for a failed one (`paraphrase.make_paraphraser`). It
        adds `fve_llm_paraphrase` and `lost_…`.
      judge: an LLM that judges claims (`claim_judge.make_judge`). It adds `claim_precision_judge` and
        `claims_kappa`, and more.
      dtype: as in `api.load`.

    An imported bundle may have no mean direction. FVE then uses the mean of the store's warm rows, or of the
    evaluated rows if there are none.

    Raises UserError for an unknown probe or split, for a store of another model or layer, and as
    `bundle.load`, always before minutes of work.
    """
    directory = paths.absolute(directory)
    wanted = probe_table.find_probes(probes or ["all"])
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"an evaluation has no split {split!r}; it has {', '.join(SPLITS)}"
                            f"{did_you_mean(split, SPLITS)}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be at least 0 and finite")
    meta = bundle.read_sidecar(directory)
    data, stored, settings = open_store(directory, meta, data, splits, rows, target)
    if wanted.keys() & {"independent", "surface", "lens", "sae"}:  # they save what they fit
        writable.check_directory(held_out_rows.evaluation_dir(directory))
    for probe in wanted.values():
        probe.fetch()  # before minutes of work
    nla = api.load(directory, target, batch, dtype=dtype, announce=True)
    more = {
        "warm": warm_start(nla, directory),
        "train": store.load_columns(data, "warm") if "warm" in stored["splits"] else None,
        "readers": held_out_rows.evaluation_dir(directory) / "readers",
        "settings": settings,
        "paraphraser": paraphraser,
        "judge": judge,
    }
    out, mean = {}, nla.mean_direction
    if mean is None and more["train"] is not None:
        mean = fve.mean_direction(more["train"]["h"])
    for split in splits:
        left_out: list[str] = []
        columns = spaced_rows(store.load_columns(data, split), rows)
        figures, _ = probe_table.evaluate(
            nla.runner,
            columns,
            fve.mean_direction(columns["h"]) if mean is None else mean,
            key_for(seed, "evaluate", SPLITS.index(split)),
            temperature=temperature,
            max_new=meta["max_new_tokens"],
            seed=seed,
            label=split,
            probes=list(wanted),
            more={**more, "left_out": left_out},
        )
        out[split] = Table(figures, left_out, store.split_notes(stored).get(split, ""))
    return out


def open_store(directory, meta: dict, data: str | Path, splits: Sequence[str], rows: int, target):
    """Return (the store's path, its metadata, the config that the bundle was trained with or None).

    The arguments are those of `evaluate_bundle`; `meta` is the bundle's sidecar. Raises UserError for a store
    of another model or layer, for a split that it lacks, and for too many rows.
    """
    data = paths.path(data) if data else held_out_rows.store_of(directory, target)
    stored = store.read_meta(data)
    settings = meta["training"].get("config")
    why = store.why_mismatch(
        stored,
        name=meta["base_checkpoint"],
        fingerprint=meta["base_fingerprint"],
        digest=meta.get("base_digest", ""),
        layer=meta["extraction"]["layer_index"],
        d_model=meta["lm"]["d_model"],
        called=(settings or {}).get("data", {}).get("base_model", ""),
    )
    if why:
        raise UserError(
            f"{data} holds activations of another model or layer than {directory} was "
            f"trained for ({why}); give the store it was trained on with --store"
        )
    for split in splits:
        if split not in stored["splits"]:
            raise UserError(f"{data} has no split {split!r}; it has {', '.join(stored['splits'])}")
        if not 0 <= rows <= (there := stored["splits"][split]["rows"]):
            raise UserError(f"{rows} rows requested; split {split!r} of {data} has {there}")
    return data, stored, settings


def spaced_rows(columns: dict, n: int) -> dict:
    """Return n evenly spaced rows (0: all)."""
    pick = evenly_spaced(range(len(columns["h"])), n or len(columns["h"]))
    return {k: v[pick] if isinstance(v, np.ndarray) else [v[i] for i in pick] for k, v in columns.items()}


def warm_start(nla: api.NLA, directory: Path) -> Runner | None:
    """Return a Runner of the bundle's warm start, if it is in the same directory and the bundle is of RL."""
    beside = directory.parent / "bundle_warm"
    if nla.meta["stage"] != "rl" or not (beside / bundle.SIDECAR).is_file():
        return None
    meta = bundle.read_sidecar(beside)
    same = ("base_fingerprint", "extraction", "tokens", "prompt_templates", "lm", "roles")
    if any(meta[k] != nla.meta[k] for k in same):
        return None
    trees = bundle.place_trees(beside, meta, nla.spec.lm, nla.mesh, nla.dtype)
    return nla.runner.with_trees(av=trees["av"], ar=trees["ar"])
