"""Explain stretches of neighbouring tokens of texts: the claims that trust is fitted and measured on."""

import dataclasses

from nla_jax.data.splits import keyed_hash
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.trust.features import Said
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.util.batching import chunks
from nla_jax.util.keys import key_for

AROUND = 4  # tokens before and after whose explanations are compared
CENTRES = (4, 6, 8, 10, 12)  # tokens before the end of the text whose claims are used
LENGTH = CENTRES[-1] + AROUND + 1  # tokens of a stretch
SAMPLES = 3  # further explanations of each centre


@dataclasses.dataclass(frozen=True)
class Stretches:
    """The explanations of the centres, the text that ends with each centre, and its document."""

    said: Said
    texts: list[str]
    docs: list[str]


def explain_stretches(
    runner: Runner, columns: dict, *, rows: int, seed: int, temperature: float, max_new: int, label: str = ""
) -> Stretches:
    """Explain the last LENGTH tokens of at most `rows` texts, and SAMPLES times more each centre.

    columns: of a store split. Texts that are too short for a stretch are left out.
    """
    ids_spans = {i: tok_lib.offsets(runner.tok, t) for i, t in enumerate(columns["text"]) if t}
    fits = [i for i, (ids, _) in ids_spans.items() if len(ids) > 2 * LENGTH]
    fits = sorted(sorted(fits, key=lambda i: keyed_hash("trust", seed, columns["doc_id"][i], i))[:rows])
    texts = [columns["text"][i] for i in fits]
    h_NLD = capture_texts.capture_last(
        runner, texts, back=range(LENGTH), label=label and f"{label}: activations"
    )
    n, d = len(fits), h_NLD.shape[-1]
    asked = {"temperature": temperature, "max_new": max_new}
    flat = runner.explain(
        h_NLD.reshape(n * LENGTH, d), key_for(seed, "trust"), **asked, label=label and f"{label}: neighbours"
    )
    said = list(chunks(flat, LENGTH))
    h_CD = h_NLD[:, CENTRES].reshape(n * len(CENTRES), d)
    more = [
        runner.explain(h_CD, key_for(seed, "trust", 1 + s), **asked, label=label and f"{label}: samples")
        for s in range(SAMPLES)
    ]
    spans = [ids_spans[i][1] for i in fits]
    return Stretches(
        Said(
            h_CD,
            [row[c] for row in said for c in CENTRES],
            list(zip(*more, strict=True)),
            before=[row[c + 1 : c + 1 + AROUND] for row in said for c in CENTRES],
            after=[row[c - AROUND : c] for row in said for c in CENTRES],
        ),
        [t[: s[-1 - c][1]] for t, s in zip(texts, spans, strict=True) for c in CENTRES],
        [columns["doc_id"][i] for i in fits for _ in CENTRES],
    )
