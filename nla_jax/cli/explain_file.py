"""`nla explain --file` and `--activations`: explain many texts or activations into a file."""

from nla_jax.cli import flags
from nla_jax.errors import UserError
from nla_jax.util import utf8

BATCH = 64
FOR_ONE = {"tokens": "all", "json": "", "svg": ""}  # flags of a single text, and their defaults


def add_flags(p) -> None:
    """Add the flags to the parser of `nla explain`."""
    many = p.add_argument_group("many texts or activations", "docs/howto/batch.md has the output's columns")
    many.add_argument("--file", default="", metavar="FILE",
                      help="texts: .txt with one a line; .jsonl or .parquet with a column text or messages")
    many.add_argument("--activations", default="", metavar="FILE",
                      help="vectors [N, D]: .npy, .npz, .safetensors or .parquet")
    many.add_argument("--out", default="", metavar="FILE",
                      help="the output, .jsonl or .parquet; a stopped command is resumed")
    many.add_argument("--positions", default="", metavar="WHICH",
                      help="tokens of each text: last (the default), all, every:8, entropy:5, surprise:5")
    many.add_argument("--scale", default="mean", metavar="SCALE",
                      help="norm of the injected vectors: mean is that of training, a number a multiple of "
                      "it, raw goes by their own norms")
    many.add_argument("--scores", default="ar,frozen", metavar="NAMES",
                      help="readers that score the explanations: ar, frozen, or none")
    many.add_argument("--batch", type=flags.COUNT, default=BATCH, metavar="N",
                      help="rows that AV writes at once")
    many.add_argument("--max-new", type=flags.COUNT, default=0, metavar="N",
                      help="maximum number of tokens of an explanation; default: the bundle's")
    many.add_argument("--field", default="", metavar="NAME",
                      help="column of the texts or chats; default: text")
    many.add_argument("--key", default="", metavar="NAME",
                      help="array or column of the activations; default: the only one, or h")
    many.add_argument("--carry", default=None, metavar="NAMES",
                      help="columns of the input to keep in the output; default: all")
    many.add_argument("--skip-bad", action="store_true",
                      help="give inputs that cannot be read a row with the reason, and go on")


def is_asked(args) -> bool:
    """Return whether the command is for many texts. Raises UserError for flags that do not go together."""
    given = [f"--{n}" for n in ("text", "file", "activations") if getattr(args, n) not in (None, "")]
    given = given or ["--text"] * (args.text == "")  # refused later, with the reason
    if len(given) != 1:
        what = f"{given[0]} and {given[1]} do not go together" if given else "there is nothing to explain"
        raise UserError(f"{what}: give --text TEXT, --file FILE, or --activations FILE")
    if given == ["--text"]:
        if args.out:
            raise UserError("--out is for --file and --activations; use --json FILE with --text")
        return False
    if wrong := [n for n, default in FOR_ONE.items() if getattr(args, n) != default]:
        hint = {"tokens": "use --positions", "json": "use --out FILE.jsonl"}.get(wrong[0], "leave it out")
        raise UserError(f"--{wrong[0]} is for --text: {hint}")
    if not args.out:
        raise UserError(f"{given[0]} needs --out FILE.jsonl or FILE.parquet")
    if args.activations and args.positions:
        raise UserError("--positions is for --file: with --activations every row is explained")
    return True


def work(args) -> None:
    """Run the command."""
    from nla_jax import api
    from nla_jax.pipeline import explain_batch
    from nla_jax.pipeline.explain_columns import Options
    from nla_jax.pipeline.explain_output import check_path

    utf8.check(args.file or args.activations, "the file's name")
    check_path(args.out)
    scores = () if args.scores == "none" else tuple(args.scores.split(","))
    carry = None if args.carry is None else tuple(n for n in args.carry.split(",") if n)
    options = dict(
        positions=args.positions or "last", samples=args.samples, temperature=args.temperature,
        max_new=args.max_new, seed=args.seed, scale=args.scale, scores=scores, trust=args.trust,
        field=args.field, rendered=args.rendered, carry=carry,
    )
    Options(**options)  # refuses what cannot be, before the weights are read
    explain_batch.check_input(args.file, args.activations, args.key)
    nla = api.load(flags.find_bundle(args), args.target or None, args.batch, dtype=args.dtype, announce=True)
    outcome = explain_batch.explain_file(
        nla, args.out, texts=args.file or None, activations=args.activations or None, key=args.key,
        skip_bad=args.skip_bad, **options,
    )
    print(outcome)
