"""Reading lessons: explanation-shaped lines that quote the last words of a text and the next ones.

They need no language model and never run out: any token of any document gives one. AV learns from
them to read h, AR to build it, before the written explanations teach what to say.
"""

import hashlib
from collections.abc import Sequence

# {last}: the last words of the text, {next}: the words that follow, both verbatim between double
# quotes.
_WITH_NEXT = (
    'Ends on "{last}", then "{next}".',
    'Cut on "{last}", next perhaps "{next}".',
    'Stops at "{last}", expecting "{next}".',
    '"{last}" is the very end, so "{next}" follows.',
    'Breaks off after "{last}", likely "{next}".',
    'The end is "{last}", wanting "{next}" next.',
    'Halts at "{last}", where "{next}" comes next.',
    'Text pauses on "{last}", asking for "{next}".',
)
_INSIDE_WORD = (
    'Ends inside a word on "{last}", then "{next}".',
    'Cut within a word at "{last}", completed by "{next}".',
    'Breaks off mid-word at "{last}", so "{next}" follows.',
)
_NO_NEXT = (
    'Ends on "{last}".',
    'The very end is "{last}".',
    'Stops at "{last}", the end of the text.',
)


def last_words(text: str, n: int) -> str:
    """The last n words of `text` joined by single spaces; a word that is cut short stays so."""
    return " ".join(text.split()[-n:])


def lesson_last(text: str, n: int) -> str:
    """`Ends on "<last n words>"`: the surface baseline, what quoting alone is worth."""
    return f'Ends on "{_plain(last_words(text, n))}"'


def lesson(
    text: str,
    next_text: str,
    key: tuple,
    *,
    last: tuple[int, int] = (2, 6),
    ahead: tuple[int, int] = (1, 4),
) -> str:
    """One line that quotes the end of `text` and what follows, a pure function of its arguments.

    Args:
        text: the context up to and including the token.
        next_text: what follows, starting with the very next character ("" at the end of a
            document).
        key: chooses the wording and the numbers of words, e.g. (seed, row, epoch).
        last, ahead: smallest and largest number of words quoted from either side.
    """
    draw = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=6).digest()
    n_last = last[0] + draw[0] % (last[1] - last[0] + 1)
    n_next = ahead[0] + draw[1] % (ahead[1] - ahead[0] + 1)
    following = " ".join(next_text.split()[:n_next])
    inside = text[-1:].isalnum() and next_text[:1].isalnum()
    wordings = _NO_NEXT if not following else _INSIDE_WORD if inside else _WITH_NEXT
    wording = wordings[int.from_bytes(draw[2:], "little") % len(wordings)]
    return wording.format(last=_plain(last_words(text, n_last)), next=_plain(following))


def lessons(
    texts: Sequence[str],
    next_texts: Sequence[str],
    rows: Sequence[int],
    *,
    seed: int,
    epoch: int | Sequence[int] = 0,
    **options,
) -> list[str]:
    """A lesson for each row, keyed on (seed, row, epoch): another wording each epoch, the same on
    every run.

    `epoch` is one number for all or one a row (a batch may straddle two epochs).
    """
    epochs = [epoch] * len(rows) if isinstance(epoch, int) else epoch
    return [
        lesson(text, following, (seed, int(row), int(e)), **options)
        for text, following, row, e in zip(texts, next_texts, rows, epochs, strict=True)
    ]


def _plain(words: str) -> str:
    """Verbatim but for our own tags, which would end an explanation early."""
    return words.replace("<explanation>", "< explanation>").replace(
        "</explanation>", "< /explanation>"
    )
