"""The command line, `nla COMMAND`.

Each command has one file. `main` parses the flags; no module parses them at import.
"""

import argparse
import os
import sys
import traceback

import nla_jax
from nla_jax import errors
from nla_jax.cli import (
    completion,
    config_list,
    config_print,
    data_explain,
    data_export,
    data_extract,
    data_fetch,
    data_import,
    data_stats,
    data_sweep,
    evaluate,
    explain,
    export_bundle,
    import_bundle,
    info,
    pack,
    parser,
    push,
    readouts,
    report,
    results,
    serve,
    train,
    trust,
    watch,
)
from nla_jax.errors import UserError

# In the order of `nla --help`.
GROUPS = {
    "data": ("targets, corpora, activations, explanations",
             (data_fetch, data_extract, data_explain, data_stats, data_sweep, data_import, data_export)),
    "config": ("experiments and their settings", (config_list, config_print)),
}
COMMANDS = (train, evaluate, trust, explain, readouts, results, report, watch, serve, info, import_bundle,
            export_bundle, pack, push, completion)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status (2 for an error that the user can fix)."""
    args, rest = _parse(_join_dashed(sys.argv[1:] if argv is None else argv))
    if args.work is completion.work:  # it waits for nothing, so not for jax either
        args.work(args, rest)
        return 0
    from nla_jax.util import distributed

    status = 0
    if hasattr(sys.stdout, "reconfigure"):  # a terminal in another encoding than UTF-8 shows \u2026 for …
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _use_cache()
        if getattr(args, "distributed", False):
            distributed.join()
        args.work(args, rest)
        return 0
    except UserError as e:
        print(f"nla: {e}", file=sys.stderr)
        status = 2
    except distributed.Stopped as e:
        print(f"nla: {e}; run the same command again to continue", file=sys.stderr)
        if e.together:
            return 0
    except KeyboardInterrupt:
        print("nla: stopped; run the same command again to continue", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as e:
        if said := errors.disk_fault(e):
            print(f"nla: {said}", file=sys.stderr)
            status = 2
        elif distributed.is_in_pod():
            traceback.print_exc()
            status = 1
        else:
            raise
    distributed.exit_pod(status)
    return status


def _join_dashed(argv: list[str]) -> list[str]:
    """Join `--tokens -3:` to `--tokens=-3:`, because argparse reads a value with a leading dash as a flag."""
    out: list[str] = []
    for a in argv:
        free = out and out[-1] in ("--tokens", "--text")
        out[-1:] = [f"{out[-1]}={a}"] if free else [*out[-1:], a]
    return out


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    p = make_parser()
    parser.refuse_unknown(p, argv)
    args, rest = p.parse_known_args(argv)
    args.root = p
    if rest and not getattr(args, "takes_config", False):
        p.error(f"unknown argument {rest[0]!r}")
    return args, rest


def make_parser() -> parser.Parser:
    """Return the parser of `nla` with all commands."""
    p = parser.Parser(prog="nla", description="Natural language autoencoders in JAX.",
                      epilog='example:\n  nla explain --text "The cat sat on the" --tokens=-3:')
    p.add_argument("--version", action="version", version=f"nla_jax {nla_jax.__version__}")
    sub = p.add_subparsers(required=True, metavar="COMMAND")
    for name, (about, commands) in GROUPS.items():
        group_sub = parser.add(sub, name, about).add_subparsers(required=True, metavar="COMMAND")
        for command in commands:
            command.add(group_sub)
    for command in COMMANDS:
        command.add(sub)
    return p


def _use_cache() -> None:
    """Keep compiled programs between runs, in the cache directory, if it can be written."""
    import jax

    from nla_jax.util import paths, writable

    try:
        directory = paths.programs_dir()
        writable.check_directory(directory)
    except UserError as e:
        print(f"compiled programs are not kept for the next start: {e}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", directory)
