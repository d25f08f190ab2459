"""The activation reconstructor (AR): text -> h. Splice into its prompt, read at the last token.

A trainable AR is {"params" or "lora", "head"}: blocks 0..K of the target without final norm and
unembedding, and a D x D head without bias, initialised to the identity.

The empty tree {} is the frozen target as AR (FROZEN): the target's own blocks 0..K without a head. It has no
trainable parameters, so AV and AR cannot develop a private code.
"""

import jax.numpy as jnp

from nla_jax.lm import lora
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import cast_tail, embed, forward
from nla_jax.lm.ops import dense
from nla_jax.prompts import ARPrompt
from nla_jax.sharding import placement
from nla_jax.util.batching import pad_rows

KINDS = ("trained", "frozen")  # `config.ar.kind`
FROZEN: dict = {}


def table(cfg: LMConfig, layer: int, *, rank: int = 0, kind: str = "trained") -> dict[str, params_lib.Spec]:
    """Return {name: Spec} of an AR's tree; empty for the frozen target."""
    if kind == "frozen":
        return {}
    short = cfg.first_blocks(layer + 1)
    if rank:
        specs = {f"lora/{n}": s for n, s in lora.table(short, rank).items()}
    else:
        keep = params_lib.table(short).items()
        specs = {f"params/{n}": s for n, s in keep if n == "embed" or n.startswith("blocks/")}
    specs["head"] = params_lib.Spec((cfg.d_model, cfg.d_model), ("norm", "model"), "eye")
    return specs


def init(base: dict, cfg: LMConfig, layer: int, *, rank: int = 0, key=None, kind: str = "trained") -> dict:
    """Return an initial AR: a copy of blocks 0..layer (rank 0) or adapters, head = I; {} for "frozen"."""
    if kind == "frozen":
        return dict(FROZEN)
    head = jnp.eye(cfg.d_model, dtype=jnp.float32)
    if rank:
        return {"lora": lora.init(cfg.first_blocks(layer + 1), rank, key), "head": head}
    short = params_lib.truncate(base, layer + 1, cfg)
    return {"params": params_lib.float32_copy(short), "head": head}


def weights(base: dict, ar: dict, layer: int, dtype=jnp.float32, cfg: LMConfig | None = None) -> dict:
    """Return the AR's parameters in `dtype`, with the head under "head"; blocks as in `verbalizer.weights`.
    The frozen target (an empty `ar`) has no head. cfg: as for `params.truncate`."""
    if not ar:
        return cast_tail(params_lib.truncate(base, layer + 1, cfg, whole=True), dtype)
    if "lora" in ar:
        params = lora.attach(cast_tail(params_lib.truncate(base, layer + 1, cfg, whole=True), dtype),
                             cast_tail(ar["lora"], dtype))
    else:
        params = cast_tail(ar["params"], dtype)
    return {**params, "head": ar["head"].astype(dtype)}


def splice(prompt: ARPrompt, ids_BT, start_B, end_B):
    """Copy ids[start:end] of each row into the prompt: before + words + after.

    Returns (ids [B, len(before) + T + len(after)], valid, last_B): right padded; `last_B` is the
    index of the last token, where h is read. An empty span leaves the bare prompt, or one padding token if
    that is empty too. A last token that ends in a line break (`ARPrompt.breaks`) is replaced by the token
    without it, because the text path strips the explanation.
    """
    T = ids_BT.shape[1]
    before, after = jnp.array(prompt.before, jnp.int32), jnp.array(prompt.after, jnp.int32)
    n = jnp.maximum(end_B - start_B, 0)[:, None]
    j = jnp.arange(T + len(after))[None]
    words = jnp.take_along_axis(ids_BT, jnp.clip(start_B[:, None] + j, 0, T - 1), 1)
    if prompt.breaks:
        with_break, bare = jnp.array(prompt.breaks, jnp.int32).T[:, None]
        last = jnp.take_along_axis(ids_BT, jnp.clip(end_B[:, None] - 1, 0, T - 1), 1)
        same = last == with_break
        without = jnp.sum(jnp.where(same, bare, 0), 1, jnp.int32, keepdims=True)
        last = jnp.where(same.any(1, keepdims=True), without, last)
        words = jnp.where(j == n - 1, last, words)
    tail = after[jnp.clip(j - n, 0, len(after) - 1)] if len(after) else prompt.pad
    length = n + len(after)
    ids = jnp.where(j < n, words, jnp.where(j < length, tail, prompt.pad))
    head = jnp.broadcast_to(before, (ids.shape[0], len(before)))
    ids = jnp.concatenate([head, ids], 1)
    length = jnp.maximum(length + len(before), 1)
    return ids, jnp.arange(ids.shape[1])[None] < length, length[:, 0] - 1


def reconstruct(params, cfg: LMConfig, ids_BT, valid_BT, last_B, remat: bool = False, dtype=None,
                summed=None, attention: str = "plain", frozen: bool = False):
    """Predict activations h_BD (float32, arbitrary norm) from whole AR prompts.

    Args:
      params: `weights(...)`.
      ids_BT, valid_BT: right-padded prompts, from `splice` (token path) or `rows` (text path).
      last_B: index of the last real token of each row, where h is read.
      remat, dtype, summed, attention, frozen: as in `forward`.
    """
    x, _ = forward(params, cfg, embed(params, cfg, ids_BT), valid_BT, remat=remat, dtype=dtype, summed=summed,
                   attention=attention, frozen=frozen)
    x_BD = jnp.take_along_axis(x, last_B[:, None, None], 1)[:, 0]
    if "head" not in params:
        return placement.shard_rows(x_BD).astype(jnp.float32)
    head = placement.gather_weight(params["head"], ("norm", "model"), x_BD.shape[0])
    return dense(placement.shard_rows(x_BD), head)


def rows(tok, template: str, texts: list[str], pad: int, multiple: int = 16):
    """Put each text into the template, tokenise the whole prompt and pad it on the right, on the host.

    This is the text path. A prompt without tokens becomes one padding token. A special token that a text
    spells is read as text.

    Returns (ids_BT int32, valid_BT bool, last_B int32); T is rounded up to `multiple` so that few
    shapes are compiled.
    """
    return pad_rows([ids or [pad] for ids in tok_lib.all_raw_ids(tok, texts, template)], pad, multiple)
