"""Read the text or the chat of a Neuronpedia request, and name its tokens as Neuronpedia's server does."""

import dataclasses
import os.path
from typing import NamedTuple

from nla_jax.data import chats
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib


class Block(NamedTuple):
    """The characters of one message in a rendered chat: all of them, and those of its content.

    index: of the message; None for the opening of the assistant's next turn."""

    start: int
    end: int
    content: tuple[int, int]
    role: str
    channel: str | None
    index: int | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text as the target reads it, without the tokens before every text; the blocks of a chat."""

    text: str
    blocks: list[Block] = dataclasses.field(default_factory=list)


def read_prompt(tok, lead: tuple[int, ...], *, text: str | None, messages: list[dict] | None,
                add_generation_prompt: bool, continue_final_message: bool,
                enable_thinking: bool | None) -> Prompt:
    """Return the text of a request, or its chat in the target's template.

    A text may hold special tokens, as there. Raises UserError if there is neither text nor chat, and for a
    chat that cannot be rendered as asked."""
    if not messages:
        if not text:
            raise UserError("give text or messages")
        before = "".join(tok.convert_ids_to_tokens(list(lead)))
        return Prompt(text.removeprefix(before) if before else text)
    if not tok.chat_template:
        raise UserError("the target has no chat template: send text instead of messages")
    if enable_thinking and "enable_thinking" in str(tok.chat_template):
        raise UserError("this server renders chats without thinking: omit enable_thinking")
    if any("," in m["role"] for m in messages):
        raise UserError("the name of a role may not hold a comma")
    turns = [{k: m[k] for k in ("role", "content")} for m in messages]
    opens = add_generation_prompt and not continue_final_message
    found = _render(turns, tok, opens)
    if found.refused:
        raise UserError(f"the chat cannot be read: {found.refused}")
    if continue_final_message and not turns[-1]["content"].strip():
        raise UserError("continue_final_message needs words in the last message")
    blocks, whole = _blocks(messages, turns, found, tok), found.text
    if continue_final_message:
        whole = whole[: found.spans[-1][1]]
    return Prompt(whole, blocks)


def _render(turns: list[dict], tok, opens: bool) -> chats.Conversation:
    return chats.render(turns, tok, ",".join({t["role"].lower(): 0 for t in turns}), "the chat", opens)


def _blocks(messages: list[dict], turns: list[dict], found: chats.Conversation, tok) -> list[Block]:
    """Return the blocks of a rendered chat. A block ends where the chat up to its message does."""
    contents, ends = iter(found.spans), [0]
    for n in range(1, len(turns) + 1):
        upto = _render(turns[:n], tok, False)
        shared = 0 if upto.refused else len(os.path.commonprefix([upto.text, found.text]))
        ends.append(max(ends[-1], shared))
    blocks = []
    for i, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        # A message without words is all header.
        content = next(contents, (ends[i + 1],) * 2) if turn["content"].strip() else (ends[i + 1],) * 2
        blocks.append(Block(ends[i], ends[i + 1], content, turn["role"], message["channel"], i))
    blocks.append(Block(ends[-1], len(found.text), (len(found.text),) * 2, "assistant", None, None))
    return blocks


def read_tokens(tok, prompt: Prompt, n_lead: int) -> list[dict]:
    """Return token, token_id, position, fragment and place in the chat of each token.

    Positions count the `n_lead` tokens that the tokenizer puts before every text, as there. Tokens that are
    parts of one character have that character as `token`."""
    ids, spans = tok_lib.offsets(tok, prompt.text)
    out = []
    for i, (token_id, (a, b)) in enumerate(zip(ids, spans, strict=True)):
        first = last = i
        while first and a < b and spans[first - 1] == (a, b):
            first -= 1
        while last + 1 < len(spans) and a < b and spans[last + 1] == (a, b):
            last += 1
        out.append({
            "token": prompt.text[a:b], "token_id": int(token_id), "position": i + n_lead,
            "fragment_index": i - first, "fragment_count": last - first + 1, **_place(prompt.blocks, a),
        })
    return out


def _place(blocks: list[Block], at: int) -> dict:
    """Return role, section, channel and message_index of the token that begins at a character."""
    if not blocks:
        return dict.fromkeys(("role", "section", "channel", "message_index"))
    for block in blocks:
        if block.start <= at < block.end:
            begin, end = block.content
            section = "header" if at < begin else "footer" if at >= end else "content"
            return {"role": block.role, "section": section, "channel": block.channel,
                    "message_index": block.index}
    return {"role": None, "section": "scaffold", "channel": None, "message_index": None}
