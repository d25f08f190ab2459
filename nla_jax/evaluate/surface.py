"""More than a quotation? What the last words of the text say of h, and what an explanation adds to them.

A reader is trained on training documents to rebuild h from the last n words of the text, from this AV's
explanation, and from both. On held-out rows it is given each: the words alone are the surface
baseline, and what both have over the words is what the explanation says beyond them.
"""

import jax
import numpy as np

from nla_jax.data import lessons, order
from nla_jax.evaluate import readers
from nla_jax.evaluate.evidence import Evidence, Figure

LAST = (1, 4, 12, 30)  # words
ROWS, STEPS, BATCH, LR = 480, 36, 32, 1e-3  # training rows that AV explains; the reader's training
PUBLISHED = {4: "small model, own training: .54", 12: "the same: .64", 30: "the same: .68"}


def surface(ev: Evidence, label: str = "") -> list[Figure]:
    """FVE of the last n words, of these with the explanation, and the difference."""
    if ev.train is None:
        return []
    reader = ev.runner.holding(ar=_reader(ev, label))
    texts, ok, h = ev.columns["text"], ev.trip.ok, ev.columns["h"]
    out = []
    for n in LAST:
        words = [lessons.lesson_last(t, n) for t in texts]
        both = [_both(w, z) for w, z in zip(words, ev.trip.explanations, strict=True)]
        alone = ev.errors(reader.reconstruct(words))
        # A failed answer adds nothing: what is left are the words.
        helped = ev.errors(reader.reconstruct(both))
        out += [
            ev.fve(f"fve_last_{n}", alone, f"what the last {n} words of the text say, by a reader of its own",
                   reference=PUBLISHED.get(n, "")),
            ev.lost(f"beyond_last_{n}", alone, helped, f"FVE that the explanation adds to {n} words"),
        ]  # fmt: skip
    only = reader.reconstruct(ev.trip.explanations)
    shuffled = np.roll(np.arange(len(h)), len(h) // 2)
    mixed = [_both(lessons.lesson_last(texts[i], 4), ev.trip.explanations[j])
             for i, j in enumerate(shuffled)]  # fmt: skip
    words = ev.errors(reader.reconstruct([lessons.lesson_last(t, 4) for t in texts]))
    return [
        *out,
        ev.lost("beyond_last_4_shuffled", words, ev.errors(reader.reconstruct(mixed)),
                "the same with another row's explanation: what knowing nothing adds"),
        ev.fve("fve_fresh_reader", ev.errors(only, ok),
               "explanations read by that reader, who learned them without AV's ear"),
    ]  # fmt: skip


def _both(words: str, explanation: str) -> str:
    return f"{words}\n{explanation}".rstrip()


def _reader(ev: Evidence, label: str):
    """The reader's tree: from the warm start's AR (it reads quotes and English), else from AR itself."""
    rows = np.sort(np.random.default_rng([ev.seed, 1]).permutation(len(ev.train["h"]))[:ROWS])
    about = {
        "rows": [int(r) for r in rows],
        "documents": sorted({ev.train["doc_id"][i] for i in rows}),
        "batch": BATCH,
        "last": LAST,
        "seed": ev.seed,
        "wrote": _identity(ev.runner.av),
    }
    start = (ev.warm or ev.runner).ar
    explained: list[str] = []

    def draw(step):
        if not explained:  # a reader that is kept needs none
            explained.extend(
                ev.runner.explain(
                    ev.train["h"][rows],
                    jax.random.fold_in(jax.random.key(ev.seed), 101),
                    temperature=ev.temperature,
                    max_new=ev.max_new,
                    label=label and f"{label} training rows",
                )
            )
        n = LAST[step % len(LAST)]
        pick = np.asarray(draws[step])
        texts = []
        for place, i in enumerate(pick):
            words = lessons.lesson_last(ev.train["text"][rows[i]], n)
            z = explained[i]
            # A third each; where AV failed there are only the words.
            kind = (place + step) % 3 if z else 0
            texts.append((words, _both(words, z), z)[kind])
        width = -(-int(1.6 * n + ev.max_new + 24) // 16) * 16
        return ev.train["h"][rows[pick]], texts, width

    draws = order.epoch_indices(len(rows), BATCH, ev.seed, "surface")
    return readers.trained(ev.runner, start, draw, name="surface", steps_=STEPS, lr=LR, about=about,
                           directory=ev.readers)  # fmt: skip


def _identity(tree) -> float:
    """A number that tells two trees apart."""
    return float(sum(np.abs(np.asarray(a, np.float64)).sum() for a in jax.tree.leaves(tree)))
