"""`nla results`: write finished runs as a Markdown page."""

from pathlib import Path

from nla_jax.cli import parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "results", "write a finished run, or a comparison of several, as a Markdown page",
                   "nla results runs/quickstart --out page.md")
    p.add_argument("run", nargs="+", metavar="RUN", help="a --workdir of `nla train`, finished")
    p.add_argument("--out", required=True, metavar="FILE",
                   help="the .md file; for one run a .png with the same name too")
    p.add_argument("--made-by", default="", metavar="COMMAND",
                   help="the training command, for the page; default: a guess from the name of RUN")
    p.add_argument("--figures", default="", metavar="NAMES",
                   help="for several runs: the figures in the columns, separated by commas (default: "
                        "those of most interest; others need eval.probes)")
    p.set_defaults(work=_results)


def _results(args, rest) -> None:
    from nla_jax.view import compare, markdown_report

    if len(args.run) > 1:
        names = [n for n in args.figures.split(",") if n]
        print(compare.write(args.run, args.out, args.made_by, names))
        return
    workdir = args.run[0]
    made_by = args.made_by or f"nla train --config experiments/{Path(workdir).name}.py"
    print(markdown_report.write(workdir, args.out, made_by))
