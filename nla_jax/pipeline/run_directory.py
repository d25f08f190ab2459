"""The directory of a run: its config, its finished stages, and the summary.

WORKDIR/config.json         the config at the start of the run
WORKDIR/fingerprints.json   the target, tokenizer, prompts and texts that it began with
WORKDIR/data/               the store of activations; online runs have measured.json instead
WORKDIR/params/STAGE/       the parameters of a finished training stage
WORKDIR/checkpoints/STAGE/  checkpoints of an unfinished stage
WORKDIR/metrics/, tensorboard/
WORKDIR/times/STAGE.jsonl   times of the phases of its steps
WORKDIR/profile/            traces of `config.profile_steps`
WORKDIR/wandb.json, wandb/  the W&B run of `config.wandb`
WORKDIR/done/STAGE.json     a finished stage: seconds and outcome
WORKDIR/bundle_warm/, bundle/
WORKDIR/summary.json        written last
"""

import importlib.metadata
import json
from pathlib import Path

import jax

from nla_jax import configs
from nla_jax.data import corpora, store
from nla_jax.errors import UserError
from nla_jax.util import distributed, paths

FINGERPRINTS, MEASURED = "fingerprints.json", "measured.json"

# Settings that may differ when a run is resumed. They change no number, or only rounding (mesh, attention).
HARMLESS = {
    "checkpoint_every", "log_every", "metrics_callback", "wandb", "profile_steps", "rl.watch_every",
    "rl.watch_rows", "target", "mesh.data", "mesh.fsdp", "mesh.tensor", "attention",
}


def is_done(workdir: Path, stage: str) -> bool:
    return (workdir / "done" / f"{stage}.json").exists()


def read_done(workdir: Path, stage: str) -> dict:
    return json.loads((workdir / "done" / f"{stage}.json").read_text("utf-8"))


def write_done(workdir: Path, stage: str, outcome: dict) -> None:
    distributed.write_json(workdir / "done" / f"{stage}.json", outcome)


def is_same_value(key: str, stored, present, directory: str = "") -> bool:
    """Return whether two values of a setting are one path or corpus, spelled differently.

    directory: the one to which relative paths in `stored` belong; "": the working directory.
    """
    if key in ("data.corpus", "data.ood"):
        return corpora.is_same(stored, present, directory)
    return key in configs.PATHS and paths.same_place(stored, present, directory)


def differences(workdir: Path, config) -> list[configs.Difference]:
    """Return where a config differs from that of the run at `workdir`, which must have one."""
    stored = json.loads((workdir / "config.json").read_text("utf-8"))
    found, directory = configs.differences(stored, config), ""
    if found and (workdir / FINGERPRINTS).is_file():
        directory = json.loads((workdir / FINGERPRINTS).read_text("utf-8")).get("directory", "")
    return [d for d in found if not is_same_value(d.key, d.stored, d.present, directory)]


def check_config(config, workdir: Path) -> None:
    if (workdir / "config.json").exists():
        differ = [d for d in differences(workdir, config) if d.key not in HARMLESS]
        if differ:
            d = differ[0]
            more = f" (and {len(differ) - 1} more keys)" if len(differ) > 1 else ""
            raise UserError(
                f"{workdir} was begun with {d.key}={d.stored!r}, the config now says "
                f"{d.present!r}{more}; use another --workdir, or delete it to start again"
            )


def record_config(config, workdir: Path) -> None:
    """Write config.json, if it does not exist. Call this after the config's checks."""
    if not (workdir / "config.json").exists():
        distributed.write_json(workdir / "config.json", config.to_dict())


def versions() -> dict:
    """Return the versions of the packages that affect the numbers."""
    names = (
        "nla_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "grain",
        "tensorflow-datasets",
        "numpy",
    )
    out = {}
    for n in names:
        try:
            out[n] = importlib.metadata.version(n)
        except importlib.metadata.PackageNotFoundError:
            out[n] = "unknown"
    return out


def summarise(config, workdir: Path, stages: tuple[str, ...]) -> dict:
    """Write and return WORKDIR/summary.json: the figures of both bundles, seconds by stage, versions, seed.

    The checkpoints of unfinished stages are deleted.
    """
    warm, rl = read_done(workdir, "eval_warm"), read_done(workdir, "eval_rl")

    def figure(ev, name):
        return next((f for f in ev["figures"]["heldout"] if f["name"] == name), None)

    extracted, data = read_done(workdir, "extract"), workdir / "data"
    out = {"seed": config.seed, "target": config.target}
    said = {}
    for bundle, ev in (("warm_start", warm), ("rl", rl)):
        # At temperature 0 every explanation is greedy. Older runs have no figure of the frozen target.
        greedy = figure(ev, "fve_greedy") or (None if config.eval.temperature else figure(ev, "fve"))
        said[f"fve_{bundle}"] = figure(ev, "fve")
        said[f"fve_frozen_target_{bundle}"] = figure(ev, "fve_frozen_target")
        said[f"fve_greedy_{bundle}"] = greedy
    for name in ("fve_shuffled", "fve_mean_direction", "fve_token_path", "fve_meannorm"):
        said[name] = figure(rl, name)
    said["rl_gain"] = rl.get("gain", {}).get("heldout")  # older versions have none
    for name, f in said.items():
        if f:
            out |= {name: f["value"], f"{name}_interval": [f["low"], f["high"]]}
    out["retokenization_mismatch"] = figure(rl, "retokenization_mismatch")["value"]
    out |= {
        "rows": extracted["rows"],
        "documents": extracted["documents"],
        "notes": store.split_notes(store.read_meta(data) if store.is_complete(data) else {}),
        "warm_start": warm["figures"],
        "rl": rl["figures"],
        "seconds": {s: read_done(workdir, s)["seconds"] for s in stages},
        "steps": {s: done["steps"] for s in stages if "steps" in (done := read_done(workdir, s))},
        **({"chosen": chosen} if (chosen := read_done(workdir, "rl").get("chosen")) else {}),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": versions(),
    }
    distributed.write_json(workdir / "summary.json", out)
    paths.remove(workdir / "checkpoints")
    return out
