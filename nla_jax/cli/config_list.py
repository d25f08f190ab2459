"""`nla config list`: list the experiment files."""

import ast
import sys
from pathlib import Path

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.util import paths


def add(sub) -> None:
    """Add the command to the subparsers of `nla config`."""
    p = parser.add(sub, "list", "list the experiment files with their first lines", "nla config list")
    p.add_argument("directory", nargs="?", default="", metavar="DIR",
                   help="where they are; default: experiments/ here, else those that nla_jax ships")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(work=_list)


def find_experiments(directory: str) -> list[Path]:
    """Return the experiment files of a directory. Raises UserError if it has none."""
    from nla_jax.pipeline import experiment_files

    near = "experiments" if Path("experiments").is_dir() else experiment_files.shipped()
    place = paths.path(directory or near)
    found = sorted(p for p in place.glob("*.py") if "def get_config(" in p.read_text("utf-8", "replace"))
    if not found:
        raise UserError(f"{place}: no experiment files here (a .py file with a function get_config)")
    return found


def _about(path: Path) -> str:
    try:
        text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    except (SyntaxError, ValueError) as e:
        return f"cannot be read ({e})"
    return " ".join((text or "").split("\n\n")[0].split())


def _list(args, rest) -> None:
    found = {str(p): _about(p) for p in find_experiments(args.directory)}
    if args.json:
        flags.put_json("-", found)
        return
    flags.print_pairs(list(found.items()))
    print("`nla config print FILE` shows the settings of one", file=sys.stderr)
