"""`nla import`: import a released AV and AR as a bundle."""


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("import", help="import a released AV and AR as a bundle")
    p.add_argument("--av", required=True, help="the verbalizer: a directory or Hub id, with a sidecar")
    p.add_argument("--ar", required=True, help="the reconstructor: a directory or Hub id, with a sidecar")
    p.add_argument("--out", required=True, help="the bundle's directory")
    p.add_argument("--target", default="", help="the model that they explain; default: as in AV's sidecar")
    p.add_argument("--mean-from", default="", help="a store of its activations, for the mean direction")
    p.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="dtype of matrix products")
    p.add_argument("--max-new", type=int, default=0, help="cap on an answer in tokens; default 150")
    p.set_defaults(work=_import)


def _import(args, rest) -> None:
    from nla_jax.interchange import import_pair

    out = import_pair.import_pair(
        args.av, args.ar, args.out, target=args.target, mean_from=args.mean_from, dtype=args.dtype,
        max_new=args.max_new,
    )
    print(f"bundle: {out}")
