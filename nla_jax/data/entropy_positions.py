"""Choose the tokens of a text that are worth an explanation, by the target's next-token prediction.

A text has too many tokens to explain them all. After most of them the target is sure what follows. Where it
is not (high entropy), or where it was wrong (high surprise), its activation holds more than the next word.
"""

import functools
from collections.abc import Collection, Sequence

import jax
import numpy as np

from nla_jax import objectives, specs
from nla_jax.errors import UserError
from nla_jax.lm.model import embed, forward
from nla_jax.util.batching import full_batches, pad_rows, width_for
from nla_jax.util.progress import Progress

KINDS = ("entropy", "surprise")


@functools.partial(jax.jit, static_argnames="spec")
def _scores(base, ids_BT, valid_BT, spec: specs.Spec):
    x_BTD, _ = forward(base, spec.lm, embed(base, spec.lm, ids_BT), valid_BT)
    next_BT = jax.numpy.roll(ids_BT, -1, 1)
    logp, entropy, _ = objectives.token_scores(
        base, spec.lm, x_BTD.reshape(-1, x_BTD.shape[-1]), next_BT.reshape(-1), chunk=spec.vocab_chunk)
    return entropy.reshape(ids_BT.shape), -logp.reshape(ids_BT.shape)


def score_tokens(base, spec: specs.Spec, texts: Sequence[Sequence[int]], *, batch: int = 16,
                 label: str = "") -> list[dict[str, np.ndarray]]:
    """Return for each text {"entropy": [T], "surprise": [T]}, float32, in nats.

    entropy[t]: of the target's prediction of the token after token t. surprise[t]: minus the log-probability
    that it gave to the token that does follow; 0 at the last token.

    Args:
      base: the whole target. texts: ids of each text, without the ids that the tokenizer puts first
        (`lm.tokenizer.plain_ids`). batch: texts of a forward pass.
    """
    rows, lead = [[*spec.lead, *ids] for ids in texts], len(spec.lead)
    out: list[dict[str, np.ndarray]] = [{} for _ in rows]
    order = np.argsort([len(row) for row in rows], kind="stable")
    with Progress(label, len(rows), unit="texts") as bar:
        for real, pick in full_batches(order, min(batch, max(len(rows), 1))):
            ids_BT, valid_BT, _ = pad_rows([rows[i] for i in pick], spec.av.pad,
                                           width_for(len(rows[real[-1]])))
            found = [np.asarray(a) for a in _scores(base, ids_BT, valid_BT, spec)]
            for b, i in enumerate(real):
                entropy_T, surprise_T = (a[b, lead : len(rows[i])].copy() for a in found)
                surprise_T[-1:] = 0.0
                out[i] = {"entropy": entropy_T, "surprise": surprise_T}
            bar.advance(len(real))
    return out


def choose_positions(score_T, n: int, *, apart: int = 1, allowed: Collection[int] | None = None) -> list[int]:
    """Return the n indices of the highest scores, in ascending order; fewer if no more are eligible.

    Args:
      score_T: one number for each token, such as `score_tokens(...)[i]["entropy"]`.
      apart: the smallest distance between two chosen indices. The higher score is chosen first.
      allowed: the eligible indices; None: all.

    Of equal scores the earlier is chosen. Raises UserError if n or apart is below 1, or a score is NaN.
    """
    score_T = np.asarray(score_T, np.float64)
    if n < 1 or apart < 1:
        raise UserError(f"n={n}, apart={apart}: both must be at least 1")
    if np.isnan(score_T).any():
        raise UserError("a score is not a number: the target's prediction is not finite")
    chosen: list[int] = []
    for i in np.argsort(-score_T, kind="stable"):
        if len(chosen) == n:
            break
        if (allowed is None or int(i) in allowed) and all(abs(int(i) - c) >= apart for c in chosen):
            chosen.append(int(i))
    return sorted(chosen)


def telling_positions(base, spec: specs.Spec, ids: Sequence[int], n: int, *, by: str = "entropy",
                      apart: int = 1) -> list[int]:
    """Return the n token indices of one text with the highest entropy (or surprise), in ascending order.

    Args as in `score_tokens` and `choose_positions`. by: one of KINDS; otherwise it raises UserError.
    """
    if by not in KINDS:
        raise UserError(f"positions by {by!r}: must be one of {', '.join(KINDS)}")
    return choose_positions(score_tokens(base, spec, [ids])[0][by], n, apart=apart)
