"""Score the claims of sampled explanations against their source texts, for the reward of RL."""

import numpy as np

from nla_jax.evaluate.words import claims as claims_lib

OTHERS = 4  # texts of other documents that a claim is compared with


def score_claims(explanations, ok_N, texts, docs, group: int, fewest: int) -> tuple[np.ndarray, dict]:
    """Return (score [N] from -1 to 1, metrics) of `group` explanations of each text.

    The score is (true claims - those expected by chance) / max(claims, fewest). Chance is the share that is
    true of a few texts of other documents in the batch. The terms are chosen so that AV cannot gain the score
    by other means than true claims about this text:

      - It writes less: below `fewest` claims, the missing ones count as false.
      - It repeats a claim: outside the ending line, a claim counts once.
      - It writes words that are true of most texts: chance takes them off.
      - It fails: an answer without explanation scores -1.

    Args:
      explanations: N = len(texts) * group strings. ok_N: whether they are explanations.
      docs: the document of each text.
    """
    score_N, seen = np.full(len(explanations), -1.0, np.float32), []
    for i in np.flatnonzero(ok_N):
        b = int(i) // group
        claims = claims_lib.split_claims(explanations[i])
        kept = _first_of_each(claims)
        near = [(b + k) % len(texts) for k in range(1, len(texts))]
        others = [j for j in near if docs[j] != docs[b]][:OTHERS]
        true = float(claims_lib.judge_claims(claims, texts[b])[kept].sum())
        chance = [claims_lib.judge_claims(claims, texts[j])[kept].sum() for j in others]
        expected = float(np.mean(chance)) if chance else 0.0
        score_N[i] = (true - expected) / max(len(kept), fewest)
        seen.append((len(kept), true, expected))
    n, true, expected = np.sum(seen, 0) if seen else (0.0, 0.0, 0.0)
    return score_N, {
        "claim_score": float(score_N.mean()),
        "claim_precision": float(true / max(n, 1)),
        "claim_precision_shuffled": float(expected / max(n, 1)),
        "claims_true": float(true / max(len(seen), 1)),
        "claims_false": float((n - true) / max(len(seen), 1)),
    }


def _first_of_each(claims) -> list[int]:
    """Return the indices of the claims without repetitions. Words of the ending line are all kept."""
    first: dict = {}
    for i, c in enumerate(claims):
        first.setdefault((c.kind, i if c.kind == "ending" else c.text.lower()), i)
    return sorted(first.values())
