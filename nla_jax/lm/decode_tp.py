"""Tensor-parallel decoding: matrices are sharded over `tensor`, rows and their caches over all axes.

Each token runs under `shard_map` with explicit collectives, because the compiler would otherwise all-gather
weights. The rows of a tensor group are all-gathered before a product with a sharded matrix. The result goes
back to the device of its row by an all-to-all or a reduce-scatter.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.lm import kv_cache, lora
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import block_axes, cast, gated, norm_if, rms_norm
from nla_jax.lm.ops import attend_levels, dense, softcap
from nla_jax.lm.rotary import rotate
from nla_jax.sharding import placement

# With more block parameters than this, the blocks are scanned; unrolled they would compile for minutes.
UNROLLED = 1e9


def scanned(cfg: LMConfig) -> bool:
    """Return whether decoding scans over blocks, with stacked weights and caches."""
    heads = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    return cfg.n_blocks * cfg.d_model * (heads + 3 * cfg.d_ff) > UNROLLED


def weights(params: dict, cfg: LMConfig, dtype) -> dict:
    """Cast, merge and shard weights for `decode_token`; blocks are stacked or a list (`scanned`)."""
    axes = block_axes(cfg)
    blocks = params["blocks"]
    factors = {n: ab for n, ab in blocks.items() if isinstance(ab, dict)}
    blocks = {n: a for n, a in blocks.items() if n not in factors} | cast(factors, dtype)

    def one(p):
        p = cast(lora.merge_block(p), dtype)
        return {name: placement.decoding(a, axes[name]) for name, a in p.items()}

    if scanned(cfg):
        blocks = jax.lax.map(one, blocks)  # only one block at a time is merged in float32
    else:
        blocks = [one(jax.tree.map(lambda a, i=i: a[i], blocks)) for i in range(cfg.n_blocks)]
    unembed = params["embed"].T if cfg.tied else params["lm_head"]
    return {
        "blocks": blocks,
        "embed": placement.constrain(params["embed"], None, "tensor"),
        "unembed": placement.decoding(unembed.astype(dtype), ("model", "vocab")),
        "final_norm": params["final_norm"],
    }


def decode_token(w, cfg: LMConfig, ids_B, slot, prompt, written):
    """Run one token per row: (logits_BV, `written` with its keys and values at `slot`)."""
    rows = placement.axes_of(ids_B.shape[0], "rows")
    stacked = isinstance(w["blocks"], dict)

    def spec(name, a):
        lead = (None,) if stacked else ()
        return PartitionSpec(
            *lead, *placement.spec(a.shape[len(lead) :], placement.decoded(block_axes(cfg)[name]))
        )

    one = lambda p: {name: spec(name, a) for name, a in p.items()}  # noqa: E731
    V, D = w["embed"].shape
    specs = {
        "blocks": one(w["blocks"]) if stacked else [one(p) for p in w["blocks"]],
        "embed": PartitionSpec(None, placement.axes_of(D, "tensor")),
        "unembed": PartitionSpec(None, placement.axes_of(V, "tensor")),
        "final_norm": PartitionSpec(),
    }

    def cache(axes):
        return lambda a: PartitionSpec(*(None,) * (stacked and a.ndim == 5), axes)

    r = PartitionSpec(rows)
    shared = tuple(jax.tree.map(cache(None if level.batch == 1 else rows), level) for level in prompt)
    own = jax.tree.map(cache(rows), written)
    run = jax.shard_map(
        lambda *args: _token(_Exchange("tensor" not in (rows or ())), cfg, *args),
        in_specs=(specs, r, PartitionSpec(), shared, own), out_specs=(r, own), check_vma=False,
    )
    return run(w, ids_B, slot, prompt, written)


class _Exchange:
    """The collectives around a product with a matrix that is sharded over `tensor`.

    shared: the rows are replicated in a tensor group, because they are too few to shard.
    """

    def __init__(self, shared: bool):
        self.shared = shared

    def together(self, y):
        """All-gather the rows of the tensor group."""
        return y if self.shared else jax.lax.all_gather(y, "tensor", tiled=True)

    def whole(self, z, n: int):
        """Redistribute [group rows, a shard of n columns] to [own rows, n columns]."""
        if z.shape[1] == n:
            return z if self.shared else self._own(z)
        if self.shared:
            return jax.lax.all_gather(z, "tensor", axis=1, tiled=True)
        return jax.lax.all_to_all(z, "tensor", 0, 1, tiled=True)

    def _own(self, z):
        n = z.shape[0] // jax.lax.axis_size("tensor")
        return jax.lax.dynamic_slice_in_dim(z, jax.lax.axis_index("tensor") * n, n)

    def part(self, a, n: int):
        """Redistribute [own rows, all columns] to [group rows, this device's n columns]."""
        if a.shape[1] == n:
            return self.together(a)
        if self.shared:
            return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("tensor") * n, n, 1)
        return jax.lax.all_to_all(a, "tensor", 1, 0, tiled=True)

    def sum(self, z, is_part: bool):
        """Reduce [group rows, D] to [own rows, D]. is_part: each device has a partial sum."""
        if not is_part:
            return z if self.shared else self._own(z)
        if self.shared:
            return jax.lax.psum(z, "tensor")
        return jax.lax.psum_scatter(z, "tensor", tiled=True)


def _token(ex: _Exchange, cfg: LMConfig, w, ids_B, slot, prompt, written):
    """`decode_token` of one device's part."""
    table, stacked = w["embed"], isinstance(w["blocks"], dict)
    x = ex.whole(jnp.take(table, ex.together(ids_B), axis=0), cfg.d_model)
    if cfg.scale_embed:
        x = x * jnp.asarray(cfg.d_model**0.5, x.dtype)
    x = x.astype(jnp.float32)
    max_new = jax.tree.leaves(written)[0].shape[-2]
    views = kv_cache.views(cfg, prompt, ids_B.shape[0], max_new, slot)
    if stacked:
        x, new = _scan(ex, cfg, w["blocks"], x, views, prompt, written, slot)
    else:
        local = cfg.local or (False,) * len(written)
        new = []
        for i, (p, cache, is_local) in enumerate(zip(w["blocks"], written, local, strict=True)):
            q, k, v = _qkv(ex, cfg, p, x, *views[is_local][:2])
            cache = [jax.lax.dynamic_update_slice_in_dim(c, a, slot, 2)
                     for c, a in zip(cache, (k, v), strict=True)]
            new.append(tuple(cache))
            parts = [(level.k[i], level.v[i]) for level in prompt] + new[-1:]
            x = _rest(ex, cfg, p, x, q, parts, views[is_local][2])
    y = ex.together(rms_norm(x, w["final_norm"], cfg.norm_eps).astype(w["unembed"].dtype))
    return softcap(ex.whole(dense(y, w["unembed"]), cfg.vocab_size), cfg.final_softcap), new


def _qkv(ex: _Exchange, cfg: LMConfig, p, x, cos, sin):
    """Query [B, 1, H, d] of the new token, and its key and value [B, K, 1, d]."""
    B, eps, dtype = x.shape[0], cfg.norm_eps, p["wo"].dtype
    H, K, d = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    y = ex.together(rms_norm(x, p["attn_norm"], eps).astype(dtype))

    def project(name, heads):
        z = ex.whole(dense(y, p[name]), heads * d)
        if name + "_bias" in p:
            z = z + p[name + "_bias"].astype(jnp.float32)
        return z.reshape(B, 1, heads, d)

    q = rotate(norm_if(p, "q_norm", project("wq", H), eps), cos, sin)
    k = rotate(norm_if(p, "k_norm", project("wk", K), eps), cos, sin)
    return q, *(a.transpose(0, 2, 1, 3).astype(dtype) for a in (k, project("wv", K)))


def _rest(ex: _Exchange, cfg: LMConfig, p, x, q, parts, masks):
    """The block from its attention on: to the prompt's parts and to what is written, the new token too."""
    eps, dtype = cfg.norm_eps, p["wo"].dtype
    a = attend_levels(q[:, 0], parts, masks, dtype, cfg.query_scalar, cfg.attn_softcap)
    n = p["wo"].shape[0]
    a = ex.sum(dense(ex.part(a.astype(dtype), n), p["wo"]), n < a.shape[1])
    x = x + norm_if(p, "attn_post_norm", a, eps)
    y = ex.together(rms_norm(x, p["mlp_norm"], eps).astype(dtype))
    y = gated(cfg, dense(y, p["w_gate"]), dense(y, p["w_up"]))
    y = ex.sum(dense(y, p["w_down"]), p["w_down"].shape[0] < cfg.d_ff)
    return x + norm_if(p, "mlp_post_norm", y, eps)


def _scan(ex: _Exchange, cfg: LMConfig, blocks, x, views, prompt, written, slot):
    """Every block by a scan; what is written, [L, B, K, T, d], is carried and changed in place. The prompt is
    only read."""
    def step(carry, layer):
        x, k_all, v_all = carry
        i, p, local, shared = layer
        view = views[False] if local is None else jax.tree.map(
            lambda a, b: jnp.where(local, a, b), views[True], views[False])
        q, k, v = _qkv(ex, cfg, p, x, *view[:2])
        k_all = jax.lax.dynamic_update_slice(k_all, k[None], (i, 0, 0, slot, 0))
        v_all = jax.lax.dynamic_update_slice(v_all, v[None], (i, 0, 0, slot, 0))
        here = [jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (k_all, v_all)]
        return (_rest(ex, cfg, p, x, q, [*shared, here], view[2]), k_all, v_all), None

    local_L = jnp.array(cfg.local, bool) if cfg.local else None
    shared = [(level.k, level.v) for level in prompt]
    (x, *new), _ = jax.lax.scan(step, (x, *written), (jnp.arange(cfg.n_blocks), blocks, local_L, shared))
    return x, tuple(new)
