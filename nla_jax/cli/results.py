"""`nla results`: write finished runs as a Markdown page."""

from pathlib import Path


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("results", help="write a finished run, or a comparison of several, as a Markdown page")
    p.add_argument("--workdir", required=True, nargs="+")
    p.add_argument("--out", required=True, help="the .md file; for one run a .png with the same name too")
    p.add_argument("--made-by", default="", help="the command that made the run")
    p.set_defaults(work=_results)


def _results(args, rest) -> None:
    from nla_jax.view import compare, markdown_report

    if len(args.workdir) > 1:
        print(compare.write(args.workdir, args.out, args.made_by))
        return
    workdir = args.workdir[0]
    made_by = args.made_by or f"nla train --config experiments/{Path(workdir).name}.py"
    print(markdown_report.write(workdir, args.out, made_by))
