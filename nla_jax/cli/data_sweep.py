"""`nla data sweep`: short warm starts over layers and scales, as a table, JSON, Markdown or a plot."""

import json
from pathlib import Path

from nla_jax.cli import config_arguments
from nla_jax.errors import UserError
from nla_jax.util import paths, writable


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = sub.add_parser("sweep", help="train short warm starts over layers and scales, to choose K and alpha")
    config_arguments.add(p)
    p.add_argument("--layers", required=True, metavar="K,K,…", help="blocks of the target, from 0")
    p.add_argument("--scales", default="0.1,0.3,1,3", metavar="X,X,…",
                   help="alphas as multiples of the 75th percentile of a layer's norms")
    p.add_argument("--alphas", default="", metavar="A,A,…", help="further alphas, unscaled, at every layer")
    p.add_argument("--json", default="", metavar="FILE", help="also write the figures to this file")
    p.add_argument("--markdown", default="", metavar="FILE", help="also write the table to this file")
    p.add_argument("--png", default="", metavar="FILE", help="also plot the figures (needs the extra report)")
    p.set_defaults(work=_sweep, takes_config=True)


def _numbers(flag: str, text: str, kind) -> list:
    try:
        return [kind(x) for x in text.split(",") if x]
    except ValueError:
        raise UserError(f"{flag} {text}: give numbers with commas between them, such as 5,10,15") from None


def _command(args, rest) -> str:
    flags = ("config", "workdir", "layers", "scales", "alphas", "markdown", "png")
    given = [f"--{f} {getattr(args, f)}" for f in flags if getattr(args, f)]
    return " ".join(["nla data sweep", *given, *rest])


def _sweep(args, rest) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nla_jax.pipeline import experiment_files, sweep
    from nla_jax.view import sweep_report

    writable.check_outputs(args.json, args.markdown, args.png)
    layers = _numbers("--layers", args.layers, int)
    scales, alphas = _numbers("--scales", args.scales, float), _numbers("--alphas", args.alphas, float)
    config = experiment_files.load_config(args.config, rest)
    found = sweep.run(config, args.workdir, layers, scales, alphas)
    header, *body = sweep_report.table(found)
    table = Table(title=escape(f"which layer, which alpha: {args.workdir}"))
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i else "left")
    for line in body:
        table.add_row(*map(escape, line))
    Console().print(table)
    print(sweep_report.about(found))
    if args.json:
        paths.write(paths.path(args.json), json.dumps(found, indent=1))
    if args.markdown:
        page = sweep_report.markdown(found, _command(args, rest), Path(args.png).name if args.png else "")
        paths.write(paths.path(args.markdown), "\n".join(page))
    if args.png:
        with paths.upload_after(args.png) as png:
            sweep_report.plot(found, png)
