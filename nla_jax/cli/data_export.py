"""`nla data export`: export a split of a store as an official data file."""

import json

from nla_jax.interchange.data_sidecar import DATA_STAGES


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = sub.add_parser("export", help="export a split of a store as an official data file with its sidecar")
    p.add_argument("--store", required=True, help="such as runs/quickstart/data")
    p.add_argument("--split", required=True, help="such as warm")
    p.add_argument("--stage", required=True, choices=DATA_STAGES)
    p.add_argument("--out", required=True, metavar="FILE.parquet")
    p.add_argument("--bundle", default="",
                   help="a bundle trained on the store, for marker, prompts and the target's name")
    p.set_defaults(work=_export)


def _export(args, rest) -> None:
    from nla_jax.interchange import export_data

    counts = export_data.export_split(
        args.store, args.split, args.stage, args.out, bundle_directory=args.bundle
    )
    print(json.dumps({"file": args.out, **counts}, indent=1))
