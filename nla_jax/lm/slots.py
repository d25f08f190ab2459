"""Continuous batching: decode a fixed number of slots, which rows enter and leave at different times.

Every slot has its own number of tokens. A row's tokens depend on its own prompt, logits and key only. Its
slot, the time when it entered, and the rows in other slots do not matter.
"""

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm import decode_tp, generate, kv_cache
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import KV
from nla_jax.sharding import placement
from nla_jax.util.keys import IMPL, uniform


@flax.struct.dataclass
class Slots:
    """The state of N slots. T is the largest number of tokens of a row.

    own: the part of the prompt that rows do not share, for each slot. written: keys and values of new tokens,
    in the layout of `kv_cache.allocate`. most_N: the largest number of tokens of each row. done_N: whether a
    row has ended; empty slots have, too. key_N2: the words of each row's key.
    """

    own: kv_cache.Level | None
    written: list | dict
    ids_NT: jax.Array
    length_N: jax.Array
    most_N: jax.Array
    done_N: jax.Array
    key_N2: jax.Array
    temperature_N: jax.Array


def empty(cfg: LMConfig, own: KV, n: int, max_new: int, dtype, pad_id: int) -> Slots:
    """Return n >= 2 empty slots. own: n rows of the prompt's own part, of any content."""
    own = own.replace(valid_BS=jnp.zeros_like(own.valid_BS))
    key_N2, most_N = jnp.zeros((n, 2), jnp.uint32), jnp.zeros(n, jnp.int32)
    now = _fresh(cfg, own, jnp.zeros((n, 1)), key_N2, jnp.zeros(n), most_N, max_new, dtype, pad_id)
    return now.replace(done_N=jnp.ones(n, bool))


def _fresh(cfg: LMConfig, own: KV, logits_AV, key_A2, temperature_A, most_A, max_new: int, dtype,
           pad_id: int) -> Slots:
    """Return slots with prefilled rows, before their first token."""
    A, stacked = len(logits_AV), decode_tp.is_scanned(cfg)
    (level,) = kv_cache.make_levels(own, A, dtype, stacked)
    written = kv_cache.allocate(cfg, cfg.n_blocks, logits_AV, max_new, dtype, stacked, own)
    return Slots(
        level, written, jnp.full((A, max_new), pad_id, jnp.int32), jnp.zeros(A, jnp.int32),
        most_A.astype(jnp.int32), jnp.zeros(A, bool), key_A2, temperature_A.astype(jnp.float32),
    )


def enter(cfg: LMConfig, now: Slots, slot_A, own: KV, logits_AXV, keys_A, temperature_A, most_A, *, dtype,
          draft: tuple[int, ...] = (), begun: KV | None = None, stop_ids: tuple[int, ...] = (),
          eos_ids: tuple[int, ...] = (), pad_id: int = 0) -> Slots:
    """Put A prefilled rows into slots, and sample the first tokens of each.

    Args:
      slot_A: of each row. A row whose number is not below N is left out.
      own, begun, logits_AXV: of the rows, as `verbalizer.prefill_draft` returns them for `draft`, which has
        less than T tokens. A row samples from the first logits, and from the next ones as long as its tokens
        are those of the draft.
      keys_A, temperature_A, most_A: key, temperature and largest number of tokens of each row.
      dtype: of the cache, which must be that of the weights. stop_ids, eos_ids, pad_id: as for
        `generate.sample`.
    """
    key_A2, T = jax.random.key_data(keys_A), now.ids_NT.shape[1]
    new = _fresh(cfg, own, logits_AXV[:, 0], key_A2, temperature_A, most_A, T, dtype, pad_id)
    if begun is not None:
        new = new.replace(written=_begin_with(cfg, new.written, begun, dtype))
    on_A = jnp.ones(len(logits_AXV), bool)
    for t, guess in enumerate((*draft, -1)):
        new = _append(new, logits_AXV[:, t], stop_ids, eos_ids, on_A)
        on_A = on_A & (new.ids_NT[:, t] == guess)

    enters_AN = slot_A[:, None] == jnp.arange(len(now.done_N))[None]
    row_N = enters_AN.argmax(0)

    def put(old, rows, axis=0):
        def one(a, b):  # passes over the whole of a; a scatter would take three times as long on a CPU
            mask = enters_AN.any(0).reshape(-1, *(1,) * (a.ndim - axis - 1))
            mask = jnp.broadcast_to(mask, (*(1,) * axis, *mask.shape))
            return placement.shard_rows(jnp.where(mask, jnp.take(b, row_N, axis, mode="clip"), a), axis)

        return jax.tree.map(one, old, rows)

    axis = int(decode_tp.is_scanned(cfg))  # they are stacked over blocks
    own = kv_cache.Level(put(now.own.k, new.own.k, axis), put(now.own.v, new.own.v, axis),
                         put(now.own.place_BS, new.own.place_BS))
    written = put(now.written, new.written, axis)
    bare = dict(own=None, written=None)
    return put(now.replace(**bare), new.replace(**bare)).replace(own=own, written=written)


def _begin_with(cfg: LMConfig, written, begun: KV, dtype):
    """Put the keys and values of the first tokens into the cache of the new tokens."""
    stacked = isinstance(written, dict)
    (level,) = kv_cache.make_levels(begun, begun.batch, dtype, stacked)
    first = {False: (level.k, level.v)} if stacked else [*zip(level.k, level.v, strict=True)]
    put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, 0, a.ndim - 2)
    return jax.tree.map(put, written, first)


def advance(w: dict, cfg: LMConfig, shared: kv_cache.Level, now: Slots, n, *, stop_ids: tuple[int, ...] = (),
            eos_ids: tuple[int, ...] = ()) -> Slots:
    """Sample n more tokens in each slot (traced or not), or until every row has ended.

    w: `generate.decode_weights`. shared: the part of the prompt that all rows share. Splitting the work over
    several calls does not change the tokens.
    """
    decode_token = decode_tp.decode_token if placement.has_mesh() else generate._decode_token
    own = now.own  # not in the loop's carry

    def body(carry):
        i, now = carry
        slot_N = jnp.maximum(now.length_N - 1, 0)  # of the token that is read
        token_N = jnp.take_along_axis(now.ids_NT, slot_N[:, None], 1)[:, 0]
        logits_NV, written = decode_token(w, cfg, token_N, slot_N, (shared, own), now.written)
        return i + 1, _append(now.replace(written=written), logits_NV, stop_ids, eos_ids)

    unfinished = lambda carry: (carry[0] < n) & ~carry[1].done_N.all()
    _, now = jax.lax.while_loop(unfinished, body, (jnp.int32(0), now.replace(own=None)))
    return now.replace(own=own)


def _append(now: Slots, logits_NV, stop_ids, eos_ids, on_N=True) -> Slots:
    """Sample the next token of each row of on_N that has not ended, as `generate.sample` does."""
    keys_N = jax.random.wrap_key_data(now.key_N2, impl=IMPL)
    u_N = jax.vmap(lambda key, t: uniform(jax.random.fold_in(key, t)))(keys_N, now.length_N)
    hot_N1 = jnp.maximum(now.temperature_N, 1e-6)[:, None]
    token_N = generate.draw(logits_NV / hot_N1, u_N, 1.0)
    token_N = jnp.where(now.temperature_N == 0, jnp.argmax(logits_NV, -1).astype(jnp.int32), token_N)
    going_N = ~now.done_N & on_N
    here_NT = (jnp.arange(now.ids_NT.shape[1])[None] == now.length_N[:, None]) & going_N[:, None]
    ids_NT = jnp.where(here_NT, token_N[:, None], now.ids_NT)
    length_N = now.length_N + going_N.astype(jnp.int32)
    ended_N = length_N >= now.most_N
    if eos_ids:
        ended_N = ended_N | jnp.isin(token_N, jnp.array(eos_ids, jnp.int32))
    if stop_ids:
        ended_N = ended_N | _ends_with(ids_NT, length_N, stop_ids)
    return now.replace(ids_NT=ids_NT, length_N=length_N, done_N=now.done_N | (going_N & ended_N))


def _ends_with(ids_NT, length_N, stop_ids: tuple[int, ...]):
    """Return which rows end with a sequence of ids."""
    at_NX = length_N[:, None] + jnp.arange(-len(stop_ids), 0)[None]
    last_NX = jnp.take_along_axis(ids_NT, jnp.clip(at_NX, 0, ids_NT.shape[1] - 1), 1)
    return ((last_NX == jnp.array(stop_ids)[None]) & (at_NX >= 0)).all(1)
