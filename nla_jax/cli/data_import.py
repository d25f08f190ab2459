"""`nla data import`: import official data files as a store."""

import json

from nla_jax.cli import parser
from nla_jax.interchange.data_sidecar import DATA_STAGES
from nla_jax.util.number_types import real, whole


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "import", "import official data files (parquet with sidecars) as a store",
                   "nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/released/store")
    p.add_argument("files", nargs="+", metavar="FILE",
                   help=f"data files of the stages {', '.join(DATA_STAGES)}")
    p.add_argument("--out", required=True, metavar="DIR",
                   help="the store's directory; a stopped import is resumed")
    p.add_argument("--heldout", nargs="+", default=[], metavar="FILE", help="files of held-out documents")
    p.add_argument(
        "--heldout-share",
        type=real(0, 1),
        default=0.02,
        metavar="X",
        help="without such files: the share of documents to hold out, by a hash of their ids",
    )
    p.add_argument("--heldout-rows", type=whole(0), default=500, metavar="N",
                   help="maximum number of rows to keep of that share; 0: all")
    p.add_argument(
        "--warm-fraction",
        type=real(0, 1),
        default=0.75,
        metavar="X",
        help="share of base files' documents for the warm start; the others are for RL",
    )
    p.set_defaults(work=_import)


def _import(args, rest) -> None:
    from nla_jax.data import store
    from nla_jax.interchange import import_data

    meta = import_data.import_files(
        args.files,
        args.out,
        heldout=args.heldout,
        heldout_share=args.heldout_share,
        heldout_rows=args.heldout_rows,
        warm_fraction=args.warm_fraction,
    )
    about = {s: {k: a[k] for k in ("rows", "documents")} for s, a in meta["splits"].items()}
    out = {"store": args.out, "splits": about, "left out": meta["drops"], "notes": store.split_notes(meta)}
    print(json.dumps(out, indent=1))
