"""The prompts of AV and AR: templates as text, and the token ids around the variable part."""

import dataclasses
import json

from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts
from nla_jax.lm import tokenizer as tok_lib

# The marker comes last because tokens after it are computed again for each activation.
AV_TEMPLATE = (
    "Below is one activation of a language model that was reading a text, given as a vector. Say "
    "in plain English, inside explanation tags, what it holds.\n<concept>{marker}</concept>"
)
# AR reads the bare explanation: its last token is the explanation's last token. Any token after the
# explanation makes the reconstruction much worse (docs/method.md).
AR_TEMPLATE = "{explanation}"
# Tokenizers that put a space before a text, such as Llama 2's, use the second template.
AR_TEMPLATES = (AR_TEMPLATE, "\n{explanation}")
OPEN, CLOSE = "<explanation>\n", "\n</explanation>"


@dataclasses.dataclass(frozen=True)
class AVPrompt:
    """The verbalizer's prompt as ids: before | marker | after. Its answer is `open` ... `close`.

    injection: a name of `verbalizer.INJECTIONS`, or "module:function": how the vector enters the model.
    """

    before: tuple[int, ...]
    marker: int
    after: tuple[int, ...]
    open: tuple[int, ...]
    close: tuple[int, ...]
    newline: tuple[int, ...]  # ids of the line break that may precede the closing tag
    end_of_turn: int  # follows the closing tag in training data; sampling stops before it
    eos: tuple[int, ...]  # any of these ends a row that was not closed
    pad: int
    injection: str = "replace"


@dataclasses.dataclass(frozen=True)
class ARPrompt:
    """The reconstructor's prompt as ids: before + explanation + after. h is read at the last token.

    after: empty if the prompt ends with the explanation, as our own template does.
    suffix: the ids that every rendered prompt ends with. It is `after`, or the end of it if the first
    tokens of `after` may merge with the explanation's last ones.
    breaks: (token that ends in a line break, token of the same text without it). An explanation may end in
    such a token, because some tokenizers merge a full stop with the break before the closing tag.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int
    suffix: tuple[int, ...] = ()
    breaks: tuple[tuple[int, int], ...] = ()


def av_prompt(tok, template: str, marker: str, injection: str = "replace") -> AVPrompt:
    """Render and tokenise the chat prompt in one step, and split it at the marker.

    Raises UserError if the template does not contain `{marker}` once, if the marker is not a single token,
    or if the rendered prompt does not contain that token once.
    """
    if template.count("{marker}") != 1:
        raise UserError(f"the AV prompt template must hold {{marker}} once: {template!r}")
    ids = chat_prompts.chat_ids(tok, template.replace("{marker}", marker))
    marker_ids = tok_lib.inner_ids(tok, marker)
    if len(marker_ids) != 1:
        raise UserError(f"marker {marker!r} is {len(marker_ids)} tokens in this tokenizer; choose "
                        "one that is a single token")
    sites = [i for i, t in enumerate(ids) if t == marker_ids[0]]
    if len(sites) != 1:
        raise UserError(f"marker {marker!r} (id {marker_ids[0]}) occurs {len(sites)} times in the "
                        "rendered AV prompt; it must occur once: choose another marker or template")
    eos = tuple(tok_lib.eos_ids(tok))
    end = tok.eos_token_id if tok.eos_token_id in eos else eos[0]
    return AVPrompt(
        before=tuple(ids[: sites[0]]), marker=marker_ids[0], after=tuple(ids[sites[0] + 1 :]),
        open=tuple(tok_lib.plain_ids(tok, OPEN)),
        # Tokenise the tag without its line break, which may merge with the text before it.
        close=tuple(tok_lib.inner_ids(tok, CLOSE.strip())),
        newline=tuple(tok_lib.inner_ids(tok, "\n")),
        end_of_turn=end, eos=eos, pad=end, injection=injection,
    )


def ids_of(av: AVPrompt, ar: ARPrompt) -> dict:
    """Return the ids of rendered prompts as JSON values, for `av_of_ids` and `ar_of_ids`."""
    out = {"av": dataclasses.asdict(av), "ar": dataclasses.asdict(ar)}
    del out["av"]["injection"], out["ar"]["breaks"]  # a setting, and a property of the vocabulary
    return json.loads(json.dumps(out))


def av_of_ids(found: dict, tok, injection: str) -> AVPrompt:
    """Return AV's prompt of recorded ids (`ids_of`). Raises UserError if they are not of this tokenizer."""
    return AVPrompt(**_checked_ids(found, tok, AVPrompt, "injection"), injection=injection)


def ar_of_ids(found: dict, tok) -> ARPrompt:
    """Return AR's prompt of recorded ids (`ids_of`). Raises UserError if they are not of this tokenizer."""
    return ARPrompt(**_checked_ids(found, tok, ARPrompt, "breaks"), breaks=_breaks(tok))


def _checked_ids(found: dict, tok, kind, other: str) -> dict:
    names = {f.name for f in dataclasses.fields(kind)} - {other}
    if not isinstance(found, dict) or set(found) != names:
        raise UserError("the recorded ids of a prompt are malformed: copy the directory again")
    for ids in found.values():
        for i in ids if isinstance(ids, list) else [ids]:
            if not isinstance(i, int) or not 0 <= i < len(tok):
                raise UserError(f"the recorded ids of a prompt contain {i!r}, which is no token of this "
                                "tokenizer: restore the tokenizer")
    return {k: tuple(ids) if isinstance(ids, list) else ids for k, ids in found.items()}


def drill_prompt(prompt: AVPrompt) -> AVPrompt:
    """Return the verbalizer's prompt truncated after the marker, for answers without tags.

    An answer is closed by the end of turn. A row of a drill computes only the marker and its answer.
    """
    return dataclasses.replace(prompt, after=(), open=(), close=(prompt.end_of_turn,), newline=())


def ar_template_for(tok) -> str:
    """Return the first of AR_TEMPLATES whose tokens do not merge with the explanation's."""
    for template in AR_TEMPLATES:
        try:
            ar_prompt(tok, template)
            return template
        except UserError:
            continue
    return AR_TEMPLATE


def ar_prompt(tok, template: str, n_suffix: int = 0) -> ARPrompt:
    """Tokenise the template around `{explanation}`: an ARPrompt.

    Both parts are tokenised as in a rendered prompt, with a beginning-of-text token if the tokenizer adds
    one. A line break or a space must separate `{explanation}` from text after it.

    Args:
      n_suffix: how many final ids must not depend on the explanation; 0 means all of `after`. The official
        templates have no line breaks around the explanation, so ids at either border may merge with it.
        There the token path, which puts ids between `before` and `after`, differs from the text path.

    Raises UserError if the template does not contain `{explanation}` once, or if its tokens merge with
    the explanation's.
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
        raise UserError(f"the AR template merges with the explanation's tokens at a border: {ids_before} + "
                        f"{probe} + {ids_after} became {whole}; separate them by a line break")
    return ARPrompt(tuple(ids_before), tuple(ids_after), tok.eos_token_id or 0, tuple(end),
                    _breaks(tok))


def _breaks(tok) -> tuple[tuple[int, int], ...]:
    found = []
    # Byte-level vocabularies spell a line break as U+010A.
    for i in sorted(i for token, i in tok.get_vocab().items() if token.endswith(("\u010a", "\n"))):
        bare = tok.decode([i]).rstrip()
        if bare and len(ids := tok_lib.inner_ids(tok, bare)) == 1:
            found.append((i, ids[0]))
    return tuple(found)
