"""Let the frozen target read an explanation's words alone, as it reads any text.

The target was not trained with AV, so a private code between AV and AR does not help it.
"""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from nla_jax import api, prompts, reconstructor, specs
from nla_jax.data import entropy_positions
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.sharding import placement
from nla_jax.util.batching import pad_rows, width_for

TOP = 5  # tokens in a list of next tokens


def reader(nla: api.NLA) -> Runner:
    """Return a Runner whose AR is the frozen target, for one text at a time."""
    frozen, template = reconstructor.FROZEN, prompts.AR_TEMPLATE
    return Runner(nla.spec, nla.base, nla.av, frozen, nla.tokenizer, template, batch=1)


def read_words(runner: Runner, texts: list[str]) -> np.ndarray:
    """Return the target's h [N, D] (float32, not scaled) at the last token of each text, by a `reader`."""
    return runner.reconstruct(texts)


@functools.partial(placement.jit_by_mesh, static_argnames="spec")
def _next_logp(base, ids_BT, valid_BT, last_B, spec: specs.Spec):
    """Return log p [B, V] of the token after each row's last one, under the whole target."""
    x_BTD, _ = forward(base, spec.lm, embed(base, spec.lm, ids_BT), valid_BT)
    x_BD = jax.numpy.take_along_axis(x_BTD, last_B[:, None, None], 1)[:, 0]
    return jax.nn.log_softmax(unembed(base, spec.lm, x_BD), -1)


def next_logp(nla: api.NLA, ids: list[int]) -> np.ndarray:
    """Return log p [V] (float64) of the target's next token after `ids`, which begin with `spec.lead`.

    Rows are padded to `batching.width_for`, so that few programs are compiled."""
    row = pad_rows([ids], nla.spec.ar.pad, width_for(len(ids)))
    return np.asarray(_next_logp(nla.base, *row, spec=nla.spec), np.float64)[0]


def predict(nla: api.NLA, ids: list[int], words: str) -> Iterator[dict]:
    """Compare the target's next token after a text with its next token after the words alone.

    Args:
      ids: of the text, without `spec.lead`.

    Yields {} between steps, and last {"after_text": [{"token", "p"}, ...], "after_words": [...], "kl"}:
    the TOP likeliest tokens, and KL(after the text || after the words) in nats.

    Raises UserError when the words have no token, or more tokens than the target's maximal position.
    """
    spec, tok = nla.spec, nla.tokenizer
    (bare,) = tok_lib.all_raw_ids(tok, [words])
    if len(bare) <= len(spec.lead):
        raise UserError("there are no words to read: give at least one token")
    if len(bare) > spec.lm.max_position:
        most = spec.lm.max_position
        raise UserError(f"the words have {len(bare)} tokens; this target reads at most {most}")
    found = []
    for row in ([*spec.lead, *ids], bare):
        found.append((row[-1], next_logp(nla, row)))
        yield {}
    lists = [[{"token": _name(tok, last, int(i)), "p": float(np.exp(logp_V[i]))}
              for i in np.argsort(-logp_V, kind="stable")[:TOP]] for last, logp_V in found]
    (_, text_V), (_, words_V) = found
    kl = float(np.sum(np.exp(text_V) * (text_V - words_V)))
    yield {"after_text": lists[0], "after_words": lists[1], "kl": max(kl, 0.0)}


def telling(nla: api.NLA, text: str, n: int, by: str) -> dict:
    """Return {"tokens", "nats"}: the n tokens of a text with the highest score, in their order.

    by: "entropy" or "surprise" (`entropy_positions.score_tokens`)."""
    (scores,) = entropy_positions.score_tokens(nla.base, nla.spec, [tok_lib.plain_ids(nla.tokenizer, text)])
    tokens = entropy_positions.choose_positions(scores[by], n)
    return {"tokens": tokens, "nats": [float(scores[by][i]) for i in tokens]}


def _name(tok, last: int, token: int) -> str:
    """Decode a token after another one, because some tokenizers drop the space before a single token."""
    decode = functools.partial(tok.decode, clean_up_tokenization_spaces=False)
    before, both = decode([last]), decode([last, token])
    return both[len(before) :] if both.startswith(before) else decode([token])
