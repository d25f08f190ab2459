"""`nla pack`: write a bundle as a small directory."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "pack", "write a bundle as a small directory: a bfloat16 file, sidecar, card",
                   "nla pack --bundle runs/mine/bundle --out runs/mine/packed")
    flags.add_bundle(p, required=True)
    p.add_argument("--out", required=True, metavar="DIR",
                   help="the directory; a packed bundle in it is replaced")
    p.add_argument("--card", default="", metavar="FILE", help="your own Markdown for its README.md")
    p.add_argument("--made-by", default="", metavar="COMMAND", help="the training command, for the card")
    flags.add_store(p, about="training activations, whose statistics say how unusual a vector is")
    flags.add_target(p)
    p.set_defaults(work=_pack)


def _pack(args, rest) -> None:
    from nla_jax.interchange import pack
    from nla_jax.util import path_kinds, paths

    data = path_kinds.store_in(args.store) if args.store else ""
    directory = flags.find_bundle(args)
    out = pack.pack(directory, args.out, own_card=args.card, made_by=args.made_by, target=args.target,
                    data=data)
    total = sum(paths.size(p) for p in paths.files(out).values())
    print(f"packed: {out}, {total / 1e6:,.1f} MB")
