"""The two fixed prompts, as templates in words and as ids around the place that varies."""

import dataclasses

from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib

# What follows the marker is computed again for each activation, so the marker comes last.
AV_TEMPLATE = (
    "Below is one activation of a language model that was reading a text, given as a vector. Say "
    "in plain English, inside explanation tags, what it holds.\n<concept>{marker}</concept>"
)
# AR reads the bare explanation. Its read-out is the last token, so the words that end an explanation come
# directly before it: any token between them costs much of what they say (docs/method.md).
AR_TEMPLATE = "{explanation}"
# Tokenizers that put a space before a text, as Llama 2's does, get the second one.
AR_TEMPLATES = (AR_TEMPLATE, "\n{explanation}")
OPEN, CLOSE = "<explanation>\n", "\n</explanation>"


@dataclasses.dataclass(frozen=True)
class AVPrompt:
    """The verbalizer's prompt as ids: before | marker | after, then `open` ... `close`.

    injection: how h comes in: a name of `verbalizer.INJECTIONS`, or "module:function".
    """

    before: tuple[int, ...]
    marker: int
    after: tuple[int, ...]
    open: tuple[int, ...]
    close: tuple[int, ...]
    newline: tuple[int, ...]  # ids of the line break that may stand before the closing tag
    end_of_turn: int  # written after the closing tag in training data; sampling stops before it
    eos: tuple[int, ...]  # any of these ends a row that was not closed
    pad: int
    injection: str = "replace"


@dataclasses.dataclass(frozen=True)
class ARPrompt:
    """The reconstructor's prompt as ids: before + explanation + after; read at the last token.

    after: empty where the prompt ends with the explanation, as our own does.
    suffix: what a rendered prompt ends with, whatever the explanation. It is `after`, or less of it
    where the first tokens of `after` may merge with the explanation's last ones.
    breaks: tokens that end in a line break, each with the token of the same text without it. An answer may
    end in one, since some tokenizers merge a full stop with the break before the closing tag.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int
    suffix: tuple[int, ...] = ()
    breaks: tuple[tuple[int, int], ...] = ()


def av_prompt(tok, template: str, marker: str, injection: str = "replace") -> AVPrompt:
    """Render and tokenise the chat prompt in one step and find the marker between its neighbours.

    Raises UserError when the template has no `{marker}`, or the marker is not exactly one token in
    exactly one place.
    """
    if template.count("{marker}") != 1:
        raise UserError(f"the AV prompt template must hold {{marker}} once: {template!r}")
    ids = tok_lib.chat_ids(tok, template.replace("{marker}", marker))
    marker_ids = tok_lib.inner_ids(tok, marker)
    if len(marker_ids) != 1:
        raise UserError(f"marker {marker!r} is {len(marker_ids)} tokens in this tokenizer; choose "
                        "one that is a single token")
    sites = [i for i, t in enumerate(ids) if t == marker_ids[0]]
    if len(sites) != 1:
        raise UserError(f"marker {marker!r} (id {marker_ids[0]}) stands {len(sites)} times in the "
                        "rendered AV prompt; it must stand once")
    eos = tuple(tok_lib.eos_ids(tok))
    end = tok.eos_token_id if tok.eos_token_id in eos else eos[0]
    return AVPrompt(
        before=tuple(ids[: sites[0]]), marker=marker_ids[0], after=tuple(ids[sites[0] + 1 :]),
        open=tuple(tok_lib.plain_ids(tok, OPEN)),
        # The tag is tokenised without the line break, which may merge with what precedes it.
        close=tuple(tok_lib.inner_ids(tok, CLOSE.strip())),
        newline=tuple(tok_lib.inner_ids(tok, "\n")),
        end_of_turn=end, eos=eos, pad=end, injection=injection,
    )


def drill_prompt(prompt: AVPrompt) -> AVPrompt:
    """The verbalizer's prompt cut behind the marker, for answers without tags that the end of turn closes: a
    row of a drill costs the marker and the words of its answer."""
    return dataclasses.replace(prompt, after=(), open=(), close=(prompt.end_of_turn,), newline=())


def ar_template_for(tok) -> str:
    """The first of AR_TEMPLATES whose borders do not merge with an explanation in this tokenizer."""
    for template in AR_TEMPLATES:
        try:
            ar_prompt(tok, template)
            return template
        except UserError:
            continue
    return AR_TEMPLATE


def ar_prompt(tok, template: str, n_suffix: int = 0) -> ARPrompt:
    """The raw-string prompt with special tokens, split around the explanation.

    The halves are tokenised as they stand in a rendered prompt, so that a beginning-of-text token
    is there when the tokenizer adds one. Where text follows `{explanation}`, a line break or a space must
    separate them.

    Args:
      n_suffix: how many ids at the end must stand, 0 for all of `after`. The official templates have no
        line breaks around the explanation, so that the ids at either border may merge with it. The
        token path, which puts ids between `before` and `after`, then differs from the text there.

    Raises UserError for a template that does not hold `{explanation}` once, or merges.
    """
    if template.count("{explanation}") != 1:
        raise UserError(f"the AR prompt template must hold {{explanation}} once: {template!r}")
    before, after = template.split("{explanation}")
    ids_before, ids_after = tok_lib.raw_ids(tok, before), tok_lib.inner_ids(tok, after)
    probe = tok_lib.inner_ids(tok, "Probe.")
    whole = tok_lib.raw_ids(tok, template.replace("{explanation}", "Probe."))
    end = ids_after[-n_suffix:] if n_suffix else ids_after
    begin = ids_before if len(end) == len(ids_after) else ids_before[:-1]
    split = whole[len(whole) - len(end) :] == end and whole[: len(begin)] == begin
    if not split or not (ids_after or whole == ids_before + probe):
        raise UserError(f"the AR template merges with the explanation's tokens at a border: "
                        f"{ids_before} + {probe} + {ids_after} became {whole}")
    return ARPrompt(tuple(ids_before), tuple(ids_after), tok.eos_token_id or 0, tuple(end),
                    _breaks(tok))


def _breaks(tok) -> tuple[tuple[int, int], ...]:
    found = []
    # As byte-level vocabularies spell a line break, and as others do.
    for i in sorted(i for token, i in tok.get_vocab().items() if token.endswith(("\u010a", "\n"))):
        bare = tok.decode([i]).rstrip()
        if bare and len(ids := tok_lib.inner_ids(tok, bare)) == 1:
            found.append((i, ids[0]))
    return tuple(found)
