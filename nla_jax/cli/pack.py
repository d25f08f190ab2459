"""`nla pack`: a bundle as a small directory."""


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("pack", help="a bundle as a small directory: one file in bfloat16, sidecar, card")
    p.add_argument("--bundle", required=True)
    p.add_argument("--out", required=True, help="the directory; a packed bundle that is there is replaced")
    p.add_argument("--card", default="", metavar="FILE", help="your own Markdown for its README.md")
    p.add_argument("--made-by", default="", metavar="COMMAND", help="what trained it, for the card")
    p.add_argument("--target", default="", help="where the target is now")
    p.set_defaults(work=_pack)


def _pack(args, rest) -> None:
    from nla_jax.interchange import pack
    from nla_jax.util import paths

    out = pack.pack(
        args.bundle, args.out, own_card=args.card, made_by=args.made_by, target=args.target
    )
    total = sum(paths.size(p) for p in paths.files(out).values())
    print(f"packed: {out}, {total / 1e6:,.1f} MB")
