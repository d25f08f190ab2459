"""Test whether AR uses the meaning of an explanation, with paraphrases, opposites and counterfactual edits.

A private code between AV and AR may survive every edit of form, but not these. A paraphrase breaks it. It
does not react when almost the same words say the opposite. When a word is swapped in text and explanation,
AR's reconstruction does not follow the change of the target's activation.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

from nla_jax.errors import UserError, one_line
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence, Figure, evenly_spaced, rows_of_other_documents
from nla_jax.evaluate.probes.form import edited_reconstructions
from nla_jax.evaluate.words import edits, wordnet
from nla_jax.evaluate.words.paraphrase import REWRITE
from nla_jax.lm import thinking
from nla_jax.lm.chat import make_answer
from nla_jax.lm.chat_prompts import chat_ids
from nla_jax.lm.special_tokens import break_special
from nla_jax.util.batching import chunks
from nla_jax.util.keys import new_key
from nla_jax.util.progress import Progress

OTHERS = 64  # explanations whose names and numbers replace those of a row
SWAPPED = 100  # rows of the counterfactual edit; each needs three forward passes of the target
TAIL = 30  # the swapped word must be among these last words of the source, which h is about
REWRITTEN = 64  # rows that the target rewrites
MAX_NEW = 128  # tokens of its answer; most explanations have 30 to 55 words, about 80 tokens


class Swap(NamedTuple):
    """A row's explanation and source with one word swapped, and its source with a second word instead."""

    explanation: str
    source: str
    another: str


def meaning(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of paraphrases, FVE lost by opposites and by neutral words, and counterfactual cosines.

    Raises:
      UserError: WordNet cannot be fetched; the paraphraser fails or returns another number of texts.
    """
    label = label and f"{label} meaning"
    texts, seed = ev.trip.explanations, ev.seed
    reverse = [wordnet.reverse_claims(t, seed) for t in texts]
    others = [texts[i] for i in evenly_spaced(np.flatnonzero(ev.trip.ok), OTHERS)]
    edited = {
        "text": texts,
        "paraphrase": [wordnet.paraphrase(t, 1.0, seed) for t in texts],
        "kept_quotes": [wordnet.paraphrase(t, 1.0, seed, keep_quotes=True) for t in texts],
        "half": [wordnet.paraphrase(t, 0.5, seed) for t in texts],
        "opposite": [t for t, _ in reverse],
        "neutral": [
            wordnet.apply_neutral(t, changes) for t, (_, changes) in zip(texts, reverse, strict=True)
        ],
        "entities": [wordnet.swap_entities(t, others, seed) for t in texts],
    }
    if ev.paraphraser is not None:
        said = _run_paraphraser(ev.paraphraser, texts)
        edited["llm"] = [t if s is None else s for s, t in zip(said, texts, strict=True)]
        if mute := [i for i, s in enumerate(said) if s is None]:
            ev.left_out.append(f"fve_llm_paraphrase of {len(mute)} rows: the paraphraser gave nothing of use")
        heard = [i for i, s in enumerate(said) if s is not None] if any(said) else []
    else:
        heard = []
    written = _rewrite(ev, label)
    edited["rewritten"] = [written.get(i, t) for i, t in enumerate(texts)]
    swaps = make_swaps(texts, ev.columns["text"], ev.trip.ok, seed)
    edited["swapped"] = [swaps[i].explanation if i in swaps else t for i, t in enumerate(texts)]
    h_hat = edited_reconstructions(ev, edited, label)
    error = {name: ev.errors(h, ev.trip.ok) for name, h in h_hat.items()}
    return [
        *_paraphrases(ev, edited, error, [i for i in sorted(written) if ev.trip.ok[i]], heard),
        *_opposites(ev, edited, error, h_hat, [i for i, (_, changes) in enumerate(reverse) if changes]),
        *_entities(ev, edited, error),
        *_counterfactual(ev, h_hat, swaps, label),
    ]


def _paraphrases(ev: Evidence, edited, error, written: list[int], heard: list[int]) -> list[Figure]:
    changed = [_count_changed(a, b) for a, b in zip(edited["text"], edited["paraphrase"], strict=True)]
    out = [
        ev.fve("fve_paraphrase", error["paraphrase"], "every word that has a synonym is replaced by it",
               reference="published: 25 % of FVE kept"),
        ev.fve_lost("lost_paraphrase", error["paraphrase"], error["text"], "FVE lost by it"),
        ev.fve("fve_paraphrase_kept_quotes", error["kept_quotes"], "the same outside quotes",
               reference="published: 98 % kept"),
        ev.fve("fve_paraphrase_half", error["half"], "half of those words"),
        ev.ratio("paraphrased", [a for a, _ in changed], [b for _, b in changed],
                 "share of words that fve_paraphrase replaces"),
    ]
    if heard:
        out += [
            ev.fve("fve_llm_paraphrase", error["llm"], "the same said by an LLM in other words", rows=heard),
            ev.fve_lost(
                "lost_llm_paraphrase",
                error["llm"],
                error["text"],
                "FVE lost by that on the same rows",
                rows=heard,
            ),
        ]
    if written:
        new = [_count_new(edited["text"][i], edited["rewritten"][i]) for i in written]
        out += [
            ev.fve("fve_target_paraphrase", error["rewritten"], "the same said by the target in other words",
                   rows=written),
            ev.fve_lost("lost_target_paraphrase", error["rewritten"], error["text"],
                    "FVE lost by that on the same rows", rows=written),
            ev.ratio("target_paraphrase_new", [a for a, _ in new], [b for _, b in new],
                     "share of its words that are new", rows=written),
        ]
    return out


def _opposites(ev: Evidence, edited, error, h_hat, rows: list[int]) -> list[Figure]:
    """Return the figures of opposites, on the rows where a claim was reversed; [] if there is no such row."""
    if not rows:
        return []
    whole, variance = F.normalise(h_hat["text"]), F.variances(ev.columns["h"])[rows]
    read = {name: ev.errors(ev.read_frozen(edited[name]), ev.trip.ok) for name in ("opposite", "neutral")}

    def moved(name, edit, asks):
        return ev.ratio(name, np.sum((F.normalise(h_hat[edit]) - whole) ** 2, 1)[rows], variance, asks,
                        rows=rows)

    return [
        ev.fve_lost(
            "lost_opposite",
            error["opposite"],
            error["text"],
            "FVE lost when the claims are reversed",
            rows=rows,
        ),
        ev.fve_lost(
            "lost_opposite_control",
            error["neutral"],
            error["text"],
            "FVE lost when as many words at the same places become neutral ones",
            rows=rows,
        ),
        ev.fve_lost(
            "opposite_margin",
            error["opposite"],
            error["neutral"],
            "the difference; above zero: AR tells a claim from its opposite",
            rows=rows,
        ),
        ev.fve_lost(
            "opposite_margin_frozen",
            read["opposite"],
            read["neutral"],
            "the same by the frozen target; below zero: reversed words bring it nearer to h",
            rows=rows,
        ),
        moved("moved_opposite", "opposite", "how far ĥ moves under it, in variances of h"),
        moved("moved_control", "neutral", "how far under the neutral words"),
    ]


def _entities(ev: Evidence, edited, error) -> list[Figure]:
    pairs = zip(edited["text"], edited["entities"], strict=True)
    rows = [i for i, (a, b) in enumerate(pairs) if a != b]
    asks = "FVE lost with other explanations' names and numbers"
    return [ev.fve_lost("lost_entities", error["entities"], error["text"], asks, rows=rows)] if rows else []


def _counterfactual(ev: Evidence, h_hat, swaps: dict, label: str) -> list[Figure]:
    """Return cosines between the changes of AR's ĥ and of the target's h when both inputs swap a word."""
    rows = sorted(swaps)
    if not rows:
        return []
    sources = [ev.columns["text"][i] for i in rows]
    ours, another = [swaps[i].source for i in rows], [swaps[i].another for i in rows]
    # The original text is captured again, because a store's h comes from a longer window and another batch.
    told = label and f"{label}: swapped"
    h = capture_texts.capture_last(ev.runner, sources + ours + another, label=told)[:, 0]
    h, h_ours, h_another = np.split(F.normalise(h), 3)
    moved = F.normalise(h_hat["swapped"][rows]) - F.normalise(h_hat["text"][rows])
    other = moved[rows_of_other_documents([ev.columns["doc_id"][i] for i in rows])]
    asks = "cosine of AR's change with the target's when a word is swapped in explanation and text"
    cos, cos_another = _cos(moved, h_ours - h), _cos(moved, h_another - h)
    return [
        ev.mean("counterfactual_cos", cos, asks, rows=rows,
                reference="published: rabbit->mouse steering works ~50 %"),
        ev.mean("counterfactual_margin", cos - cos_another,
                "how much higher that is than with the target's change for another word", rows=rows),
        ev.mean("counterfactual_cos_random", cos_another,
                "the same with the target's change for another word there", rows=rows),
        ev.mean("counterfactual_cos_mismatch", _cos(other, h_ours - h),
                "the same with AR's change of another row", rows=rows),
    ]


def make_swaps(texts: list[str], sources: list[str], ok_N, seed: int = 0) -> dict[int, Swap]:
    """Return {row: Swap} for at most SWAPPED rows whose explanation and source's last words share a word.

    Both new words come from other rows' sources and match the replaced word: a name replaces a name, and
    any other word has the same part of speech and the same ending.
    """
    pool, found = {}, {}
    for w in (w for source in sources for w in _candidates(source)):
        pool.setdefault(_shape(w), set()).add(w.text)
    pool = {shape: sorted(words) for shape, words in pool.items()}
    for i, (text, source) in enumerate(zip(texts, sources, strict=True)):
        if not ok_N[i]:
            continue
        tail = " ".join(source.split()[-TAIL:])
        known = {w.text.lower() for w in (*_candidates(text), *_candidates(source))}
        rng = edits.keyed_generator(seed, f"{text}\x1f{source}")
        words = [w for w in _candidates(text) if re.search(rf"\b{w.text}\b", tail)]
        for w in (words[j] for j in rng.permutation(len(words))):
            new = [v for v in pool.get(_shape(w), ()) if v.lower() not in known]
            if len(new) > 1:
                one, two = (new[j] for j in rng.choice(len(new), 2, replace=False))
                found[i] = Swap(
                    *(_replace_word(*a) for a in ((text, w, one), (source, w, one), (source, w, two)))
                )
                break
    return {i: found[i] for i in evenly_spaced(list(found), SWAPPED)}


def _candidates(text: str) -> list[wordnet.Word]:
    return [w for w in wordnet.content_words(text) if len(w.text) >= 4]


def _shape(w: wordnet.Word) -> tuple:
    return w.reading and w.reading[::2], w.text[0].isupper(), w.text.isupper()


def _replace_word(text: str, w: wordnet.Word, new: str) -> str:
    found = re.finditer(rf"\b{w.text}\b", text)
    return wordnet.replace_spans(text, [(*m.span(), new) for m in found])


def _rewrite(ev: Evidence, label: str) -> dict[int, str]:
    """Return {row: the target's greedy answer to REWRITE} for at most REWRITTEN rows; "" where AV failed.

    Rows whose prompt and answer exceed the target's maximal position are left out.
    """
    tok, spec, batch = ev.runner.tok, ev.runner.spec, ev.runner.batch
    texts = ev.trip.explanations
    ids = {
        i: chat_ids(tok, REWRITE.replace("{text}", break_special(tok, texts[i])))
        for i in evenly_spaced(range(len(ev)), REWRITTEN)
    }
    ids = {i: row for i, row in ids.items() if len(row) + MAX_NEW <= spec.lm.max_position}
    asked = sorted((i for i in ids if ev.trip.ok[i]), key=lambda i: len(ids[i]))
    if not asked:
        return {}
    out = dict.fromkeys(ids, "")
    answer = make_answer(ev.runner.base, spec.lm, tok, max_new=MAX_NEW, batch=batch, eos=spec.av.eos,
                      dtype=spec.compute)
    keys = jax.random.split(new_key(0), batch)  # unused, because decoding is greedy
    with Progress(label and f"{label}: rewritten", len(asked), unit="texts") as bar:
        for real in chunks(asked, batch):
            for i, said in zip(real, answer([ids[i] for i in real], keys), strict=True):
                out[i] = thinking.split(said)[0].strip()
            bar.advance(len(real))
    return out


def _run_paraphraser(paraphraser, texts: list[str]) -> list[str | None]:
    """Return the paraphrase of every text, None where there is none. Empty texts are not sent and stay ""."""
    rows = [i for i, t in enumerate(texts) if t]
    try:
        said = list(paraphraser([texts[i] for i in rows])) if rows else []
    except OSError as err:
        raise UserError(f"the paraphraser failed ({one_line(err)}): evaluate without it") from err
    if len(said) != len(rows):
        raise UserError(f"the paraphraser returned {len(said)} texts for {len(rows)}: it must return one for "
                        "each, in their order")
    out = dict(zip(rows, said, strict=True))
    return [out.get(i, "") for i in range(len(texts))]


def _count_changed(text: str, other: str) -> tuple[int, int]:
    """Return (number of words that differ at the same position, number of words)."""
    pairs = list(zip(text.split(), other.split(), strict=True))
    return sum(a != b for a, b in pairs), len(pairs)


def _count_new(text: str, other: str) -> tuple[int, int]:
    """Return (words of `other` that are not in `text`, words of `other`), without case and punctuation."""
    known, said = (re.findall(r"\w+", t.lower()) for t in (text, other))
    return sum(w not in known for w in said), len(said)


def _cos(a_ND, b_ND) -> np.ndarray:
    """Return the cosine [N] of rows; 0 where one vector is 0."""
    size = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return np.sum(a_ND * b_ND, 1) / np.maximum(size, 1e-12)
