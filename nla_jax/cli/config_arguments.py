"""The arguments of commands that need a config."""

import os


def add(p) -> None:
    """Add --config, --workdir, --plain and --distributed to a command's parser."""
    p.add_argument(
        "--config", required=True, help="experiments/X.py[:ARG]; override with --config.rl.steps=10"
    )
    p.add_argument("--workdir", required=True)
    p.add_argument("--plain", action="store_true", help="print progress line by line, on a terminal too")
    p.add_argument(
        "--distributed",
        action="store_true",
        default=os.environ.get("NLA_DISTRIBUTED", "") not in ("", "0"),
        help="run as one process of a pod; also NLA_DISTRIBUTED=1 (launch/ has scripts that start pods)",
    )
