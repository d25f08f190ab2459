"""Sampling with a key/value cache, inside jit.

The sampler takes a prefilled prompt and the logits of the next token, so the caller decides which
rows share a prefix. The prompt may have several parts with different batch sizes
(`nla_jax.lm.kv_cache`).
A row's sample depends on its own key and logits only, not on the other rows of the batch.
"""

import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm import decode_tp, kv_cache, lora
from nla_jax.lm import params as params_lib
from nla_jax.lm.block import GATE_UP, GLOBAL_QK, GLOBAL_QKV, QKV, add_adapter, add_bias, plain_products
from nla_jax.lm.config import LMConfig
from nla_jax.lm.delta_net import DELTA_IN
from nla_jax.lm.model import KV, cast, embed
from nla_jax.lm.ops import dense, rms_norm, softcap
from nla_jax.sharding import placement
from nla_jax.util.keys import to_threefry, uniform

BUCKETS = 2  # how often `sample` halves the batch
_FEWEST = 8  # a batch of fewer rows takes as long as one of this many
_CHUNK = 128  # the vocabulary is searched in chunks of this many tokens
# Decoding joins these matrices under this name.
_FUSED = {QKV: "wqkv", GATE_UP: "w_gate_up", DELTA_IN: "delta_in", GLOBAL_QKV: "global_wqkv",
          GLOBAL_QK: "global_wqk"}


@flax.struct.dataclass
class Samples:
    """Sampled tokens. Positions from `length_B` on have the pad id and log-probability 0."""

    ids_BT: jax.Array
    logp_BT: jax.Array  # log-probability at temperature 1 of each sampled token
    length_B: jax.Array  # number of sampled tokens, the stop sequence included
    closed_B: jax.Array  # whether the row ended with the stop sequence (not at the cap, not by EOS)


def decode_weights(params: dict, cfg: LMConfig, dtype) -> dict:
    """Prepare weights for decoding: cast, adapters merged, projections fused, one dict per block. Adapters of
    `Int8` matrices are not merged. Blocks of large models stay stacked (`decode_tp.is_scanned`), without a
    copy if they have neither adapters nor another dtype.

    The loop would otherwise cast, gather or slice them for every token. On a mesh of several devices the
    layout is another one (`nla_jax.lm.decode_tp`).
    """
    if placement.has_mesh():
        return decode_tp.weights(params, cfg, dtype)
    params = lora.merge(params)
    unembed = params["embed"].T if cfg.tied else params["lm_head"]
    rest = {
        "embed": params["embed"],
        "unembed": unembed.astype(dtype),
        "final_norm": params["final_norm"],
    }
    if decode_tp.is_scanned(cfg):
        return {"blocks": cast(params["blocks"], dtype), **rest}
    joined = dict(params["blocks"])
    for parts, name in _FUSED.items():
        for end in ("", "_bias"):
            if all(part + end in joined for part in parts):
                pieces = [joined.pop(part + end) for part in parts]
                joined[name + end] = jax.tree.map(lambda *a: jnp.concatenate(a, -1), *pieces)
    joined = cast(joined, dtype)
    blocks = [params_lib.one_block(joined, cfg, i) for i in range(cfg.n_blocks)]
    return {"blocks": blocks, **rest}


def _fused_products(cfg: LMConfig, p, names: tuple[str, ...], x) -> list:
    """Compute the `products` of `block.block` with the matrices of `decode_weights`.

    Matrices that were joined give one product, which is then split.
    """
    if names not in _FUSED:
        return plain_products(cfg, p, names, x)
    name, table = _FUSED[names], params_lib.table(cfg)
    ends = list(itertools.accumulate(table[f"blocks/{n}"].shape[-1] for n in names[:-1]))
    parts = jnp.split(add_bias(p, name, dense(x, p[name])), ends, -1)
    return [add_adapter(p, n, x, y) for n, y in zip(names, parts, strict=True)]


def _decode_token(w, cfg: LMConfig, ids_B, slot, prompt, written):
    """Run one token per row through every block: (logits_BV, `written` with its keys, values at `slot`, which
    is of all rows, or [B] of each)."""
    # Tied to what changes: else XLA's CPU backend copies the whole table to float32 before each loop.
    table, ids_B = jax.lax.optimization_barrier((w["embed"], ids_B))
    x = embed({"embed": table}, cfg, ids_B)
    views = kv_cache.views(cfg, prompt, len(ids_B), kv_cache.capacity(cfg, written), slot)
    if decode_tp.is_scanned(cfg):
        run, products = decode_tp.scan_blocks, functools.partial(plain_products, cfg)
    else:
        run, products = kv_cache.run_blocks, functools.partial(_fused_products, cfg)
    x, new = run(w["blocks"], cfg, x, views, prompt, written, slot, products)
    logits_BV = dense(rms_norm(x, w["final_norm"], cfg.norm_eps), w["unembed"])
    return softcap(logits_BV, cfg.final_softcap), new


def _index_with_mass(index_B, mass_BN):
    """Return the first index from index_B on that has mass, or else the last one before it.

    Rounding may shift an index by one, and a token of probability 0 has log-probability -inf.
    """
    N = mass_BN.shape[1]
    has = mass_BN > 0
    after = has & (jnp.arange(N)[None] >= index_B[:, None])
    last = N - 1 - jnp.argmax(has[:, ::-1], -1)
    return jnp.where(after.any(-1), jnp.argmax(after, -1), last)


def draw(logits_BV, u_B, temperature):
    """Sample one token per row by inverting the cumulative distribution at u in [0, 1]; argmax at T = 0.

    This needs one uniform number per row instead of one per vocabulary entry. The search has two
    levels: first the chunk of 128 tokens, then the token.
    """
    B, V = logits_BV.shape
    hot = jnp.maximum(temperature, 1e-6)
    probs = jax.nn.softmax(logits_BV / hot, -1)
    probs = jnp.pad(probs, ((0, 0), (0, -V % _CHUNK))).reshape(B, -1, _CHUNK)
    mass = probs.sum(-1)
    ends = jnp.cumsum(mass, -1)
    target = u_B * ends[:, -1]
    chunk = _index_with_mass((ends <= target[:, None]).sum(-1), mass)
    start = jnp.take_along_axis(ends - mass, chunk[:, None], 1)[:, 0]
    inner = jnp.take_along_axis(probs, chunk[:, None, None], 1)[:, 0]
    within = (jnp.cumsum(inner, -1) <= (target - start)[:, None]).sum(-1)
    token = chunk * _CHUNK + _index_with_mass(within, inner)
    return jnp.where(temperature == 0, jnp.argmax(logits_BV, -1), token).astype(jnp.int32)


def row_keys(key, rows_B):
    """Return one key per row, folded by the row's index in the global batch, not on its device. Raises
    UserError as `keys.to_threefry`."""
    key = to_threefry(key)
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(rows_B)


@flax.struct.dataclass
class DecodeState:
    """The state of the decode loop, which `continue_decoding` continues. T is the cap on new tokens."""

    t: jax.Array  # number of tokens sampled so far
    written: list  # keys and values of these tokens, in the layout of `kv_cache.allocate`
    ids_BX: jax.Array  # T tokens, after one column of -1 per stop id
    logp_BT: jax.Array
    done_B: jax.Array
    length_B: jax.Array
    closed_B: jax.Array
    prompt: tuple[kv_cache.Level, ...]
    keys_B: jax.Array
    temperature: jax.Array

    @property
    def ids_BT(self) -> jax.Array:
        return self.ids_BX[:, -self.logp_BT.shape[1] :]

    def samples(self) -> Samples:
        return Samples(self.ids_BT, self.logp_BT, self.length_B, self.closed_B)


def begin(cfg: LMConfig, prompt: KV | tuple[KV, ...], logits_BV, keys_B, *, max_new: int, dtype,
          temperature=1.0, stop_ids: tuple[int, ...] = (), eos_ids: tuple[int, ...] = (),
          pad_id: int = 0) -> DecodeState:
    """Allocate slots for `max_new` tokens after a prefilled prompt, and sample the first token. Arguments as
    for `sample`; dtype: of the cache, which must be that of the weights."""
    B, n_stop = logits_BV.shape[0], len(stop_ids)
    stacked = decode_tp.is_scanned(cfg)
    last = prompt if isinstance(prompt, KV) else prompt[-1]
    prompt = kv_cache.make_levels(prompt, B, dtype, stacked)
    written = kv_cache.allocate(cfg, cfg.n_blocks, logits_BV, max_new, dtype, stacked, last)
    nothing = jnp.concatenate([jnp.full((B, n_stop), -1), jnp.full((B, max_new), pad_id)], 1)
    empty = DecodeState(
        jnp.int32(0), written, nothing.astype(jnp.int32), jnp.zeros((B, max_new), jnp.float32),
        jnp.zeros(B, bool), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), prompt, keys_B,
        jnp.float32(temperature),
    )
    return _sample_token(empty, logits_BV, stop_ids, eos_ids, pad_id)


def _sample_token(now: DecodeState, logits_BV, stop_ids, eos_ids, pad_id) -> DecodeState:
    """Sample one more token per row from its logits."""
    t, n_stop, B = now.t, len(stop_ids), logits_BV.shape[0]
    u = jax.vmap(lambda k: uniform(jax.random.fold_in(k, t)))(now.keys_B)
    token = draw(logits_BV, u, now.temperature)
    token = jnp.where(now.done_B, pad_id, token)
    lp = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token[:, None], 1)[:, 0]
    # The ids carry n_stop leading columns of -1, so that the window is never short.
    ids = jax.lax.dynamic_update_slice_in_dim(now.ids_BX, token[:, None], t + n_stop, 1)
    lp = jnp.where(now.done_B, 0.0, lp)[:, None]
    logp = jax.lax.dynamic_update_slice_in_dim(now.logp_BT, lp, t, 1)
    length = jnp.where(now.done_B, now.length_B, t + 1)
    ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(B, bool)
    closed = now.closed_B
    if n_stop:
        window = jax.lax.dynamic_slice_in_dim(ids, t + 1, n_stop, 1)
        hit = (window == jnp.array(stop_ids)[None]).all(1)
        closed = closed | (hit & ~now.done_B)
        ended = ended | hit
    return now.replace(t=t + 1, ids_BX=ids, logp_BT=logp, done_B=now.done_B | ended, length_B=length,
                       closed_B=closed)


def continue_decoding(w: dict, cfg: LMConfig, now: DecodeState, until, *, stop_ids: tuple[int, ...] = (),
          eos_ids: tuple[int, ...] = (), pad_id: int = 0, alive: int = 0) -> DecodeState:
    """Continue until there are `until` tokens (traced or not; at most the cap) or all rows but `alive` have
    ended.

    Splitting the work over several calls does not change the tokens.
    """
    n_stop, prompt = len(stop_ids), now.prompt
    decode_token = decode_tp.decode_token if placement.has_mesh() else _decode_token
    # Keep loop invariants out of the loop's carry.
    fixed = dict(prompt=prompt, keys_B=now.keys_B, temperature=now.temperature)

    def body(now):
        t = now.t
        token_B = jax.lax.dynamic_slice_in_dim(now.ids_BX, t - 1 + n_stop, 1, 1)[:, 0]
        logits_BV, written = decode_token(w, cfg, token_B, t - 1, prompt, now.written)
        now = _sample_token(now.replace(written=written, **fixed), logits_BV, stop_ids, eos_ids, pad_id)
        return now.replace(**bare)

    bare = dict.fromkeys(fixed)
    unfinished = lambda now: (now.t < until) & ((~now.done_B).sum() > alive)
    return jax.lax.while_loop(unfinished, body, now.replace(**bare)).replace(**fixed)


def compacted_sizes(n_rows: int, buckets: int = BUCKETS) -> tuple[int, ...]:
    """Return the sizes of the batches in which decoding continues: a half of the rows, a quarter, …"""
    sizes = (n_rows >> i for i in range(1, buckets + 1))
    return tuple(n for n in sizes if n >= _FEWEST)


def _take_rows(now: DecodeState, rows_n) -> DecodeState:
    """Return the state of some of the rows."""
    prompt, written = kv_cache.take_rows(now.prompt, now.written, rows_n, len(now.done_B))
    names = ("ids_BX", "logp_BT", "done_B", "length_B", "closed_B", "keys_B")
    return now.replace(prompt=prompt, written=written, **{n: getattr(now, n)[rows_n] for n in names})


def _decode_compacted(w, cfg: LMConfig, now: DecodeState, until: int, sizes, ends) -> Samples:
    """Continue until `until` tokens or the end of every row, in smaller batches as soon as these suffice.

    sizes: numbers of rows, descending. Each compiles the loop once more.
    """
    before = []
    for size in sizes:
        now = continue_decoding(w, cfg, now, until, alive=size, **ends)
        rows_n = jnp.argsort(now.done_B, stable=True)[:size]  # the rows that have not ended, and maybe others
        before.append((now.samples(), rows_n))
        now = _take_rows(now, rows_n)
    out = continue_decoding(w, cfg, now, until, **ends).samples()
    for whole, rows_n in reversed(before):
        put = lambda a, b, rows_n=rows_n: a.at[rows_n].set(b, unique_indices=True)
        out = jax.tree.map(put, whole, out)
    return out


def sample(w: dict, cfg: LMConfig, prompt: KV | tuple[KV, ...], logits_BV, keys_B, *, max_new: int,
           temperature=1.0, stop_ids: tuple[int, ...] = (), eos_ids: tuple[int, ...] = (),
           pad_id: int = 0, buckets: int = BUCKETS) -> Samples:
    """Sample up to `max_new` tokens per row after a prefilled prompt.

    Args:
      w: `decode_weights`.
      prompt: keys and values of the B rows (left padding allowed), or a tuple of consecutive parts. The batch
        of a part divides B; B / batch adjacent rows share each of its rows.
      logits_BV: logits of the first new token.
      keys_B: one PRNG key per row; token t uses fold_in(key, t).
      temperature: scalar, traced; 0 means greedy.
      stop_ids: a row ends after this sequence of ids (`closed_B`).
      eos_ids: a row ends after any of these ids.
      pad_id: the id after the end of a row.
      buckets: how often rows that have ended leave the batch (`compacted_sizes`). This does not change the
        tokens. On a mesh of several devices they stay, because rows would move between devices.
    """
    ends = dict(stop_ids=stop_ids, eos_ids=eos_ids, pad_id=pad_id)
    now = begin(cfg, prompt, logits_BV, keys_B, max_new=max_new, temperature=temperature,
                dtype=w["unembed"].dtype, **ends)
    if placement.has_mesh() or not (stop_ids or eos_ids):
        buckets = 0
    sizes = compacted_sizes(len(logits_BV), buckets)
    return _decode_compacted(w, cfg, now, max_new, sizes, ends)
