"""Look up a function by name in a table, or import the user's own function as "module:function"."""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nla_jax.errors import UserError, did_you_mean
from nla_jax.util import paths


def choose(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Return the entry `name` of `table`, or the function "module:function".

    Python imports the module from `sys.path` or from the working directory.

    Args:
      what: the name of the setting, for error messages ("config rl.reward").

    Raises UserError when the name is unknown, or when the module or the function does not exist.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        known = ", ".join(map(repr, table))
        hint = did_you_mean(name, table)
        raise UserError(f"{what}={name!r}: must be one of {known}, or your own as 'module:function'{hint}")
    return find_function(name, what)


def find_function(name: str, what: str) -> Callable:
    """Import and return the function "module:function". Raises UserError as `choose`."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(f"{what}={name!r}: must be 'module:function'")
    try:
        found = getattr(_module(module), function, None)
    except ImportError as e:
        raise UserError(
            f"{what}={name!r}: cannot import {module!r} ({e}); start in the directory that holds it, or add "
            "that directory to PYTHONPATH"
        ) from e
    if not callable(found):
        raise UserError(f"{what}={name!r}: module {module!r} has no function {function!r}")
    return found


def refuse_code_beside(directory: str | Path, name: str) -> None:
    """Raises UserError where a directory's sidecar names "module:function" and the directory holds code that
    Python could import: a downloaded bundle must not bring code that runs."""
    suffixes = tuple(importlib.machinery.all_suffixes())
    code = [n for n in paths.files(paths.path(directory)) if n.endswith(suffixes)] if ":" in name else []
    if code:
        raise UserError(
            f"{directory} needs the code {name!r} and brings {code[0]} itself: read that file, and if you "
            "trust it move it into the directory that you work in"
        )


def _module(name: str):
    here = str(Path.cwd())
    if here not in sys.path:  # a console script such as `nla` does not have the working directory on its path
        sys.path.append(here)
    importlib.invalidate_caches()
    return importlib.import_module(name)
