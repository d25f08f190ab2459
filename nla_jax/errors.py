"""The one exception that is meant for people rather than for programs."""

import reprlib


class UserError(Exception):
    """Something the caller can fix: one line that says what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 100, 100, 100


def shown(value) -> str:
    """A value out of a file as an error shows it: short, without line breaks."""
    # Bounded before it is written: a few lines of YAML with aliases say a value that has no end.
    said = _SHORT.repr(value)
    return said if len(said) <= 100 else said[:100] + "..."


def joined(faults: list[str], most: int = 20) -> str:
    """All of a few faults; of many the first ones, and how many more there are."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join(faults[:most] + more)
