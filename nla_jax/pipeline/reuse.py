"""Reuse of another run's finished stages whose settings agree (`nla train --from`).

In ablations, activations, reading lessons and warm start are then computed once. Each variant runs only the
stages that its settings change.
"""

import json
from collections.abc import Collection
from pathlib import Path

from nla_jax import configs
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.pipeline import activations, fingerprints, run_directory
from nla_jax.util import path_kinds, paths
from nla_jax.util.paths import link_file

# Stage -> (settings that determine its numbers, stages that it depends on). A section means all its keys.
# Bundles are never reused, because their sidecar contains the config.
_MODEL = ("seed", "target", "layer", "dtype", "mu_dtype", "remat", "attention", "mesh", "init", "activations")
_NEEDS = {
    "extract": (("seed", "target", "layer", "dtype", "data", "chat_template", "activations"), ()),
    "lessons_ar": ((*_MODEL, "ar", "ar_template", "data.ending_tokens", "lessons_ar"), ("extract",)),
    "lessons_av": (
        (*_MODEL, "av", "chat_template", "av_template", "alpha", "marker", "vocab_chunk",
         "data.ending_tokens", "lessons_av"),
        ("extract",),
    ),
    "warm_ar": (("warm_ar", "data.explanation_lines"), ("lessons_ar",)),
    # AR's template determines whether a written explanation has an ending line.
    "warm_av": (("warm_av", "data.explanation_lines", "ar_template"), ("lessons_av",)),
    "eval_warm": (("eval", "rl.max_new"), ("warm_ar", "warm_av")),
    "rl_drill": (("rl_drill", "rl"), ("warm_av",)),
}
# Keys of these sections that do not affect the stage.
_ELSEWHERE = {"extract": ("data.explanation_lines", "data.ending_tokens")}


def agreeing_stages(stored: dict, present, differ: Collection[str] | None = None) -> list[str]:
    """Return the stages, in order, whose numbers are the same under both configs.

    Args:
      stored: the config of the other run, as in its config.json. present: a ConfigDict.
      differ: the keys that differ; None: those whose values differ.
    """
    if differ is None:
        differ = {d.key for d in configs.differences(stored, present)}
    # A run with online activations can use a store too, because it does not train on the store.
    enough = {"extract": {"activations"} if stored.get("activations", "stored") == "stored" else set()}
    out: list[str] = []
    for stage, (settings, before) in _NEEDS.items():
        touched = {k for k in differ if any(k == s or k.startswith(s + ".") for s in settings)}
        touched -= enough.get(stage, set())
        if touched <= set(_ELSEWHERE.get(stage, ())) and all(b in out for b in before):
            out.append(stage)
    return out


def link_stages(config, source: str | Path, workdir: str | Path, present: dict | None = None) -> list[str]:
    """Link the finished stages of the run at `source` that agree with `config` into a new run at `workdir`.

    Data and parameters are hard links, or copies if the file system has none. If `workdir` already has a
    run, nothing is done, because the run is resumed.

    Args:
      present: the fingerprints of the new run (`fingerprints.of_run`), which are compared too.

    Returns:
      The linked stages.

    Raises:
      UserError: as `check_source`, or no finished stage agrees.
    """
    check_source(source, workdir)
    source, workdir = paths.absolute(source), paths.absolute(workdir)
    if (workdir / "config.json").exists():
        return []
    stored = json.loads((source / "config.json").read_text("utf-8"))
    changed = _changes(config, source, present or {})
    found = agreeing_stages(stored, config, changed)
    stages = [s for s in found if run_directory.is_done(source, s)]
    if not stages:
        keys = ", ".join([*changed][:4])
        why = "".join(f"; {why}" for why in changed.values() if why)
        raise UserError(
            f"--from {source}: no finished stage agrees with this config (it differs in {keys}{why}); omit "
            "--from"
        )
    for stage in stages:
        inside = [f"params/{stage}", f"metrics/{stage}.jsonl"]
        for name in ["data", activations.FILE] if stage == "extract" else inside:
            _link(source / name, workdir / name)
        run_directory.write_done(
            workdir, stage, run_directory.read_done(source, stage) | {"taken_from": source.name}
        )
    run_directory.record_config(config, workdir)
    return stages


def check_source(source: str | Path, workdir: str | Path) -> None:
    """Raise UserError if `source` is not a run, or is `workdir`."""
    source = paths.absolute(source)
    if paths.same_place(str(source), str(paths.absolute(workdir))):
        raise UserError(f"--from {source} is the --workdir itself; give another run")
    if not (source / "config.json").is_file():
        hint = path_kinds.hint(source) or "give a --workdir of `nla train`"
        raise UserError(f"--from {source}: not a run (config.json is missing); {hint}")


def _changes(config, source: Path, present: dict) -> dict[str, str]:
    """Return {config key: why} for what differs between a new run and the run at `source`. "" if the configs
    show it."""
    out = {d.key: "" for d in run_directory.differences(source, config)}
    if present:
        theirs = fingerprints.read(source)
        if "target" in theirs:
            out.pop("target", None)  # its weights are compared, and not its name
        elif store.is_complete(made := source / "data"):  # a run of an older version
            theirs = {"weights": {"name": "", "digest": store.read_meta(made)["plan"]["target"]}}
        out |= fingerprints.differences(theirs, present)
    return dict(sorted(out.items()))


def _link(source: Path, to: Path) -> None:
    if source.is_dir():
        paths.remove(to)  # an earlier attempt may be incomplete
        for name, found in paths.files(source).items():
            link_file(found, to / name)
    elif source.exists():
        to.unlink(missing_ok=True)
        # Copy logs, because a run that appended to a hard link would change the other run's log.
        paths.copy(source, to)
