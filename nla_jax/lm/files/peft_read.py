"""Read AV or AR from a PEFT adapter: LoRA factors, whole modules, and AR's head."""

import dataclasses
import re
from itertools import accumulate
from pathlib import Path

import numpy as np
from flax import traverse_util

from nla_jax.errors import UserError
from nla_jax.lm import lora, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import peft_config
from nla_jax.lm.files.families import FAMILIES
from nla_jax.lm.files.peft_config import AR_WEIGHTS, WEIGHTS, Settings
from nla_jax.lm.files.regroup import file_name
from nla_jax.util import lazy_params

HEAD = "value_head.safetensors"  # AR's head beside its weights
_BLOCK = re.compile(r"^(?P<module>(?:.*\.)?layers\.(?P<block>\d+)\.(?P<tail>.+))\.lora_(?P<factor>[AB])"
                    r"(?:\.default)?\.weight$")
# Ends of the names of whole modules -> our parameter.
_WHOLE = {"embed_tokens.weight": "embed", "lm_head.weight": "lm_head", "value_head.weight": "head"}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory, float32.

    lora: {matrix: {"a": [L, in, rank], "b": [L, rank, out]}}, as `lora.table`: the scale is in b, and smaller
    ranks are padded with zeros. rank: the largest. whole: our parameter -> its array, [in, out].
    """

    rank: int
    lora: dict
    whole: dict[str, np.ndarray]


def module_names() -> dict[str, list[str]]:
    """Return {the end of a module's name in a block: our matrices}, such as {"self_attn.q_proj": ["wq"]}.

    A fused module has several, from its first rows on: {"self_attn.qkv_proj": ["wq", "wk", "wv"]}. So has a
    module whose shape depends on the kind of the block; a block has one of these.
    """
    found: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        for ours, theirs in family.hf.items():
            if (matrix := ours.removeprefix("blocks/")) in lora.ADAPTED:
                end = file_name(theirs).split("layers.{i}.")[1].removesuffix(".weight")
                matrices = found.setdefault(end, [])
                matrices += [] if matrix in matrices else [matrix]
    return found


def read(directory: Path, cfg: LMConfig, settings: Settings) -> Adapter:
    """Read an adapter of a model with this config. An AR's config has K+1 blocks: later ones are left out.

    Raises UserError if a file is missing or damaged, for a tensor that is not finite, whose shape is not the
    config's or whose name means nothing here, for a module that the base's block lacks, and for a factor
    without its partner. The matrices of a fused module share its first factor.
    """
    path = _file(directory)
    names, table = module_names(), lora.table(cfg, 1)
    factors: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    whole = {}
    for name, tensor in _tensors(path):
        match = _BLOCK.match(name)
        if match is None:
            ours = next((o for end, o in _WHOLE.items() if name.endswith(end)), None)
            if ours is None:
                raise UserError(f"{path}: nla_jax does not support the tensor {name}")
            whole[ours] = tensor if ours == "embed" else tensor.T
            continue
        named, block, factor = names.get(match["tail"], []), int(match["block"]), match["factor"]
        if not named:
            raise UserError(f"{path}: nla_jax does not adapt {match['tail']} of a block ({name})")
        if block >= cfg.n_blocks:
            continue
        matrices = [m for m in named if f"{m}/a" in table and block in params_lib.blocks_of(cfg, m)]
        if not matrices:
            raise UserError(f"{path}: block {block} of the base has no {match['tail']} ({name})")
        module = match["module"].removeprefix("base_model.model.").removeprefix("backbone.")
        rank, sizes = settings.rank_of(module), [table[f"{m}/b"].shape[2] for m in matrices]
        wanted = (rank, table[f"{matrices[0]}/a"].shape[1]) if factor == "A" else (sum(sizes), rank)
        if tensor.shape != wanted:
            raise UserError(f"{path}: {name} has shape {tensor.shape}, and the base's config asks for "
                            f"{wanted}: is this the adapter's base?")
        scale = settings.scale_of(module) if factor == "B" else 1.0
        for matrix, size, end in zip(matrices, sizes, accumulate(sizes), strict=True):
            part = tensor if factor == "A" else tensor[end - size : end]
            factors.setdefault((matrix, block), {})[factor] = part.T * np.float32(scale)
    for (matrix, block), pair in factors.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {matrix} of block {block} has only one of its two factors")
    rank = max((pair["A"].shape[1] for pair in factors.values()), default=1)
    return Adapter(rank, _stack(cfg, rank, factors), whole)


def av_tree(adapter: Adapter, directory: Path, target: str, cfg: LMConfig) -> tuple[dict, int]:
    """Return (AV's tree of `lazy_params.Array`s, its rank: 0 if whole modules make it a whole model).

    Raises UserError for an adapter whose whole modules untie the target's head."""
    tree = {"lora": _wrap(adapter.lora)}
    if not adapter.whole:
        return tree, adapter.rank
    whole = dict(adapter.whole)
    whole.pop("head", None)
    if cfg.tied and whole.keys() & {"embed", "lm_head"}:
        embed, head = whole.get("embed"), whole.pop("lm_head", None)
        if embed is None or head is None or not np.array_equal(embed, head.T):
            raise UserError(f"{directory}: the adapter has its own embedding or head, but its target ties "
                            "them: this is not supported")
    return {"params": _replace(merge_adapters(tree, weights.resolve(target), cfg), whole)}, 0


def ar_tree(adapter: Adapter, directory: Path, target: str, short: LMConfig) -> tuple[dict, int]:
    """Return (AR's tree of `lazy_params.Array`s, its rank), as `av_tree`. short: the config of blocks 0..K.

    The head is in value_head.safetensors, or a whole module of the adapter. Raises UserError without one."""
    whole = dict(adapter.whole)
    head = whole.pop("head", None)
    if head is None:
        head = _head_beside(directory / HEAD, short.d_model)
    if head.shape != (short.d_model,) * 2:
        raise UserError(f"{directory}: the head has shape {head.shape}, not {(short.d_model,) * 2}")
    tree = {"lora": _wrap(adapter.lora), "head": lazy_params.wrap(head, stacked=False)}
    embed = whole.get("embed")
    if embed is None:
        return tree, adapter.rank
    params = merge_adapters(tree, weights.resolve(target), short, ("final_norm", "lm_head"))
    return {"params": _replace(params, {"embed": embed}), "head": tree["head"]}, 0


def merge_adapters(role: dict, path: Path | None, cfg: LMConfig, without: tuple[str, ...] = ()) -> dict:
    """Return a role's parameters as `lazy_params.Array`s: its own, or the target's in float32 with its
    adapters, if any, merged."""
    if "params" in role:
        return role["params"]
    flat = traverse_util.flatten_dict(weights.lazy_tree(weights.open_files(path, cfg, without)), sep="/")

    def one(name: str, base: lazy_params.Array) -> lazy_params.Array:
        ab = role.get("lora", {}).get(name.removeprefix("blocks/"))
        factors = {k: f.whole() for k, f in ab.items()} if ab else {}

        def read(i):
            w = base.read(i).astype(np.float32, copy=False)
            return np.asarray(lora.add_update(w, {k: f[i] for k, f in factors.items()})) if factors else w

        return dataclasses.replace(base, dtype=np.dtype(np.float32), read=read)

    return params_lib.nest({name: one(name, base) for name, base in flat.items()})


def _wrap(tree: dict) -> dict:
    return {m: {k: lazy_params.wrap(a, stacked=True) for k, a in ab.items()} for m, ab in tree.items()}


def _replace(params: dict, whole: dict[str, np.ndarray]) -> dict:
    return params | {name: lazy_params.wrap(a, stacked=False) for name, a in whole.items()}


def _head_beside(path: Path, d_model: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing, and the adapter does not contain AR's head: download it again")
    found = dict(_tensors(path))
    if found.keys() != {"weight"}:
        raise UserError(f"{path} holds {', '.join(sorted(found))}, not one tensor named weight")
    return found["weight"].T


def _stack(cfg: LMConfig, rank: int, factors: dict) -> dict:
    """Return the tree of `lora.table`: zeros where the adapter has no factors."""
    specs = lora.table(cfg, rank)
    tree = params_lib.nest({name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()})
    for (matrix, block), pair in factors.items():
        n, r = params_lib.blocks_of(cfg, matrix).index(block), pair["A"].shape[1]
        tree[matrix]["a"][n, :, :r] = pair["A"]
        tree[matrix]["b"][n, :r] = pair["B"]
    return tree


def _file(directory: Path) -> Path:
    name = WEIGHTS if (directory / peft_config.CONFIG).is_file() else AR_WEIGHTS
    path = directory / name
    if not path.is_file():
        old = directory / "adapter_model.bin"
        hint = f"convert {old.name} to safetensors" if old.is_file() else "download it again"
        raise UserError(f"{path} is missing: {hint}")
    return path


def _tensors(path: Path):
    """Yield (name, tensor in float32) of a safetensors file."""
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            for name in file.keys():
                tensor = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(tensor).all():
                    raise UserError(f"{path}: {name} is not finite; the checkpoint is broken")
                yield name, tensor
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}): download it again") from e
