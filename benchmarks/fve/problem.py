"""The training that all sides do, as files: settings, prompts, starting weights, every batch, and the check.

problem.json   settings, prompts as ids, learning rates of every step
trees.npz      AV and AR at the start, as {"av/lora/wq/a": ...}
batches.npz    the batch of every step, as {"STEP/NAME": ...}
check.npz      fixed answers, on which the sides must agree before anything is timed
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import yaml

from nla_jax import configs, reconstructor
from nla_jax.data import shuffle
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner
from nla_jax.pipeline import activations, config_checks, context, training_stages
from nla_jax.training import feeds, jitted_steps
from nla_jax.util.keys import key_for

STAGES = ("rl", "warm_ar")
CHECKED = 8  # answers of the check
# Settings that the PyTorch side does not have, with the values that leave them out.
UNKNOWN_TO_TORCH = {
    "av.injection": "replace", "av.affine": "none", "ar.kind": "trained", "rl.policy": "reinforce",
    "rl.advantage": "zscore", "rl.reward": "log_mse", "rl.drop_equal": False, "rl.reader": "ar",
    "rl.prefix_min": 0, "rl.paraphrase": 0.0, "rl.patch_kl": 0.0, "rl.false_claims": 0.0, "rl.ar_reset": 0,
    "rl.length_penalty": 0.0, "rl.loss_mean": "tokens", "rl.ar_group": 0, "rl.shuffle_h": False,
    "rl.weight_decay": 0.0, "warm_ar.weight_decay": 0.0, "rl.train_ar": True,
}


def read_config(run: str | Path, overrides: list[str], steps: int = 0, stage: str = "rl"):
    """Return the config of a run with KEY=VALUE changes, and with `steps` steps of `stage` if that is not 0.

    Raises UserError for a directory without a run, and for an unknown key."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"--from {run}: not a run (config.json is missing); train one with "
                        "bash launch/quickstart.sh")
    c = configs.default()
    c.update(json.loads(path.read_text("utf-8")))
    known = configs.keys(c)
    for setting in overrides:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise UserError(f"{setting}: write KEY=VALUE with a key that `nla config list` has")
        section, _, name = key.rpartition(".")
        block = c[section] if section else c
        block[name] = type(block[name])(yaml.safe_load(value))
    if steps:
        c[stage].steps = steps
    return config_checks.lock(c)


def refuse_for_torch(config) -> None:
    """Raise UserError for a setting that the PyTorch side does not have."""
    flat = configs.flat(config.to_dict())
    wrong = [f"{k}={flat[k]!r}" for k, v in UNKNOWN_TO_TORCH.items() if flat[k] != v]
    if not (config.av.rank and config.ar.rank):
        wrong.append("av.rank or ar.rank 0")
    if wrong:
        raise UserError(f"the PyTorch side does not have {', '.join(wrong)}; leave it out with --no-torch")


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Return nested arrays as {"a/b": array}."""
    out = {}
    for name, value in tree.items():
        name = f"{prefix}{name}"
        out |= flatten(value, name + "/") if isinstance(value, dict) else {name: np.asarray(value)}
    return out


def nest(arrays) -> dict:
    """Return the inverse of `flatten`. arrays: a dict, or an open .npz file."""
    out: dict = {}
    for name in arrays:
        *path, last = name.split("/")
        block = functools.reduce(lambda block, part: block.setdefault(part, {}), path, out)
        block[last] = arrays[name]
    return out


def start_trees(r, stage: str) -> dict:
    """Return {"av": tree, "ar": tree} at the start of a stage."""
    if stage == "rl":
        return {role: training_stages.last_warm(r, role) for role in ("av", "ar")}
    return {role: context.initial_tree(r, role) for role in ("av", "ar")}


def batches(r, stage: str, steps: int) -> list[dict]:
    """Return the batch of every step, as a run has it. All have the same shapes, for a single program."""
    c, spec = r.config, context.with_spec(r).spec
    if stage == "warm_ar":
        texts = training_stages.texts_of(r, "warm_ar")
        at = functools.partial(feeds.ar_batch, texts, r.tok, spec, r.templates[1], c.warm_ar.max_tokens)
        return _equal_widths([at(i) for i in range(steps)], "")
    columns = activations.columns_of(r, "rl")
    draws = shuffle.epoch_indices(len(columns["h"]), c.rl.batch, c.seed, "rl")
    at = lambda i: feeds.rl_batch(columns, batch=c.rl.batch, seed=c.seed, step=i, draws=draws)
    out = [at(i) for i in range(steps)]
    if c.rl.written_ar:
        written = training_stages.texts_of(r, "warm_ar", batch=c.rl.written_ar)
        add = lambda i: feeds.add_written_batch(
            lambda _: out[i], written, r.tok, spec, r.templates[1], c.rl.max_new)(i)
        out = _equal_widths([add(i) for i in range(steps)], "written_")
    return out


def _equal_widths(found: list[dict], prefix: str) -> list[dict]:
    """Pad the prompts of all batches to the width of the widest, as `steps.rl` itself pads written ones."""
    names = [f"{prefix}ids_BT", f"{prefix}valid_BT"]
    width = max(b[names[0]].shape[1] for b in found)
    pad = lambda a: np.pad(a, ((0, 0), (0, width - a.shape[1])))
    return [b | {n: pad(b[n]) for n in names} for b in found]


def checked_answers(r, runner: Runner, first: dict) -> dict[str, np.ndarray]:
    """Return fixed inputs of the check: sampled answers to some activations, and advantages drawn for them.

    first: the batch of step 0."""
    h_ND = np.resize(first["h_BD"], (CHECKED, first["h_BD"].shape[1]))
    ids, length, closed, logp, start, end, ok = runner.write(
        h_ND, key_for(r.config.seed, "rl"), temperature=1.0, max_new=r.config.rl.max_new, label="")
    words = [r.tok.decode(row[:n], skip_special_tokens=True) for row, n in zip(ids, length, strict=True)]
    ar_ids, valid, last = reconstructor.rows(r.tok, r.templates[1], words, r.spec.ar.pad)
    advantage = np.random.default_rng(0).standard_normal(CHECKED).astype(np.float32)
    return {"h_ND": h_ND, "ids_NT": ids, "length_N": length, "logp_NT": logp, "closed_N": closed,
            "start_N": start, "end_N": end, "ok_N": ok, "advantage_N": advantage,
            "ar_ids_NT": ar_ids, "ar_valid_NT": valid, "ar_last_N": last}


def write(r, stage: str, steps: int, directory: Path, check: dict, trees: dict) -> None:
    """Write the files of a problem. check: of `checked_answers`. trees: of `start_trees`."""
    c, spec = r.config, context.with_spec(r).spec
    rates = [("rl", "lr_av"), ("rl", "lr_ar")] if stage == "rl" else [("warm_ar", "lr")]
    about = {
        "stage": stage, "steps": steps, "target": str(r.path), "config": c.to_dict(),
        "spec": dataclasses.asdict(spec),
        "rates": {name: jitted_steps.learning_rates(c, section, name) for section, name in rates},
    }
    directory.mkdir(parents=True)
    (directory / "problem.json").write_text(json.dumps(about), "utf-8")
    np.savez(directory / "trees.npz", **flatten(trees))
    np.savez(directory / "check.npz", **check)
    found = batches(r, stage, steps)
    np.savez(directory / "batches.npz", **flatten({str(i): b for i, b in enumerate(found)}))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The files of a problem, read back. batches: one dict a step."""

    about: dict
    trees: dict
    batches: list[dict]
    check: dict


def read(directory: Path) -> Problem:
    about = json.loads((directory / "problem.json").read_text("utf-8"))
    load = lambda name: dict(np.load(directory / name, allow_pickle=False))
    by_step = nest(load("batches.npz"))
    return Problem(about, nest(load("trees.npz")), [by_step[str(i)] for i in range(about["steps"])],
                   load("check.npz"))
