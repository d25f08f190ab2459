"""`nla trust`: fit the trust model of a bundle's claims, and measure it."""

from nla_jax.cli import flags, parser
from nla_jax.util import figures, path_kinds, paths, writable
from nla_jax.util.number_types import whole
from nla_jax.util.terminal_text import console


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "trust", "estimate how likely each claim of a bundle's explanations is true",
                   "nla trust --bundle runs/quickstart/bundle --splits heldout,ood")
    flags.add_bundle(p, required=True)
    flags.add_dtype(p)
    flags.add_store(p, about="the activations; default: those of the bundle's run, or a store in the cache")
    p.add_argument("--splits", default="heldout", metavar="NAME,…",
                   help="such as heldout,ood; half of heldout fits the model")
    p.add_argument("--rows", type=whole(0), default=0, metavar="N",
                   help="number of texts of each split, at most; default: all")
    flags.add_temperature(p, 1.0)
    flags.add_seed(p, "of sampling and of the halves")
    flags.add_target(p)
    flags.add_json(p)
    flags.add_file(p, "png", "a plot of calibration and of precision by coverage (it needs the extra report)")
    p.set_defaults(work=_trust)


def _trust(args, rest) -> None:
    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import bundle_trust
    from nla_jax.view import trust_report

    writable.check_outputs(args.json, args.png)
    if args.png:
        figures.require_matplotlib()
    _, found = bundle_trust.fit_bundle(
        flags.find_bundle(args), data=args.store and path_kinds.store_in(args.store),
        splits=args.splits.split(","), rows=args.rows, temperature=args.temperature, seed=args.seed,
        target=args.target or None, dtype=args.dtype,
    )
    if not flags.put_json(args.json, {split: m.as_json() for split, m in found.items()}):
        for split, m in found.items():
            title = f"{split}: trust in claims of {args.bundle}"
            console().print(figure_table.table({"value": m.figures}, title))
    if args.png:
        with paths.upload_after(args.png) as png:
            trust_report.plot({split: m.as_json() for split, m in found.items()}, png)
