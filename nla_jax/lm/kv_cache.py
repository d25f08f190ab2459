"""The cache of the decode loop: the prompt's keys and values once a level, and slots for what rows write.

N rows stand in order. A level is a part of the prompt with keys and values for b rows, where b divides N:
each is shared by N / b rows that follow one another. For the verbalizer b is 1 before the marker, and the
number of activations from the marker on. Only what a row writes itself is kept for each of the N.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm.block import block
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import KV, join
from nla_jax.lm.ops import attend_levels
from nla_jax.lm.rotary import rotary
from nla_jax.sharding import placement


@flax.struct.dataclass
class Level:
    """Keys and values of one part of the prompt: [b, K, S, d] of each block, or of all stacked."""

    k: list | jax.Array
    v: list | jax.Array
    place_BS: jax.Array  # which of the level's tokens stands in a slot, from 0; -1 is padding

    @property
    def batch(self) -> int:
        return self.place_BS.shape[0]


def lay(prompt: KV | tuple[KV, ...], n_rows: int, dtype, stacked: bool = False) -> tuple[Level, ...]:
    """The prompt's parts, in order, as the loop reads them.

    On a mesh a part of one row is whole on every device. Others are dealt out as the `n_rows` rows are, after
    each row was repeated as often as it takes for no device to need another's. Raises ValueError.
    """
    parts: list[KV] = []
    for kv in (prompt,) if isinstance(prompt, KV) else prompt:
        if n_rows % kv.batch:
            raise ValueError(f"{kv.batch} rows of a prompt cannot be shared by {n_rows} rows")
        if parts and parts[-1].batch == kv.batch:  # they are one
            kv = join(parts.pop(), kv)
        parts.append(kv)
    return tuple(_level(kv, n_rows, dtype, stacked) for kv in parts)


def _level(kv: KV, n_rows: int, dtype, stacked: bool) -> Level:
    B = kv.batch
    times = 1 if B == 1 else math.lcm(B, placement.ways(n_rows)) // B

    def own(a, axis):
        a = a if times == 1 else jnp.repeat(a, times, axis)
        return placement.constrain(a) if B == 1 else placement.rows(a, axis)

    def blocks(a_LBKSd):
        a_LBKSd = a_LBKSd.astype(dtype)
        return own(a_LBKSd, 1) if stacked else [own(a, 0) for a in a_LBKSd]

    place_BS = jnp.where(kv.valid_BS, jnp.cumsum(kv.valid_BS, 1) - 1, -1)
    return Level(blocks(kv.k_LBKSd), blocks(kv.v_LBKSd), own(place_BS, 0))


def room(cfg: LMConfig, n_blocks: int, logits_NV, max_new: int, dtype, stacked: bool = False):
    """Slots for what rows write after a prompt: (k, v) [N, K, T, d] of each block, or of all stacked."""
    # Nobody sees what stands there, but made from constants it would be made first of all, and lie beside
    # weights in float32 while adapters are merged.
    empty = jnp.isnan(logits_NV[:, 0]).astype(dtype)[:, None, None, None]
    shape = (logits_NV.shape[0], cfg.n_kv_heads, max_new, cfg.head_dim)
    if stacked:
        return tuple(placement.rows(jnp.broadcast_to(empty, (n_blocks, *shape)), 1) for _ in "kv")
    return [tuple(placement.rows(jnp.broadcast_to(empty, shape)) for _ in "kv") for _ in range(n_blocks)]


def views(cfg: LMConfig, levels: tuple[Level, ...], n_rows: int, max_new: int, slot) -> dict[bool, tuple]:
    """(cos, sin, masks) for the token in `slot` of each row, under True as local blocks see it.

    One mask a level, and one for the written slots: [b, n, S], where n is N / b, or 1 if all see the same.
    """
    own_T = jnp.arange(max_new)
    sums = [jnp.repeat(level.place_BS.max(1) + 1, n_rows // level.batch) for level in levels]
    pos_N = sum(sums) + slot
    masks = [level.place_BS[:, None] >= 0 for level in levels] + [(own_T <= slot)[None, None]]
    out = {False: (*rotary(pos_N[:, None], cfg), masks)}
    if cfg.local:
        back_N, near = pos_N, []  # how far back a level's first token is
        for level, mask, n in zip(levels, masks, sums, strict=False):
            far = back_N.reshape(level.batch, -1, 1) - level.place_BS[:, None]
            near.append(mask & (far < cfg.window))
            back_N = back_N - n
        near.append(masks[-1] & (slot - own_T < cfg.window)[None, None])
        out[True] = (*rotary(pos_N[:, None], cfg, True), near)
    return out


def run_blocks(blocks: list, cfg: LMConfig, x_ND, views, prompt: tuple[Level, ...], written: list, slot,
               products):
    """Run one token a row through every block: (x_ND, `written` with its keys and values at `slot`).

    views: `views`. products: as for `block.block`.
    """
    local = cfg.local or (False,) * len(written)
    new = []
    for i, (p, cache, is_local) in enumerate(zip(blocks, written, local, strict=True)):
        cos, sin, masks = views[is_local]

        def attend(q, k, v, i=i, cache=cache, masks=masks):
            here = tuple(jax.lax.dynamic_update_slice_in_dim(c, a, slot, 2)
                         for c, a in zip(cache, (k, v), strict=True))
            parts = [*((level.k[i], level.v[i]) for level in prompt), here]
            return attend_levels(q[:, 0], parts, masks, k.dtype, cfg.query_scalar, cfg.attn_softcap), here

        x_ND, kept = block(p, cfg, x_ND, cos, sin, attend, products)
        new.append(kept)
    return x_ND, new
