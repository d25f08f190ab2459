"""`nla data sweep`: short warm starts over layers and scales, as a table, JSON, Markdown or a plot."""

from pathlib import Path

from nla_jax.cli import config_arguments, flags, parser
from nla_jax.util import paths, writable
from nla_jax.util.number_types import real, several, whole


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "sweep", "train short warm starts over layers and scales, to choose K and alpha",
                   "nla data sweep --config experiments/levers.py --workdir runs/sweep --layers 15,20")
    config_arguments.add(p)
    p.add_argument("--layers", required=True, type=several(whole(0)), metavar="K,K,…",
                   help="blocks of the target, from 0")
    positive = several(real(0, above=True))
    p.add_argument("--scales", type=positive, default="0.1,0.3,1,3", metavar="X,X,…",
                   help="alphas as multiples of the 75th percentile of a layer's norms")
    p.add_argument("--alphas", type=positive, default=[], metavar="A,A,…",
                   help="further alphas, unscaled, at every layer")
    flags.add_json(p)
    flags.add_file(p, "markdown", "the table")
    flags.add_file(p, "png", "a plot (it needs the extra report)")
    p.set_defaults(work=_sweep, takes_config=True)


def _command(args, rest) -> str:
    numbers = {f: ",".join(f"{x:g}" for x in getattr(args, f)) for f in ("layers", "scales", "alphas")}
    shown = {"config": args.config, "workdir": args.workdir, **numbers, "markdown": args.markdown,
             "png": args.png}
    given = [f"--{f} {x}" for f, x in shown.items() if x]
    return " ".join(["nla data sweep", *given, *rest])


def _sweep(args, rest) -> None:
    from nla_jax.pipeline import experiment_files, sweep
    from nla_jax.view import sweep_report

    writable.check_outputs(args.json, args.markdown, args.png)
    config = experiment_files.load_config(args.config, rest)
    found = sweep.run(config, args.workdir, args.layers, args.scales, args.alphas)
    if not flags.put_json(args.json, found):
        head, *rows = sweep_report.table(found)
        flags.print_table(f"which layer, which alpha: {args.workdir}", head, rows)
        print(sweep_report.about(found))
    if args.markdown:
        page = sweep_report.markdown(found, _command(args, rest), Path(args.png).name if args.png else "")
        paths.write(paths.path(args.markdown), "\n".join(page))
    if args.png:
        with paths.upload_after(args.png) as png:
            sweep_report.plot(found, png)
