"""`nla export`: a bundle as a released AV and AR."""


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("export", help="a bundle as the release's directories av and ar")
    p.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    p.add_argument("--out", required=True, help="the directory in which av and ar are made")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    p.add_argument("--target", default="", help="where the target is now")
    p.add_argument("--schema", type=int, default=2, choices=(1, 2), help="generation of the sidecars")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax import bundle
    from nla_jax.interchange import import_pair

    av, ar = import_pair.export_pair(
        bundle.named(args.bundle), args.out, dtype=args.dtype, target=args.target, schema=args.schema
    )
    print(f"av: {av}\nar: {ar}")
