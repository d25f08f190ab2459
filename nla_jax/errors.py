"""The one exception that is meant for people rather than for programs."""

import contextlib
import errno
import logging
import os
import reprlib
import sys
import threading
from collections.abc import Iterator


class UserError(Exception):
    """Something the caller can fix: one line that says what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def room(where="") -> Iterator[None]:
    """Inside, a disk that is full is a UserError.

    Writers of other packages say it in exceptions of their own, of which only the words are sure, and in
    threads, whose tracebacks are kept back here; what reaches us may be no more than what went wrong as they
    tidied up.
    """
    heard: list[BaseException] = []

    def is_it(e) -> bool:
        found = _full(e)
        heard.extend([found] if found else [])
        return found is not None

    def thread_died(args):
        if not (is_it(args.exc_value) or heard):
            hook(args)

    def callback_died(args):
        if not (is_it(args.exc_value) or heard):
            other(args)

    hook, threading.excepthook = threading.excepthook, thread_died
    other, sys.unraisablehook = sys.unraisablehook, callback_died
    log, quiet = logging.getLogger("absl"), lambda record: not is_it((record.exc_info or (None, None))[1])
    log.addFilter(quiet)
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not (is_it(e) or heard):
            raise
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):  # it tidies up, and dies of that
                with contextlib.suppress(Exception):
                    thread.join(10)
        place = getattr(heard[0], "filename", None) or where
        raise UserError(
            f"{place}{': ' if place else ''}no room left on the disk, or in a quota; what was whole before "
            "still is: make room, and the same command goes on from there"
        ) from e
    finally:
        threading.excepthook, sys.unraisablehook = hook, other
        log.removeFilter(quiet)


def _full(e: BaseException | None) -> BaseException | None:
    """The exception in a chain that says that a disk is full."""
    seen = []
    while e is not None and e not in seen:
        if (isinstance(e, OSError) and e.errno in _FULL) or any(os.strerror(n) in str(e) for n in _FULL):
            return e
        seen.append(e)
        e = e.__cause__ or e.__context__
    return None


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


def one_line(err: Exception | str) -> str:
    """The message of an exception, or a name in a file, short and without line breaks."""
    return " ".join(str(err).split())[:200] or type(err).__name__
