"""Count the minimal arithmetic of a step: floating-point operations of its products, over all devices.

A product of [m, k] and [k, n] has 2mkn operations. A token and a matrix of p entries need 2p forward, 2p for
the token's gradient, and 2p for the matrix's gradient if it is trained. Attention counts only the positions
that a token may see. Recomputation of blocks (`remat`) is counted. The last product of a block is not, unless
a norm follows it, because the backward pass does not need it. Logits are computed once. Padding counts like
tokens, because shapes are fixed. Decoding counts max_new tokens for every row. Norms, softmax, rotary
embedding, sampling and optimizers are not products and are not counted. Of a mixture, the router and the
chosen experts of a token count.

Linear attention counts in chunks, with its triangular system solved by substitution. Its form for one token
is elementwise, in the program too, and is not counted.
"""

import dataclasses
import math

from nla_jax import specs
from nla_jax.lm import lora
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.delta_net import CHUNK


def block_sizes(cfg: LMConfig) -> list[int]:
    """Return the number of entries of each block's matrices."""
    return _entries(cfg, lambda spec: math.prod(spec.shape[1:]))


def _entries(cfg: LMConfig, count) -> list[int]:
    """Return the sum of count(spec) over the matrices of each block."""
    out = [0] * cfg.n_blocks
    for name, spec in params_lib.table(cfg).items():
        if name.startswith("blocks/") and "model" in spec.axes:  # no norms, biases or convolutions
            for i in params_lib.blocks_of(cfg, name):
                out[i] += count(spec)
    return out


def _multiplied(cfg: LMConfig, n_blocks: int) -> int:
    """Return the number of entries that a token is multiplied with in the first `n_blocks` blocks."""
    chosen, n = cfg.experts[1::-1] if cfg.experts else (1, 1)
    of_experts = lambda spec: spec.axes[1:2] == ("expert",)
    every = _entries(cfg, lambda spec: math.prod(spec.shape[1:]) * (chosen if of_experts(spec) else n) // n)
    return sum(every[:n_blocks])


def _adapters(cfg: LMConfig, n_blocks: int, rank: int) -> int:
    """Return the number of entries of all adapters of the first `n_blocks` blocks."""
    table = lora.table(cfg.first_blocks(n_blocks), rank) if rank else {}
    return sum(math.prod(spec.shape) for spec in table.values())


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a token is multiplied by a matrix: `forward`, `again` (recomputation), for the token's
    gradient `dx`, and for the matrix's gradient `dw`."""

    forward: int = 1
    again: int = 0
    dx: int = 0
    dw: int = 0

    @property
    def all(self) -> int:
        return self.forward + self.again + self.dx + self.dw


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How many tokens there are, how many pairs of a token and one that it sees, and how many of these pairs
    are in one chunk of linear attention."""

    n: float
    pairs: float
    near: float = 0.0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.n + other.n, self.pairs + other.pairs, self.near + other.near)


def sequences(rows: float, length: int, seen: int = 0) -> Tokens:
    """Return the Tokens of sequences of this length, each after `seen` other tokens."""
    chunks, rest = divmod(length, CHUNK)
    near = chunks * _causal(CHUNK) + _causal(rest)
    return Tokens(rows * length, rows * (length * seen + _causal(length)), rows * near)


def _causal(n: float) -> float:
    return n * (n + 1) / 2


def _attention(cfg: LMConfig, n_blocks: int, tokens: Tokens) -> float:
    """Return the operations of attention in the first `n_blocks` blocks, forward."""
    linear = sum(cfg.linear[:n_blocks])
    softmax = 4 * cfg.n_heads * cfg.head_dim * tokens.pairs  # scores and their product with values
    if not linear:
        return n_blocks * softmax
    key_heads, heads, dk, dv, _ = cfg.delta
    # Keys with keys and with queries; the system; the part of the output that the chunk has written.
    inside = 4 * key_heads * dk + heads * (2 * (dk + dv) + 2 * dv)
    state = 6 * heads * dk * dv  # read by keys and by queries, and written
    chunked = inside * tokens.near + state * tokens.n if tokens.near else 0  # without chunks: token by token
    return (n_blocks - linear) * softmax + linear * chunked


def _blocks(cfg: LMConfig, n_blocks: int, tokens: Tokens, how: Passes, rank: int) -> float:
    """Return the operations of the first `n_blocks` blocks over `tokens`."""
    matrices = _multiplied(cfg, n_blocks) * (how.all - (how.dw if rank else 0))
    if not (cfg.post_norms or cfg.experts):  # the last product of a block is not computed again
        matrices -= n_blocks * how.again * cfg.d_model * cfg.d_ff
    attention = _attention(cfg, n_blocks, tokens) * (how.forward + how.again + 2 * (how.dx > 0))
    return 2 * tokens.n * (matrices + _adapters(cfg, n_blocks, rank) * how.all) + attention


def _prompt(spec: specs.Spec) -> tuple[int, int]:
    return len(spec.av.before), 1 + len(spec.av.after)


def _answers(spec: specs.Spec, n_rows: int, T: int, micro: int, how: Passes, rank: int) -> float:
    """Return AV's operations over its prompt and T - 1 tokens of each answer.

    The prompt before the marker counts once per microbatch."""
    before, own = _prompt(spec)
    tokens = sequences(micro, before) + sequences(n_rows, own + T - 1, before)
    return _blocks(spec.lm, spec.lm.n_blocks, tokens, how, rank)


def _logits(spec: specs.Spec, positions: float, how: Passes, rank: int) -> float:
    return 2 * positions * spec.lm.d_model * spec.lm.vocab_size * (how.all - (how.dw if rank else 0))


def _trained(remat: bool) -> Passes:
    return Passes(1, int(remat), 1, 1)


def _reconstructor(spec: specs.Spec, n_rows: int, T: int, how: Passes, rank: int) -> float:
    blocks = _blocks(spec.lm, spec.layer + 1, sequences(n_rows, T), how, rank)
    return blocks + 2 * n_rows * spec.lm.d_model**2 * (how.forward + how.dx + how.dw)


def warm(config, stage: str, spec: specs.Spec) -> dict[str, float]:
    """Return {phase: operations} of a warm-start step."""
    s, how = config[stage], _trained(spec.remat)
    if stage.endswith("ar"):
        return {"update": _reconstructor(spec, s.batch, s.max_tokens, how, config.ar.rank)}
    rank = config.av.rank
    loss = _logits(spec, s.batch * s.max_tokens, _trained(False), rank)
    return {"update": _answers(spec, s.batch, s.max_tokens, s.micro, how, rank) + loss}


def rl(config, spec: specs.Spec) -> dict[str, float]:
    """Return {phase: operations} of an RL step."""
    o, cfg, once = config.rl, spec.lm, Passes()
    N, T, rank = o.batch * o.group, o.max_new, config.av.rank
    before, own = _prompt(spec)
    how = _trained(spec.remat)
    prefill = _blocks(cfg, cfg.n_blocks, sequences(1, before) + sequences(o.batch, own, before), once, rank)
    new = T - 1  # the first token comes from the prefill
    seen = N * (new * (before + own) + _causal(new))
    out = {
        "prefill": prefill + _logits(spec, o.batch, once, rank),
        # Adapters are merged for decoding.
        "decode": _blocks(cfg, cfg.n_blocks, Tokens(N * new, seen), once, 0)
        + _logits(spec, N * new, once, 0),
    }
    T_ar, learns = len(spec.ar.before) + T + len(spec.ar.after), o.train_ar and config.ar.kind == "trained"
    best = o.batch * o.ar_group if learns and 0 < o.ar_group < o.group else N  # rows that AR learns
    out["ar"] = _reconstructor(spec, best, T_ar, how if learns else once, config.ar.rank)
    if best < N:
        out["ar"] += _reconstructor(spec, N, T_ar, once, config.ar.rank)
    out["av"] = _answers(spec, N, T, o.micro_av, how, rank) + _logits(spec, N * T, _trained(False), rank)
    if o.kl:
        out["reference"] = _answers(spec, N, T, o.micro_av, once, rank)
        out["av"] += _logits(spec, N * T, once, rank)  # the reference's logits, in the same loop
    return out


def of(config, name: str, spec: specs.Spec) -> dict[str, float]:
    """Return {phase: operations} of the program `name`."""
    return rl(config, spec) if name == "rl" else warm(config, name, spec)
