"""The arguments of commands that need a config."""

import os


def add(p) -> None:
    """Add --config, --workdir, --plain and --distributed to a command's parser."""
    p.add_argument("--config", required=True, metavar="FILE[:ARG]",
                   help="such as experiments/toy.py; override a setting with --config.rl.steps=10")
    p.add_argument("--workdir", required=True, metavar="RUN", help="the directory of the run")
    p.add_argument("--plain", action="store_true", help="print progress line by line, on a terminal too")
    p.add_argument(
        "--distributed",
        action="store_true",
        default=os.environ.get("NLA_DISTRIBUTED", "") not in ("", "0"),
        help="run as one process of a pod, by default if NLA_DISTRIBUTED=1 is set (launch/ starts pods)",
    )
