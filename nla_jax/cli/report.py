"""`nla report`: write runs as one HTML file."""

import shlex

from nla_jax.cli import parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "report", "write one or several runs as one HTML file that needs no network",
                   "nla report runs/quickstart --out report.html")
    p.add_argument("run", nargs="+", metavar="RUN", help="a --workdir of `nla train`, finished or not")
    p.add_argument("--out", required=True, metavar="FILE", help="the .html file")
    p.add_argument(
        "--evaluation", nargs="+", default=[], metavar="FILE",
        help="the file of `nla evaluate --json` for each run, in order; default: RUN/evaluation.json",
    )
    p.set_defaults(work=_report)


def _report(args, rest) -> None:
    from nla_jax.view import html_report

    argv = ["nla", "report", *map(str, args.run)]
    argv += ["--evaluation", *args.evaluation] if args.evaluation else []
    print(html_report.write(args.run, args.out, args.evaluation, shlex.join([*argv, "--out", str(args.out)])))
