"""`nla readouts`: what a bundle reads at the cells of a WorkspaceBench plan."""

import json

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.util import paths, writable
from nla_jax.util.number_types import whole

READERS = ("nla", "lens")


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "readouts", "read the cells of a WorkspaceBench plan, for its judges",
                   "nla readouts --plan plan/multihop.jsonl --out readouts/multihop.jsonl")
    flags.add_bundle(p)
    p.add_argument("--plan", required=True, metavar="FILE", help="JSONL, one family, by `wsbench plan`")
    p.add_argument("--out", required=True, metavar="FILE",
                   help="JSONL of readouts; a stopped run is resumed")
    p.add_argument("--reader", default="nla", choices=READERS,
                   help="nla: AV's explanations; lens: ten tokens by the Jacobian lens, a baseline")
    p.add_argument("--samples", type=flags.COUNT, default=1, metavar="N", help="explanations of each cell")
    p.add_argument("--limit", type=whole(0), default=0, metavar="N", help="number of items; default: all")
    flags.add_temperature(p, 1.0)
    flags.add_seed(p, "of sampling")
    flags.add_target(p)
    p.set_defaults(work=_readouts)


def _readouts(args, rest) -> None:
    from nla_jax import api
    from nla_jax.pipeline import wsbench

    if args.reader == "lens" and args.samples > 1:
        raise UserError("--samples is for --reader nla: the lens always says the same")
    writable.check_output(args.out, makes_directory=True)
    wsbench.read_plan(args.plan)  # before the weights are read
    directory, target = flags.find_bundle(args), args.target or None
    nla = api.load(directory, target)
    read = (_lens(nla, directory, target) if args.reader == "lens" else
            wsbench.prose(nla, samples=args.samples, temperature=args.temperature, seed=args.seed))
    paths.path(args.out).parent.mkdir(parents=True, exist_ok=True)
    counts = wsbench.write_readouts(nla, args.plan, args.out, read, limit=args.limit)
    print(json.dumps({"file": args.out, "layer": nla.spec.layer, **counts}, indent=1))


def _lens(nla, directory, target):
    from nla_jax.data import store
    from nla_jax.evaluate import jacobian_lens
    from nla_jax.pipeline import held_out_rows, wsbench

    data = held_out_rows.store_of(directory, target)
    texts = store.load_columns(data, "warm", ["text"])["text"]
    readers = held_out_rows.evaluation_dir(directory) / "readers"
    return wsbench.ranked(nla, jacobian_lens.fit_or_read(nla.runner, texts, readers, "Jacobian lens"))
