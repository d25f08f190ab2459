"""From documents to capture requests: the texts, and the tokens whose activations to capture.

The requests of a document are a pure function of (seed, document). They do not depend on order, batch or
process.
"""

import bisect
import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nla_jax.data import explanations as explanations_lib
from nla_jax.data import lessons
from nla_jax.data.corpora import Document
from nla_jax.data.splits import Sample, keyed_hash, split_of
from nla_jax.errors import UserError
from nla_jax.lm.special_tokens import special_tokens
from nla_jax.lm.tokenizer import offsets
from nla_jax.util import paths

NEXT_WORDS = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """One text for the target, and the rows that its forward pass gives.

    `ids` [T] int32 are the tokens of the text, tokenised without its context. Row i is the token at index
    `positions[i]`. `texts[i]` is the text up to and including this token. `next_texts[i]` is the document's
    text from the next character on, so it begins inside a word if the token ends inside one.
    `explanations[i]` is "" if there is no explanation.
    """

    doc_id: str
    ids: np.ndarray
    positions: tuple[int, ...]
    texts: tuple[str, ...]
    next_texts: tuple[str, ...]
    explanations: tuple[str, ...]


def tokenize(tok, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of `text`, without context, and their character spans."""
    ids, spans = offsets(tok, text)
    return list(ids), [(int(a), int(b)) for a, b in spans]


def next_words(text: str, end: int, n: int = NEXT_WORDS) -> str:
    """Return the text from character `end` to the end of the n-th word after it, first space included."""
    words = text[end : end + 40 * n].split()
    if end and not text[end - 1].isspace() and text[end : end + 1].strip():
        n += 1  # the first piece is the rest of a word
    length, at = 0, end
    for word in words[:n]:
        at = text.index(word, at) + len(word)
        length = at - end
    return text[end : end + length]


def explanation_requests(
    docs: Iterable[Document],
    tok,
    split: str,
    *,
    jsonl_path: str | Path | None = None,
    warm: float = 0.75,
    cuts_per_text: int = 1,
    positions: int = 1,
    max_shift_words: int = 12,
    seed: int = 0,
    dropped: Collection[str] = (),
) -> tuple[list[Request], dict[str, int]]:
    """Make one request, or several cuts, for every written explanation whose document is in `split`.

    h is captured at the LAST token of the explained text, which is tokenised without its context. With
    `cuts_per_text` = n there are n requests with the same end. The first is the text as written. In the
    others the start moves forward by different numbers of words (1 to `max_shift_words`, keyed by seed and
    text). All have the same explanation.

    With `positions` = n a request has up to n - 1 further tokens from the second half of the text. The draw
    is keyed by seed and text. Their explanation is the written description without its last line and its
    ending line. The last line describes the end of the text; the rest changes little over the second half.

    Args:
        docs: the whole corpus, all splits; at least the documents with explanations.
        dropped: ids of near duplicates (`document_choice.select`), which are counted but not used.
        split: "warm", "rl" or "heldout" (`splits.split_of` with `warm`).
        jsonl_path: the file of explanations; by default the shipped ones, about the news corpus.

    Returns:
        The requests in file order, and the numbers of explanations: "used", and left out by reason.

    Raises:
        UserError: a text that does not match its hash, an explanation on the wrong side of the
            held-out line, an impossible `cuts_per_text`, or no explanation about this corpus.
    """
    if not 1 <= cuts_per_text <= max_shift_words + 1:
        raise UserError(
            f"cuts_per_text={cuts_per_text}: give a number from 1 to {max_shift_words + 1}"
        )
    path = paths.path(jsonl_path) if jsonl_path else explanations_lib.SHIPPED
    by_id, special = {doc.doc_id: doc for doc in docs}, _special_ids(tok)
    requests, counts = [], collections.Counter(used=0)
    for record in explanations_lib.read(path):
        doc = by_id.get(record.doc_id)
        if doc is None:
            near = record.doc_id in dropped
            counts["near duplicate" if near else "document not in the corpus"] += 1
            continue
        text = _explained_text(doc, record, path)
        home = split_of(doc, warm)
        if home != split:
            counts[f"document in split {home}"] += 1
            continue
        counts["used"] += 1
        tail = next_words(doc.text, record.end)
        description, _ = lessons.split_end(record.explanation)
        for cut in _cut_starts(
            text, cuts_per_text, max_shift_words, (seed, record.doc_id, record.end)
        ):
            ids, spans = tokenize(tok, text[cut:])
            start, inner = record.start + cut, []
            if positions > 1 and (about := description.rpartition("\n")[0]):
                key = keyed_hash("inner", seed, record.doc_id, record.end, cut)
                inner = _draw(_whole_tokens(ids, spans, len(spans) // 2, special)[:-1], positions - 1, key)
            ends = [start + spans[i][1] for i in inner]
            requests.append(
                Request(
                    record.doc_id,
                    np.asarray(ids, np.int32),
                    (*inner, len(ids) - 1),
                    (*(doc.text[start:end] for end in ends), text[cut:]),
                    (*(next_words(doc.text, end) for end in ends), tail),
                    (*(about for _ in ends), record.explanation),
                )
            )
    if not by_id or counts["document not in the corpus"] == sum(counts.values()):
        raise UserError(
            f"none of the explanations in {path} is about this corpus: use the corpus that they "
            "were written for"
        )
    return requests, dict(counts)


def _explained_text(doc: Document, record, path: Path) -> str:
    text = doc.text[record.start : record.end]
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not text or not record.sha256 or not digest.startswith(record.sha256):
        raise UserError(
            f"explanation {record.id} of {path}: characters {record.start}-{record.end} of "
            f"{doc.doc_id} do not have the recorded sha256 {record.sha256!r}: the corpus is "
            "another version, or the file was edited; use the corpus that the file was written for"
        )
    if (record.split == "heldout") != (doc.split == "heldout"):
        raise UserError(
            f"explanation {record.id} of {path} says split {record.split!r}, but {doc.doc_id} is "
            f"{doc.split!r}: held-out documents must not be trained on; correct the file"
        )
    return text


def _cut_starts(text: str, n: int, max_shift: int, key: tuple) -> list[int]:
    """Return character offsets of n starts: 0, then n - 1 different later word starts, in keyed order."""
    starts = [i + 1 for i, c in enumerate(text) if c == " "]
    # At least half of the words must remain, so a short text gives fewer cuts.
    starts = starts[: min(max_shift, len(starts) // 2)]
    order = sorted(range(len(starts)), key=lambda i: keyed_hash("cut", *key, i))
    return [0, *(starts[i] for i in order[: n - 1])]


def window_requests(
    docs: Sequence[Document],
    tok,
    *,
    window_tokens: int = 128,
    positions: int = 8,
    min_position: int = 50,
    seed: int = 0,
    max_windows: int | None = None,
) -> list[Request]:
    """Make requests for random tokens of the windows of all documents.

    A document is cut from its start into windows, which begin at a word and have at most `window_tokens`
    tokens. Each window is tokenised without its context. In each window up to `positions` tokens are drawn
    uniformly without replacement from the indices >= min_position, keyed by (seed, doc_id, window). Special
    tokens, and tokens that end inside a character (pieces of an emoji), are never drawn. In a document with
    `spans` only tokens inside the spans are drawn. `max_windows` keeps a keyed random choice of windows, from
    at most `max_windows` documents.

    Returns:
        Requests by document in the given order, windows in reading order, positions ascending.

    Raises:
        UserError: the settings leave no token to draw, or no window is long enough.
    """
    if not 0 <= min_position < window_tokens or positions < 1:
        raise UserError(
            f"window_tokens={window_tokens}, min_position={min_position}, positions={positions}: "
            "a window must be longer than min_position, and positions at least 1"
        )
    if max_windows is not None:
        sample = Sample(max_windows, seed)
        for doc in docs:
            sample.add(doc)
        docs = sample.documents()
    # A heap of (minus the rank, number, request). Its first element has the largest rank and is replaced
    # first, so memory does not grow with the corpus.
    keyed: list[tuple[int, int, Request]] = []
    n, special = 0, _special_ids(tok)
    for doc in docs:
        for window, (ids, spans, base) in enumerate(_windows(doc.text, tok, window_tokens)):
            rank, full = keyed_hash("window", seed, doc.doc_id, window), len(keyed) == max_windows
            if full and rank >= -keyed[0][0]:
                continue
            whole = _whole_tokens(ids, spans, min_position, special)
            request = _window_request(doc, window, ids, spans, base, positions, whole, seed)
            if request is not None:
                n += 1
                (heapq.heappushpop if full else heapq.heappush)(keyed, (-rank, n, request))
    if not keyed:
        raise UserError(
            f"no window of {len(docs)} documents is longer than {min_position} tokens: lower "
            "min_position or give longer documents"
        )
    return [request for _, _, request in sorted(keyed, key=lambda item: item[1])]


def _windows(
    text: str, tok, window_tokens: int
) -> Iterator[tuple[list[int], list[tuple[int, int]], int]]:
    """Yield (ids, spans within the window, character offset of the window) in reading order."""
    start = 0
    while start < len(text):
        reach = 6 * window_tokens  # in characters; enough for most texts
        ids, spans = tokenize(tok, text[start : start + reach])
        # The slice may end inside a word; the window must end before that word.
        while len(ids) <= window_tokens + 16 and start + reach < len(text):
            reach *= 2
            ids, spans = tokenize(tok, text[start : start + reach])
        n = min(window_tokens, len(ids))
        while 1 < n < len(ids) and spans[n][0] < spans[n - 1][1]:
            n -= 1  # a window must not end inside a character
        ids, spans = ids[:n], spans[:n]
        yield ids, spans, start
        end = start + max(max(b for _, b in spans), 1)
        if end < len(text) and not text[end - 1].isspace() and not text[end].isspace():
            end = text.find(" ", end)  # the window ends inside a word; the next one starts after that word
            if end < 0:
                return
        start = end + text[end : end + 1].isspace()


def _is_inside(spans: Sequence[tuple[int, int]], at: int) -> bool:
    i = bisect.bisect_right(spans, at, key=lambda span: span[0]) - 1
    return i >= 0 and at < spans[i][1]


def _special_ids(tok) -> set[int]:
    return {*special_tokens(tok).values()} - {tok.unk_token_id}  # an unknown word is text


def _whole_tokens(ids, spans: Sequence[tuple[int, int]], first: int, special: Collection[int]) -> list[int]:
    """Return the indices from `first` on of tokens that are not special and do not end inside a character."""
    return [
        i
        for i, (a, b) in enumerate(spans)
        if i >= first and b > a and (i + 1 == len(spans) or spans[i + 1][0] >= b) and ids[i] not in special
    ]


def _draw(eligible: list[int], n: int, key: int) -> list[int]:
    """Draw at most n of the indices uniformly without replacement; the result ascends."""
    rng = np.random.Generator(np.random.Philox(key=key))
    drawn = rng.choice(len(eligible), size=min(n, len(eligible)), replace=False, shuffle=False)
    return sorted(eligible[i] for i in drawn)


def _window_request(doc, window, ids, spans, base, positions, whole, seed) -> Request | None:
    ends = [b for _, b in spans]
    eligible = [
        i
        for i in whole
        if not doc.spans or _is_inside(doc.spans, base + ends[i] - 1)
    ]
    if not eligible:
        return None
    chosen = _draw(eligible, positions, keyed_hash("positions", seed, doc.doc_id, window))
    return Request(
        doc.doc_id,
        np.asarray(ids, np.int32),
        tuple(chosen),
        tuple(doc.text[base : base + ends[i]] for i in chosen),
        tuple(next_words(doc.text, base + ends[i]) for i in chosen),
        ("",) * len(chosen),
    )
