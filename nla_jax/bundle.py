"""The NLA bundle: AV, AR, sidecar and tokenizer in one directory that `nla_jax.load` opens.

DIR/nla_meta.yaml   the sidecar: target, layer, scale, marker, prompts, training
DIR/params/         Orbax: {"av": ..., "ar": ...}
DIR/tokenizer/      tokenizer.json and its configuration. DIR/trust.json: optional (`nla trust`)

A packed bundle (`nla pack`, `lm.files.packed`; `SHIPPED` is one) has adapters.safetensors instead of params/,
and README.md. It has tokenizer/ only if the target's own tokenizer renders other prompts.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nla_jax import reconstructor, specs, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import pair_files, sharded_load, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import packed
from nla_jax.sharding import inference
from nla_jax.specs import KIND, SCHEMA
from nla_jax.util import checkpoint, distributed, hardware, lazy_params, path_kinds, paths
from nla_jax.util.choices import choose, refuse_code_beside

SIDECAR, TRUST = path_kinds.SIDECAR, "trust.json"
DTYPES = ("float32", "bfloat16", "int8")  # of weights; products of int8 weights are in bfloat16
SHIPPED = Path(__file__).parent / "shipped"  # `nla_jax.load` opens it by default
REQUIRED = ("stage", "base_checkpoint", "base_fingerprint", "lm", "dtype", "extraction", "tokens",
            "prompt_templates", "roles", "max_new_tokens", "mean_direction", "created_by")


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
    """A bundle in memory. dtype: of the weights (`load`)."""

    meta: dict
    spec: specs.Spec
    tok: object
    base: dict
    av: dict
    ar: dict
    dtype: str


def injection(meta: dict) -> str:
    """Return the sidecar's injection, one of `prompts.INJECTIONS`; older sidecars lack the key."""
    return meta["extraction"].get("injection", "replace")


def ar_kind(meta: dict) -> str:
    """Return the sidecar's kind of AR, one of `reconstructor.KINDS`; older sidecars lack the key."""
    return meta["roles"].get("ar_kind", "trained")


def load(
    directory: str | Path,
    target: str | None = None,
    check=lambda spec, tok: None,
    *,
    dtype: str = "",
    mesh: Mesh | None = None,
    whole_target: bool = True,
    announce: bool = False,
) -> LoadedBundle:
    """Open a bundle and the target that it was trained with, for inference.

    Weights go from the files to the devices one tensor at a time, in the dtype of the products. Adapters,
    AR's head and the affine map are in float32.

    Args:
      target: location of the target; by default the sidecar's `base_checkpoint`.
      check: called with the Spec and the tokenizer before weights are read; it may raise.
      dtype: of weights and products, one of DTYPES. "": as in the sidecar.
      mesh: default: all devices (`sharding.inference`); without a mesh if there is only one.
      whole_target: if False, read only what explanations and reconstructions need of the target.
      announce: print a line about the devices (`hardware.announce`).

    Raises:
      UserError: the directory is not a bundle, the target is another model, the tokenizer renders
        other prompts, or parameters are missing or damaged.
    """
    meta = read_sidecar(directory)
    path = weights.resolve(target or meta["base_checkpoint"])
    cfg = weights.read_config(path)
    check_target(directory, meta, path, cfg)
    tok = tok_lib.load(tokenizer_dir(directory, meta) or path)
    spec = spec_of(meta, cfg, tok, dtype)
    check_ids(directory, spec, meta, tok)
    check(spec, tok)
    own_av = not meta["roles"]["av_rank"]
    part = {} if whole_target or not own_av else {
        "cfg": cfg.first_blocks(spec.layer + 1), "without": ("final_norm", "lm_head")}
    dtype = dtype or spec.dtype
    mesh = inference.make_mesh(*_bytes(meta, cfg, dtype, part)) if mesh is None else mesh
    if announce:
        hardware.announce(dtype, mesh=mesh)
    _, base = sharded_load.place(path, mesh, dtype, **part)
    trees = place_trees(directory, meta, cfg, mesh, dtype)
    return LoadedBundle(meta, spec, tok, base, trees["av"], trees["ar"], dtype)


def _bytes(meta: dict, cfg: LMConfig, dtype: str, part: dict) -> tuple[int, int]:
    """Return the bytes of all weights, and of AV in decoding."""
    size = lambda table: jnp.dtype(dtype).itemsize * sum(math.prod(s.shape) for s in table.values())
    whole = params_lib.table(part.get("cfg", cfg))
    base = {n: s for n, s in whole.items() if n not in part.get("without", ())}
    return size(base) + sum(map(size, _roles(meta, cfg).values())), size(params_lib.table(cfg))


def tokenizer_dir(directory: str | Path, meta: dict) -> Path | None:
    """Return the directory of the bundle's tokenizer, or None if a packed bundle uses the target's. Raises
    UserError if files of a packed bundle are damaged."""
    if pair_of(meta):
        return pair_of(meta)[0]
    if packed.is_packed(meta):
        packed.check(paths.path(directory), meta)
        if not any(name.startswith("tokenizer/") for name in meta["files"]):
            return None
    return paths.local_copy(paths.path(directory) / "tokenizer")


def spec_of(meta: dict, cfg: LMConfig, tok, dtype: str = "") -> specs.Spec:
    """Return a sidecar's Spec, or one with another dtype. Older sidecars lack the ids of the prompts: then
    `tok` renders them. Raises UserError as `make_spec`, and for a dtype that is not in DTYPES."""
    if dtype and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    choose(verbalizer.INJECTIONS, injection(meta), "the injection of the bundle")
    return specs.make_spec(
        cfg,
        tok,
        layer=meta["extraction"]["layer_index"],
        dtype="bfloat16" if dtype == "int8" else dtype or meta["dtype"],
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
    """Read {"av": tree, "ar": tree} in float32 onto the mesh or the default device. Raises UserError."""
    if pair_of(meta) or packed.is_packed(meta):
        return place_trees(directory, meta, cfg, mesh, "float32")
    tables = _tables(directory, meta, cfg)
    like = {role: sharded_load.abstract(table, mesh) for role, table in tables.items()}
    return checkpoint.load_tree(paths.path(directory) / "params", like)


def place_trees(directory: str | Path, meta: dict, cfg: LMConfig, mesh, dtype: str) -> dict:
    """Read {"av": tree, "ar": tree} for inference, as `load` does. Raises UserError."""
    pair = pair_of(meta)
    out = pair_files.place_models(*pair, cfg, mesh, dtype) if pair else {}
    tables = _roles(meta, cfg) if pair else _tables(directory, meta, cfg)
    for role, tree in open_trees(directory, meta, cfg).items():
        if role in out:
            continue
        models = {n.removeprefix("params/"): s for n, s in tables[role].items() if n.startswith("params/")}
        kinds = dict.fromkeys(tables[role], jnp.dtype(jnp.float32))
        kinds |= {f"params/{n}": kind for n, kind in sharded_load.kinds_of(models, dtype).items()}
        pieces = sharded_load.pieces_of(tree, f"{directory}: {role.upper()}")
        out[role] = sharded_load.stream(pieces, tables[role], kinds, mesh)
    return out


def open_trees(directory: str | Path, meta: dict, cfg: LMConfig) -> dict:
    """Return {"av": tree, "ar": tree} of `lazy_params.Array`, in the dtype of the bundle; a packed bundle is
    read as float32. Raises UserError."""
    if pair := pair_of(meta):
        where = meta["extraction"]["layer_index"], meta["base_checkpoint"]
        return pair_files.open_trees(*pair, cfg, *where)[0]
    like = {role: params_lib.nest(table) for role, table in _tables(directory, meta, cfg).items()}
    if packed.is_packed(meta):
        return packed.open_trees(paths.path(directory), like)
    return checkpoint.open_tree(paths.path(directory) / "params", like)


def pair_of(meta: dict) -> tuple[Path, Path] | None:
    """Return the directories of AV and AR if the bundle refers to a released pair, whose weights are read in
    place (`nla_jax.interchange.find_bundle`)."""
    found = meta.get("pair")
    return found and (Path(found["av"]), Path(found["ar"]))


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
    return _roles(meta, cfg)


def _roles(meta: dict, cfg: LMConfig) -> dict:
    roles, layer = meta["roles"], meta["extraction"]["layer_index"]
    return {
        "av": verbalizer.table(cfg, rank=roles["av_rank"], affine=roles["affine"]),
        "ar": reconstructor.table(cfg, layer, rank=roles["ar_rank"], kind=ar_kind(meta)),
    }
