"""`nla data stats`: statistics of a store, as a table, JSON, Markdown or a plot."""

import json
from pathlib import Path

from nla_jax.util import paths, writable


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = sub.add_parser("stats", help="show norms, variance, components, lengths and duplicates of a store")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", default="", help="a run, whose data/ is the store")
    where.add_argument("--store", default="", metavar="DIR")
    p.add_argument("--splits", default="", help="such as warm,rl; default: all")
    p.add_argument("--json", default="", metavar="FILE", help="also write the figures to this file")
    p.add_argument("--markdown", default="", metavar="FILE", help="also write the table to this file")
    p.add_argument("--png", default="", metavar="FILE", help="also plot the figures (needs the extra report)")
    p.set_defaults(work=_stats)


def _command(args) -> str:
    flags = ("workdir", "store", "splits", "markdown", "png")
    return " ".join(["nla data stats", *(f"--{f} {getattr(args, f)}" for f in flags if getattr(args, f))])


def _stats(args, rest) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nla_jax.data import document_choice, stats, store
    from nla_jax.view import stats_report

    writable.check_outputs(args.json, args.markdown, args.png)
    directory = paths.path(args.store) if args.store else paths.path(args.workdir) / "data"
    meta = store.read_meta(directory)
    found = {
        split: stats.of_split(directory, split)
        for split in (args.splits.split(",") if args.splits else meta["splits"])
    }
    header, *body = stats.lines(found)
    table = Table(title=escape(f"activations in {directory}"))
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i else "left", no_wrap=True)
    for line in body:
        table.add_row(*map(escape, line))
    Console().print(table)
    if meta.get("corpus"):
        print(document_choice.log_line(meta["corpus"]))
    figures = {split: s.figures for split, s in found.items()}
    if args.json:
        whole = {"splits": figures, "corpus": meta.get("corpus", {}), "drops": meta.get("drops", {})}
        paths.write(paths.path(args.json), json.dumps(whole, indent=1, ensure_ascii=False))
    if args.markdown:
        page = ["# Activations", "", "Made by:", "", f"    {_command(args)}", "", *stats.markdown(found), ""]
        page += [document_choice.log_line(meta["corpus"]), ""] if meta.get("corpus") else []
        page += [f"![curves]({Path(args.png).name})", ""] if args.png else []
        paths.write(paths.path(args.markdown), "\n".join(page))
    if args.png:
        with paths.upload_after(args.png) as png:
            stats_report.plot(found, png)
