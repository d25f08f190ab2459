"""Count the minimal arithmetic of a step: floating-point operations of its products, over all devices.

A product of [m, k] and [k, n] has 2mkn operations. A token and a matrix of p entries need 2p forward, 2p for
the token's gradient, and 2p for the matrix's gradient if it is trained. Attention counts only the positions
that a token may see. Recomputation of blocks (`remat`) is counted. The last product of a block is not, unless
a norm follows it, because the backward pass does not need it. Logits are computed once. Padding counts like
tokens, because shapes are fixed. Decoding counts max_new tokens for every row. Norms, softmax, rotary
embedding, sampling and optimizers are not products and are not counted.
"""

import dataclasses

from nla_jax import specs
from nla_jax.lm import lora
from nla_jax.lm.config import LMConfig


def block_size(cfg: LMConfig) -> int:
    """Return the number of entries of one block's matrices."""
    heads = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
    return cfg.d_model * (heads + cfg.n_heads * cfg.head_dim + 3 * cfg.d_ff)


def _adapters(cfg: LMConfig, rank: int) -> int:
    return sum(a * b for _, a, b in (s.shape for s in lora.table(cfg, rank).values())) if rank else 0


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


def _blocks(cfg: LMConfig, n_blocks: int, tokens: float, pairs: float, how: Passes, rank: int) -> float:
    """Return the operations of blocks over `tokens` tokens, with `pairs` pairs of query and key in all."""
    matrices = block_size(cfg) * (how.all - (how.dw if rank else 0))
    if not cfg.post_norms:
        matrices -= how.again * cfg.d_model * cfg.d_ff
    both = 2 * cfg.n_heads * cfg.head_dim * pairs  # scores and their product with values
    attention = 2 * both * (how.forward + how.again + 2 * (how.dx > 0))
    adapters = 2 * tokens * _adapters(cfg, rank) / cfg.n_blocks * how.all
    return n_blocks * (2 * tokens * matrices + attention + adapters)


def _causal(n: float) -> float:
    return n * (n + 1) / 2


def _prompt(spec: specs.Spec) -> tuple[int, int]:
    return len(spec.av.before), 1 + len(spec.av.after)


def _answers(spec: specs.Spec, n_rows: int, T: int, micro: int, how: Passes, rank: int) -> float:
    """Return AV's operations over its prompt and T - 1 tokens of each answer.

    The prompt before the marker counts once per microbatch."""
    before, own = _prompt(spec)
    own += T - 1
    tokens = micro * before + n_rows * own
    pairs = micro * _causal(before) + n_rows * (own * before + _causal(own))
    return _blocks(spec.lm, spec.lm.n_blocks, tokens, pairs, how, rank)


def _logits(spec: specs.Spec, positions: float, how: Passes, rank: int) -> float:
    return 2 * positions * spec.lm.d_model * spec.lm.vocab_size * (how.all - (how.dw if rank else 0))


def _trained(remat: bool) -> Passes:
    return Passes(1, int(remat), 1, 1)


def _reconstructor(spec: specs.Spec, n_rows: int, T: int, how: Passes, rank: int) -> float:
    blocks = _blocks(spec.lm, spec.layer + 1, n_rows * T, n_rows * _causal(T), how, rank)
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
    prefill = _blocks(cfg, cfg.n_blocks, before + o.batch * own,
                      _causal(before) + o.batch * (own * before + _causal(own)), once, rank)
    new = T - 1  # the first token comes from the prefill
    # Adapters are merged for decoding.
    seen = N * (new * (before + own) + _causal(new))
    out = {
        "prefill": prefill + _logits(spec, o.batch, once, rank),
        "decode": _blocks(cfg, cfg.n_blocks, N * new, seen, once, 0) + _logits(spec, N * new, once, rank),
    }
    ar = how if o.train_ar and config.ar.kind == "trained" else once
    out["ar"] = _reconstructor(spec, N, len(spec.ar.before) + T + len(spec.ar.after), ar, config.ar.rank)
    out["av"] = _answers(spec, N, T, o.micro_av, how, rank) + _logits(spec, N * T, _trained(False), rank)
    if o.kl:
        out["reference"] = _answers(spec, N, T, o.micro_av, once, rank)
        out["av"] += _logits(spec, N * T, once, rank)  # the reference's logits, in the same loop
    return out


def of(config, name: str, spec: specs.Spec) -> dict[str, float]:
    """Return {phase: operations} of the program `name`."""
    return rl(config, spec) if name == "rl" else warm(config, name, spec)
