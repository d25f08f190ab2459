"""`nla data fetch`: download the target and the default corpora."""

from nla_jax.cli import parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "fetch", "download the target and the default corpora", "nla data fetch --probe-data")
    p.add_argument("--target", default="default", metavar="URI", help="the model, or default")
    p.add_argument("--probe-data", action="store_true",
                   help="also download the data of the probes of `nla evaluate` (150 MB)")
    p.set_defaults(work=_fetch)


def _target(name: str) -> str:
    from nla_jax.lm.weights import DEFAULT_TARGET

    return DEFAULT_TARGET if name in ("", "default") else name


def _fetch(args, rest) -> None:
    from nla_jax.data import corpora
    from nla_jax.lm import weights

    print(f"target: {weights.resolve(_target(args.target))}")
    for name in ("news", "wikipedia"):
        print(f"{name}: {len(corpora.open_corpus(name))} documents")
    if args.probe_data:
        from nla_jax.evaluate.words import embedder, wordnet

        embedder.load()
        wordnet.wordnet()
        print("probes: sentence embedder, WordNet")
