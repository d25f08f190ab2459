"""`nla data import` and `nla data export`: their flags, and what they print."""

import json

STAGES = ("base", "av_sft", "ar_sft", "rl")


def add(sub) -> None:
    """Add both commands to the subparsers of `nla data`."""
    im = sub.add_parser("import", help="official data files (parquet, sidecars) as a store")
    im.add_argument("files", nargs="+", metavar="FILE", help=f"of stages {', '.join(STAGES)}")
    im.add_argument("--out", required=True, help="the store, a directory; a stopped import goes on")
    im.add_argument("--heldout", nargs="+", default=[], metavar="FILE", help="files of held-out documents")
    im.add_argument(
        "--heldout-share",
        type=float,
        default=0.02,
        help="without such files: the share of documents held out, by a hash of their ids",
    )
    im.add_argument("--heldout-rows", type=int, default=500, help="of that share, kept at most; 0: all")
    im.add_argument(
        "--warm-fraction",
        type=float,
        default=0.75,
        help="of the documents of base files that go to the warm start; the rest goes to RL",
    )
    im.set_defaults(work=_import)
    ex = sub.add_parser("export", help="a split of a store as an official data file with its sidecar")
    ex.add_argument("--store", required=True, help="such as runs/quickstart/data")
    ex.add_argument("--split", required=True, help="such as warm")
    ex.add_argument("--stage", required=True, choices=STAGES)
    ex.add_argument("--out", required=True, metavar="FILE.parquet")
    ex.add_argument("--bundle", default="", help="trained on the store: marker, prompts, the target's name")
    ex.set_defaults(work=_export)


def _import(args, rest) -> None:
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
    print(json.dumps({"store": args.out, "splits": about, "left out": meta["drops"]}, indent=1))


def _export(args, rest) -> None:
    from nla_jax.interchange import export_data

    counts = export_data.export_split(
        args.store, args.split, args.stage, args.out, bundle_directory=args.bundle
    )
    print(json.dumps({"file": args.out, **counts}, indent=1))
