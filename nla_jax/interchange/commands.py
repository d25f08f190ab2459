"""`nla import` and `nla export`: their arguments and what they do."""


def add(sub) -> None:
    """Add both commands to the subparsers of `nla`."""
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
    ex.add_argument("--bundle", required=True)
    ex.add_argument("--out", required=True, help="the directory in which av and ar are made")
    ex.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    ex.add_argument("--target", default="", help="where the target is now")
    ex.add_argument("--schema", type=int, default=2, choices=(1, 2), help="generation of the sidecars")
    ex.set_defaults(work=_export)


def _import(args, rest) -> None:
    from nla_jax.interchange import models

    out = models.import_pair(
        args.av, args.ar, args.out, target=args.target, mean_from=args.mean_from, dtype=args.dtype,
        max_new=args.max_new,
    )  # fmt: skip
    print(f"bundle: {out}")


def _export(args, rest) -> None:
    from nla_jax.interchange import models

    av, ar = models.export_pair(
        args.bundle, args.out, dtype=args.dtype, target=args.target, schema=args.schema
    )
    print(f"av: {av}\nar: {ar}")
