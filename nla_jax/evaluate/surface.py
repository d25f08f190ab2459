"""More than a quotation? What the last words of the text say of h, and what an explanation adds to them.

A reader is trained on training documents to rebuild h from the last n words of the text, from this AV's
explanation, and from both. On held-out rows it is given each: the words alone are the surface
baseline, and what both have over the words is what the explanation says beyond them.
"""

import numpy as np

from nla_jax.data import lessons, order
from nla_jax.evaluate import readers
from nla_jax.evaluate.evidence import Evidence, Figure, elsewhere
from nla_jax.train import key_for

LAST = (1, 4, 12, 30)  # words
WIDTHS = (12, 30)  # words that a batch is padded for
BEYOND = (4, 30)  # of these, with the explanation beside them
ROWS, STEPS, BATCH, LR = 256, 28, 32, 1e-3  # training rows that AV explains; the reader's training
PUBLISHED = {4: "this model, longer training: .54", 12: "the same: .64", 30: "the same: .68"}


def surface(ev: Evidence, label: str = "") -> list[Figure]:
    """FVE of the last n words, of these with the explanation, and the difference."""
    if not ev.has_texts(train=True):
        ev.left_out.append("surface: needs training rows (split warm) in the store, and texts on all rows")
        return []
    reader = ev.runner.holding(ar=_reader(ev, label))
    texts, explanations = ev.columns["text"], ev.trip.explanations
    other = elsewhere(ev.columns["doc_id"])
    label = label and f"{label} surface"

    def error(words):
        return ev.errors(reader.reconstruct(words, label))

    out = []
    for n in LAST:
        words = [lessons.lesson_last(t, n) for t in texts]
        alone = error(words)
        asks = f"what the last {n} words of the text say, by a reader of its own"
        out.append(ev.fve(f"fve_last_{n}", alone, asks, reference=PUBLISHED.get(n, "")))
        if n not in BEYOND:
            continue
        # A failed answer adds nothing: what is left are the words.
        both = error([_both(w, z) for w, z in zip(words, explanations, strict=True)])
        mixed = error([_both(w, explanations[j]) for w, j in zip(words, other, strict=True)])
        out += [
            ev.lost(f"beyond_last_{n}", alone, both, f"FVE that the explanation adds to {n} words"),
            ev.lost(f"beyond_last_{n}_shuffled", alone, mixed, "the same with another document's"),
        ]
    if ev.warm is not None:
        only = ev.errors(reader.reconstruct(explanations), ev.trip.ok)
        asks = "explanations read by that reader, who learned them without AV's ear"
        out.append(ev.fve("fve_fresh_reader", only, asks))
    return out


def _both(words: str, explanation: str) -> str:
    return f"{words}\n{explanation}".rstrip()


def _reader(ev: Evidence, label: str):
    """The reader's tree: from the warm start's AR (it reads quotes and English), else from AR itself."""
    rows = np.sort(np.random.default_rng([ev.seed, 1]).permutation(len(ev.train["h"]))[:ROWS])
    h, texts = ev.train["h"][rows], [ev.train["text"][i] for i in rows]
    draws = order.epoch_indices(len(rows), BATCH, ev.seed, "surface")
    explained: list[str] = []

    def draw(step):
        if not explained:  # a reader that is kept needs none
            explained.extend(
                ev.runner.explain(
                    h,
                    key_for(ev.seed, "surface"),
                    temperature=ev.temperature,
                    max_new=ev.max_new,
                    label=label and f"{label} training rows",
                )
            )
        n, pick = LAST[step % len(LAST)], np.asarray(draws[step])
        words = []
        for place, i in enumerate(pick):
            last, z = lessons.lesson_last(texts[i], n), explained[i]
            # A third each; where AV failed there are only the words.
            words.append((last, _both(last, z), z)[(place + step) % 3 if z else 0])
        # Two widths, since each is compiled: the prompt around the words, and the words with some to spare.
        widest = next(most for most in WIDTHS if n <= most)
        return h[pick], words, -(-int(1.5 * widest + ev.max_new + 12) // 16) * 16

    about = {
        "rows": readers.digest(h, texts),
        "av": readers.digest(ev.runner.av),
        "sampled": [ev.temperature, ev.max_new, ev.seed],
        "batch": [BATCH, LAST],
    }
    return readers.trained(
        ev.runner,
        (ev.warm or ev.runner).ar,
        draw,
        name="surface",
        n_steps=STEPS,
        optimizer={"lr": LR, "warmup": max(1, min(5, STEPS // 4))},
        about=about,
        directory=ev.readers,
    )
