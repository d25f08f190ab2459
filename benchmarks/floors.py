"""The arithmetic and the memory traffic that each phase cannot do without.

Counted is what any implementation must do on these shapes: every distinct position once (the prompt before
the marker is the same for all rows, what follows it for the rows of one activation), causal attention over
the positions that are seen, products of the vocabulary only where a token is scored. Not counted: work that
an implementation adds (padding, recomputation, logits of prompts). A product of [m, k] and [k, n] has
2 m k n operations. Elementwise work, norms and softmaxes are left out, so the floor is a little too low.

Memory: weights once for each pass (for each token in decoding), keys and values where they are read, the
optimizer's state. Intermediate results are assumed to stay in caches.
"""

import dataclasses

from benchmarks.cases import Case
from nla_jax.lm.config import LMConfig

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number
ADAM = 6 * FULL  # parameter and two moments, each read and written


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes of parts that follow one another, with tokens and samples that come out."""

    parts: tuple[tuple[float, float], ...]
    tokens: int = 0
    samples: int = 0

    @property
    def flops(self) -> float:
        return sum(f for f, _ in self.parts)

    @property
    def bytes(self) -> float:
        return sum(b for _, b in self.parts)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Each part takes as long as the slower of its arithmetic and its traffic."""
        return sum(max(f / flops_per_s, b / bytes_per_s) for f, b in self.parts)


def block_weights(lm: LMConfig) -> int:
    """Numbers in the matrices of one block."""
    heads, kv = lm.n_heads * lm.head_dim, lm.n_kv_heads * lm.head_dim
    return lm.d_model * (2 * heads + 2 * kv + 3 * lm.d_ff)


def adapter_weights(lm: LMConfig, rank: int) -> int:
    """Numbers in the adapters of one block's seven matrices."""
    heads, kv = lm.n_heads * lm.head_dim, lm.n_kv_heads * lm.head_dim
    return rank * (2 * (lm.d_model + heads) + 2 * (lm.d_model + kv) + 3 * (lm.d_model + lm.d_ff))


def attention(lm: LMConfig, blocks: int, queries: int, seen: int) -> float:
    """Operations of `queries` new positions that follow `seen` others, causal, in `blocks` blocks."""
    pairs = queries * seen + queries * (queries + 1) / 2
    return 4.0 * blocks * lm.n_heads * lm.head_dim * pairs


def _rows(case: Case, rows: int, tokens: int, blocks: int, per: int, adapters: bool = True) -> float:
    """Forward operations of AV over `rows` answers of `tokens`, `per` to an activation; no vocabulary."""
    lm, own = case.lm, 1 + case.after
    weights = block_weights(lm) + (adapter_weights(lm, case.rank) if adapters else 0)
    activations = rows // per
    positions = case.before + activations * own + rows * tokens
    return (
        2.0 * positions * blocks * weights
        + attention(lm, blocks, case.before, 0)
        + activations * attention(lm, blocks, own, case.before)
        + rows * attention(lm, blocks, tokens, case.before + own)
    )


def _vocabulary(lm: LMConfig, positions: int) -> float:
    return 2.0 * positions * lm.d_model * lm.vocab_size


def _model_bytes(lm: LMConfig, blocks: int, vocabulary: bool = True) -> float:
    return HALF * (blocks * block_weights(lm) + (lm.d_model * lm.vocab_size if vocabulary else 0))


def rollout(case: Case, rows: int, per: int) -> Work:
    """Prefill, then one token at a time. Keys and values of a shared prompt are read once a step."""
    lm, T = case.lm, case.max_new
    L, own = lm.n_blocks, 1 + case.after
    activations = rows // per
    weights = block_weights(lm)
    prefill = (
        _rows(dataclasses.replace(case, rank=0), rows, 0, L, per) + _vocabulary(lm, activations),
        _model_bytes(lm, L),
    )
    kv = 2 * L * lm.n_kv_heads * lm.head_dim * HALF  # bytes of one position
    parts = [prefill]
    for t in range(1, T):  # the token that is read is the t-th one written
        flops = rows * (2.0 * L * weights + attention(lm, L, 1, case.prompt + t - 1))
        flops += _vocabulary(lm, rows)
        seen = case.before + activations * own + rows * t
        parts.append((flops, _model_bytes(lm, L) + kv * seen))
    return Work(tuple(parts), tokens=rows * T, samples=rows)


def plain_decode_bytes(case: Case, rows: int) -> float:
    """Traffic of the decoding loop when every row reads the whole of its own cache."""
    lm = case.lm
    kv = 2 * lm.n_blocks * lm.n_kv_heads * lm.head_dim * HALF
    steps = range(1, case.max_new)
    return sum(_model_bytes(lm, lm.n_blocks) + kv * rows * (case.prompt + t) for t in steps)


def _trained(case: Case, blocks: int, whole: bool) -> int:
    """Numbers that the optimizer updates (norm weights and the AR's head are left out)."""
    if case.rank:
        return blocks * adapter_weights(case.lm, case.rank)
    tables = (1 if case.lm.tied or not whole else 2) * case.lm.d_model * case.lm.vocab_size
    return blocks * block_weights(case.lm) + tables


def _passes(case: Case) -> float:
    """Forward-sized products of an update: forward and both gradients, or without that of W (LoRA)."""
    return 2.0 if case.rank else 3.0


def _adapter_extra(case: Case, forward: float, share: float) -> float:
    """The adapters' own weight gradients, which `_passes` leaves out with LoRA."""
    return forward * share if case.rank else 0.0


def _update(case: Case, forward: float, vocabulary: float, blocks: int, whole: bool) -> tuple[float, float]:
    extra = adapter_weights(case.lm, case.rank)
    share = extra / (block_weights(case.lm) + extra)
    flops = _passes(case) * (forward + vocabulary) + _adapter_extra(case, forward, share)
    passes = 2 * _model_bytes(case.lm, blocks, whole)
    return flops, passes + ADAM * _trained(case, blocks, whole)


def av_update(case: Case) -> Work:
    """Policy with its gradient, the reference forward, the optimizer."""
    lm, N, T = case.lm, case.rows, case.max_new
    forward = _rows(case, N, T - 1, lm.n_blocks, case.group)
    vocabulary = _vocabulary(lm, N * T)
    policy = _update(case, forward, vocabulary, lm.n_blocks, True)
    reference = (forward + vocabulary, _model_bytes(lm, lm.n_blocks))
    return Work((reference, policy), tokens=N * T, samples=N)


def _ar_forward(case: Case, rows: int, tokens: int) -> float:
    """Blocks 0..K over AR prompts whose beginning is shared, and the head."""
    lm, blocks = case.lm, case.layer + 1
    weights = block_weights(lm) + adapter_weights(lm, case.rank)
    own = tokens - case.ar_before
    return (
        2.0 * (case.ar_before + rows * own) * blocks * weights
        + attention(lm, blocks, case.ar_before, 0)
        + rows * attention(lm, blocks, own, case.ar_before)
        + 2.0 * rows * lm.d_model**2
    )


def score(case: Case, rows: int) -> Work:
    blocks = case.layer + 1
    part = (_ar_forward(case, rows, case.ar_tokens), _model_bytes(case.lm, blocks, False))
    return Work((part,), tokens=rows * case.max_new, samples=rows)


def ar_update(case: Case, rows: int, tokens: int) -> Work:
    """The forward pass (which scores too) with its gradient, and the optimizer."""
    part = _update(case, _ar_forward(case, rows, tokens), 0.0, case.layer + 1, False)
    return Work((part,), tokens=rows * tokens, samples=rows)


def warm_av(case: Case) -> Work:
    rows, T = case.warm
    forward = _rows(case, rows, T - 1, case.lm.n_blocks, 1)
    part = _update(case, forward, _vocabulary(case.lm, rows * T), case.lm.n_blocks, True)
    return Work((part,), tokens=rows * T, samples=rows)


def capture(case: Case) -> Work:
    (rows, tokens), lm, blocks = case.capture, case.lm, case.layer + 1
    flops = rows * (2.0 * tokens * blocks * block_weights(lm) + attention(lm, blocks, tokens, 0))
    return Work(((flops, _model_bytes(lm, blocks, False)),), tokens=rows * tokens, samples=rows)


def of(case: Case) -> dict[str, Work]:
    """Phase -> Work."""
    out = {
        "rollout": rollout(case, case.rows, case.group),
        "score": score(case, case.rows),
        "av_update": av_update(case),
        "ar_update": ar_update(case, case.rows, case.ar_tokens),
        "capture": capture(case),
        "warm_av": warm_av(case),
        "warm_ar": ar_update(case, *case.warm),
    }
    # Scoring needs no pass of its own: the forward pass of AR's update gives the rewards.
    parts = [p for name in ("rollout", "ar_update", "av_update") for p in out[name].parts]
    out["step"] = Work(tuple(parts), tokens=case.rows * case.max_new, samples=case.rows)
    trip = rollout(case, case.evaluate, 1).parts + score(case, case.evaluate).parts
    out["evaluate"] = Work(trip, tokens=case.evaluate * case.max_new, samples=case.evaluate)
    return out
