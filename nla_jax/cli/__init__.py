"""The command line: `nla data|train|watch|evaluate|trust|explain|results|report|serve|import|export|pack`.

Each command has one file. `main` parses the flags; no module parses them at import.
"""

import argparse
import os
import sys
import traceback

from nla_jax import errors
from nla_jax.cli import (
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
    pack,
    report,
    results,
    serve,
    train,
    trust,
    watch,
)
from nla_jax.errors import UserError

# In the order of `nla --help`.
DATA_COMMANDS = (data_fetch, data_extract, data_explain, data_stats, data_sweep, data_import, data_export)
COMMANDS = (train, evaluate, trust, explain, results, report, watch, serve, import_bundle, export_bundle,
            pack)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status (2 for an error that the user can fix)."""
    parser = _parser()
    args, rest = parser.parse_known_args(_join_dashed(sys.argv[1:] if argv is None else argv))
    if rest and not getattr(args, "takes_config", False):
        parser.error(f"unknown argument {rest[0]!r}")
    from nla_jax.util import distributed

    status = 0
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


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="nla", description="Natural language autoencoders in JAX.")
    sub = p.add_subparsers(required=True, metavar="COMMAND")
    data = sub.add_parser("data", help="targets, corpora, activations, explanations")
    data_sub = data.add_subparsers(required=True, metavar="COMMAND")
    for command in DATA_COMMANDS:
        command.add(data_sub)
    for command in COMMANDS:
        command.add(sub)
    return p


def _use_cache() -> None:
    """Keep compiled programs between runs, in the cache directory."""
    import jax

    from nla_jax.util.paths import programs_dir

    jax.config.update("jax_compilation_cache_dir", programs_dir())
