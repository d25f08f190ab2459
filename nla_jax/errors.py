"""UserError, the exception whose message is for the user, and functions that shorten values for messages."""

import difflib
import errno
import os
import reprlib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """An error that the caller can fix. Its message is one line: what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def run_main(main: Callable[[], int | None], name: str) -> None:
    """Run the function `main` of a module, and exit as the command line does.

    A UserError is printed as one line and gives status 2. Ctrl-C gives status 130.

    Args:
      main: returns the exit status, or None for 0.
      name: the word that a message begins with.
    """
    try:
        sys.exit(main())
    except UserError as e:
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


_NO_ROOM = ("no room left on the disk, or in a quota; what was whole before still is: make room, and the "
            "same command goes on from there")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = {
    errno.EROFS: "the file system is read-only: choose another directory, or mount it for writing",
    errno.EACCES: "permission denied: choose another directory, or change the permissions",
}


def disk_fault(e: BaseException | None) -> str | None:
    """Returns one line for an exception that a full or closed disk caused, None for any other.

    Orbax and ArrayRecord raise exceptions of their own for a full disk. Of these only the words are sure.
    """
    seen = []
    while e is not None and e not in seen:
        place = getattr(e, "filename", None)
        if getattr(e, "errno", None) in _FULL or any(os.strerror(n) in str(e) for n in _FULL):
            return f"{place or one_line(e)}: {_NO_ROOM}"
        if isinstance(e, OSError) and e.errno in _CLOSED and place:
            return f"{place}: {_CLOSED[e.errno]}"
        seen.append(e)
        e = e.__cause__ or e.__context__
    return None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 100, 100, 100


def short_repr(value) -> str:
    """Return the repr of a value from a file, of at most about 100 characters, for an error message."""
    # reprlib bounds the depth too, because YAML aliases can make a small file expand without end.
    said = _SHORT.repr(value)
    return said if len(said) <= 100 else said[:100] + "..."


def join_faults(faults: list[str], most: int = 20) -> str:
    """Join faults by "; ": the first `most`, then "and N more"."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join(faults[:most] + more)


def one_line(err: Exception | str) -> str:
    """Return the message of an exception, or a name from a file, as one line of at most 200 characters."""
    return " ".join(str(err).split())[:200] or type(err).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a misspelt word, or "" if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the nearest of the known names, or "" if none is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""
