"""The NLA bundle: AV, AR, sidecar and tokenizer in one directory that `nla_jax.load` opens.

DIR/nla_meta.yaml   the sidecar: target, layer, scale, marker, prompts, training
DIR/params/         Orbax: {"av": ..., "ar": ...}
DIR/tokenizer/      tokenizer.json and its configuration. DIR/trust.json: optional (`nla trust`)

A packed bundle (`nla pack`, `lm.files.packed`; `SHIPPED` is one) has adapters.safetensors instead of params/,
and README.md. It has tokenizer/ only if the target's own tokenizer renders other prompts.
"""

import dataclasses
import datetime
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from nla_jax import prompts, reconstructor, specs, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import packed
from nla_jax.util import checkpoint, distributed, lazy_params, path_kinds, paths
from nla_jax.util.choices import choose, refuse_code_beside

SIDECAR, TRUST = path_kinds.SIDECAR, "trust.json"
KIND, SCHEMA = "nla_bundle", 1
SHIPPED = Path(__file__).parent / "shipped"  # `nla_jax.load` opens it by default
REQUIRED = ("stage", "base_checkpoint", "base_fingerprint", "lm", "dtype", "extraction", "tokens",
            "prompt_templates", "roles", "max_new_tokens", "mean_direction", "created_by")


def sidecar(
    spec: specs.Spec,
    *,
    target: str,
    target_path,
    av_rank: int,
    ar_rank: int,
    affine: bool,
    ar_kind: str = "trained",
    marker: str,
    av_template: str,
    ar_template: str,
    stage: str,
    max_new: int,
    mean_D,
    training: dict,
) -> dict:
    """Return the contents of nla_meta.yaml. `mean_D`: mean of normalised training activations, or None."""
    import nla_jax

    return {
        "kind": KIND,
        "schema_version": SCHEMA,
        "stage": stage,
        "base_checkpoint": target,
        "base_fingerprint": weights.fingerprint(target_path),
        "base_digest": weights.digest(target_path),
        "d_model": spec.lm.d_model,
        "lm": dataclasses.asdict(spec.lm),
        "dtype": spec.dtype,
        "extraction": {
            "layer_index": spec.layer,
            "norm": "none",
            "injection": spec.av.injection,
            "injection_scale": float(spec.alpha),
            "mse_scale": "sqrt_d_model",
        },
        "tokens": {
            "injection_char": marker,
            "injection_token_id": spec.av.marker,
            "injection_left_neighbor_id": spec.av.before[-1],
            "injection_right_neighbor_id": spec.av.after[0],
            "critic_suffix_ids": list(spec.ar.suffix),
        },
        "prompt_templates": {"av": av_template, "ar": ar_template},
        "prompt_ids": prompts.ids_of(spec.av, spec.ar),
        "roles": {"av_rank": av_rank, "ar_rank": ar_rank, "affine": affine, "ar_kind": ar_kind},
        "max_new_tokens": max_new,
        "mean_direction": None if mean_D is None else [float(x) for x in mean_D],
        "training": training,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
    }


def save(directory: str | Path, meta: dict, av, ar, tok) -> None:
    """Write a bundle. The sidecar is written last, so a bundle that has one is complete. All processes of a
    pod call this. `av` and `ar` are trees of arrays, or both of `lazy_params.Array`. Raises UserError for a
    parameter that is not finite."""
    import yaml

    directory = paths.path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if distributed.is_first():
        (directory / SIDECAR).unlink(missing_ok=True)
    for role, tree in (("AV", av), ("AR", ar)):
        bad = [
            jax.tree_util.keystr(k)
            for k, a in jax.tree_util.tree_leaves_with_path(tree)
            if not isinstance(a, lazy_params.Array) and not bool(jnp.isfinite(a).all())
        ]
        if bad:
            raise UserError(
                f"{directory}: {role} parameter {bad[0]} is not finite because the run diverged; "
                "go back to an earlier checkpoint or lower the learning rate"
            )
    checkpoint.save_tree(directory / "params", {"av": av, "ar": ar})
    if not distributed.is_first():
        return
    with paths.upload_after(directory / "tokenizer") as place:
        tok_lib.save(tok, place)
    meta = {**meta, "tokenizer": tok_lib.fingerprint(tok), "files": _sizes(directory / "params")}
    paths.write(directory / SIDECAR, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))


def _sizes(directory: Path) -> dict[str, int]:
    return {f"{directory.name}/{name}": paths.size(p) for name, p in paths.files(directory).items()}


def shipped_bundle() -> Path:
    """Return the directory of the shipped bundle. Raises UserError if this copy of nla_jax has none."""
    if not (SHIPPED / SIDECAR).is_file():
        raise UserError(
            f"{SHIPPED}: this copy of nla_jax ships no bundle; give one with --bundle, or write one "
            "into this directory with `nla pack --out`"
        )
    return SHIPPED


def bundle_or_shipped(directory: str) -> Path | str:
    """Return `directory`, or the bundle of a run, or if it is empty the shipped bundle, with a notice on
    stderr. Raises UserError as `shipped_bundle`."""
    if directory:
        return path_kinds.bundle_in(directory)
    print(f"no --bundle given: using the bundle that nla_jax ships, {shipped_bundle()}", file=sys.stderr)
    return SHIPPED


def read_sidecar(directory: str | Path) -> dict:
    """Read the sidecar of a bundle. Raises UserError if it is missing, damaged or of another kind."""
    import yaml

    path = paths.path(directory) / SIDECAR
    if not path.is_file():
        hint = path_kinds.hint(directory) or "give one that `nla train` wrote, such as runs/quickstart/bundle"
        raise UserError(f"{directory}: not an NLA bundle ({SIDECAR} is missing); {hint}")
    try:
        meta = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML ({str(e).splitlines()[0]})") from e
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        found = meta.get("kind") if isinstance(meta, dict) else None
        raise UserError(f"{path}: kind is {found!r}, not {KIND!r}")
    if meta.get("schema_version", 0) > SCHEMA:
        newer = f"schema_version {meta['schema_version']} is newer than this program reads ({SCHEMA})"
        raise UserError(f"{path}: {newer}; update nla_jax")
    if missing := [k for k in REQUIRED if k not in meta]:
        raise UserError(f"{path}: {missing[0]} is missing; the file was edited or cut short")
    refuse_code_beside(directory, str(injection(meta)))
    return meta


@dataclasses.dataclass(frozen=True)
class LoadedBundle:
    """A bundle in memory."""

    meta: dict
    spec: specs.Spec
    tok: object
    base: dict
    av: dict
    ar: dict


def injection(meta: dict) -> str:
    """Return the sidecar's injection, one of `prompts.INJECTIONS`; older sidecars lack the key."""
    return meta["extraction"].get("injection", "replace")


def ar_kind(meta: dict) -> str:
    """Return the sidecar's kind of AR, one of `reconstructor.KINDS`; older sidecars lack the key."""
    return meta["roles"].get("ar_kind", "trained")


def load(directory: str | Path, target: str | None = None, check=lambda spec, tok: None) -> LoadedBundle:
    """Open a bundle and the target that it was trained with.

    Args:
      target: location of the target; by default the sidecar's `base_checkpoint`.
      check: called with the Spec and the tokenizer before weights are read; it may raise.

    Raises:
      UserError: the directory is not a bundle, the target is another model, the tokenizer renders
        other prompts, or parameters are missing or damaged.
    """
    meta = read_sidecar(directory)
    path = weights.resolve(target or meta["base_checkpoint"])
    cfg = weights.read_config(path)
    check_target(directory, meta, path, cfg)
    tok = tok_lib.load(tokenizer_dir(directory, meta) or path)
    spec = spec_of(meta, cfg, tok)
    check_ids(directory, spec, meta, tok)
    check(spec, tok)
    _, base = sharded_load.place(path, dtype=meta["dtype"])
    trees = read_trees(directory, meta, cfg)
    return LoadedBundle(meta, spec, tok, base, trees["av"], trees["ar"])


def tokenizer_dir(directory: str | Path, meta: dict) -> Path | None:
    """Return the directory of the bundle's tokenizer, or None if a packed bundle uses the target's. Raises
    UserError if files of a packed bundle are damaged."""
    if packed.is_packed(meta):
        packed.check(paths.path(directory), meta)
        if not any(name.startswith("tokenizer/") for name in meta["files"]):
            return None
    return paths.local_copy(paths.path(directory) / "tokenizer")


def spec_of(meta: dict, cfg: LMConfig, tok) -> specs.Spec:
    """Return a sidecar's Spec. Older sidecars lack the ids of the prompts: then `tok` renders them. Raises
    UserError as `make_spec`."""
    choose(verbalizer.INJECTIONS, injection(meta), "the injection of the bundle")
    return specs.make_spec(
        cfg,
        tok,
        layer=meta["extraction"]["layer_index"],
        dtype=meta["dtype"],
        alpha=meta["extraction"]["injection_scale"],
        injection=injection(meta),
        marker=meta["tokens"]["injection_char"],
        av_template=meta["prompt_templates"]["av"],
        ar_template=meta["prompt_templates"]["ar"],
        n_suffix=len(meta["tokens"]["critic_suffix_ids"]),
        ids=meta.get("prompt_ids"),
    )


def check_target(directory: str | Path, meta: dict, path: Path, cfg: LMConfig) -> None:
    """Raise UserError unless the target at `path` is the one that the bundle was trained with."""
    if LMConfig.of_plain(meta["lm"]) != cfg:
        raise UserError(f"{directory} was made for another architecture than that of {path}; pass the target "
                        f"{meta['base_checkpoint']!r}")
    known = {"base_fingerprint": weights.fingerprint(path), "base_digest": weights.digest(path)}
    if any(meta[k] != v for k, v in known.items() if k in meta):  # older sidecars lack the digest
        raise UserError(f"{directory} was made for other weights than those in {path}; pass the target "
                        f"{meta['base_checkpoint']!r} it was trained with")


def check_ids(directory: str | Path, spec: specs.Spec, meta: dict, tok) -> None:
    """Raise UserError unless `tok` is the bundle's tokenizer and the ids of its prompts are the sidecar's. A
    packed bundle's sidecar has a digest of all these ids. Older sidecars lack the tokenizer's fingerprint."""
    known = {"tokenizer": tok_lib.fingerprint(tok), "prompts_sha256": specs.prompts_digest(spec)}
    if specs.first_difference(spec, meta["tokens"]) or any(meta.get(k, v) != v for k, v in known.items()):
        raise UserError(
            f"{directory}: its tokenizer is not the sidecar's, or renders the prompts to other ids; restore "
            "the bundle's tokenizer directory, or the target's tokenizer"
        )


def read_trees(directory: str | Path, meta: dict, cfg: LMConfig, mesh=None) -> dict:
    """Read {"av": tree, "ar": tree} onto the mesh or the default device. Raises UserError."""
    like = {role: sharded_load.abstract(table, mesh) for role, table in _tables(directory, meta, cfg).items()}
    if packed.is_packed(meta):
        return packed.load_trees(paths.path(directory), like)
    return checkpoint.load_tree(paths.path(directory) / "params", like)


def open_trees(directory: str | Path, meta: dict, cfg: LMConfig) -> dict:
    """Return {"av": tree, "ar": tree} of `lazy_params.Array`, in the dtype of the bundle; a packed bundle is
    read as float32. Raises UserError."""
    like = {role: params_lib.nest(table) for role, table in _tables(directory, meta, cfg).items()}
    if packed.is_packed(meta):
        return packed.open_trees(paths.path(directory), like)
    return checkpoint.open_tree(paths.path(directory) / "params", like)


def _tables(directory: str | Path, meta: dict, cfg: LMConfig) -> dict:
    """Return {role: table of its tree}. Raises UserError if a listed file is missing or has another size."""
    params = paths.path(directory) / "params"
    if packed.is_packed(meta):
        packed.check(paths.path(directory), meta)
        listed, found = {}, {}
    else:
        listed, found = meta.get("files", {}), _sizes(params)
    for name, size in listed.items():
        if found.get(name) != size:
            raise UserError(
                f"{params.parent / name}: {found.get(name, 'no')} bytes instead of {size}; the bundle was "
                "damaged or half copied: copy it again, or delete it and run `nla train` once more"
            )
    roles, layer = meta["roles"], meta["extraction"]["layer_index"]
    return {
        "av": verbalizer.table(cfg, rank=roles["av_rank"], affine=roles["affine"]),
        "ar": reconstructor.table(cfg, layer, rank=roles["ar_rank"], kind=ar_kind(meta)),
    }
