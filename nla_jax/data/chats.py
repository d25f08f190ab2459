"""Conversations as the target reads them, and where in them somebody speaks."""

from typing import NamedTuple

from nla_jax.errors import UserError

# Names of the two keys of a turn, and of the speakers, in the data sets that there are.
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class Rendered(NamedTuple):
    """A conversation through a chat template.

    `spans` are the characters (start, end) of the turns that were asked for, `words` all turns without the
    template (it says on which side of the held-out line the conversation is, whatever the target).
    `refused` is why it cannot be used, or "".
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    words: str
    refused: str


def render(conversation, tok, roles: str, where: str) -> Rendered:
    """A list of turns ({"role", "content"} or {"from", "value"}) through the template of `tok`.

    Args:
      roles: whose turns, such as "user,assistant".

    Raises UserError when there is no tokenizer or template, or `conversation` is no such list.
    """
    import jinja2

    if tok is None or not tok.chat_template:
        raise UserError(
            "a chat: corpus goes through the target's chat template, and there is none here: extract with a "
            "target that has one, or set config.chat_template"
        )
    wanted, messages = roles.split(","), _messages(conversation, where)
    if not any(m["role"] in wanted and m["content"] for m in messages):
        return Rendered("", (), "", "empty")
    words = "\x1f".join(m["content"] for m in messages)
    # Written by a user, they would be read as the end of a turn.
    if any(special in words for special in tok.all_special_tokens):
        return Rendered("", (), "", "holds a special token of the target")
    try:
        text = tok.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return Rendered("", (), "", "refused by the chat template")
    if tok.bos_token and text.startswith(tok.bos_token):
        text = text.removeprefix(tok.bos_token)  # it is put before every text
    spans, at = [], 0
    for m in messages:
        if not m["content"]:
            continue
        start = text.find(m["content"], at)
        if start < 0:
            return Rendered("", (), "", "changed by the chat template")
        at = start + len(m["content"])
        if m["role"] in wanted:
            spans.append((start, at))
    return Rendered(text, tuple(spans), words, "")


def _messages(conversation, where: str) -> list[dict[str, str]]:
    out = []
    if isinstance(conversation, dict):  # TFDS gives the columns of a list of turns
        columns = [list(c) if hasattr(c, "__len__") else [] for c in conversation.values()]
        same = len({len(c) for c in columns}) == 1
        turns = [map(_decoded, turn) for turn in zip(*columns, strict=False)]
        conversation = [dict(zip(conversation, turn, strict=True)) for turn in turns] if same else None
    for turn in conversation if isinstance(conversation, list | tuple) else [None]:
        keys = [k for k in _KEYS if isinstance(turn, dict) and k[0] in turn and k[1] in turn]
        content = turn[keys[0][1]] if keys else None
        if not keys or not isinstance(content, str | None) or not isinstance(turn[keys[0][0]], str):
            raise UserError(
                f'{where}: no conversation, which is a list of {{"role": ..., "content": ...}}: name the '
                "field with ?field=NAME"
            )
        role = turn[keys[0][0]].lower()
        out.append({"role": _ROLES.get(role, role), "content": (content or "").strip()})
    return out


def _decoded(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
