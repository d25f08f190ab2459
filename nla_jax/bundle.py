"""The NLA bundle: AV, AR, sidecar and tokenizer in one directory that `nla_jax.load` opens.

DIR/nla_meta.yaml   what it is: target, layer, scale, marker, prompts, how it was trained
DIR/params/         Orbax: {"av": ..., "ar": ...}
DIR/tokenizer/      tokenizer.json and its configuration

A packed bundle (`nla pack`, `lm.files.packed`) has adapters.safetensors in place of params/, and README.md.
It has tokenizer/ only where the target's own tokenizer would render other prompts. `SHIPPED` is a packed one.
"""

import dataclasses
import datetime
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from nla_jax import reconstructor, specs, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import packed
from nla_jax.util import checkpoint, distributed, lazy_params, paths
from nla_jax.util.choices import choose, refuse_code_beside

SIDECAR = "nla_meta.yaml"
KIND, SCHEMA = "nla_bundle", 1
SHIPPED = Path(__file__).parent / "shipped"  # what `load` opens when no bundle is named
REQUIRED = (
    "stage", "base_checkpoint", "base_fingerprint", "lm", "dtype", "extraction", "tokens",
    "prompt_templates", "roles", "max_new_tokens", "mean_direction", "created_by",
)


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
    """The contents of nla_meta.yaml. `mean_D`: mean of normalised training activations, where known."""
    import nla_jax

    return {
        "kind": KIND,
        "schema_version": SCHEMA,
        "stage": stage,
        "base_checkpoint": target,
        "base_fingerprint": weights.fingerprint(target_path),
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
        "roles": {"av_rank": av_rank, "ar_rank": ar_rank, "affine": affine, "ar_kind": ar_kind},
        "max_new_tokens": max_new,
        "mean_direction": None if mean_D is None else [float(x) for x in mean_D],
        "training": training,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
    }


def save(directory: str | Path, meta: dict, av, ar, tok) -> None:
    """Write a bundle; the sidecar comes last, so a bundle that has one is whole. All processes of a pod
    call this. `av` and `ar` are trees of arrays, or both of `lazy_params.Array`."""
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
                f"{directory}: {role} parameter {bad[0]} is not finite; the run diverged, "
                "go back to an earlier checkpoint or lower the learning rate"
            )
    checkpoint.save_tree(directory / "params", {"av": av, "ar": ar})
    if not distributed.is_first():
        return
    with paths.sent(directory / "tokenizer") as place:
        tok_lib.save(tok, place)
    meta = {**meta, "files": _sizes(directory / "params")}
    paths.write(directory / SIDECAR, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))


def _sizes(directory: Path) -> dict[str, int]:
    return {f"{directory.name}/{name}": paths.size(p) for name, p in paths.files(directory).items()}


def shipped() -> Path:
    """The directory of the bundle that the package ships. Raises UserError where this copy has none."""
    if not (SHIPPED / SIDECAR).is_file():
        raise UserError(
            f"{SHIPPED}: this copy of nla_jax ships no bundle; name one with --bundle, or make it with "
            "`nla pack --out` that directory"
        )
    return SHIPPED


def named(directory: str) -> Path | str:
    """The bundle that a command is given, or the shipped one, which a line on stderr then says. Raises
    UserError as `shipped`."""
    if directory:
        return directory
    print(f"no --bundle given: using the bundle that nla_jax ships, {shipped()}", file=sys.stderr)
    return SHIPPED


def read_sidecar(directory: str | Path) -> dict:
    """The sidecar of a bundle. Raises UserError when it is missing or of another kind."""
    import yaml

    path = paths.path(directory) / SIDECAR
    if not path.is_file():
        raise UserError(
            f"{directory}: not an NLA bundle ({SIDECAR} is missing); give the directory "
            "that `nla train` wrote, such as runs/quickstart/bundle"
        )
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
class Opened:
    """A bundle in memory."""

    meta: dict
    spec: specs.Spec
    tok: object
    base: dict
    av: dict
    ar: dict


def injection(meta: dict) -> str:
    """How the AV of a sidecar takes h in; in older ones it is not said."""
    return meta["extraction"].get("injection", "replace")


def ar_kind(meta: dict) -> str:
    """The kind of AR of a sidecar, one of `reconstructor.KINDS`; older ones do not say it."""
    return meta["roles"].get("ar_kind", "trained")


def load(directory: str | Path, target: str | None = None) -> Opened:
    """Open a bundle and the target that it was made for.

    Args:
      target: where the target is now, when not where the sidecar says.

    Raises:
      UserError: not a bundle, another target than the one it was trained for, a tokenizer that does
        not fit, or parameters that are missing or damaged.
    """
    meta = read_sidecar(directory)
    path, cfg, base, tok = sharded_load.open_target(target or meta["base_checkpoint"], meta["dtype"])
    same_target(directory, meta, path, cfg)
    if own := own_tokenizer(directory, meta):
        tok = tok_lib.load(own)
    spec = spec_of(meta, cfg, tok)
    same_ids(directory, spec, meta)
    trees = read_trees(directory, meta, cfg)
    return Opened(meta, spec, tok, base, trees["av"], trees["ar"])


def own_tokenizer(directory: str | Path, meta: dict) -> Path | None:
    """Where a bundle's tokenizer is; None where a packed bundle uses its target's. Raises UserError where the
    files of a packed one are damaged."""
    if packed.is_packed(meta):
        packed.check(paths.path(directory), meta)
        if not any(name.startswith("tokenizer/") for name in meta["files"]):
            return None
    return paths.fetched(paths.path(directory) / "tokenizer")


def spec_of(meta: dict, cfg: LMConfig, tok) -> specs.Spec:
    """The static facts of a sidecar, prompts rendered by this tokenizer. Raises UserError as `make_spec`."""
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
    )


def same_target(directory: str | Path, meta: dict, path: Path, cfg: LMConfig) -> None:
    """UserError unless the target at `path` is the one that the bundle was made for."""
    if LMConfig.of_plain(meta["lm"]) != cfg:
        raise UserError(
            f"{directory} was made for another architecture than {path} has; pass the "
            f"target {meta['base_checkpoint']!r}"
        )
    if weights.fingerprint(path) != meta["base_fingerprint"]:
        raise UserError(
            f"{directory} was made for other weights than those in {path}; pass the target "
            f"{meta['base_checkpoint']!r} it was trained with"
        )


def same_ids(directory: str | Path, spec: specs.Spec, meta: dict) -> None:
    """UserError unless a bundle's tokenizer renders its prompts as its sidecar says: for a packed bundle
    without a tokenizer, to all of the same ids."""
    if specs.other_ids(spec, meta["tokens"]) or meta.get(
        "prompts_sha256", specs.prompts_digest(spec)
    ) != specs.prompts_digest(spec):
        raise UserError(
            f"{directory}: its tokenizer renders the prompts to other ids than the sidecar "
            "records; the tokenizer directory, or the target's tokenizer, was changed"
        )


def read_trees(directory: str | Path, meta: dict, cfg: LMConfig, mesh=None) -> dict:
    """{"av": tree, "ar": tree} of a bundle, placed on the mesh or on the default device. Raises UserError."""
    like = {role: sharded_load.abstract(table, mesh) for role, table in _tables(directory, meta, cfg).items()}
    if packed.is_packed(meta):
        return packed.load_trees(paths.path(directory), like)
    return checkpoint.load_tree(paths.path(directory) / "params", like)


def open_trees(directory: str | Path, meta: dict, cfg: LMConfig) -> dict:
    """The same with a `lazy_params.Array` for every array, in the dtype that the bundle has; a packed one is
    read as float32. Raises UserError."""
    like = {role: params_lib.nest(table) for role, table in _tables(directory, meta, cfg).items()}
    if packed.is_packed(meta):
        return packed.open_trees(paths.path(directory), like)
    return checkpoint.open_tree(paths.path(directory) / "params", like)


def _tables(directory: str | Path, meta: dict, cfg: LMConfig) -> dict:
    """Role -> table of its tree, once the files are found to be all there."""
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
