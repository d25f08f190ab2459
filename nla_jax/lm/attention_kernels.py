"""Fused attention without a score matrix in memory: cuDNN's on a GPU, the splash kernel on a TPU.

Both compute the same function as `ops.attend` in the same dtypes, with another order of summation. They run
the passes over many tokens in training, scoring and extraction. The shared prefix, prefill and decoding use
plain attention.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nla_jax.errors import UserError
from nla_jax.lm.config import LMConfig

CHOICES = ("long", "auto", "plain", "cudnn", "splash")
LONG = 1024  # tokens from which "long" uses a kernel; below, plain attention costs little (docs/scaling.md)
TILE = 128  # the splash kernel needs numbers of queries and of keys that are multiples of it
HEADS = 64  # smallest head size for the splash kernel; smaller heads leave most of a tile empty
_KERNELS = {"cuda": "cudnn", "tpu": "splash"}


class Rows(NamedTuple):
    """The splash kernel's input in place of a mask: segment ids, int32, 1 for real tokens and 0 for padding.

    valid_BT: ids of the queries. valid_BS: ids of all slots that they may attend to. Tokens attend within
    their segment only. local_B: whether the block is local, the same in every row.
    """

    valid_BT: jax.Array
    valid_BS: jax.Array
    local_B: jax.Array


def platform_of(device) -> str:
    """Return the platform of a device: jax's name, or "cuda" or "rocm" for a GPU."""
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def resolve(choice: str, device, cfg: LMConfig, dtype: str) -> str:
    """Resolve `choice` for a model on a device: "plain", "cudnn", "splash", or for the choice "long" such as
    "long splash" (`at_length`). dtype: of matrix products.

    Raises UserError if `choice` is a kernel that does not support this device, model or dtype.
    """
    platform = platform_of(device)
    is_open = choice in ("auto", "long")
    kernel = _KERNELS.get(platform, "plain") if is_open else choice
    reason = None if kernel == "plain" else _reason_unsupported(kernel, platform, device, cfg, dtype)
    if reason and not is_open:
        raise UserError(f"config attention={choice!r}: {reason}; set attention=auto or attention=plain")
    if reason or kernel == "plain":
        return "plain"
    return f"long {kernel}" if choice == "long" else kernel


def at_length(attention: str, n_tokens: int) -> str:
    """Return the implementation for a pass over so many tokens: "long splash" is "splash" or "plain"."""
    kind, _, kernel = attention.rpartition(" ")
    return kernel if not kind or n_tokens >= LONG else "plain"


def _reason_unsupported(kernel: str, platform: str, device, cfg: LMConfig, dtype: str) -> str | None:
    """Return the reason why a kernel does not support this device, model or dtype; None if it does."""
    home = next(p for p, k in _KERNELS.items() if k == kernel)
    if platform != home:
        return f"it runs on {home}, and this is {platform}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes bfloat16, and dtype is {dtype}"
    sizes = {cfg.kv_heads(local)[1] for local in (False, *cfg.local)}
    if kernel == "splash":
        small = [d for d in sizes if d % 8 or d < HEADS]
        return f"heads are of {small[0]}, not a multiple of 8 from {HEADS} on" if small else None
    if cfg.attn_softcap is not None:
        return "this model caps its scores, which cuDNN does not"
    most = 256 if float(device.compute_capability) >= 9 else 128
    if large := [d for d in sizes if d % 8 or d > most]:
        return f"heads are of {large[0]}, not a multiple of 8 up to {most}"
    return None


def window_is_shorter(cfg: LMConfig, length: int) -> bool:
    """Return whether the window of local blocks is shorter than `length` slots."""
    return bool(cfg.local) and length > cfg.window


def attend_fused(kernel: str, cfg: LMConfig, q_BTHd, k_BKSd, v_BKSd, seen, dtype):
    """Compute `ops.attend` by a kernel: [B, T, H*d], float32.

    The queries belong to the last T slots. seen: the mask [B, T, S] for "cudnn", `Rows` for "splash". Values
    at padding tokens are meaningless but finite.
    """
    q = (q_BTHd * (cfg.query_scalar or cfg.head_dim) ** -0.5).astype(dtype)
    run = {"cudnn": _cudnn, "splash": _splash}[kernel]
    out = run(cfg, q, k_BKSd.astype(dtype), v_BKSd.astype(dtype), seen)
    return out.reshape(*out.shape[:2], -1).astype(jnp.float32)


def _cudnn(cfg, q_BTHd, k_BKSd, v_BKSd, mask_BTS, implementation: str = "cudnn"):
    T, S = mask_BTS.shape[1:]
    # A query without visible keys (left padding) gets all keys, because its softmax would be undefined.
    mask = mask_BTS | ~mask_BTS.any(-1, keepdims=True)
    # cuDNN's backward pass needs even lengths. Added queries see all keys; added keys are masked.
    odd_T, odd_S = T % 2, S % 2
    mask = jnp.pad(jnp.pad(mask, ((0, 0), (0, odd_T), (0, 0)), constant_values=True),
                   ((0, 0), (0, 0), (0, odd_S)))
    q = jnp.pad(q_BTHd, ((0, 0), (0, odd_T), (0, 0), (0, 0)))
    k, v = (jnp.pad(a.transpose(0, 2, 1, 3), ((0, 0), (0, odd_S), (0, 0), (0, 0)))
            for a in (k_BKSd, v_BKSd))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation=implementation)
    return out[:, :T]


def _splash(cfg, q_BTHd, k_BKSd, v_BKSd, rows: Rows):
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    more_T, more_S = -T % TILE, -S % TILE
    q = q_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, more_T), (0, 0)))
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, more_S), (0, 0))) for a in (k_BKSd, v_BKSd))
    ids = jnp.pad(rows.valid_BT, ((0, 0), (0, more_T))), jnp.pad(rows.valid_BS, ((0, 0), (0, more_S)))
    shape = T + more_T, S + more_S
    wide = _kernel(cfg, shape, S - T, 0)
    if not window_is_shorter(cfg, S):
        out = wide(q, k, v, ids)
    elif all(cfg.local):
        out = _kernel(cfg, shape, S - T, cfg.window)(q, k, v, ids)
    else:
        near = _kernel(cfg, shape, S - T, cfg.window)
        out = jax.lax.cond(rows.local_B[0], near, wide, q, k, v, ids)
    return out[:, :, :, :T].transpose(0, 3, 1, 2, 4)


def _kernel(cfg, shape: tuple[int, int], before: int, window: int):
    """Return q [B, K, G, T, d], k and v [B, K, S, d], ids ([B, T], [B, S]) -> [B, K, G, T, d], for `shape`.

    before: number of slots before the first query's. window: number of slots that a query sees, its own
    included; 0 means all earlier ones.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, S = shape
    mask = masks.LocalMask(shape, (window - 1, 0), before) if window else masks.CausalMask(shape, before)
    q, k = (math.gcd(n, 4 * TILE) for n in shape)
    # A single backward kernel computes all gradients if there is only one block of keys.
    one = k == S
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, use_fused_bwd_kernel=one,
        **({} if one else {"block_q_dq": q, "block_kv_dq": k}),
    )

    def run(q_BKGTd, k_BKSd, v_BKSd, ids):
        kernel = splash.make_splash_mqa_single_device(
            mask=masks.MultiHeadMask([mask] * q_BKGTd.shape[2]), block_sizes=sizes,
            attn_logits_soft_cap=cfg.attn_softcap,
        )
        heads = jax.vmap(kernel, (0, 0, 0, None))
        return jax.vmap(heads)(q_BKGTd, k_BKSd, v_BKSd, splash.SegmentIds(*ids))

    return run
