"""`nla export`: export a bundle as an AV and AR of the release."""


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("export", help="export a bundle as the release's directories av and ar")
    p.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    p.add_argument("--out", required=True, help="the directory for av and ar")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    p.add_argument("--target", default="", help="location of the target; default: as in the sidecar")
    p.add_argument("--schema", type=int, default=2, choices=(1, 2), help="schema version of the sidecars")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax import bundle
    from nla_jax.interchange import import_pair

    av, ar = import_pair.export_pair(
        bundle.bundle_or_shipped(args.bundle),
        args.out,
        dtype=args.dtype,
        target=args.target,
        schema=args.schema,
    )
    print(f"av: {av}\nar: {ar}")
