"""`nla pack`: write a bundle as a small directory."""


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("pack", help="write a bundle as a small directory: a bfloat16 file, sidecar, card")
    p.add_argument("--bundle", required=True)
    p.add_argument("--out", required=True, help="the directory; a packed bundle in it is replaced")
    p.add_argument("--card", default="", metavar="FILE", help="your own Markdown for its README.md")
    p.add_argument("--made-by", default="", metavar="COMMAND", help="the training command, for the card")
    p.add_argument("--target", default="", help="location of the target; default: as in the sidecar")
    p.set_defaults(work=_pack)


def _pack(args, rest) -> None:
    from nla_jax.interchange import pack
    from nla_jax.util import paths

    out = pack.pack(
        args.bundle, args.out, own_card=args.card, made_by=args.made_by, target=args.target
    )
    total = sum(paths.size(p) for p in paths.files(out).values())
    print(f"packed: {out}, {total / 1e6:,.1f} MB")
