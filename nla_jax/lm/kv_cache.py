"""The key/value cache of the decode loop: shared levels for the prompt, and slots for each row's new tokens.

A level is a part of the prompt with keys and values for b rows, where b divides the N decoded rows. N / b
adjacent rows share each of them. For the verbalizer, b is 1 before the marker, and the number of activations
from the marker on. Only the new tokens have keys and values for each of the N rows.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm import delta_net
from nla_jax.lm.block import block
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import KV, join
from nla_jax.lm.ops import attend_levels
from nla_jax.lm.rotary import rotary
from nla_jax.sharding import placement


@flax.struct.dataclass
class Level:
    """Keys and values of one part of the prompt: [b, K, S, d] per block, or stacked over blocks.

    If blocks that are not local have other heads, theirs follow those of local blocks. Stacked, there is then
    {whether the blocks are local: their stack}.
    """

    k: list | dict | jax.Array
    v: list | dict | jax.Array
    place_BS: jax.Array  # position of a slot's token within the level, from 0; -1 is padding

    @property
    def batch(self) -> int:
        return self.place_BS.shape[0]


def span(kv: KV, start: int, stop: int) -> KV:
    """Return these positions of a cache without states, which cannot be cut."""
    stacks = {name: None if a is None else a[..., start:stop, :] for name, a in kv.stacks().items()}
    return KV(valid_BS=kv.valid_BS[:, start:stop], **stacks)


def make_levels(prompt: KV | tuple[KV, ...], n_rows: int, dtype, stacked: bool = False) -> tuple[Level, ...]:
    """Lay out the prompt's parts as levels, in order.

    On a mesh, a part with one row is replicated. Other parts are sharded like the `n_rows` rows. Their rows
    are repeated first, because a device would otherwise need rows of another. Raises ValueError if a part's
    batch does not divide `n_rows`.
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
    times = 1 if B == 1 else math.lcm(B, placement.n_shards(n_rows)) // B

    def own(a, axis):
        a = a if times == 1 else jnp.repeat(a, times, axis)
        return placement.constrain(a) if B == 1 else placement.shard_rows(a, axis)

    def blocks(a_LBKSd):
        a_LBKSd = a_LBKSd.astype(dtype)
        return own(a_LBKSd, 1) if stacked else [own(a, 0) for a in a_LBKSd]

    place_BS = jnp.where(kv.valid_BS, jnp.cumsum(kv.valid_BS, 1, jnp.int32) - 1, -1)
    if kv.global_k_LBKSd is None:
        return Level(blocks(kv.k_LBKSd), blocks(kv.v_LBKSd), own(place_BS, 0))
    pairs = [(blocks(a), blocks(b)) for a, b in (
        (kv.k_LBKSd, kv.global_k_LBKSd), (kv.v_LBKSd, kv.global_v_LBKSd))]
    k, v = ({True: near, False: far} if stacked else near + far for near, far in pairs)
    return Level(k, v, own(place_BS, 0))


def allocate(cfg: LMConfig, n_blocks: int, logits_NV, max_new: int, dtype, stacked: bool = False,
             last: KV | None = None):
    """Allocate slots for the new tokens: (k, v) [N, K, T, d] per block.

    A block with linear attention has its state after the prompt in their place, for each row. last: the last
    part of the prompt, which has it. stacked: return {kind: stacks over the blocks of this kind} instead.
    """
    # The contents are never read. They depend on the logits because XLA would hoist a constant buffer to the
    # start, where it overlaps the float32 adapter merge.
    empty = jnp.isnan(logits_NV[:, 0]).astype(dtype)[:, None, None, None]
    n_rows = len(logits_NV)

    def slots(local: bool, *stack):
        n_kv, d = cfg.kv_heads(local)
        shape = *stack, n_rows, n_kv, max_new, d
        return tuple(placement.shard_rows(jnp.broadcast_to(empty, shape), len(stack)) for _ in "kv")

    states = _states(n_rows, last) if cfg.linear else ()
    if stacked:
        counts = {kind: cfg.kinds.count(kind) for kind in set(cfg.kinds)} or {False: n_blocks}
        return {kind: states if kind and cfg.linear else slots(kind, n) for kind, n in counts.items()}
    none = (False,) * n_blocks
    linear, local = cfg.linear or none, cfg.local or none
    return [tuple(a[sum(linear[:i])] for a in states) if linear[i] else slots(local[i])
            for i in range(n_blocks)]


def _states(n_rows: int, last: KV) -> tuple:
    """Return (inputs of the convolution, S) of every row, stacked over blocks with linear attention."""
    return tuple(placement.shard_rows(jnp.repeat(a, n_rows // a.shape[1], 1), 1)
                 for a in (last.conv_LBWC, last.state_LBHkv))


def take_rows(levels: tuple[Level, ...], written, rows_n, n_rows: int):
    """Return (levels, written) of the rows `rows_n` of `n_rows` decoded rows.

    A level of one row stays shared. Each row gets a copy of its row of the others, because its neighbours no
    longer share it. Rows of one device only.
    """
    axis = int(isinstance(written, dict))  # they are stacked over blocks

    def take(tree, rows_n, axis=axis):
        return jax.tree.map(lambda a: a.at[(slice(None),) * axis + (rows_n,)].get(mode="clip"), tree)

    def own(level):
        if level.batch == 1:
            return level
        of_n = rows_n // (n_rows // level.batch)
        return Level(take(level.k, of_n), take(level.v, of_n), take(level.place_BS, of_n, 0))

    return tuple(map(own, levels)), take(written, rows_n)


def capacity(cfg: LMConfig, written) -> int:
    """Return how many new tokens there are slots for; 1 if all attention is linear, which needs none."""
    if cfg.linear and all(cfg.linear):
        return 1
    first = False if isinstance(written, dict) else cfg.linear.index(False) if cfg.linear else 0
    return jax.tree.leaves(written[first])[0].shape[-2]


def views(cfg: LMConfig, levels: tuple[Level, ...], n_rows: int, max_new: int, slot) -> dict[bool, tuple]:
    """Return {False: (cos, sin, masks)} for the token in `slot` of each row; local blocks use key True.

    slot: of all rows, or [N] of each. There is one mask per level, and one for the new tokens: [b, n, S],
    where n is N / b, or 1 if the rows share it. The last one is [1, 1, T] if the rows share the slot.
    """
    back_XT = jnp.reshape(slot, (-1, 1)) - jnp.arange(max_new)[None]  # how far back a new token is
    sums = [jnp.repeat(level.place_BS.max(1) + 1, n_rows // level.batch) for level in levels]
    pos_N = sum(sums) + slot
    masks = [level.place_BS[:, None] >= 0 for level in levels] + [(back_XT >= 0)[:, None]]
    out = {False: (*rotary(pos_N[:, None], cfg), masks)}
    if cfg.local:
        back_N, near = pos_N, []  # how far back a level's first token is
        for level, mask, n in zip(levels, masks, sums, strict=False):
            far = back_N.reshape(level.batch, -1, 1) - level.place_BS[:, None]
            near.append(mask & (far < cfg.window))
            back_N = back_N - n
        near.append(masks[-1] & (back_XT < cfg.window)[:, None])
        out[True] = (*rotary(pos_N[:, None], cfg, True), near)
    return out


def _places_in_level(cfg: LMConfig) -> dict[int, int]:
    """Return {block: which keys and values of a `Level` are its own} of blocks with softmax attention."""
    linear = cfg.linear or (False,) * cfg.n_blocks
    first = cfg.local if cfg.global_heads and cfg.local else (True,) * cfg.n_blocks
    order = sorted((i for i in range(cfg.n_blocks) if not linear[i]), key=lambda i: not first[i])
    return {i: n for n, i in enumerate(order)}


def put(cache_NKTd, new_NK1d, slot):
    """Write one token of each row at `slot`, or at its own slot if `slot` is [N].

    The latter passes over the whole cache, which attention reads anyway. A scatter made a step of decoding
    three times as long on a CPU.
    """
    if jnp.ndim(slot) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache_NKTd, new_NK1d, slot, 2)
    here_NT = jnp.arange(cache_NKTd.shape[2])[None] == slot[:, None]
    return jnp.where(here_NT[:, None, :, None], new_NK1d, cache_NKTd)


def run_blocks(blocks: list, cfg: LMConfig, x_ND, views, prompt: tuple[Level, ...], written: list, slot,
               products):
    """Run one token a row through every block: (x_ND, `written` with its keys and values at `slot`).

    views, slot: as in `views`. products: as for `block.block`.
    """
    local = cfg.local or (False,) * len(written)
    new, places = [], _places_in_level(cfg)
    for i, (p, cache, is_local) in enumerate(zip(blocks, written, local, strict=True)):
        cos, sin, masks = views[is_local]
        if "delta_out" in p:
            step = functools.partial(delta_net.over_token, cfg, cache)
            x_ND, kept = block(p, cfg, x_ND, cos, sin, step, products)
            new.append(kept)
            continue

        def attend(q, k, v, i=places[i], cache=cache, masks=masks):
            here = tuple(put(c, a, slot) for c, a in zip(cache, (k, v), strict=True))
            parts = [*((level.k[i], level.v[i]) for level in prompt), here]
            return attend_levels(q[:, 0], parts, masks, k.dtype, cfg.query_scalar, cfg.attn_softcap), here

        x_ND, kept = block(p, cfg, x_ND, cos, sin, attend, products)
        new.append(kept)
    return x_ND, new
