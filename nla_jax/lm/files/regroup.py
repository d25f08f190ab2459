"""Tensors that files join or split differently from the parameters: fused matrices, and experts one by one.

Our part of a fused matrix is named "FUSED[name]", and all experts of a block together have "*" for the
number of the expert. Both are names in `Family.hf` and `Family.gguf` only; no file has them.
"""

import re
from functools import partial
from itertools import accumulate

import numpy as np

from nla_jax.errors import UserError, join_faults, one_line, short_repr
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.family import Tensor

_PART = re.compile(r"(.*)\[\w+\]")


def file_name(theirs: str) -> str:
    """Return the name of the fused matrix that this is a part of, or else the name itself."""
    match = _PART.fullmatch(theirs)
    return match[1] if match else theirs


def fused(names: dict[str, str]) -> dict[str, list[str]]:
    """Return {fused matrix: our names of its parts, from its first rows on} of a family's names."""
    out = {}
    for ours, theirs in names.items():
        if (whole := file_name(theirs)) != theirs:
            out.setdefault(whole, []).append(ours)
    return out


def regroup(path, cfg: LMConfig, names: dict[str, str], tensors: dict[str, Tensor],
            others: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Return the tensors by the names in `names`. others: names that some files have in their place.

    Raises UserError for experts that are missing or differ, and for a fused matrix of another shape.
    """
    from nla_jax.lm.params import table  # it imports jax, and `nla --help` reads this module

    specs, out, wrong, others = table(cfg), dict(tensors), [], others or {}
    for ours, block in ((ours, block) for ours in others for block in range(cfg.n_blocks)):
        if (name := others[ours].format(i=block)) in out:
            out[names[ours].format(i=block)] = out.pop(name)
    for whole, parts in [*fused(others).items(), *fused(names).items()]:
        if not (parts := [ours for ours in parts if ours in specs]):
            continue
        needed = file_name(names[parts[0]]) == whole
        sizes = [specs[ours].shape[-1] for ours in parts]
        for block in range(cfg.n_blocks):
            if (name := whole.format(i=block)) not in out:
                wrong += [f"{name} is missing"] if needed else []
                continue
            tensor, (*lead, n_in, _) = out.pop(name), specs[parts[0]].shape[1:]
            shape = (*lead, sum(sizes), n_in)
            if tensor.shape != shape:
                wrong.append(f"{name} has shape {short_repr(tensor.shape)}, not {shape}")
                continue
            for ours, end, size in zip(parts, accumulate(sizes), sizes, strict=True):
                out[names[ours].format(i=block)] = _rows(tensor, end - size, size)
    for theirs in [theirs for ours, theirs in names.items() if "*" in theirs and ours in specs]:
        for block in range(cfg.n_blocks if len(wrong) < 20 else 0):
            if theirs.format(i=block) in out:
                continue
            found = [theirs.format(i=block).replace("*", str(e)) for e in range(cfg.experts[0])]
            missing = [name for name in found if name not in out]
            if missing or len({out[name].shape for name in found}) > 1:
                wrong += [f"{one_line(name)} is missing" for name in missing] or [
                    f"{theirs.format(i=block)} have several shapes"
                ]
                continue
            out[theirs.format(i=block)] = _stack([out.pop(name) for name in found])
    if wrong:
        raise UserError(f"{path} does not fit its configuration: " + join_faults(wrong))
    return out


def _rows(tensor: Tensor, start: int, size: int) -> Tensor:
    """Return `size` rows of a matrix, or of each matrix of a stack, from row `start` on."""
    shape = (*tensor.shape[:-2], size, tensor.shape[-1])

    def part(at):
        first, last, _ = at[-2].indices(size)
        return tensor.part((*at[:-2], slice(start + first, start + last), at[-1]))

    if tensor.part is None:
        return Tensor(shape, lambda: tensor.read()[..., start : start + size, :], None, tensor.dtype)
    return Tensor(shape, partial(part, (slice(None),) * len(shape)), part, tensor.dtype)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one shape as one, with a leading axis."""
    first = tensors[0]

    def part(at):
        return np.stack([t.part(at[1:]) for t in tensors[at[0]]])

    return Tensor((len(tensors), *first.shape), lambda: np.stack([t.read() for t in tensors]),
                  part if first.part else None, first.dtype)


def split(theirs: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return [(name, tensor)] of one parameter in the file's orientation; experts have one each."""
    if "*" not in theirs:
        return [(theirs, array)]
    return [(theirs.replace("*", str(e)), one) for e, one in enumerate(array)]


def join(pairs: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the parts of fused matrices, which are in order."""
    out: dict[str, list] = {}
    for name, array in pairs:
        out.setdefault(file_name(name), []).append(array)
    return {
        name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -2) for name, arrays in out.items()
    }
