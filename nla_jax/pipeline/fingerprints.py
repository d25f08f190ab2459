"""Fingerprints of what determines a run's numbers outside its config: WORKDIR/fingerprints.json.

The file is written when a run begins. It has the target's weights, tokenizer and chat template, the corpora,
the explanations and the bundle `init`, each with its name in the config, and the ids of the rendered prompts.
A later start compares the fingerprints, and uses these ids.
"""

import hashlib
import json
import os
from pathlib import Path

from nla_jax import bundle
from nla_jax.data import corpora, explanations, store
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.pipeline import run_directory
from nla_jax.util import paths

FILE = run_directory.FINGERPRINTS
# Name in the file -> (words of messages, config key)
TARGET = {
    "target": ("other weights", "target"),
    "weights": ("other weights", "target"),  # the shorter fingerprint of stores and bundles
    "tokenizer": ("another tokenizer", "target"),
    "chat_template": ("another chat template", "chat_template"),
    "init": ("other parameters", "init"),
}
TEXTS = {
    "corpus": ("other files", "data.corpus"),
    "ood": ("other files", "data.ood"),
    "explanations": ("other lines", "data.explanations"),
}


def read(workdir: str | Path) -> dict:
    """Return the file of a run that has begun; {} if there is none. Raises UserError if it is damaged."""
    workdir = paths.path(workdir)
    begun = (workdir / "config.json", workdir / "data" / ".progress", workdir / "data" / store.META,
             workdir / run_directory.MEASURED)
    if not (workdir / FILE).is_file() or not any(p.exists() for p in begun):
        return {}
    try:
        found = json.loads((workdir / FILE).read_text("utf-8"))
        return {**found, "prompts": dict(found["prompts"]), "directory": str(found["directory"])}
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{workdir / FILE}: damaged ({e}); restore it, or choose another --workdir") from e


def prompt_settings(given: dict) -> dict:
    """Return the settings of each role's prompt. given: arguments of `specs.make_spec`."""
    return {
        "av": [given["marker"], given["av_template"]],
        "ar": [given["ar_template"], given["n_suffix"]],
    }


def recorded_prompts(known: dict, given: dict) -> dict:
    """Return arguments of `specs.make_spec` for the roles whose prompts have the same settings in `known`."""
    found = known.get("prompts") or {}
    same = [role for role, s in prompt_settings(given).items() if found.get(role, {}).get("settings") == s]
    ids = (given.get("ids") or {}) | {role: found[role]["ids"] for role in same}
    return {"ids": ids} | {f"{role}_template": found[role]["template"] for role in same}


def of_run(r) -> dict:
    """Return what the file of a run that begins now has, without the texts (`of_texts`). r: a RunContext."""
    c, templates = r.config, dict(zip(("av", "ar"), r.templates, strict=True))
    init = bundle.read_sidecar(c.init) if c.init else None
    digests = {
        "target": weights.digest(r.path),
        "weights": weights.fingerprint(r.path),
        "tokenizer": tok_lib.fingerprint(r.tok),
        "chat_template": _hash(r.chat_template),
        "init": init and _hash(init),
    }
    return {
        "directory": os.getcwd(),
        **{key: _entry(c, TARGET[key][1], digest) for key, digest in digests.items() if digest},
        "prompts": {
            role: {"settings": r.prompt_settings[role], "template": templates[role], "ids": ids}
            for role, ids in r.given["ids"].items()
        },
    }


def of_texts(c) -> dict:
    """Return the file's entries of corpora and explanations. A text that is not there has no entry."""
    if c.data.store:
        return {}
    path = c.data.explanations if c.data.explanations != "shipped" else explanations.SHIPPED
    path = path and paths.local_copy(path)
    digests = {
        "corpus": corpora.digest(c.data.corpus),
        "ood": corpora.digest(c.data.ood),
        "explanations": paths.digest(path)[:16] if path and path.is_file() else "",
    }
    return {key: _entry(c, TEXTS[key][1], digest) for key, digest in digests.items() if digest}


def _entry(c, key: str, digest: str) -> dict:
    section, _, name = key.rpartition(".")
    return {"name": (c[section] if section else c)[name], "digest": digest}


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(known: dict, present: dict) -> dict[str, str]:
    """Return {config key: what is not the same} for the entries that are in both and differ."""
    out = {}
    for entry, (what, key) in (TARGET | TEXTS).items():
        then, now = known.get(entry), present.get(entry)
        if then and now and then["digest"] and then["digest"] != now["digest"] and key not in out:
            has = f"{key}={now['name']!r} has {what} than"
            if then["name"] in ("", now["name"]):
                out[key] = f"{has} when it was begun: restore what was there"
            else:
                out[key] = f"{has} {key}={then['name']!r}: give the latter again"
    return out


def settle(r, present: dict, known: dict, linked: dict) -> dict:
    """Compare a run that goes on with its file. Return the contents of the file of a new run, else {}.

    Args:
      present: of `of_run`. known: the run's file (`read`). linked: the file of the run whose activations were
        linked.

    Raises UserError if something differs. Texts are compared as long as they are still read.
    """
    done = run_directory.is_done(r.workdir, "extract")
    if not known:
        texts = {k: linked[k] for k in TEXTS if k in linked} if done else of_texts(r.config)
        if store.is_complete(r.workdir / "data"):  # linked, or of an older version
            plan = store.read_meta(r.workdir / "data")["plan"]
            known = {"weights": {"name": "", "digest": plan["target"]}}
    else:
        texts = of_texts(r.config) if not done or r.config.activations == "online" else {}
    _refuse(r.workdir, differences(known, present | texts))
    return {} if "prompts" in known else present | texts


def _refuse(workdir: Path, found: dict[str, str]) -> None:
    for why in found.values():
        raise UserError(f"{workdir} cannot go on: {why}, or choose another --workdir")


def check_target(config, workdir: Path) -> None:
    """Raise UserError if a finished run was begun with another target than the config names."""
    known = read(workdir)
    if not known or paths.same_place(known["target"]["name"], config.target, known["directory"]):
        return
    present = _entry(config, "target", weights.digest(weights.resolve(config.target)))
    _refuse(workdir, differences(known, {"target": present}))


def as_begun(config, workdir: Path) -> dict:
    """Return the config's "data" with the spellings of paths that the run began with."""
    known, data = read(workdir), config.data.to_dict()
    for entry, (_, key) in TEXTS.items():
        name, now = key.partition(".")[2], data[key.partition(".")[2]]
        if entry in known and run_directory.is_same_value(key, known[entry]["name"], now, known["directory"]):
            data[name] = known[entry]["name"]
    return data
