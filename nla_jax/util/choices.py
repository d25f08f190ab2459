"""Look up a function by name in a table, or import the user's own function as "module:function"."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nla_jax.errors import UserError


def choose(table: Mapping[str, Callable], name: str, what: str) -> Callable:
    """Return the entry `name` of `table`, or the function "module:function".

    Python imports the module from `sys.path` or from the working directory.

    Args:
      what: the name of the setting, for error messages ("config rl.reward").

    Raises UserError when the name is unknown, or when the module or the function does not exist.
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
    if here not in sys.path:  # a console script such as `nla` does not have the working directory on its path
        sys.path.append(here)
    importlib.invalidate_caches()
    return importlib.import_module(name)
