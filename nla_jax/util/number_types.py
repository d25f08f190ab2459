"""Types of command-line flags: numbers in a range, and lists of them. NaN is in no range."""

import argparse
import math
from collections.abc import Callable


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number from `least` to `most` (None: no limit)."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
        return _in_range(text, value, least, most)

    return parse


def real(least: float, most: float | None = None, above: bool = False) -> Callable[[str], float]:
    """Return the type of a flag that takes a finite number from `least` to `most` (None: no limit).

    above: `least` itself is refused."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
        if above and value == least:
            raise argparse.ArgumentTypeError(f"{text}: must be above {least:g}")
        return _in_range(text, value, least, most)

    return parse


def several(kind: Callable[[str], float], n: int | None = None) -> Callable[[str], list]:
    """Return the type of a flag that takes numbers with commas between them; `n` of them, if given."""

    def parse(text: str) -> list:
        found = [kind(x) for x in text.split(",") if x.strip()]
        if not found or (n and len(found) != n):
            raise argparse.ArgumentTypeError(f"{text}: must be {n or 'some'} numbers, as in 3,15")
        return found

    return parse


def _in_range(text: str, value, least, most):
    if value < least or (most is not None and value > most):
        bound = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
        raise argparse.ArgumentTypeError(f"{text}: must be {bound}")
    return value
