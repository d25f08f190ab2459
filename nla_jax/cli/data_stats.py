"""`nla data stats`: statistics of a store, as a table, JSON, Markdown or a plot."""

from pathlib import Path

from nla_jax.cli import flags, parser
from nla_jax.util import path_kinds, paths, writable


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "stats", "show norms, variance, components, lengths and duplicates of a store",
                   "nla data stats --store runs/quickstart --png stats.png")
    flags.add_store(p, required=True)
    p.add_argument("--splits", default="", metavar="NAME,…", help="such as warm,rl; default: all")
    flags.add_json(p)
    flags.add_file(p, "markdown", "the table")
    flags.add_file(p, "png", "a plot (it needs the extra report)")
    p.set_defaults(work=_stats)


def _command(args) -> str:
    given = [f"--{f} {x}" for f in ("store", "splits", "markdown", "png") if (x := getattr(args, f))]
    return " ".join(["nla data stats", *given])


def _stats(args, rest) -> None:
    from nla_jax.data import document_choice, stats, store
    from nla_jax.view import stats_report

    writable.check_outputs(args.json, args.markdown, args.png)
    directory = paths.path(path_kinds.store_in(args.store))
    meta = store.read_meta(directory)
    found = {
        split: stats.of_split(directory, split)
        for split in (args.splits.split(",") if args.splits else meta["splits"])
    }
    figures = {split: s.figures for split, s in found.items()}
    whole = {"splits": figures, "corpus": meta.get("corpus", {}), "drops": meta.get("drops", {})}
    if not flags.put_json(args.json, whole):
        head, *rows = stats.lines(found)
        flags.print_table(f"activations in {directory}", head, rows)
        if meta.get("corpus"):
            print(document_choice.log_line(meta["corpus"]))
    if args.markdown:
        page = ["# Activations", "", "Made by:", "", f"    {_command(args)}", "", *stats.markdown(found), ""]
        page += [document_choice.log_line(meta["corpus"]), ""] if meta.get("corpus") else []
        page += [f"![curves]({Path(args.png).name})", ""] if args.png else []
        paths.write(paths.path(args.markdown), "\n".join(page))
    if args.png:
        with paths.upload_after(args.png) as png:
            stats_report.plot(found, png)
