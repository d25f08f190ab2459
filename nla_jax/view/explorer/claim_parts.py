"""The parts of an explanation that the explorer shows: claims with what they add, and with trust."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nla_jax import api
from nla_jax.data import lessons
from nla_jax.errors import UserError
from nla_jax.evaluate.trust import apply
from nla_jax.evaluate.words import edits


def split_parts(words: str, most: int) -> tuple[list[str], str, list[str]]:
    """Split an explanation into the claims of its description and its ending line ("" if there is none).

    There are at most `most` parts. Returns (claims, ending line, for each part the words without it), with
    the ending line last.
    """
    description = lessons.split_end(words)[0]
    end = words.removeprefix(description).lstrip("\n")
    claims = edits.claims(description)[: most - bool(end)]
    kept = [edits.remove_claim(description, i) if len(claims) > 1 else "" for i in range(len(claims))]
    left = ["\n".join(filter(None, (text, end))) for text in kept]
    return claims, end, [*left, description] if end else left


def trusted(nla: api.NLA, h_TD: np.ndarray, token: int, words: str) -> Iterator[dict]:
    """Yield {} while AV writes, then the claims of `words` with the trust in each (`apply.TrustedClaim`).

    h_TD: of the text. Raises UserError if the bundle has no trust model.
    """
    if nla.trust is None:
        raise UserError("this bundle has no trust model: fit one with `nla trust`")
    yield {}
    mean_D = apply.mean_or_zero(nla.mean_direction, nla.spec.lm.d_model)
    (found,) = apply.trust_claims(nla.runner, mean_D, nla.trust, h_TD, [token], [words],
                                  max_new=nla.meta["max_new_tokens"])
    yield {"done": {"claims": [dataclasses.asdict(c) for c in found]}}
