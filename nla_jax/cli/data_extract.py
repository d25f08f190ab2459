"""`nla data extract`: capture the activations of a config."""

import json

from nla_jax.cli import config_arguments, flags, parser
from nla_jax.errors import UserError
from nla_jax.pipeline import experiment_files
from nla_jax.util.number_types import whole


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "extract", "capture the activations of a config into RUN/data",
                   "nla data extract --config experiments/quickstart.py --workdir runs/mine")
    config_arguments.add(p)
    p.add_argument("--corpus", default="", metavar="URI",
                   help="the texts; sets --config.data.corpus; docs/corpora.md")
    p.add_argument("--hosts", type=flags.COUNT, default=1, metavar="N",
                   help="number of hosts that share RUN, each with its own devices")
    p.add_argument("--host-index", type=whole(0), default=0, metavar="I", help="this host, from 0")
    p.set_defaults(work=_extract, takes_config=True)


def _extract(args, rest) -> None:
    from nla_jax.pipeline import stages
    from nla_jax.util import distributed, progress

    if args.host_index >= args.hosts or (args.hosts > 1 and args.distributed):
        raise UserError(f"--host-index {args.host_index} of --hosts {args.hosts}: the index counts from 0, "
                        "and --hosts excludes --distributed")
    rest += [f"--config.data.corpus={args.corpus}"] if args.corpus else []
    with distributed.raise_on_sigterm(), progress.plain_progress(args.plain):
        config = experiment_files.load_config(args.config, rest)
        outcome = stages.run(config, args.workdir, only="extract", host=(args.host_index, args.hosts))
    if distributed.is_first():
        print(json.dumps(outcome, indent=1))
