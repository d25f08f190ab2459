"""`nla watch`: follow a run from another terminal."""

import contextlib

from nla_jax.cli import parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "watch", "follow a run from another terminal, as nla train shows it",
                   "nla watch runs/quickstart")
    p.add_argument("run", metavar="RUN", help="a --workdir of `nla train`")
    p.set_defaults(work=_watch)


def _watch(args, rest) -> None:
    from nla_jax.view import watch

    with contextlib.suppress(KeyboardInterrupt):  # the user leaves with Ctrl-C
        watch.follow(args.run)
