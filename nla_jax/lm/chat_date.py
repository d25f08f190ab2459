"""The date of chat templates that print today's: always one, because prompts must not depend on the day."""

CLOCK = {
    "c": "%a %b %e %T %Y", "x": "%D", "X": "%T",  # those that others make up come first
    "F": "%Y-%m-%d", "D": "%m/%d/%y", "T": "%H:%M:%S", "R": "%H:%M",
    "Y": "2025", "y": "25", "m": "01", "-m": "1", "B": "January", "b": "Jan", "h": "Jan",
    "d": "01", "-d": "1", "e": " 1", "j": "001", "A": "Wednesday", "a": "Wed", "w": "3", "u": "3",
    "H": "00", "-H": "0", "I": "12", "-I": "12", "p": "AM", "M": "00", "-M": "0", "S": "00", "-S": "0",
    "f": "000000", "Z": "", "z": "",
}


def fix(template: str) -> str:
    """Return a chat template that prints 1 January 2025 for today's date."""
    if "strftime_now" not in template:
        return template
    # transformers passes no functions to a template, so a macro in front of it hides theirs.
    replaced = "".join(f"|replace('%{k}', '{v}')" for k, v in CLOCK.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro +%}}{template}"
