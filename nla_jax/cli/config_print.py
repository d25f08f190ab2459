"""`nla config print`: print the settings of an experiment file, with overrides, beside the defaults."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla config`."""
    p = parser.add(sub, "print", "print the settings of an experiment, with overrides, beside the defaults",
                   "nla config print experiments/quickstart.py --changed --config.rl.steps=10")
    p.add_argument("file", nargs="?", default="", metavar="FILE[:ARG]",
                   help="such as experiments/toy.py; default: the defaults alone")
    p.add_argument("--changed", action="store_true", help="only the settings that differ from their defaults")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(work=_print, takes_config=True)


def _print(args, rest) -> None:
    from nla_jax import configs
    from nla_jax.pipeline import experiment_files

    default = configs.default().to_dict()
    config = experiment_files.load_config(args.file, rest).to_dict() if args.file or rest else default
    before, now = configs.flat(default), configs.flat(config)
    both = {k: (v, before.get(k)) for k, v in now.items() if not args.changed or v != before.get(k)}
    if args.json:
        flags.put_json("-", {k: {"value": v, "default": d} for k, (v, d) in both.items()})
        return
    for key, (value, standard) in both.items():
        print(f"{key}={value!r}" + ("" if value == standard else f"    # default: {standard!r}"))
