"""A store of activations from elsewhere (config data.store): check that it fits the run, and link its files.

An imported store (`nla data import`) also has a marker, prompts and a scale. A run uses them unless its
config sets its own.
"""

import json
from pathlib import Path

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.interchange import sidecar_common
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.util import paths


def check(config, directory: str | Path, lm, path: Path) -> dict:
    """Check that config.data.store fits the run, and return the imported files' facts ("interchange" of its
    meta); {} if there are none.

    Args:
      directory: the run's data directory. It is checked instead, if the store is already linked there.
      lm, path: the target's architecture, and its files.

    Raises UserError if there is no store, if it is of another target or layer, or if it lacks a split that
      the run needs.
    """
    if not config.data.store:
        return {}
    where = directory if store.is_complete(directory) else config.data.store
    meta = store.read_meta(where)
    layer = lm.default_layer() if config.layer == -1 else config.layer
    why = store.why_mismatch(
        meta,
        name=config.target,
        fingerprint=weights.fingerprint(path),
        digest=weights.digest(path),
        layer=layer,
        d_model=lm.d_model,
        called=config.data.base_model,
    )
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
    """Return arguments for `specs.make_spec`: alpha, injection, marker, templates and number of suffix ids.

    They come from the config, or from `facts` if the config does not set them.
    """
    templates, tokens = facts.get("templates") or {}, facts.get("tokens") or {}

    def template(role):
        official = templates.get(role)
        return config[f"{role}_template"] or (
            sidecar_common.to_our_template("data.store", role, official) if official else ""
        )

    return {
        "alpha": config.alpha or facts.get("injection_scale") or 0.0,
        "injection": config.av.injection,
        "marker": config.marker or tokens.get("injection_char", ""),
        "av_template": template("av"),
        "ar_template": template("ar"),
        "n_suffix": 0 if config.ar_template else len(tokens.get("critic_suffix_ids") or ()),
    }


def check_tokenizer(config, directory: str | Path, tok) -> None:
    """Raise UserError if the store was made with another tokenizer. `directory` as in `check`."""
    if not config.data.store:
        return
    where = directory if store.is_complete(directory) else config.data.store
    if store.read_meta(where).get("tokenizer", known := tok_lib.fingerprint(tok)) != known:
        raise UserError(
            f"data.store {where} does not fit this run: its texts were read with another tokenizer than that "
            f"of {config.target}; give the target that it was made with"
        )


def check_tokens(config, facts: dict, spec) -> None:
    """Raise UserError if this tokenizer renders the store's prompts to other ids than those in its files."""
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
    """Raise UserError if store and bundle (`config.init`, with its sidecar) differ in marker or prompts."""
    templates = facts.get("templates") or {}
    theirs = dict(facts.get("tokens") or {})
    theirs |= {
        f"{r} template": sidecar_common.to_our_template("data.store", r, t) for r, t in templates.items() if t
    }
    ours = meta["tokens"] | {f"{r} template": t for r, t in meta["prompt_templates"].items()}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    sidecar_common.check_same(f"data.store {config.data.store}", listed, f"init {config.init}", ours)


def link_store(source: str | Path, directory: str | Path, fingerprint: str) -> None:
    """Link the store at `source` into `directory`: by hard links, or by copies if the file system has none.

    The new store's plan has this fingerprint as its target.
    """
    source, directory = paths.path(source), paths.path(directory)
    meta = store.read_meta(source)
    paths.remove(directory)  # an earlier attempt may be incomplete
    for name, found in paths.files(source).items():
        if name != store.META and not name.startswith("."):
            paths.link_file(found, directory / name)
    meta["plan"] |= {"target": fingerprint, "taken_from": source.name}
    paths.write(directory / store.META, json.dumps(meta, indent=1, ensure_ascii=False))
