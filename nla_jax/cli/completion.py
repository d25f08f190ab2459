"""`nla completion`: print a script that completes commands, flags and files in a shell."""

from nla_jax.cli import parser

SHELLS = ("bash", "zsh", "fish")


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "completion", "print a script that completes commands, flags and files in a shell",
                   'eval "$(nla completion bash)"     # in ~/.bashrc; docs/start.md has zsh and fish')
    p.add_argument("shell", choices=SHELLS, help="the shell")
    p.set_defaults(work=work)


def work(args, rest) -> None:
    """Print the script; `args.root` is the parser of `nla`."""
    import shtab

    for _, p in parser.commands(args.root):
        for action in p._actions:
            if action.nargs != 0 and action.choices is None and action.type is None:
                action.complete = shtab.FILE
    print(shtab.complete(args.root, args.shell))
