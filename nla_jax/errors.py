"""UserError, the exception whose message is for the user, and functions that shorten values for messages."""

import contextlib
import errno
import logging
import os
import reprlib
import sys
import threading
from collections.abc import Iterator


class UserError(Exception):
    """An error that the caller can fix. Its message is one line: what was wrong, where, and what to do.

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
    """Return the exception of the chain that reports a full disk, or None."""
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
    """Return the repr of a value from a file, of at most about 100 characters, for an error message."""
    # reprlib bounds the depth too, because YAML aliases can make a small file expand without end.
    said = _SHORT.repr(value)
    return said if len(said) <= 100 else said[:100] + "..."


def joined(faults: list[str], most: int = 20) -> str:
    """Join faults by "; ": the first `most`, then "and N more"."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join(faults[:most] + more)


def one_line(err: Exception | str) -> str:
    """Return the message of an exception, or a name from a file, as one line of at most 200 characters."""
    return " ".join(str(err).split())[:200] or type(err).__name__
