"""Measure how well the last words of the text give h, and what an explanation adds to them.

Two readers get the line `… last n words`: the frozen target, and a reader trained on training documents.
That reader learns to reconstruct h from such lines, from this AV's explanations, and from both together.
The larger FVE of the two readers is the surface baseline. The explanation's contribution is the trained
reader's FVE of both minus its FVE of the words alone. Explanations are also compared with quotations of
the same number of tokens.
"""

import numpy as np

from nla_jax import reconstructor
from nla_jax.data import lessons, shuffle
from nla_jax.evaluate import fitted, trained_readers
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.lm.tokenizer import batch_ids, plain_ids
from nla_jax.util.batching import round_up
from nla_jax.util.keys import key_for

LAST = (1, 4, 12, 30)  # numbers of last words
WIDTHS = (12, 30)  # numbers of words that a batch is padded for
BEYOND = (4, 30)  # elements of LAST for which the explanation's contribution is measured
ROWS, STEPS, BATCH, LR = 256, 28, 32, 1e-3  # training rows that AV explains; the reader's training
RANK = 8  # of the reader's adapters, if AR is the frozen target
PUBLISHED = {4: "this model, longer training: .54", 12: "the same: .64", 30: "the same: .68"}


def surface(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of the last n words, what the explanation adds to it, and FVE of equally long quotations."""
    if not ev.has_texts(train=True):
        ev.left_out.append("surface: needs training rows (split warm) in the store, and texts on all rows")
        return []
    label = label and f"{label} surface"
    out = _equal_length_quotations(ev, label)
    reader = ev.runner.with_trees(ar=_train_reader(ev, label))
    texts, explanations = ev.columns["text"], ev.trip.explanations
    other = rows_of_other_documents(ev.columns["doc_id"])

    def error(words):
        return ev.errors(reader.reconstruct(words, label))

    for n in LAST:
        words = [lessons.quote_words(t, n) for t in texts]
        alone = error(words)
        frozen = ev.errors(ev.read_frozen(words, label))
        who, best = _better_reader({"a trained reader": alone, "the frozen target": frozen})
        asks = f"what the last {n} words of the text say, by {who}, the better of two readers"
        out.append(ev.fve(f"fve_last_{n}", best, asks, reference=PUBLISHED.get(n, "")))
        if n not in BEYOND:
            continue
        # A failed answer is "", so the reader gets the words alone.
        both = error([_join(w, z) for w, z in zip(words, explanations, strict=True)])
        mixed = error([_join(w, explanations[j]) for w, j in zip(words, other, strict=True)])
        out += [
            ev.fve_lost(f"beyond_last_{n}", alone, both, f"FVE that the explanation adds to {n} words"),
            ev.fve_lost(f"beyond_last_{n}_shuffled", alone, mixed, "the same with another document's"),
        ]
    if ev.warm is not None:
        only = ev.errors(reader.reconstruct(explanations), ev.trip.ok)
        asks = "explanations read by that reader, which was not trained jointly with AV"
        out.append(ev.fve("fve_fresh_reader", only, asks))
    return out


def _better_reader(error: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """Return the reader with the larger FVE on the same rows, and its errors."""
    return min(error.items(), key=lambda item: item[1].sum())


def _equal_length_quotations(ev: Evidence, label: str) -> list[Figure]:
    """Return FVE of quotations as long as the explanations, in tokens, and the ratio of the two FVEs."""
    if not ev.trip.ok.any():
        return []
    words = equal_quotations(ev)
    error = {"AR": ev.errors(ev.reconstruct(words, label)),
             "the frozen target": ev.errors(ev.read_frozen(words, label))}
    asks = "a quotation of the text's last words with as many tokens as the explanation, read by"
    own, frozen = (ev.fve(f"fve_quotation_equal{end}", e, f"{asks} {who}")
                   for end, (who, e) in zip(("", "_frozen"), error.items(), strict=True))
    who, best = _better_reader(error)
    if not max(own.low or 0.0, frozen.low or 0.0) > 0:
        ev.left_out.append("over_quotation: needs a quotation with FVE above zero")
        return [own, frozen]
    variance = F.variances(ev.columns["h"])
    explained, quoted = (variance - e for e in (ev.errors(ev.trip.h_text, ev.trip.ok), best))
    asks = f"FVE of explanations over FVE of that quotation by {who}, the better of the two"
    return [own, frozen, ev.ratio("over_quotation", explained, quoted, asks)]


def equal_quotations(ev: Evidence) -> list[str]:
    """Return the last words of each text, with as many tokens as its explanation: [N].

    Where AV failed, it is the mean number of tokens. There must be an explanation."""
    tok, texts = ev.runner.tok, ev.columns["text"]
    n = np.array([len(ids) for ids in batch_ids(tok, ev.trip.explanations)])
    n[~ev.trip.ok] = round(n[ev.trip.ok].mean())
    most = np.maximum(n - len(plain_ids(tok, lessons.MARK)), 1)
    return [lessons.quote_ends(tok, [t], int(m))[0] for t, m in zip(texts, most, strict=True)]


def _join(words: str, explanation: str) -> str:
    return f"{words}\n{explanation}".rstrip()


def _train_reader(ev: Evidence, label: str):
    """Train the reader and return its tree.

    Training starts from the warm start's AR, or else from AR. If that is the frozen target, it starts from
    new adapters."""
    rows = np.sort(np.random.default_rng([ev.seed, 1]).permutation(len(ev.train["h"]))[:ROWS])
    h, texts = ev.train["h"][rows], [ev.train["text"][i] for i in rows]
    draws = shuffle.epoch_indices(len(rows), BATCH, ev.seed, "surface")
    explained: list[str] = []

    def draw(step):
        if not explained:  # sampled here, because a cached reader does not need them
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
            last, z = lessons.quote_words(texts[i], n), explained[i]
            # A third of each kind; rows where AV failed have the words alone.
            words.append((last, _join(last, z), z)[(place + step) % 3 if z else 0])
        # Only two widths, because each is compiled: 1.5 tokens per word, the explanation, and the prompt.
        widest = next(most for most in WIDTHS if n <= most)
        return h[pick], words, round_up(int(1.5 * widest + ev.max_new + 12), 16)

    about = {
        "rows": fitted.digest(h, texts),
        "av": fitted.digest(ev.runner.av),
        "sampled": [ev.temperature, ev.max_new, ev.seed],
        "batch": [BATCH, LAST],
    }
    spec, key = ev.runner.spec, key_for(ev.seed, "surface", 1)
    start = (ev.warm or ev.runner).ar
    start = start or reconstructor.init(ev.runner.base, spec.lm, spec.layer, rank=RANK, key=key)
    return trained_readers.train_reader(
        ev.runner,
        start,
        draw,
        name="surface",
        n_steps=STEPS,
        optimizer={"lr": LR, "warmup": max(1, min(5, STEPS // 4))},
        about=about,
        directory=ev.readers,
    )
