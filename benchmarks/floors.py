"""Count the arithmetic and the memory traffic that each phase needs at least.

The count has what any implementation must do on these shapes. Every distinct position counts once: all rows
share the prompt before the marker, and the rows of one activation share the rest of the prompt. Attention is
causal, and logits are computed only where a token is scored. Padding, recomputation and logits of prompts
are not counted. A product of [m, k] and [k, n] has 2 m k n operations. Elementwise work, norms and softmaxes
are left out, so the floor is slightly too low.

Memory traffic has the weights once per pass (per token in decoding), keys and values where they are read,
and the optimizer's state. Intermediate results are assumed to stay in caches.
"""

import dataclasses
import statistics

from benchmarks.cases import Case
from nla_jax.lm.config import LMConfig

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number
ADAM = 6 * FULL  # parameter and two moments, each read and written


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes of consecutive parts, and the tokens and samples that they produce."""

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
        """Return the sum over parts of the larger of arithmetic time and traffic time."""
        return sum(max(f / flops_per_s, b / bytes_per_s) for f, b in self.parts)


def block_weights(lm: LMConfig) -> int:
    """Return the number of entries in the matrices of one block."""
    heads, kv = lm.n_heads * lm.head_dim, lm.n_kv_heads * lm.head_dim
    return lm.d_model * (2 * heads + 2 * kv + 3 * lm.d_ff)


def adapter_weights(lm: LMConfig, rank: int) -> int:
    """Return the number of entries in the adapters of one block's seven matrices."""
    heads, kv = lm.n_heads * lm.head_dim, lm.n_kv_heads * lm.head_dim
    return rank * (2 * (lm.d_model + heads) + 2 * (lm.d_model + kv) + 3 * (lm.d_model + lm.d_ff))


def attention(lm: LMConfig, blocks: int, queries: int, seen: int) -> float:
    """Return the operations of causal attention for `queries` positions after `seen` others."""
    pairs = queries * seen + queries * (queries + 1) / 2
    return 4.0 * blocks * lm.n_heads * lm.head_dim * pairs


def _rows(case: Case, rows: int, tokens: int, blocks: int, per: int, adapters: bool = True) -> float:
    """Return AV's forward operations over `rows` answers of `tokens` tokens, without logits.

    `per`: answers per activation."""
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
    """Return the work of a rollout: prefill, then one token at a time.

    Keys and values of a shared prompt are read once per token."""
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
    for t in range(1, T):  # the input is the t-th written token
        flops = rows * (2.0 * L * weights + attention(lm, L, 1, case.prompt + t - 1))
        flops += _vocabulary(lm, rows)
        seen = case.before + activations * own + rows * t
        parts.append((flops, _model_bytes(lm, L) + kv * seen))
    return Work(tuple(parts), tokens=rows * T, samples=rows)


def writing(case: Case, rows: int) -> Work:
    """Return the work of `rows` explanations that are written together, one of each activation.

    The keys and values of the prompt before the marker are known, as in a server."""
    (flops, traffic), *decoding = rollout(case, rows, 1).parts
    flops -= _rows(dataclasses.replace(case, rank=0), 0, 0, case.lm.n_blocks, 1)
    return Work(((flops, traffic), *decoding), tokens=rows * case.max_new, samples=rows)


def explanations_per_s(case: Case, rows: int, rates: dict) -> float:
    """Return how many explanations a second the machine can write at most, `rows` of them together."""
    return rows / writing(case, rows).seconds(rates["gemm_bf16"], rates["bandwidth"])


def plain_decode_bytes(case: Case, rows: int) -> float:
    """Return the memory traffic of the decode loop if every row reads a whole cache of its own."""
    lm = case.lm
    kv = 2 * lm.n_blocks * lm.n_kv_heads * lm.head_dim * HALF
    steps = range(1, case.max_new)
    return sum(_model_bytes(lm, lm.n_blocks) + kv * rows * (case.prompt + t) for t in steps)


def _trained(case: Case, blocks: int, whole: bool) -> int:
    """Return the number of trained parameters, without norm weights and AR's head."""
    if case.rank:
        return blocks * adapter_weights(case.lm, case.rank)
    tables = (1 if case.lm.tied or not whole else 2) * case.lm.d_model * case.lm.vocab_size
    return blocks * block_weights(case.lm) + tables


def _passes(case: Case) -> float:
    """Return the products of an update in units of a forward pass: forward and both gradients.

    With LoRA there is no gradient of W."""
    return 2.0 if case.rank else 3.0


def _adapter_extra(case: Case, forward: float, share: float) -> float:
    """Return the operations of the adapters' weight gradients, which `_passes` leaves out with LoRA."""
    return forward * share if case.rank else 0.0


def _update(case: Case, forward: float, vocabulary: float, blocks: int, whole: bool) -> tuple[float, float]:
    extra = adapter_weights(case.lm, case.rank)
    share = extra / (block_weights(case.lm) + extra)
    flops = _passes(case) * (forward + vocabulary) + _adapter_extra(case, forward, share)
    passes = 2 * _model_bytes(case.lm, blocks, whole)
    return flops, passes + ADAM * _trained(case, blocks, whole)


def av_update(case: Case) -> Work:
    """Return the work of AV's update: policy forward and gradient, reference forward, optimizer."""
    lm, N, T = case.lm, case.rows, case.max_new
    forward = _rows(case, N, T - 1, lm.n_blocks, case.group)
    vocabulary = _vocabulary(lm, N * T)
    policy = _update(case, forward, vocabulary, lm.n_blocks, True)
    reference = (forward + vocabulary, _model_bytes(lm, lm.n_blocks))
    return Work((reference, policy), tokens=N * T, samples=N)


def _ar_forward(case: Case, rows: int, tokens: int) -> float:
    """Return the operations of blocks 0..K over AR prompts with a shared beginning, and of the head."""
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
    """Return the work of AR's update: forward (which also gives the scores), gradient, optimizer."""
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


def works_by_phase(case: Case) -> dict[str, Work]:
    """Return the Work of each phase. Answers of several lengths count as so many of their mean length."""
    if case.lengths:
        case = dataclasses.replace(case, max_new=case.lengths[0])
    out = {
        "rollout": rollout(case, case.rows, case.group),
        "score": score(case, case.rows),
        "av_update": av_update(case),
        "ar_update": ar_update(case, case.rows, case.ar_tokens),
        "capture": capture(case),
        "warm_av": warm_av(case),
        "warm_ar": ar_update(case, *case.warm),
    }
    # Scoring needs no separate pass, because the forward pass of AR's update gives the rewards.
    parts = [p for name in ("rollout", "ar_update", "av_update") for p in out[name].parts]
    out["step"] = Work(tuple(parts), tokens=case.rows * case.max_new, samples=case.rows)
    trip = rollout(case, case.evaluate, 1).parts + score(case, case.evaluate).parts
    out["evaluate"] = Work(trip, tokens=case.evaluate * case.max_new, samples=case.evaluate)
    return out


def summary(work: Work, times: dict, rates: dict) -> dict:
    """Return the figures of one phase from the seconds of each side."""
    out = {}
    for side, seconds in times.items():
        s = statistics.median(seconds)
        out |= {f"{side}_s": s, f"{side}_all_s": seconds, f"{side}_tokens_per_s": work.tokens / s,
                f"{side}_samples_per_s": work.samples / s}
    if {"ours", "torch"} <= times.keys():
        out["ratio"] = out["ours_s"] / out["torch_s"]
    if rates:
        out |= {"floor_s": work.seconds(rates["gemm_bf16"], rates["bandwidth"]),
                "flops": work.flops, "bytes": work.bytes}
        for side in times:
            out[f"{side}_over_floor"] = out[f"{side}_s"] / out["floor_s"]
            out[f"{side}_of_peak"] = work.flops / out[f"{side}_s"] / rates["gemm_bf16"]
    return out
