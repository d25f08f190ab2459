"""A store of activations that was made elsewhere (config data.store): does it fit the run, and its files.

An imported store (`nla data import`) also says how the activation was to be marked and which prompts go
with it; where the config leaves these open, a run follows it.
"""

import json
from pathlib import Path

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.interchange import sidecar_common
from nla_jax.util import paths


def check(config, directory: str | Path, lm, fingerprint: str) -> dict:
    """What the files behind config.data.store said ("interchange" of its meta), once the store fits the run;
    {} without one.

    Args:
      directory: where the run keeps its data, and looks once it has taken the store.
      lm, fingerprint: the target's architecture, and which weights it has.

    Raises UserError: no store there, of another target or layer, or without a split that the run needs.
    """
    if not config.data.store:
        return {}
    where = directory if store.is_complete(directory) else config.data.store
    meta = store.read_meta(where)
    layer = lm.default_layer() if config.layer == -1 else config.layer
    why = store.mismatch(meta, name=config.target, fingerprint=fingerprint, layer=layer, d_model=lm.d_model,
                         called=config.data.base_model)
    if why:
        raise UserError(f"data.store {where} does not fit this run: {why}")
    for split in ("warm", "heldout", *(("rl",) if config.rl.steps else ())):
        if split not in meta["splits"]:
            raise UserError(
                f"data.store {where} has no split {split!r}, which this run needs: import the files of every "
                "stage together (rl.steps=0 needs no rl)"
            )
    return meta.get("interchange") or {}


def settings(config, facts: dict) -> dict:
    """alpha, injection, marker, both templates and how many ids AR prompts end with, for `specs.make_spec`:
    the config's, and where it leaves them open those of `facts`."""
    templates, tokens = facts.get("templates") or {}, facts.get("tokens") or {}

    def template(role):
        official = templates.get(role)
        return config[f"{role}_template"] or (
            sidecar_common.ours("data.store", role, official) if official else ""
        )

    return {
        "alpha": config.alpha or facts.get("injection_scale") or 0.0,
        "injection": config.av.injection,
        "marker": config.marker or tokens.get("injection_char", ""),
        "av_template": template("av"),
        "ar_template": template("ar"),
        "n_suffix": 0 if config.ar_template else len(tokens.get("critic_suffix_ids") or ()),
    }


def check_tokens(config, facts: dict, spec) -> None:
    """UserError where the store's prompts become other ids with this tokenizer than its files say."""
    tokens = facts.get("tokens")
    if tokens and not config.av_template:
        names = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
        theirs, ours = [tokens[n] for n in names], [spec.av.marker, spec.av.before[-1], spec.av.after[0]]
        if theirs != ours:
            raise UserError(
                f"data.store {config.data.store}: marker and neighbours have the ids {theirs} in its files "
                f"and {ours} with this target's tokenizer; it was made for another, or set av_template"
            )
    suffix = list(tokens["critic_suffix_ids"] or ()) if tokens else []
    if suffix and not config.ar_template and list(spec.ar.suffix) != suffix:
        ours = list(spec.ar.suffix)
        raise UserError(
            f"data.store {config.data.store}: AR prompts end with the ids {suffix} in its files and with "
            f"{ours} with this target's tokenizer; it was made for another, or set ar_template"
        )


def check_bundle(config, facts: dict, meta: dict) -> None:
    """UserError where store and bundle (`config.init`, with the sidecar `meta`) mark or prompt otherwise."""
    templates = facts.get("templates") or {}
    theirs = dict(facts.get("tokens") or {})
    theirs |= {f"{r} template": sidecar_common.ours("data.store", r, t) for r, t in templates.items() if t}
    ours = meta["tokens"] | {f"{r} template": t for r, t in meta["prompt_templates"].items()}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    sidecar_common.same(f"data.store {config.data.store}", listed, f"init {config.init}", ours)


def take(source: str | Path, directory: str | Path, fingerprint: str) -> None:
    """Make `directory` the store at `source`: hard links where the file system has them, else copies.

    From then on the activations count as those of the target with this fingerprint.
    """
    source, directory = paths.path(source), paths.path(directory)
    meta = store.read_meta(source)
    paths.remove(directory)  # half of an earlier attempt
    for name, found in paths.files(source).items():
        if name != store.META and not name.startswith("."):
            paths.link_file(found, directory / name)
    meta["plan"] |= {"target": fingerprint, "taken_from": source.name}
    paths.write(directory / store.META, json.dumps(meta, indent=1, ensure_ascii=False))
