"""Thinking: the draft that some models write before their answer, and the marks around it."""

import json
import re

PAIRS = (  # what opens a draft, and what closes it
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
)
# Harmony has a channel for each kind of text. The text is in the channel `final`.
_CLOSED = re.compile(
    "|".join([*(re.escape(end) for _, end in PAIRS), r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?"
              r"<\|message\|>"]), re.IGNORECASE)
_OPENED = re.compile(
    "|".join([*(re.escape(begin) for begin, _ in PAIRS), r"<\|channel\|>\s*(?:analysis|commentary)\b"]),
    re.IGNORECASE)
# A server that drops special tokens leaves the names of harmony's channels, without a space after them.
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z\"'])")
_SWITCHES = ("enable_thinking", "thinking")  # variables of published chat templates


def split(said: str) -> tuple[str, bool]:
    """Return (what a model said outside its draft, whether a draft is not closed)."""
    if _BARE_CHANNEL.match(said):
        _, final, said = said.rpartition("assistantfinal")
        if not final:
            return "", True
    said = said[max((end.end() for end in _CLOSED.finditer(said)), default=0) :]
    begin = _OPENED.search(said)
    return (said[: begin.start()], True) if begin else (said, False)


def has_marks(text: str) -> bool:
    """Return whether a text has a mark of thinking."""
    return bool(_OPENED.search(text) or _CLOSED.search(text))


def switch_off(template: str) -> str:
    """Return a chat template that switches thinking off, if it has such a switch."""
    # A name within a tag, and neither a field of a message nor a string.
    found = [n for n in _SWITCHES if re.search(rf"{{[%{{][^}}]*(?<![.'\"\w]){n}\b", template)]
    off = "".join(f"{{% set {n} = false %}}" for n in found)
    return template if template.startswith(off) else off + template


def is_off(template: str) -> bool:
    """Return whether a chat template is one that `switch_off` has switched off."""
    return any(template.startswith(f"{{% set {n} = false %}}") for n in _SWITCHES)


def close(template: str, prompt: str) -> str:
    """Return a chat template that closes the draft which `prompt`, an example of it, opens at its end."""
    for begin, end in PAIRS:
        if found := re.search(rf"{re.escape(begin)}(\s*)\Z", prompt, re.IGNORECASE):
            end = f"\n{end}\n\n" if found[1] else end
            # A template's last line break is not rendered, and would be before more text.
            closing = f"{{{{ {json.dumps(end, ensure_ascii=False)} }}}}"
            return template.removesuffix("\n") + f"{{% if add_generation_prompt %}}{closing}{{% endif %}}"
    return template
