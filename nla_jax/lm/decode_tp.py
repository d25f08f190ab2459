"""Tensor-parallel decoding: matrices are sharded over `tensor`, rows and their caches over all axes.

Each token runs under `shard_map` with explicit collectives, because the compiler would otherwise all-gather
weights. The rows of a tensor group are all-gathered before a product with a sharded matrix. The result goes
back to the device of its row by an all-to-all or a reduce-scatter.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.lm import block, delta_net, experts, kv_cache, lora, scan
from nla_jax.lm import params as params_lib
from nla_jax.lm.block import scale_embedding
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import block_axes, cast
from nla_jax.lm.ops import attend_levels, dense, rms_norm, softcap
from nla_jax.sharding import placement
from nla_jax.util import int8

# With more block parameters than this, the blocks are scanned; unrolled they would compile for minutes.
UNROLLED = 1e9
_EMBED, _UNEMBED = (None, "embedding"), ("model", "vocab")  # logical axes of the two, as decoding reads them


def is_scanned(cfg: LMConfig) -> bool:
    """Return whether decoding scans over blocks, with stacked weights and caches."""
    sizes = [math.prod(s.shape) for name, s in params_lib.table(cfg).items() if name.startswith("blocks/")]
    return sum(sizes) > UNROLLED


def weights(params: dict, cfg: LMConfig, dtype) -> dict:
    """Cast, merge and shard weights for `decode_token`; blocks are stacked or a list (`is_scanned`)."""
    axes, dtype = block_axes(cfg), jnp.dtype(dtype)
    blocks = params["blocks"]
    factors = {n: ab for n, ab in blocks.items() if isinstance(ab, dict)}
    blocks = {n: a for n, a in blocks.items() if n not in factors} | cast(factors, dtype)

    def one(p):
        return _map_block(placement.shard_for_decode, cast(lora.merge_block(p), dtype), axes)

    out = blocks["delta_out" if cfg.linear else "wo"]
    if is_scanned(cfg) and not factors and out.dtype == dtype:  # no copy if they rest like this
        blocks = _map_block(functools.partial(placement.shard_for_decode, stacked=True), blocks, axes)
    elif is_scanned(cfg):  # only one block at a time is merged in float32
        stacks = {}
        for name, a in blocks.items():  # with linear attention, stacks have different lengths
            stacks.setdefault(len(jax.tree.leaves(a)[0]), {})[name] = a
        blocks = {name: a for part in stacks.values() for name, a in jax.lax.map(one, part).items()}
    else:
        blocks = [one(params_lib.one_block(blocks, cfg, i)) for i in range(cfg.n_blocks)]
    unembed = params["embed"].T if cfg.tied else params["lm_head"]
    return {
        "blocks": blocks,
        "embed": placement.shard_for_decode(params["embed"], _EMBED),
        "unembed": placement.shard_for_decode(unembed.astype(dtype), _UNEMBED),
        "final_norm": params["final_norm"],
    }


def _map_block(function, p: dict, axes: dict) -> dict:
    """Return function(parameter, its logical axes) of each parameter of a block, factors of adapters too."""
    return {
        name: {f: function(b, axes[f"{name}/{f}"]) for f, b in a.items()} if isinstance(a, dict)
        else function(a, axes[name])
        for name, a in p.items()
    }


def decode_token(w, cfg: LMConfig, ids_B, slot, prompt, written):
    """Run one token per row: (logits_BV, `written` with its keys and values at `slot`, which is of all rows,
    or [B] of each)."""
    rows = placement.axes_of(ids_B.shape[0], "rows")
    stacked = isinstance(w["blocks"], dict)

    def spec(w, axes, lead=()):  # `Int8` has two arrays
        places = placement.decode_places(axes)
        return jax.tree.map(lambda a: PartitionSpec(*lead, *placement.spec(a.shape[len(lead):], places)), w)

    axes, of_block = block_axes(cfg), functools.partial(spec, lead=(None,) if stacked else ())
    specs = {
        "blocks": _map_block(of_block, w["blocks"], axes) if stacked
        else [_map_block(of_block, p, axes) for p in w["blocks"]],
        "embed": spec(w["embed"], _EMBED),
        "unembed": spec(w["unembed"], _UNEMBED),
        "final_norm": PartitionSpec(),
    }

    def cache(axes):
        return lambda a: PartitionSpec(*(None,) * (stacked and a.ndim > 2), axes)

    r = PartitionSpec(rows)
    shared = tuple(jax.tree.map(cache(None if level.batch == 1 else rows), level) for level in prompt)
    own = jax.tree.map(cache(rows), written)
    run = jax.shard_map(
        lambda *args: _token(_Collectives("tensor" not in (rows or ())), cfg, *args),
        in_specs=(specs, r, r if jnp.ndim(slot) else PartitionSpec(), shared, own), out_specs=(r, own),
        check_vma=False,
    )
    return run(w, ids_B, slot, prompt, written)


class _Collectives:
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


def _token(ex: _Collectives, cfg: LMConfig, w, ids_B, slot, prompt, written):
    """Compute one device's part of `decode_token`."""
    table, stacked = w["embed"], isinstance(w["blocks"], dict)
    x = scale_embedding(cfg, ex.whole(int8.take_rows(table, ex.together(ids_B)), cfg.d_model))
    max_new = kv_cache.capacity(cfg, written)
    views = kv_cache.views(cfg, prompt, ids_B.shape[0], max_new, slot)
    run = scan_blocks if stacked else kv_cache.run_blocks
    products = functools.partial(_split_products, ex, cfg)
    x, new = run(w["blocks"], cfg, x, views, prompt, written, slot, products)
    y = ex.together(rms_norm(x, w["final_norm"], cfg.norm_eps).astype(w["unembed"].dtype))
    return softcap(ex.whole(dense(y, w["unembed"]), cfg.vocab_size), cfg.final_softcap), new


def _split_products(ex: _Collectives, cfg: LMConfig, p, names: tuple[str, ...], x) -> list:
    """Compute the `products` of `block.block` with matrices that are split over `tensor`.

    x holds the rows of this device with all columns, and so do the results. But along the logical axis "mlp"
    they hold the rows of the whole group, with the columns of this device.
    """
    if names == experts.EXPERTS:
        z = experts.apply(p, cfg, [ex.together(a) for a in x])
        return [ex.sum(z, p["experts_down"].shape[1] < cfg.experts[2])]
    first, table = p[names[0]], params_lib.table(cfg)
    _, before, after = table["blocks/" + names[0]].axes
    x = x.astype(first.dtype)
    if after != "model":
        x = ex.together(x)
    elif before != "mlp":
        x = ex.part(x, len(first))
    out = []
    for name in names:
        # Products with adapters that are not merged are partial sums, as those with their matrices are.
        z, (_, n_in, n_out) = block.add_adapter(p, name, x, dense(x, p[name])), table["blocks/" + name].shape
        if after == "model":
            z = ex.sum(z, len(p[name]) < n_in)
        elif after != "mlp":
            z = ex.whole(z, n_out)
        out.append(block.add_bias(p, name, z))
    return out


def scan_blocks(blocks, cfg: LMConfig, x, views, prompt, written, slot, products):
    """Do what `kv_cache.run_blocks` does by a scan over stacked blocks.

    The scan carries `written`, {kind: stacks of that kind's blocks}, and changes it in place. It only reads
    the prompt.
    """
    def step(carry, layer):
        x, written = carry
        p, i, shared, local = layer
        linear = "delta_out" in p
        near = bool(cfg.global_heads) and "global_wo" not in p
        kind = linear or near
        cos, sin, masks = views[near] if local is None else jax.tree.map(
            lambda a, b: jnp.where(local, a, b), views[True], views[False])

        def put(cache, a, i):
            if jnp.ndim(slot) == 0:
                return jax.lax.dynamic_update_slice(cache, a[None], (i, zero, zero, slot, zero))
            own = jax.lax.dynamic_index_in_dim(cache, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(cache, kv_cache.put(own, a, slot), i, 0)

        def attend(q, k, v):
            new = [put(c, a, i) for c, a in zip(written[kind], (k, v), strict=True)]
            here = [jax.lax.dynamic_index_in_dim(c, i, keepdims=False) for c in new]
            a = attend_levels(q[:, 0], [*shared, here], masks, k.dtype, cfg.query_scalar, cfg.attn_softcap)
            return a, new

        def recur(*token):
            past = [jax.lax.dynamic_index_in_dim(c, i, keepdims=False) for c in written[True]]
            o, state = delta_net.over_token(cfg, past, *token)
            return o, [jax.lax.dynamic_update_index_in_dim(c, a, i, 0)
                       for c, a in zip(written[True], state, strict=True)]

        x, new = block.block(p, cfg, x, cos, sin, recur if linear else attend, products)
        return (x, {**written, kind: tuple(new)}), None

    shared, zero = [(level.k, level.v) for level in prompt], jnp.int32(0)  # slices take indices of one dtype
    if cfg.kinds:
        counts = [sum(kind == cfg.kinds[i] for kind in cfg.kinds[:i]) for i in range(cfg.n_blocks)]
        i_L = jnp.array(counts, jnp.int32)  # each block's index in the stacks of its kind
        past = {False: shared} if cfg.linear else {
            kind: [(k[kind], v[kind]) for k, v in shared] for kind in (False, True)}
        # A block takes its weights from the whole stacks. Of stacks that are scanned over, XLA would copy the
        # weights of a whole period of blocks for every token.
        places, keys = _places(blocks), {kind: _places(past[kind]) for kind in past}

        def look_up(carry, layer):
            place, i, key, _ = layer
            p = {name: _take(blocks[name], where) for name, where in place.items()}
            kind = "delta_out" in place or bool(cfg.global_heads) and "global_wo" not in place
            return step(carry, (p, i, _take(past[kind], key) if kind in past else None, None))

        return scan.scan_kinds(look_up, (x, written), cfg, places, i_L, keys)[0]
    local_L = jnp.array(cfg.local, bool) if cfg.local else None
    i_L = jnp.arange(cfg.n_blocks, dtype=jnp.int32)
    return jax.lax.scan(step, (x, written), (blocks, i_L, shared, local_L))[0]


def _places(tree):
    """Return the tree with the indices 0, 1, … in the place of each stack."""
    return jax.tree.map(lambda a: jnp.arange(len(a), dtype=jnp.int32), tree)


def _take(tree, places):
    """Return what the stacks of a tree have at these places."""
    return jax.tree.map(lambda a, i: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree, places)
