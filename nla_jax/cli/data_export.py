"""`nla data export`: export a split of a store as an official data file."""

import json

from nla_jax.cli import flags, parser
from nla_jax.interchange.data_sidecar import DATA_STAGES
from nla_jax.util import path_kinds


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "export", "export a split of a store as an official data file with its sidecar",
                   "nla data export --store runs/quickstart --split warm --stage av_sft --out av_sft.parquet")
    flags.add_store(p, required=True)
    p.add_argument("--split", required=True, metavar="NAME", help="such as warm")
    p.add_argument("--stage", required=True, choices=DATA_STAGES, help="the stage that the file is for")
    p.add_argument("--out", required=True, metavar="FILE", help="the .parquet file")
    p.add_argument("--bundle", default="", metavar="DIR",
                   help="a bundle trained on the store, for marker, prompts and the target's name")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax.interchange import export_data, find_bundle

    counts = export_data.export_split(
        path_kinds.store_in(args.store), args.split, args.stage, args.out,
        bundle_directory=args.bundle and find_bundle.find(args.bundle),
    )
    print(json.dumps({"file": args.out, **counts}, indent=1))
