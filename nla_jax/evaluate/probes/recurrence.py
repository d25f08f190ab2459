"""Compare the claims that recur in explanations of the preceding tokens with those that do not.

The state of a model changes slowly along a text. A claim that AV made up for one token need not recur at the
next. A claim recurs if an explanation of one of the BACK preceding tokens has at least the share SHARED of
its content words.
"""

import re

import numpy as np

from nla_jax.data.splits import keyed_hash
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.words import edits
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.util.batching import chunks
from nla_jax.util.keys import key_for

ROWS = 40  # at most, because each row needs BACK further explanations
BACK = 3  # preceding tokens that are explained
SHARED = 0.5  # share of a claim's content words that one neighbour's explanation must have
WORDS = 60  # last words of the source text in which a claim's words are searched

# Words that any two English lines may share.
STOP = frozenset(
    "a about after all also an and any are as at be been before but by can could did do does for from had "
    "has have he her here his how i if in into is it it's its just may might more most must no nor not of "
    "off on one or other our out over own she should so some such than that the their them then there "
    "these they this those to too under until up very was we were what when where which while who will "
    "with would you your".split()
)


def content_words(text: str) -> frozenset[str]:
    """Return the distinct lower-case words of a text that are not in STOP."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    return frozenset(w for w in words if w not in STOP)


def is_recurring(words: frozenset[str], neighbours: list[str]) -> bool:
    """Return whether one of the texts has at least the share SHARED of the words."""
    return any(len(words & content_words(t)) >= SHARED * len(words) for t in neighbours)


def recurring_claims(text: str, neighbours: list[str]) -> list[bool | None]:
    """Return for each claim of `text` whether it recurs; None for a claim without content words."""
    bags = [content_words(c) for c in edits.claims(text)]
    return [is_recurring(bag, neighbours) if bag else None for bag in bags]


def recurrence(ev: Evidence, label: str = "") -> list[Figure]:
    """Return the share of claims that recur. For recurring and other claims, return the FVE lost when one is
    left out and the share of its words in the text."""
    rows = _rows(ev)
    if not len(rows):
        ev.left_out.append("recurrence: no row has both a readable explanation and the text that h is from")
        return []
    texts = [ev.trip.explanations[i] for i in rows]
    sources = [ev.columns["text"][i] for i in rows]
    h = capture_texts.capture_last(
        ev.runner, sources, back=range(1, BACK + 1), label=label and f"{label} before"
    )
    said = ev.runner.explain(
        h.reshape(len(rows) * BACK, -1), key_for(ev.seed, "recurrence"),
        temperature=ev.temperature, max_new=ev.max_new, label=label and f"{label} neighbours",
    )
    near = list(chunks(said, BACK))
    docs = [ev.columns["doc_id"][i] for i in rows]
    far = [near[r] for r in rows_of_other_documents(docs)]

    # From here on, arrays [C] have one entry per claim.
    claims = [(r, c) for r, t in enumerate(texts) for c in edits.claims(t)]
    owner_C, bags = np.array([r for r, _ in claims]), [content_words(c) for _, c in claims]
    kinds, chance = (
        [k for t, z in zip(texts, zs, strict=True) for k in recurring_claims(t, z)] for zs in (near, far)
    )
    only_C = np.bincount(owner_C)[owner_C] == 1
    lost_C = _lost(ev, rows, owner_C)

    def by_row(chosen_C, value_C=None):
        value_C = np.ones(len(claims)) if value_C is None else np.asarray(value_C, float)
        return np.bincount(owner_C, value_C * chosen_C, len(rows))

    any_C = np.array([k is not None for k in kinds])
    out = [
        ev.ratio("recurring", by_row(np.equal(kinds, True)), by_row(any_C),
                 f"share of claims that come back within the {BACK} tokens before", rows=rows)
    ]
    if len(set(docs)) > 1:
        asks = "the same against another document's: what always comes back"
        above_R = by_row(np.equal(chance, True))
        out.append(ev.ratio("recurring_elsewhere", above_R, by_row(any_C), asks, rows=rows))
    variance_R = F.variances(ev.columns["h"])[rows]
    ends = [content_words(" ".join(ev.columns["text"][i].split()[-WORDS:])) for i in rows]
    held_C = [len(bag & ends[r]) for bag, r in zip(bags, owner_C, strict=True)]
    for name, kind, told in (("recurring", True, "that recurs"), ("lone", False, "that does not")):
        is_C = np.array([k is kind for k in kinds])
        if (is_C & ~only_C).any():
            out.append(ev.ratio(f"lost_{name}", by_row(is_C & ~only_C, lost_C),
                                by_row(is_C & ~only_C) * variance_R,
                                f"FVE lost when a claim {told} is left out", rows=rows))
        if is_C.any():
            asks = f"share of the words of a claim {told} that are among the text's last {WORDS}"
            words_R = by_row(is_C, [len(b) for b in bags])
            out.append(ev.ratio(f"{name}_in_text", by_row(is_C, held_C), words_R, asks, rows=rows))
    return out


def _rows(ev: Evidence) -> np.ndarray:
    """Return at most ROWS rows with a claim and a text of more than BACK tokens, chosen by a key."""
    ids = [plain_ids(ev.runner.tok, t) for t in ev.columns["text"]]
    fits = [
        i for i, z in enumerate(ev.trip.explanations)
        if ev.trip.ok[i] and len(ids[i]) > BACK and any(map(content_words, edits.claims(z)))
    ]
    fits.sort(key=lambda i: keyed_hash("recurrence", ev.seed, ev.columns["doc_id"][i], i))
    return np.array(sorted(fits[:ROWS]), int)


def _lost(ev: Evidence, rows, owner_C) -> np.ndarray:
    """Return by how much the squared error [C] of a row increases without each of its claims."""
    texts, h = [ev.trip.explanations[i] for i in rows], np.asarray(ev.columns["h"])[rows]
    rest = [edits.remove_claim(t, j) for t in texts for j in range(len(edits.claims(t)))]
    whole = F.errors(ev.trip.h_text[rows], h)
    return F.errors(ev.reconstruct(rest), h[owner_C]) - whole[owner_C]
