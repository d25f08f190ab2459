"""Conversations rendered by the target's chat template, and the character spans of their turns."""

from typing import NamedTuple

from nla_jax.data.text_files import BOM
from nla_jax.errors import UserError
from nla_jax.lm.chat_prompts import chat_template, template_fault
from nla_jax.lm.special_tokens import special_pattern
from nla_jax.lm.tokenizer import lead_ids

# Names of a turn's two keys, and of the roles, in public data sets.
_KEYS = (("role", "content"), ("from", "value"))
SPECIAL = "holds a special token of the target"  # why a document is left out
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class Conversation(NamedTuple):
    """A conversation rendered by a chat template.

    `spans` are the (start, end) characters of the turns of the wanted roles. `words` are all turns without
    the template. The held-out rule uses `words`, because it must not depend on the target. `refused` is the
    reason why the conversation cannot be used, or "".
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    words: str
    refused: str


def render(conversation, tok, roles: str, where: str, opens: bool = False) -> Conversation:
    """Render a list of turns ({"role", "content"} or {"from", "value"}) by the chat template of `tok`.

    Args:
      roles: the roles whose turns give `spans`, such as "user,assistant".
      where: name of the record in errors.
      opens: append the opening of the assistant's next turn.

    Raises UserError if there is no tokenizer or template, or if `conversation` is not such a list.
    """
    import jinja2

    if tok is None or not tok.chat_template:
        raise UserError(
            "a chat: corpus needs the target's chat template, and this target has none: extract with a "
            "target that has one, or set config.chat_template"
        )
    wanted, messages = roles.split(","), _messages(conversation, where)
    if not any(m["role"] in wanted and m["content"] for m in messages):
        return Conversation("", (), "", "empty")
    words = "\x1f".join(m["content"] for m in messages)
    # The target would read a special token in a turn's text as the end of the turn.
    if special_pattern(tok).search("\x1f".join([words, *(m["role"] for m in messages)])):
        return Conversation("", (), "", SPECIAL)
    try:
        text = _rendered(messages, tok, opens)
        parts = _parts(messages, tok, opens)
    except jinja2.TemplateSyntaxError as e:
        raise template_fault(e) from e
    except Exception:  # a template is code, which may raise any class
        return Conversation("", (), "", "refused by the chat template")
    spoken = [m for m in messages if m["content"]]
    spans, whole = [], parts[0]
    for m, part in zip(spoken, parts[1:], strict=False):
        if m["role"] in wanted:
            spans.append((len(whole), len(whole) + len(m["content"])))
        whole += m["content"] + part
    if whole != text or len(parts) != len(spoken) + 1:
        return Conversation("", (), "", "changed by the chat template")
    n = _lead_length(text, tok)
    return Conversation(text[n:], tuple((a - n, b - n) for a, b in spans), words, "")


def _parts(messages: list[dict], tok, opens: bool) -> list[str]:
    """Return the template's text before, between and after the contents."""
    mark = "\ue000"
    marked = [{**m, "content": m["content"] and mark} for m in messages]
    return _rendered(marked, tok, opens).split(mark)


def _rendered(messages: list[dict], tok, opens: bool) -> str:
    return tok.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opens, chat_template=chat_template(tok)
    )


def _lead_length(text: str, tok) -> int:
    """Return how many characters `text` begins with that the tokenizer puts before every text anyway."""
    lead = "".join(tok.convert_ids_to_tokens(lead_ids(tok)))
    return len(lead) if text.startswith(lead) else 0


def _messages(conversation, where: str) -> list[dict[str, str]]:
    out = []
    if isinstance(conversation, dict):  # TFDS gives the columns of a list of turns
        columns = [list(c) if hasattr(c, "__len__") else [] for c in conversation.values()]
        same = len({len(c) for c in columns}) == 1
        turns = [map(_decode, turn) for turn in zip(*columns, strict=False)]
        conversation = [dict(zip(conversation, turn, strict=True)) for turn in turns] if same else None
    for turn in conversation if isinstance(conversation, list | tuple) else [None]:
        keys = [k for k in _KEYS if isinstance(turn, dict) and k[0] in turn and k[1] in turn]
        content = turn[keys[0][1]] if keys else None
        if not keys or not isinstance(content, str | None) or not isinstance(turn[keys[0][0]], str):
            raise UserError(
                f'{where}: no conversation, which is a list of {{"role": ..., "content": ...}}: give its '
                "field with ?field=NAME"
            )
        role = turn[keys[0][0]].lower()
        out.append({"role": _ROLES.get(role, role), "content": (content or "").strip().removeprefix(BOM)})
    return out


def _decode(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
