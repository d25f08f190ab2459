"""Pack a bundle (`nla_jax.lm.files.packed`): `nla pack`."""

from pathlib import Path

from nla_jax import bundle, specs
from nla_jax.errors import UserError
from nla_jax.evaluate import distribution
from nla_jax.interchange import model_card, run_summary, sidecar_common
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import packed
from nla_jax.util import paths, utf8, writable

CARD = model_card.FILE
HOLDS = {packed.FILE, bundle.SIDECAR, bundle.TRUST, CARD, "tokenizer"}


def pack(
    directory: str | Path, out: str | Path, *, own_card: str | Path = "", made_by: str = "", target: str = "",
    data: str | Path = "",
) -> Path:
    """Write a bundle as a packed one: parameters in bfloat16, sidecar, card.

    The bundle may be packed already. The sidecar keeps the summary of its run, so that packing again keeps
    the figures.

    Args:
      out: the directory. A packed bundle in it is replaced.
      own_card: a Markdown file to use as the card instead of that of `model_card.write`.
      made_by: the command that trained the bundle, for the card.
      target: location of the target, by default that in the sidecar.
      data: a store of training activations of that target and layer, whose statistics go into the sidecar
        (`evaluate.distribution`).

    Raises UserError if `out` exists and is no packed bundle, if there is no card file, if the target is not
      the bundle's, and as `bundle.load`.
    """
    directory, out = paths.path(directory), paths.path(out)
    if out.exists() and not _may_replace(out):
        raise UserError(f"{out} exists and is not a packed bundle; choose another --out, or delete it")
    writable.check_directory(out)
    if own_card and not paths.path(own_card).is_file():
        raise UserError(f"{own_card}: there is no such card file")
    card = utf8.read_text(own_card) if own_card else ""
    meta = bundle.read_sidecar(directory)
    path = weights.resolve(target or meta["base_checkpoint"])
    cfg = weights.read_config(path)
    bundle.check_target(directory, meta, path, cfg)
    own = bundle.tokenizer_dir(directory, meta)
    tok = tok_lib.load(own or path)
    spec = bundle.spec_of(meta, cfg, tok)
    bundle.check_ids(directory, spec, meta, tok)
    run = run_summary.read_summary(directory, meta) or meta.get("run")
    if data:
        known = distribution.of_store(data, meta["base_fingerprint"], spec.layer, meta["mean_direction"])
        meta |= {"activations": known[1]}
    # Read everything before writing, because a packed bundle may be packed onto itself.
    trust = (directory / bundle.TRUST).read_text("utf-8") if (directory / bundle.TRUST).is_file() else ""
    trees = bundle.open_trees(directory, meta, LMConfig.of_plain(meta["lm"]))
    with paths.upload_after(out) as place:
        place.mkdir(parents=True, exist_ok=True)
        (place / bundle.SIDECAR).unlink(missing_ok=True)  # without it the directory is no bundle
        packed.save(place, trees)
        if trust:
            paths.write(place / bundle.TRUST, trust)
        paths.remove(place / "tokenizer")
        added = {k: v for k, v in (("run", run), ("made_by", made_by)) if v}
        if own and not _renders_same_ids(meta, cfg, tok, path):
            tok_lib.save(tok, place / "tokenizer")
        else:
            added["prompts_sha256"] = specs.prompts_digest(spec)
        # `nla trust` may replace its file later.
        free = (CARD, bundle.TRUST)
        listed = {n: p for n, p in paths.files(place).items() if n not in free and not n.endswith(".part")}
        found = {k: v for k, v in meta.items() if k != "pair"}
        found |= {"files": {n: packed.describe(p) for n, p in listed.items()}}
        found |= added
        paths.write(place / CARD, card or model_card.write(found))
        paths.write(place / bundle.SIDECAR, sidecar_common.as_yaml(found))
    return out


def _may_replace(out: Path) -> bool:
    """Return whether a directory is empty, or has only the files of a packed bundle or a killed `pack`."""
    if not out.is_dir():
        return False
    names = {p.name.removesuffix(".part") for p in out.iterdir()}
    return names <= HOLDS and (not names or packed.FILE in names)


def _renders_same_ids(meta: dict, cfg: LMConfig, tok, path: Path) -> bool:
    """Return whether the target's own tokenizer has the bundle's vocabulary and renders its prompts alike."""
    other = tok_lib.load(path)
    if tok_lib.fingerprint(other) != tok_lib.fingerprint(tok):
        return False
    meta = {k: v for k, v in meta.items() if k != "prompt_ids"}
    try:
        return bundle.spec_of(meta, cfg, other) == bundle.spec_of(meta, cfg, tok)
    except UserError:  # without a chat template, for instance
        return False
