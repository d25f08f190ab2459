"""One of several functions by its name, or a function of the user's own as "module:function"."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nla_jax.errors import UserError


def choose(table: Mapping[str, Callable], name: str, what: str) -> Callable:
    """The function that `name` means: an entry of `table`, or "module:function" of a module that Python
    finds, in the working directory too.

    Args:
      what: the thing that is chosen, for messages ("config rl.reward").

    Raises UserError for an unknown name, or for a module or function that is not there.
    """
    if name in table:
        return table[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(map(repr, table))
        raise UserError(f"{what}={name!r}: must be one of {known}, or your own as 'module:function'")
    try:
        found = getattr(_module(module), function, None)
    except ImportError as e:
        raise UserError(f"{what}={name!r}: cannot import {module!r} ({e}); is it in this directory?") from e
    if not callable(found):
        raise UserError(f"{what}={name!r}: module {module!r} has no function {function!r}")
    return found


def _module(name: str):
    here = str(Path.cwd())
    if here not in sys.path:  # the `nla` command does not have it there
        sys.path.append(here)
    importlib.invalidate_caches()
    return importlib.import_module(name)
