"""The chat template of a tokenizer: prompts for an answer, without the date of today and without drafts."""

import contextlib

from nla_jax.errors import UserError, one_line
from nla_jax.lm import thinking

# Chat templates that print today's date get this one, because a prompt must not depend on the day.
CLOCK = {
    "c": "%a %b %e %T %Y", "x": "%D", "X": "%T",  # those that others make up come first
    "F": "%Y-%m-%d", "D": "%m/%d/%y", "T": "%H:%M:%S", "R": "%H:%M",
    "Y": "2025", "y": "25", "m": "01", "-m": "1", "B": "January", "b": "Jan", "h": "Jan",
    "d": "01", "-d": "1", "e": " 1", "j": "001", "A": "Wednesday", "a": "Wed", "w": "3", "u": "3",
    "H": "00", "-H": "0", "I": "12", "-I": "12", "p": "AM", "M": "00", "-M": "0", "S": "00", "-S": "0",
    "f": "000000", "Z": "", "z": "",
}


def chat_ids(tok, user_message: str) -> list[int]:
    """Return the ids of one user turn plus the opening of the assistant's turn.

    Rendering and tokenisation are one step, because tokenising the rendered text with special tokens would
    add a second BOS. Raises UserError if the tokenizer has no chat template, or if the template fails.
    """
    if not tok.chat_template:
        raise UserError(
            "this tokenizer has no chat template: use an instruction-tuned model, or give a template "
            "in config chat_template"
        )
    turns = [{"role": "user", "content": user_message}]
    try:
        return tok.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False,
            chat_template=chat_template(tok),
        )
    except Exception as err:  # a template is code, which may raise any class
        raise template_fault(err) from err


def template_fault(err: Exception) -> UserError:
    """Return the error for a chat template that fails on every conversation."""
    line = f"line {err.lineno}: " if getattr(err, "lineno", None) else ""
    return UserError(
        f"the target's chat template fails ({type(err).__name__}: {line}{one_line(err)}); correct it in the "
        "model's directory, or give a template in config chat_template"
    )


def chat_template(tok) -> str:
    """Return the chat template of a tokenizer that has one, with the date of `CLOCK` for today's."""
    template = tok.get_chat_template()
    if "strftime_now" not in template:
        return template
    # transformers passes no functions to a template, so a macro in front of it hides theirs.
    replaced = "".join(f"|replace('%{k}', '{v}')" for k, v in CLOCK.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro +%}}{template}"


def stop_thinking(tok) -> None:
    """Change the chat template so that the assistant's turn begins with the answer, not with a draft.

    A template with a switch for thinking is switched off. If the prompt still ends in an open draft, it is
    closed. A template that fails is left as it is, because `chat_ids` says why.
    """
    if not isinstance(tok.chat_template, str):
        return
    tok.chat_template = thinking.switch_off(tok.chat_template)
    turns = [{"role": "user", "content": "a"}]
    with contextlib.suppress(Exception):
        prompt = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        tok.chat_template = thinking.close(tok.chat_template, prompt)


def thinks(tok) -> bool:
    """Return whether the chat template or the vocabulary has marks of thinking."""
    names = " ".join(t.content for t in tok.added_tokens_decoder.values())
    return thinking.has_marks(f"{tok.chat_template or ''} {names}")
