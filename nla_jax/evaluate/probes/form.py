"""Measure which part of an explanation AR uses: its quotes or its prose, its order, its prefix, each claim.

AR reads an edited explanation, and the FVE lost measures what the edit removed. An edit that loses no FVE
removed nothing that AR uses. None of this shows that the words are true.
"""

import numpy as np

from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.words import edits
from nla_jax.lm.tokenizer import all_plain_ids

PREFIXES = (5, 10, 20, 30)  # tokens


def form(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of edited explanations, and FVE lost by leaving out lines or claims."""
    texts, tok, seed = ev.trip.explanations, ev.runner.tok, ev.seed
    ids = all_plain_ids(tok, texts)
    edited = {
        "text": texts,
        "words_shuffled": [edits.shuffle_words(t, seed) for t in texts],
        "lines_shuffled": [edits.rotate_lines(t, seed) for t in texts],
        "quotes_only": [edits.keep_quotes(t) for t in texts],
        "prose_only": [edits.remove_quotes(t) for t in texts],
        **{f"prefix_{n}": [tok.decode(i[:n]) for i in ids] for n in PREFIXES},
        "no_first": [edits.remove_claim(t, 0) for t in texts],
        "no_last": [edits.remove_claim(t, -1) for t in texts],
    }
    error = edited_errors(ev, edited, label and f"{label} form")
    whole = error["text"]
    several_lines = [i for i, t in enumerate(texts) if len(t.splitlines()) > 1]
    several_claims = [i for i, t in enumerate(texts) if len(edits.claims(t)) > 1]
    out = [
        ev.fve("fve_quotes_only", error["quotes_only"], "are quoted spans and ending line the whole channel?",
               reference="published: .427 of .650"),
        ev.fve("fve_prose_only", error["prose_only"], "what the prose says without them",
               reference="published: .051 of .650"),
        *([ev.ratio("quotes_verbatim", *_verbatim(ev), "share of quoted spans that occur in the source",
                    reference="published: .26")] if ev.has_texts() else []),
        ev.fve("fve_words_shuffled", error["words_shuffled"], "does the order of words in a line matter?",
               reference="published: .485 of .650"),
        *(ev.fve(f"fve_prefix_{n}", error[f"prefix_{n}"], f"what the first {n} tokens say",
                 reference={10: "published: .45 of .650", 30: "published: .65 of .650"}.get(n, ""))
          for n in PREFIXES),
    ]
    for name, rows, asks in [
        ("lines_shuffled", several_lines, "FVE lost when the lines change places"),
        ("no_first", several_claims, "FVE lost without the first claim"),
        ("no_last", several_claims, "FVE lost without the last claim"),
    ]:
        if rows:
            out.append(ev.fve_lost(f"lost_{name}", error[name], whole, asks, rows=rows))
    return out


def edited_reconstructions(ev: Evidence, edited: dict[str, list[str]], label: str) -> dict[str, np.ndarray]:
    """Return ĥ [N, D] of each edit; `edited` is {name: one text per row}."""
    h_hat = ev.reconstruct([t for texts in edited.values() for t in texts], label)
    return dict(zip(edited, np.split(h_hat, len(edited)), strict=True))


def edited_errors(ev: Evidence, edited: dict[str, list[str]], label: str) -> dict[str, np.ndarray]:
    """Return the errors [N] of each edit. A failed answer keeps its error of 2 D."""
    h_hat = edited_reconstructions(ev, edited, label)
    return {name: ev.errors(h, ev.trip.ok) for name, h in h_hat.items()}


def _verbatim(ev: Evidence) -> tuple[list[int], list[int]]:
    found = [
        edits.count_verbatim(t, source)
        for t, source in zip(ev.trip.explanations, ev.columns["text"], strict=True)
    ]
    return [a for a, _ in found], [b for _, b in found]
