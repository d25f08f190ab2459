"""`nla info`: what a path is, and its figures, sizes, versions and fingerprints."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "info", "say what a bundle, run, store, model or pair is, without loading weights",
                   "nla info runs/quickstart/bundle")
    p.add_argument("path", nargs="?", default="", metavar="PATH",
                   help="a directory, or a .gguf, .parquet or .jsonl file; default: the shipped bundle")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(work=_info)


def _info(args, rest) -> None:
    from nla_jax.interchange import find_bundle
    from nla_jax.view import path_info

    facts = path_info.describe(args.path or find_bundle.find(""))
    if args.json:
        flags.put_json("-", facts)
        return
    flags.print_pairs(path_info.as_rows(facts))
