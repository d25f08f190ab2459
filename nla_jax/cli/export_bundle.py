"""`nla export`: export a bundle as an AV and AR of the release."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "export", "export a bundle as the release's directories av and ar",
                   "nla export --bundle runs/quickstart/bundle --out runs/quickstart/official")
    flags.add_bundle(p)
    p.add_argument("--out", required=True, metavar="DIR", help="the directory for av and ar")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    p.add_argument("--adapters", action="store_true",
                   help="export AV and AR as PEFT adapters of the target, and not as whole models")
    p.add_argument("--base", default="", metavar="NAME",
                   help="with --adapters, the target's name in adapter_config.json, such as a Hub id")
    flags.add_target(p)
    p.add_argument("--schema", type=flags.COUNT, default=2, choices=(1, 2),
                   help="schema version of the sidecars")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax import bundle
    from nla_jax.errors import UserError
    from nla_jax.interchange import export_pair, peft_write

    if args.base and not args.adapters:
        raise UserError("--base is the target's name in an adapter; give --adapters too")
    directory = bundle.bundle_or_shipped(args.bundle)
    if args.adapters:
        av, ar = peft_write.export_adapters(directory, args.out, target=args.target, base=args.base,
                                            schema=args.schema)
    else:
        av, ar = export_pair.export_pair(directory, args.out, dtype=args.dtype, target=args.target,
                                         schema=args.schema)
    print(f"av: {av}\nar: {ar}")
