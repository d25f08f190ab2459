"""`nla export`: export a bundle as an AV and AR of the release, or its explorer as a folder."""

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.util.number_types import whole


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "export", "export a bundle as the release's av and ar, or its explorer as a folder",
                   "nla export --bundle runs/quickstart/bundle --out runs/quickstart/official")
    flags.add_bundle(p)
    p.add_argument("--out", default="", metavar="DIR", help="the directory for av and ar")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    p.add_argument("--adapters", action="store_true",
                   help="export AV and AR as PEFT adapters of the target, and not as whole models")
    p.add_argument("--base", default="", metavar="NAME",
                   help="with --adapters, the target's name in adapter_config.json, such as a Hub id")
    flags.add_target(p)
    p.add_argument("--schema", type=flags.COUNT, default=2, choices=(1, 2),
                   help="schema version of the sidecars")
    p.add_argument("--static", default="", metavar="DIR",
                   help="instead of --out: the explorer as a folder for any web host, without a model")
    p.add_argument("--text", action="append", default=[],
                   help="of --static: a text to explain; may be given several times")
    p.add_argument("--file", default="", metavar="FILE",
                   help="of --static: texts, one a line, or .jsonl with text or messages")
    p.add_argument("--documents", type=whole(0), default=4, metavar="N",
                   help="of --static: held-out documents of the bundle's run to explain")
    p.add_argument("--samples", type=whole(0), default=0, metavar="N",
                   help="of --static: explanations of each token at temperature 1, besides the greedy one")
    p.add_argument("--compare", default="", metavar="DIR", help="of --static: a second bundle beside it")
    p.add_argument("--max-tokens", type=flags.COUNT, default=256, metavar="N",
                   help="of --static: maximum number of tokens of a text; held-out ones are cut at 64")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    if bool(args.out) == bool(args.static):
        raise UserError("give --out DIR for the release's av and ar, or --static DIR for the explorer")
    if args.static:
        return _export_static(args)
    if args.text or args.file or args.compare:
        raise UserError("--text, --file and --compare belong to --static")
    from nla_jax.interchange import export_pair, peft_write

    if args.base and not args.adapters:
        raise UserError("--base is the target's name in an adapter; give --adapters too")
    directory = flags.find_bundle(args)
    if args.adapters:
        av, ar = peft_write.export_adapters(directory, args.out, target=args.target, base=args.base,
                                            schema=args.schema)
    else:
        av, ar = export_pair.export_pair(directory, args.out, dtype=args.dtype, target=args.target,
                                         schema=args.schema)
    print(f"av: {av}\nar: {ar}")


def _export_static(args) -> None:
    from nla_jax.util import paths
    from nla_jax.view.explorer import bundles, engine, static_site

    static_site.check_place(args.static)
    given = static_site.read_inputs(args.text, args.file)
    directory = flags.find_bundle(args)
    compare = args.compare and flags.find_bundle(args, args.compare)
    heldout = static_site.heldout_texts(directory, args.documents)
    if not given and not heldout:
        raise UserError("there is no text to explain: give --text or --file; held-out texts need the store "
                        "of the bundle's run beside it")
    sides = bundles.open_sides(directory, compare, args.target or None, announce=True)
    opened = engine.Engine(sides, args.max_tokens)
    short = [static_site.shorten(opened, text, min(args.max_tokens, 64)) for text in heldout]
    page = static_site.write(opened, [*given, *short], args.static, args.samples)
    total = sum(paths.size(p) for p in paths.files(page.parent).values())
    print(f"page: {page}, {total / 1e6:,.1f} MB; open it, or copy the folder to a web host")
