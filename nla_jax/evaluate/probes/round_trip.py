"""Measure FVE through text, by AR and by the frozen target, with its controls."""

import numpy as np

from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.probes import endings, language
from nla_jax.evaluate.written_explanations import written
from nla_jax.util.keys import new_key

FROZEN = "the frozen target reads the bare words; it is never trained, so no private code can raise this"


def round_trip(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE through text by AR and by the frozen target, its controls, and statistics of the texts."""
    trip, h = ev.trip, ev.columns["h"]
    error = ev.errors(trip.h_text, trip.ok)
    other = rows_of_other_documents(ev.columns["doc_id"])
    out = [
        ev.fve("fve", error, "how much of h comes back through the words"),
        ev.fve("fve_frozen_target", ev.errors(ev.read_frozen(trip.explanations, label), trip.ok), FROZEN),
        *_greedy(ev, label),
        ev.fve("fve_meannorm", error, "the same over the other denominator in use; for comparison only",
               meannorm=True),
        ev.fve("fve_shuffled", ev.errors(trip.h_text[other], trip.ok[other]),
               "does it matter whose words they are (another document's)"),
        ev.fve("fve_mean_direction", ev.errors(np.broadcast_to(ev.mean_D, h.shape)),
               "what knowing nothing scores"),
        ev.fve("fve_token_path", ev.errors(trip.h_token, trip.ok_token),
               "the sampled ids spliced, not the text: a hidden channel if higher"),
    ]
    both = trip.ok & trip.ok_token
    if both.any():
        by_ids = ev.errors(trip.h_token)
        asks = "FVE that the ids carry and their text does not, where both can be read"
        out.append(ev.fve_lost("token_path_gain", error, by_ids, asks, rows=np.flatnonzero(both)))
    out += endings.description_gain(ev, label)
    rows, words = written(ev)
    if len(rows):
        rebuilt = np.zeros_like(h)
        rebuilt[rows] = ev.reconstruct(words)
        out.append(ev.fve("fve_written", ev.errors(rebuilt), "AR on the explanations written by an LLM",
                          rows=rows))
        out.append(_av_gap(ev, rows, words))
    out += endings.last_words(ev)
    texts = trip.explanations
    return out + [
        ev.ratio("retokenization_mismatch", trip.retokenised & both, both,
                 "share of explanations whose text tokenises to other ids"),
        ev.mean("ok", trip.ok, "share of answers with a readable explanation"),
        ev.mean("tokens", trip.length, "tokens written, tags included"),
        ev.ratio("ascii", [sum(c.isascii() for c in t) for t in texts], [len(t) for t in texts],
                 "share of ASCII characters"),
        ev.mean("repeated", [_repeated_share(t) for t in texts], "share of words that occur earlier in it"),
    ]


def _greedy(ev: Evidence, label: str) -> list[Figure]:
    """Return figures of greedy explanations; [] if those of the round trip are greedy (temperature 0)."""
    if not ev.temperature:
        return []
    texts = ev.runner.explain(ev.columns["h"], new_key(0), temperature=0.0, max_new=ev.max_new,
                              label=label and f"{label} greedy")
    ok = np.array([bool(t) for t in texts])
    out = [
        ev.fve("fve_greedy", ev.errors(ev.reconstruct(texts), ok), "FVE of greedy explanations"),
        ev.fve("fve_greedy_frozen_target", ev.errors(ev.read_frozen(texts), ok),
               "the same, read by the frozen target"),
    ]
    if ev.has_texts():
        found = endings.last_word(texts, ev.columns["text"])
        out.append(ev.mean("last_word_greedy", found, "share of greedy ones that end on the last word"))
    return out


def _av_gap(ev: Evidence, rows, words: list[str]) -> Figure:
    """Return AV's loss on written explanations given another document's h, minus the loss given their own h.

    It is in nats per token. The explanations have the form that AV was trained on."""
    h, other = ev.columns["h"][rows], rows_of_other_documents([ev.columns["doc_id"][i] for i in rows])
    (own, n), (shuffled, _) = (language.answer_logp(ev.runner, x, words, "") for x in (h, h[other]))
    asks = "nats a token: what a written explanation costs AV more with another document's h; 0: it ignores h"
    return ev.ratio("av_gap", own - shuffled, n, asks, rows=rows)


def _repeated_share(text: str) -> float:
    words = text.lower().split()
    return 1.0 - len(set(words)) / len(words) if words else 0.0
