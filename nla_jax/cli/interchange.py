"""`nla import`, `nla export` and `nla pack`: their arguments and what they do."""


def add(sub) -> None:
    """Add the commands to the subparsers of `nla`."""
    im = sub.add_parser("import", help="a released AV and AR as a bundle")
    im.add_argument("--av", required=True, help="the verbalizer: a directory or Hub id, with a sidecar")
    im.add_argument("--ar", required=True, help="the reconstructor, likewise")
    im.add_argument("--out", required=True, help="the bundle's directory")
    im.add_argument("--target", default="", help="the model that they explain; default: as AV's sidecar says")
    im.add_argument("--mean-from", default="", help="a store of its activations, for the mean direction")
    im.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="of matrix products")
    im.add_argument("--max-new", type=int, default=0, help="cap on an answer in tokens; default 150")
    im.set_defaults(work=_import)

    ex = sub.add_parser("export", help="a bundle as the release's directories av and ar")
    ex.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    ex.add_argument("--out", required=True, help="the directory in which av and ar are made")
    ex.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    ex.add_argument("--target", default="", help="where the target is now")
    ex.add_argument("--schema", type=int, default=2, choices=(1, 2), help="generation of the sidecars")
    ex.set_defaults(work=_export)

    pk = sub.add_parser("pack", help="a bundle as a small directory: one file in bfloat16, sidecar, card")
    pk.add_argument("--bundle", required=True)
    pk.add_argument("--out", required=True, help="the directory; a packed bundle that is there is replaced")
    pk.add_argument("--card", default="", metavar="FILE", help="your own Markdown for its README.md")
    pk.add_argument("--made-by", default="", metavar="COMMAND", help="what trained it, for the card")
    pk.add_argument("--target", default="", help="where the target is now")
    pk.set_defaults(work=_pack)


def _import(args, rest) -> None:
    from nla_jax.interchange import import_pair

    out = import_pair.import_pair(
        args.av, args.ar, args.out, target=args.target, mean_from=args.mean_from, dtype=args.dtype,
        max_new=args.max_new,
    )  # fmt: skip
    print(f"bundle: {out}")


def _export(args, rest) -> None:
    from nla_jax import bundle
    from nla_jax.interchange import import_pair

    av, ar = import_pair.export_pair(
        bundle.named(args.bundle), args.out, dtype=args.dtype, target=args.target, schema=args.schema
    )
    print(f"av: {av}\nar: {ar}")


def _pack(args, rest) -> None:
    from nla_jax.interchange import pack
    from nla_jax.util import paths

    out = pack.pack(
        args.bundle, args.out, own_card=args.card, made_by=args.made_by, target=args.target
    )
    total = sum(paths.size(p) for p in paths.files(out).values())
    print(f"packed: {out}, {total / 1e6:,.1f} MB")
