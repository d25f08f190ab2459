"""The forward pass: embed -> blocks -> hidden state, and hidden state -> logits.

Shapes are in the names: B rows, T tokens, S cached positions, D d_model, L blocks,
H query heads, K key/value heads, d head size, V vocabulary.

The dtype of a weight decides how its product is computed: float32 weights give float32
products, bfloat16 weights give bfloat16 operands accumulated in float32. The residual
stream itself, norms, biases, soft caps, softmax and rotary angles are always float32.

Families differ in `LMConfig` and in which parameters a block holds; formulas follow transformers'
classes (`nla_jax.lm.files.families`).
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm import attention_kernels, delta_net, fsdp, lora, rotary, scan
from nla_jax.lm import params as params_lib
from nla_jax.lm.block import block, scale_embedding
from nla_jax.lm.config import LMConfig
from nla_jax.lm.ops import attend, dense, rms_norm, softcap
from nla_jax.sharding import placement
from nla_jax.util import int8

MATCHED_AFTER = 1  # norm-matched injection adds to this block's output


@flax.struct.dataclass
class KV:
    """What blocks keep of earlier positions: keys (after rotary embedding) and values of softmax attention.

    Blocks with linear attention have a float32 state (`delta_net`). If global blocks have heads of their own,
    their keys and values are in `global_*`. L counts the blocks of each kind.
    """

    k_LBKSd: jax.Array
    v_LBKSd: jax.Array
    valid_BS: jax.Array
    conv_LBWC: jax.Array | None = None
    state_LBHkv: jax.Array | None = None
    global_k_LBKSd: jax.Array | None = None
    global_v_LBKSd: jax.Array | None = None

    @property
    def batch(self) -> int:
        return self.valid_BS.shape[0]

    @property
    def length(self) -> int:
        return self.valid_BS.shape[1]

    def rows(self, rows_B) -> "KV":
        """Return these rows of the batch."""
        stacks = {f: None if a is None else a[:, rows_B] for f, a in self.stacks().items()}
        return KV(valid_BS=self.valid_BS[rows_B], **stacks)

    def above(self, upper: "KV") -> "KV":
        """Return the cache of these blocks, with those of `upper` after them."""
        own, others = self.stacks(), upper.stacks()
        both = {f: [a for a in (own[f], others[f]) if a is not None] for f in own}
        return KV(valid_BS=self.valid_BS, **{f: jnp.concatenate(a) if a else None for f, a in both.items()})

    def stacks(self) -> dict:
        """Return the arrays whose first axis counts blocks."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "valid_BS"}


def _attend(cfg: LMConfig, seen, past, kernel: str, q, k, v):
    """Attend as `block.block` asks, over whole sequences; keep the keys and values of these tokens only.

    Args:
      seen: the mask [B, T, S], or what the kernel takes in its place (`attention_kernels.attend_fused`).
      past: None, or (k, v) [B or 1, K, S, d] that come before these tokens.
    """
    keys, values = k, v
    if past is not None:
        widen = [jnp.broadcast_to(a, (len(q), *a.shape[1:])) for a in past]
        keys, values = (jnp.concatenate(pair, 2) for pair in zip(widen, (k, v), strict=True))
    if kernel == "plain":
        a = attend(q, keys, values, seen, k.dtype, cfg.query_scalar, cfg.attn_softcap)
    else:
        a = attention_kernels.attend_fused(kernel, cfg, q, keys, values, seen, k.dtype)
    return a, (k, v)


def embed(params, cfg: LMConfig, ids_BT):
    """Return token embeddings [B, T, D], the input of the first block, float32."""
    return scale_embedding(cfg, placement.lookup(params["embed"], ids_BT))


def forward(params, cfg: LMConfig, x_BTD, valid_BT, *, past: KV | None = None, prefix_PD=None,
            keep_kv: bool = False, remat: bool = False, dtype=None, summed=None, matched_BD=None,
            attention: str = "plain", frozen: bool = False):
    """Run every block that `params` holds over embeddings x_BTD.

    Args:
      params: {"embed", "blocks", ...}. "blocks" may have fewer blocks than `cfg`; they are its first ones.
      x_BTD: float32 embeddings, with injected activations already in place.
      valid_BT: bool; False marks padding, on either side. Positions count valid tokens only.
      past: keys and values that precede x in every row; its batch may be 1 (shared prefix).
      prefix_PD: instead of `past`: embeddings of a prefix that all rows share. Each block processes it once,
        before the rows.
      keep_kv: also return the keys and values of these tokens.
      remat: recompute blocks in the backward pass instead of storing them.
      dtype: cast each block's matrices to it when the block runs; None: no cast.
      summed: float32 gradients of the blocks so far. The gradient of the blocks is then the sum of these and
        the new one, accumulated in place block by block (`scan_summed`); `remat` is implied.
      matched_BD: between block MATCHED_AFTER and the next, the first token's residual x becomes
        x + |x| * matched_BD.
      attention: as `attention_kernels.resolve` returns it. A kernel is used only if each device has rows of
        its own. Windows of a kernel count slots: if a window is shorter than the
        sequence, `valid_BT` must not have padding between real tokens, those of `prefix_PD` included.
        Attention with such a window and a `past` is plain.
      frozen: `params` get no gradient, as for `scan.index_frozen`. With `remat`, matrices beside adapters are
        taken to have none; otherwise the backward pass would keep a copy of each block.

    Returns:
      (x_BTD, kv): the residual stream after the last block, before the final norm, and the `KV` of
      these tokens, without `past` (None unless `keep_kv`).
    """
    B, T, _ = x_BTD.shape
    attention = attention_kernels.at_length(attention, T)
    P = 0 if prefix_PD is None else prefix_PD.shape[0]
    before = (jnp.ones if P else jnp.zeros)((1, P), bool) if past is None else past.valid_BS
    pos_BT = before.sum(1, keepdims=True) + jnp.maximum(jnp.cumsum(valid_BT, 1) - 1, 0)
    causal = jnp.tril(jnp.ones((T, T), bool))[None] & valid_BT[:, None, :]
    seen_BS = jnp.broadcast_to(before, (B, before.shape[1]))
    seen_BTS = jnp.broadcast_to(seen_BS[:, None, :], (B, T, before.shape[1]))
    wide = (*rotary.rotary(pos_BT, cfg), jnp.concatenate([seen_BTS, causal], -1))
    gaps = past is not None and attention_kernels.window_is_shorter(cfg, before.shape[1] + T)
    if gaps or (placement.has_mesh() and placement.n_shards(B) == 1):
        attention = "plain"
    axes = block_axes(cfg)
    blocks, n_blocks = params["blocks"], params_lib.n_blocks_in(params["blocks"], cfg)
    i_L = jnp.arange(n_blocks, dtype=jnp.int32)
    local_L = near = None
    if cfg.local:
        local_L = jnp.array(cfg.local[: len(i_L)], bool)
        valid_BS = jnp.concatenate([seen_BS, valid_BT], 1)
        near = (*rotary.rotary(pos_BT, cfg, True), wide[2] & in_window(cfg, pos_BT, valid_BS))
    if attention == "splash":
        ids = valid_BT.astype(jnp.int32), jnp.concatenate([seen_BS, valid_BT], 1).astype(jnp.int32)
        wide = (*wide[:2], attention_kernels.Rows(*ids, jnp.zeros(B, bool)))
        near = near and (*near[:2], attention_kernels.Rows(*ids, jnp.ones(B, bool)))

    first, first_near = _prefix_views(cfg, P)

    order = delta_net.order_of(valid_BT) if cfg.linear else None

    def run(p, x, cos, sin, seen, old, kernel=attention):
        if "delta_out" in p:
            return block(p, cfg, x, cos, sin, functools.partial(delta_net.over_sequence, cfg, seen, old))
        return block(p, cfg, x, cos, sin, functools.partial(_attend, cfg, seen, old, kernel))

    def step(carry, layer):
        x, prefix, matched = carry
        p, i, old, local = layer
        if matched is not None:  # not after a block, whose last product the backward pass would then repeat
            size = jnp.linalg.norm(x[:, 0], axis=-1, keepdims=True)
            x = x.at[:, 0].add(jnp.where(i == MATCHED_AFTER + 1, size * matched, 0.0))

        def view(wide, near, order=order):
            if "delta_out" in p:
                return (*wide[:2], order)
            if near is None or "global_wo" in p:
                return wide
            if cfg.global_heads:
                return near
            return jax.tree.map(functools.partial(jnp.where, local), near, wide)

        if prefix is not None:
            prefix, old = run(
                _place_and_cast(p, axes, 1, dtype), prefix, *view(first, first_near, None), None, "plain"
            )
        if placement.n_shards(B) > 1:
            x, kv = fsdp.run(run, p, axes, dtype, _keeps_dtype, (x, *view(wide, near)), old)
        else:
            x, kv = run(_place_and_cast(p, axes, B, dtype), x, *view(wide, near), old)
        return (x, prefix, matched), kv if keep_kv else None

    part = cfg.first_blocks(n_blocks) if cfg.kinds else cfg
    old = None if past is None else (past.k_LBKSd, past.v_LBKSd)
    carry = (x_BTD.astype(jnp.float32), prefix_PD if prefix_PD is None else prefix_PD[None], matched_BD)
    if part.kinds:
        if past is not None:
            states, heads = (past.conv_LBWC, past.state_LBHkv), (past.global_k_LBKSd, past.global_v_LBKSd)
            past = {False: old, True: states} if cfg.linear else {True: old, False: heads}
        (x_BTD, *_), kv = scan.scan_kinds(step, carry, part, blocks, i_L, past or {}, summed,
                                          remat or summed is not None)
        return x_BTD, _kv_of(cfg, kv, valid_BT) if keep_kv else None
    if summed is not None:
        (x_BTD, *_), kv = scan.scan_summed(step, carry, blocks, (i_L, old, local_L), summed), None
    else:
        frozen = frozen or (remat and lora.is_attached(params))
        step, blocks = scan.index_frozen(step, blocks, n_blocks, frozen)
        step = jax.checkpoint(step) if remat else step
        (x_BTD, *_), kv = jax.lax.scan(step, carry, (blocks, i_L, old, local_L))
    return x_BTD, KV(*kv, valid_BT) if keep_kv else None


def _kv_of(cfg: LMConfig, kept: dict, valid_BT) -> KV:
    """Return the cache that `scan_kinds` kept of blocks of two kinds."""
    B, T = valid_BT.shape
    none = jnp.zeros((0, B, cfg.n_kv_heads, T, cfg.head_dim), jax.tree.leaves(kept)[0].dtype)
    if cfg.global_heads:
        return KV(*kept.get(True, (none, none)), valid_BT, None, None, *kept[False])
    return KV(*kept.get(False, (none, none)), valid_BT, *kept[True])


def _prefix_views(cfg: LMConfig, P: int):
    """Return (cos, sin, mask) of the first P tokens for (global blocks, local blocks)."""
    if not P:
        return None, None
    pos_BT, causal = jnp.arange(P)[None], jnp.tril(jnp.ones((P, P), bool))[None]
    wide = (*rotary.rotary(pos_BT, cfg), causal)
    if not cfg.local:
        return wide, None
    return wide, (*rotary.rotary(pos_BT, cfg, True), causal & in_window(cfg, pos_BT, jnp.ones((1, P), bool)))


def block_axes(cfg: LMConfig) -> dict[str, tuple[str, ...]]:
    """Return the logical axes of each parameter of one block; factors of adapters are named "wq_lora/a"."""
    table = {n: s for n, s in params_lib.table(cfg).items() if n.startswith("blocks/")}
    table |= {n.replace("/", "_lora/"): s for n, s in lora.table(cfg, 1).items()}
    return {n.removeprefix("blocks/"): s.axes[1:] for n, s in table.items()}


def _place_and_cast(p, axes, n_rows: int, dtype):
    """Return one block's parameters, placed and cast for `n_rows` rows."""
    out = {}
    for name, w in p.items():
        if isinstance(w, dict):
            out[name] = {
                f: placement.gather_weight(a, axes[f"{name}/{f}"], n_rows, dtype) for f, a in w.items()
            }
        else:
            out[name] = placement.gather_weight(w, axes[name], n_rows, None if _keeps_dtype(name) else dtype)
    return out


def in_window(cfg: LMConfig, pos_BT, valid_BS):
    """Return which slots [B, T, S] are fewer than `window` real tokens before the token at pos_BT."""
    pos_BS = jnp.cumsum(valid_BS, 1) - 1
    return pos_BT[..., None] - pos_BS[:, None, :] < cfg.window


def join(first: KV, second: KV) -> KV:
    """Concatenate two caches; a batch of 1 in `first` is broadcast. States are those after `second`."""
    B = second.batch

    def cat(a, b):
        return jnp.concatenate([jnp.broadcast_to(a, (a.shape[0], B, *a.shape[2:])), b], 3)

    valid = jnp.broadcast_to(first.valid_BS, (B, first.length))
    before, after = first.stacks(), second.stacks()
    joined = {f: cat(before[f], a) for f, a in after.items() if f.endswith("_LBKSd") and a is not None}
    return KV(valid_BS=jnp.concatenate([valid, second.valid_BS], 1), **{**after, **joined})


def unembed(params, cfg: LMConfig, x):
    """Compute logits [..., V] in float32 from residual-stream vectors [..., D]."""
    name = "embed" if cfg.tied else "lm_head"
    y = rms_norm(x, params["final_norm"], cfg.norm_eps)
    # All-gather rows over the axes that shard the vocabulary, in the dtype of the product.
    y = placement.reshard(y, ("hosts",), ("rows",), params[name].dtype)
    logits = dense(y, params[name], cfg.tied)
    logits = placement.constrain(logits, "hosts", *(None,) * (x.ndim - 2), "vocab")
    return softcap(logits, cfg.final_softcap)


def unembed_params(params, cfg: LMConfig) -> dict:
    """Return the parameters of `unembed`, with the matrix sharded by vocabulary, for a loop over chunks."""
    name, axes = ("embed", ("vocab", "model")) if cfg.tied else ("lm_head", ("model", "vocab"))
    return {
        name: placement.reshard(params[name], placement.in_use(axes), placement.storage_places(axes)),
        "final_norm": params["final_norm"],
    }


def _keeps_dtype(name: str) -> bool:
    return "norm" in name or "bias" in name or name.endswith(("_log", "_scale"))


def cast(params, dtype):
    """Cast matrices to `dtype`; norm weights and biases keep theirs. `Int8` only notes the dtype."""

    def one(path, a):
        return a if any(_keeps_dtype(str(getattr(k, "key", k))) for k in path) else a.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=int8.is_int8)


def cast_tail(params, dtype):
    """Cast as `cast`, but on a mesh of several devices leave blocks and their adapters to `forward`.

    A copy of all blocks in another dtype would need too much memory.
    """
    if not placement.has_mesh():
        return cast(params, dtype)
    whole = {n: a for n, a in params.items() if not isinstance(a, dict)}
    return {**params, **cast(whole, dtype)}
