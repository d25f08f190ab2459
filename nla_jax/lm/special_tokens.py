"""Special tokens that a text spells: a tokenizer would read them as tokens, and not as text."""

import re

from nla_jax.errors import UserError

TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>")


def special_tokens(tok) -> dict[str, int]:
    """Return the ids of the special tokens, and of other ends of a turn, by their spelling."""
    added = {t.content: i for i, t in tok.added_tokens_decoder.items() if t.special or t.content in TURN_ENDS}
    return added | dict(zip(tok.all_special_tokens, tok.all_special_ids, strict=True))


def special_pattern(tok) -> re.Pattern:
    """Return a pattern that finds the `special_tokens` that a text spells."""
    names = sorted(special_tokens(tok), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def break_special(tok, text: str) -> str:
    """Return a text with a space after the first character of each special token that it spells."""
    return special_pattern(tok).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def check_text(tok, text: str, how: str) -> None:
    """Raise UserError if a text spells a special token, which the target would not read as text.

    how: what a user can do whose text is a chat.
    """
    if found := special_pattern(tok).search(text):
        raise UserError(
            f"the text spells {found[0]!r}, a special token of the target, which is not read as text: change "
            f"its spelling, or {how}"
        )
