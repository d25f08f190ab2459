"""`nla export`: export a bundle as an AV and AR of the release."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "export", "export a bundle as the release's directories av and ar",
                   "nla export --bundle runs/quickstart/bundle --out runs/quickstart/official")
    flags.add_bundle(p)
    p.add_argument("--out", required=True, metavar="DIR", help="the directory for av and ar")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    flags.add_target(p)
    p.add_argument("--schema", type=flags.COUNT, default=2, choices=(1, 2),
                   help="schema version of the sidecars")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax.interchange import import_pair

    av, ar = import_pair.export_pair(
        flags.find_bundle(args),
        args.out,
        dtype=args.dtype,
        target=args.target,
        schema=args.schema,
    )
    print(f"av: {av}\nar: {ar}")
