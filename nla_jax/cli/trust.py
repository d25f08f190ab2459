"""`nla trust`: fit the trust model of a bundle's claims, and measure it."""

import json
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import paths


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("trust", help="estimate how likely each claim of a bundle's explanations is true")
    p.add_argument("--bundle", default="", help="the bundle, into which trust.json is written")
    p.add_argument(
        "--data",
        default="",
        help="a store of activations; default: that of the bundle's run, or one in the cache",
    )
    p.add_argument("--splits", default="heldout", help="such as heldout,ood; half of heldout fits the model")
    p.add_argument("--rows", type=int, default=0, help="number of texts of each split; default: all")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target", default="", help="location of the target; default: as in the sidecar")
    p.add_argument("--json", default="", help="also write figures and calibration curves to this file")
    p.set_defaults(work=_trust)


def _trust(args, rest) -> None:
    from rich.console import Console

    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import bundle_trust

    if not args.bundle:
        raise UserError("name the bundle with --bundle: its trust.json is written there")
    if args.json and not (paths.is_remote(args.json) or Path(args.json).absolute().parent.is_dir()):
        raise UserError(
            f"{args.json}: there is no directory {Path(args.json).absolute().parent}; create it first"
        )
    _, found = bundle_trust.fit_bundle(
        args.bundle,
        data=args.data,
        splits=args.splits.split(","),
        rows=args.rows,
        temperature=args.temperature,
        seed=args.seed,
        target=args.target or None,
    )
    for split, m in found.items():
        Console().print(
            figure_table.table({"value": m.figures}, f"{split}: trust in claims of {args.bundle}")
        )
    if args.json:
        out = {split: m.as_json() for split, m in found.items()}
        paths.write(paths.path(args.json), json.dumps(out, indent=1))
