"""Flags that several commands have, and what commands print or write for them."""

import json
from collections.abc import Iterable, Sequence

from nla_jax.util import paths
from nla_jax.util.number_types import real, several, whole
from nla_jax.util.terminal_text import console, replace_unprintable

COUNT = whole(1)


def add_seed(p, about: str) -> None:
    """Add --seed."""
    p.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help=about)


def add_temperature(p, default: float | None, about: str = "of sampling; 0 is greedy") -> None:
    """Add --temperature."""
    p.add_argument("--temperature", type=real(0), default=default, metavar="T", help=about)


def add_file(p, kind: str, about: str) -> None:
    """Add a flag such as --svg for a file that is written in addition."""
    p.add_argument(f"--{kind}", default="", metavar="FILE", help=f"also write {about} to this file")


def add_bundle(p, required: bool = False) -> None:
    """Add --bundle and --revision. `find_bundle` reads them."""
    p.add_argument("--bundle", default="", metavar="DIR", required=required,
                   help="a bundle, a run that has one, or a released pair: AV, AR, the directory of both, or "
                   "AV,AR; each a directory or Hub id" + ("" if required else
                                                          "; default: the bundle that nla_jax ships"))
    p.add_argument("--revision", default="", metavar="NAME", help="of Hub ids: a branch, tag or commit")


def find_bundle(args, where: str | None = None):
    """Return the directory of the bundle of --bundle, --revision and --target, or of `where`."""
    from nla_jax.interchange import find_bundle

    where = args.bundle if where is None else where
    return find_bundle.find(where, target=getattr(args, "target", ""), revision=args.revision)


def add_dtype(p) -> None:
    """Add --dtype."""
    p.add_argument("--dtype", default="", choices=("float32", "bfloat16", "int8"),
                   help="of the weights; default: as in the bundle; bfloat16 for a pair")


def add_target(p) -> None:
    """Add --target, for commands that open a bundle."""
    p.add_argument("--target", default="", metavar="URI",
                   help="location of the target; default: as in the bundle's sidecar")


def add_json(p) -> None:
    """Add --json: without FILE it means JSON on stdout in place of the text."""
    p.add_argument("--json", nargs="?", const="-", default="", metavar="FILE",
                   help="print JSON instead of text, or with FILE also write it there (default: text only)")


def put_json(where: str, value) -> bool:
    """Write a value as --json says. Return whether it was printed, which replaces the text."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if where == "-":
        print(text)
    elif where:
        paths.write(paths.path(where), text)
    return where == "-"


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of figures, whose first column has names."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    for i, name in enumerate(head):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def print_pairs(pairs: list[tuple[str, str]]) -> None:
    """Print names and texts in two columns. A text may be from a file that somebody else wrote."""
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        print(replace_unprintable(f"{name:{width}}  {text}".rstrip()))


def add_wandb(p, about: str) -> None:
    """Add --wandb: without a value it means the project "nla_jax"."""
    p.add_argument("--wandb", nargs="?", const="nla_jax", default="", metavar="PROJECT",
                   help=f"{about} in Weights & Biases, in PROJECT or ENTITY/PROJECT, by itself in nla_jax "
                        "(default: no tracking; needs the extra wandb)")


def add_price(p) -> None:
    """Add --price."""
    p.add_argument("--price", type=several(real(0), 2), default=None, metavar="READ,WRITTEN",
                   help="dollars per million tokens read and written, for the estimate and the report")


def add_store(p, required: bool = False, about: str = "") -> None:
    """Add --store."""
    p.add_argument("--store", default="", metavar="DIR", required=required,
                   help=about or "a store of activations, or a run that has one")
