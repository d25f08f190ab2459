"""`nla report`: the command lines of what people look at."""

import shlex


def add(sub) -> None:
    """Add the commands to the parser of `nla`."""
    rp = sub.add_parser("report", help="a run, or several compared, as one HTML file that needs no network")
    rp.add_argument("run", nargs="+", metavar="RUN", help="a --workdir of `nla train`, finished or not")
    rp.add_argument("--out", required=True, help="the .html file")
    rp.add_argument(
        "--evaluation", nargs="+", default=[], metavar="JSON",
        help="what `nla evaluate --json` wrote about each run, in their order; default: RUN/evaluation.json",
    )  # fmt: skip
    rp.set_defaults(work=_report)


def _report(args, rest) -> None:
    from nla_jax.view import page

    argv = ["nla", "report", *map(str, args.run)]
    argv += ["--evaluation", *args.evaluation] if args.evaluation else []
    print(page.write(args.run, args.out, args.evaluation, shlex.join([*argv, "--out", str(args.out)])))
