"""The cost of decoding on several chips by formulas, and the size of `tensor` that costs least.

`decode_tp` splits matrices over the mesh axis `tensor`, and rows over all axes. With `tensor` 1 each chip has
whole weights and its own rows: data parallel, nothing is sent. With more, a chip reads fewer weights for each
token, and sends activations. docs/scaling.md compares the formulas with the compiler's output.
"""

import dataclasses
import math

from nla_jax.lm import params as params_lib
from nla_jax.lm.block import GATE_UP, GLOBAL_QK, GLOBAL_QKV, QKV
from nla_jax.lm.config import LMConfig
from nla_jax.lm.delta_net import DELTA_IN
from nla_jax.lm.experts import EXPERTS
from nla_jax.sharding import rules
from nla_jax.sharding.chips import Chip

# Seconds for a message to reach the next chip, an assumption: jax-ml.github.io/scaling-book gives 1 µs.
HOP = 1e-6
_SAMPLING = 2  # how often the logits of a token are read or written in memory, in the compiler's output
_STATES = 3  # the same of the states of linear attention


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The shape of a rollout: rows of answers, of `activations`, whose prompt has `before` tokens that all
    share and `own` tokens from the marker on. A row has up to `max_new` tokens."""

    rows: int
    activations: int
    before: int
    own: int
    max_new: int


@dataclasses.dataclass(frozen=True)
class Token:
    """What one chip does for one token of every row. Bytes, except for `flops` and `collectives`."""

    flops: float
    weights: float  # read from memory
    beside: float  # read and written beside weights: caches, states, logits
    links: float  # sent
    collectives: int
    hops: int  # from chip to chip, of one collective

    def seconds(self, chip: Chip, hop: float = HOP) -> float:
        """Return the seconds at peak rates. Products overlap with memory. Links do not: a product needs what
        the collective before it sends."""
        busy = max(self.flops / chip.flops, (self.weights + self.beside) / chip.hbm)
        return busy + self.links / chip.ici + self.collectives * self.hops * hop


def per_token(cfg: LMConfig, shape: Rollout, n: int, tensor: int, item: float = 2) -> Token:
    """Return the `Token` of n chips with `tensor` chips in a group. item: bytes of an entry of a matrix."""
    rows = shape.rows / n
    table = params_lib.table(cfg)
    sent = _Sent(rows, tensor, item if item > 1 else 2)  # activations are bfloat16 beside int8 weights
    entries = multiplied = 0.0  # of a mixture, a row is multiplied with the chosen experts
    for i in range(cfg.n_blocks):
        for names in _products(cfg, i):
            matrices, is_mixture = [table["blocks/" + name] for name in names], names == EXPERTS
            here = sum(_part(spec, tensor) for spec in matrices)
            entries += here
            multiplied += here * (cfg.experts[1] / cfg.experts[0] if is_mixture else 1)
            sent.product(matrices, is_mixture)
    unembed = params_lib.Spec((1, cfg.d_model, cfg.vocab_size), ("block", "model", "vocab"))
    entries += _part(unembed, tensor)
    multiplied += _part(unembed, tensor)
    sent.product([unembed])
    sent.all(1, 4)  # ids
    sent.exchange(cfg.d_model, sent.item)  # the embedding
    softmax = cfg.n_blocks - sum(cfg.linear)
    seen = shape.before + shape.own + shape.max_new
    scores = 4 * softmax * cfg.n_heads * cfg.head_dim * seen * rows
    beside = cache_bytes(cfg, shape, n) + (_STATES - 1) * state_bytes(cfg) * rows  # the cache has them once
    beside += _SAMPLING * 4 * cfg.vocab_size * rows
    return Token(2 * rows * tensor * multiplied + scores, entries * item, beside, sent.bytes,
                 sent.collectives, tensor - 1)


class _Sent:
    """Bytes that a chip sends around the products of `decode_tp`, and the number of its collectives."""

    def __init__(self, rows: float, tensor: int, item: int):
        self.rows, self.tensor, self.item = rows, tensor, item
        self.bytes, self.collectives = 0.0, 0

    def all(self, n: int, item: int):
        """Add an all-gather or a reduce-scatter of n columns of the group's rows."""
        self._add(n * item * (self.tensor - 1))

    def exchange(self, n: int, item: int):
        """Add an all-to-all of n columns."""
        self._add(n * item * (self.tensor - 1) / self.tensor)

    def _add(self, n_bytes: float):
        if self.tensor > 1:
            self.bytes += self.rows * n_bytes
            self.collectives += 1

    def product(self, specs, is_mixture: bool = False):
        """Add the collectives of one `_split_products`."""
        first = specs[0]
        before, after = first.axes[-2:]
        if is_mixture:  # activations in float32, and the sum
            self.all(first.shape[-2], 4)
            return self.all(first.shape[-2], 4)
        if after != "model":
            self.all(first.shape[-2], self.item)
        elif before != "mlp":
            (self.exchange if _splits(first, self.tensor) else self.all)(first.shape[-2], self.item)
        for spec in specs:
            if after == "model" and _splits(spec, self.tensor):
                self.all(spec.shape[-1], 4)
            elif after not in ("model", "mlp") and _splits(spec, self.tensor):
                self.exchange(spec.shape[-1], 4)


def _splits(spec: params_lib.Spec, tensor: int) -> bool:
    """Return whether `tensor` splits a matrix in decoding."""
    return any(axis and rules.TABLE[axis].in_decoding and size % tensor == 0
               for size, axis in zip(spec.shape[-2:], spec.axes[-2:], strict=True))


def _part(spec: params_lib.Spec, tensor: int) -> float:
    """Return the entries of one block's matrix that one chip has."""
    return math.prod(spec.shape[1:]) / (tensor if _splits(spec, tensor) else 1)


def _products(cfg: LMConfig, i: int) -> list[tuple[str, ...]]:
    """Return the names of the matrices of each call of `products` in block i (`block.block`)."""
    if cfg.linear and cfg.linear[i]:
        mixing = [DELTA_IN, ("delta_out",)]
    elif cfg.global_heads and not (cfg.local and cfg.local[i]):
        mixing = [GLOBAL_QK if cfg.global_k_is_v else GLOBAL_QKV, ("global_wo",)]
    else:
        mixing = [QKV, ("wo",)]
    if cfg.experts:
        mixing += [("router",), EXPERTS]
    if not cfg.experts or cfg.experts_beside or cfg.shared_expert:
        mixing += [GATE_UP, ("w_down",)]
    return mixing + [("shared_gate",)] * cfg.shared_expert


def cache_bytes(cfg: LMConfig, shape: Rollout, n: int, item: int = 2) -> float:
    """Return the bytes of a rollout's cache on one of n chips.

    The prompt before the marker is cached once, the rest of the prompt per activation, answers per row.
    Blocks with linear attention have one state per row instead."""
    local = cfg.local or (False,) * cfg.n_blocks
    linear = cfg.linear or (False,) * cfg.n_blocks
    sizes = (math.prod(cfg.kv_heads(near)) for near, no in zip(local, linear, strict=True) if not no)
    slot = 2 * item * sum(sizes)
    activations, rows = math.lcm(shape.activations, n) / n, shape.rows / n
    return slot * (shape.before + shape.own * activations + shape.max_new * rows) + state_bytes(cfg) * rows


def state_bytes(cfg: LMConfig) -> int:
    """Return the bytes of one row's recurrent states: float32, with the inputs of the convolution."""
    if not cfg.linear:
        return 0
    key_heads, heads, dk, dv, width = cfg.delta
    inputs = (width - 1) * (2 * key_heads * dk + heads * dv)
    return 4 * sum(cfg.linear) * (heads * dk * dv + inputs)


def weight_bytes(cfg: LMConfig, tensor: int, item: float = 2) -> float:
    """Return the bytes of a rollout's weights on one chip, embeddings included."""
    table = params_lib.table(cfg)
    matrices = [s for s in table.values() if "model" in s.axes] + [table["embed"]] * cfg.tied
    return item * sum(math.prod(s.shape) / (tensor if _splits(s, tensor) else 1) for s in matrices)


def memory_bytes(cfg: LMConfig, shape: Rollout, n: int, tensor: int, item: float = 2) -> float:
    """Return the bytes of a rollout on one chip: weights, cache, and logits as they are sampled from. The
    compiler keeps states of linear attention twice."""
    rows = shape.rows / n
    twice = 3 * 4 * cfg.vocab_size * rows + state_bytes(cfg) * rows
    return weight_bytes(cfg, tensor, item) + cache_bytes(cfg, shape, n) + twice


def rollout_seconds(cfg: LMConfig, shape: Rollout, chip: Chip, n: int, tensor: int, item: float = 2,
                    hop: float = HOP) -> float:
    """Return the seconds of a rollout at peak rates, without prefill. Weights are gathered once."""
    gathered = weight_bytes(cfg, tensor, item) * (1 - tensor / n)
    token = per_token(cfg, shape, n, tensor, item)
    return gathered / chip.ici + (shape.max_new - 1) * token.seconds(chip, hop)


def choose_tensor(cfg: LMConfig, shape: Rollout, n: int, resting: dict[int, float], memory: float,
                  chip: Chip | None, hop: float = HOP) -> int:
    """Return the size of `tensor` with the fastest rollout, among those that fit in memory.

    If the chip's rates are not known (None), it is the smallest that fits. If none fits, it is the largest.

    Args: resting: {size: bytes on a chip beside the rollout}. memory: usable bytes of a chip.
    """
    fits = [t for t, held in resting.items() if held + memory_bytes(cfg, shape, n, t) <= memory]
    if not fits:
        return max(resting)
    return min(fits, key=lambda t: rollout_seconds(cfg, shape, chip, n, t, hop=hop) if chip else t)
