"""A run that begins where another one is: finished stages whose settings agree are taken over.

For ablations: activations, reading lessons and warm start are made once, and each variant runs only
what its own settings change.
"""

import json
from pathlib import Path

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.pipeline import activations, run_directory
from nla_jax.util import paths
from nla_jax.util.paths import link_file

# What decides a stage's numbers: settings (a section stands for all of it), and the stages it is made
# from. Bundles are always written anew: their sidecar holds the config.
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
    # AR's template decides whether a written explanation has an ending line.
    "warm_av": (("warm_av", "data.explanation_lines", "ar_template"), ("lessons_av",)),
    "eval_warm": (("eval", "rl.max_new"), ("warm_ar", "warm_av")),
    "rl_drill": (("rl_drill", "rl"), ("warm_av",)),
}
# In the section, but without a say.
_ELSEWHERE = {"extract": ("data.explanation_lines", "data.ending_tokens")}


def agreeing(stored: dict, present) -> list[str]:
    """The stages, in order, whose numbers are the same under both configs.

    Args:
      stored: the config of the other run, as in its config.json. present: a ConfigDict.
    """
    differ = {d.key for d in configs.differences(stored, present)}
    # A store serves a run that reads online as well: it is only looked at there, not trained on.
    enough = {"extract": {"activations"} if stored.get("activations", "stored") == "stored" else set()}
    out: list[str] = []
    for stage, (settings, before) in _NEEDS.items():
        touched = {k for k in differ if any(k == s or k.startswith(s + ".") for s in settings)}
        touched -= enough.get(stage, set())
        if touched <= set(_ELSEWHERE.get(stage, ())) and all(b in out for b in before):
            out.append(stage)
    return out


def take_over(config, source: str | Path, workdir: str | Path) -> list[str]:
    """Begin `workdir` with what the run at `source` has finished and `config` agrees with.

    Data and parameters are hard links where the file system has them. Does nothing when `workdir` has
    begun already (it is resumed, not begun again).

    Returns:
      The stages taken over.

    Raises:
      UserError: `source` is not a run, is `workdir`, or has nothing that the config could use.
    """
    source, workdir = paths.absolute(source), paths.absolute(workdir)
    if source == workdir:
        raise UserError(f"--from {source} is the --workdir itself; give another run")
    if not (source / "config.json").is_file():
        raise UserError(f"--from {source}: not a run (config.json is missing)")
    if (workdir / "config.json").exists():
        return []
    stored = json.loads((source / "config.json").read_text("utf-8"))
    stages = [s for s in agreeing(stored, config) if run_directory.is_done(source, s)]
    if not stages:
        keys = ", ".join(d.key for d in configs.differences(stored, config)[:4])
        raise UserError(
            f"--from {source}: no finished stage agrees with this config (it differs in {keys}); leave "
            "--from out"
        )
    for stage in stages:
        inside = [f"params/{stage}", f"metrics/{stage}.jsonl"]
        for name in ["data", activations.FILE] if stage == "extract" else inside:
            _link(source / name, workdir / name)
        run_directory.finish(
            workdir, stage, run_directory.read_done(source, stage) | {"taken_from": source.name}
        )
    run_directory.record_config(config, workdir)
    return stages


def _link(source: Path, to: Path) -> None:
    if source.is_dir():
        paths.remove(to)  # half of an earlier attempt
        for name, found in paths.files(source).items():
            link_file(found, to / name)
    elif source.exists():
        to.unlink(missing_ok=True)
        # Logs grow: a copy, so that neither run writes into the other's.
        paths.copy(source, to)
