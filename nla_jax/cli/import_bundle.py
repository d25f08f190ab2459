"""`nla import`: import a released AV and AR as a bundle."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "import", "import a released AV and AR, or PEFT adapters of them, as a bundle",
                   "nla import --av AV_DIR --ar AR_DIR --out runs/released/bundle")
    p.add_argument("--av", required=True, metavar="DIR",
                   help="the verbalizer: a directory or Hub id, with a sidecar")
    p.add_argument("--ar", required=True, metavar="DIR",
                   help="the reconstructor: a directory or Hub id, with a sidecar")
    p.add_argument("--out", required=True, metavar="DIR", help="the bundle's directory")
    p.add_argument("--target", default="", metavar="URI",
                   help="the model that they explain; default: as in AV's sidecar")
    p.add_argument("--mean-from", default="", metavar="DIR",
                   help="a store of its activations, or a run that has one, for the mean direction")
    p.add_argument("--dtype", default="", choices=("float32", "bfloat16"),
                   help="dtype of matrix products; default: as exported, or bfloat16")
    p.add_argument("--max-new", type=flags.COUNT, default=None, metavar="N",
                   help="maximum number of tokens of an answer; default: as exported, or 150")
    p.add_argument("--injection", default="", choices=("replace", "norm_matched"),
                   help="how h enters an AV that is a PEFT adapter, if its sidecar does not say")
    p.set_defaults(work=_import)


def _import(args, rest) -> None:
    from nla_jax.interchange import import_pair
    from nla_jax.util import path_kinds

    out = import_pair.import_pair(
        args.av, args.ar, args.out, target=args.target, dtype=args.dtype, max_new=args.max_new or 0,
        injection=args.injection,
        mean_from=args.mean_from and path_kinds.store_in(args.mean_from),
    )
    print(f"bundle: {out}")
