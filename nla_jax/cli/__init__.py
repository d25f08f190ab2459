"""The command line: `nla data|train|watch|evaluate|explain|results|report|serve|import|export|pack`. Flags
are parsed in `main`, never at import."""

import argparse
import io
import json
import os
import sys
import traceback
from pathlib import Path

from nla_jax import errors
from nla_jax.cli import data_explain, data_interchange, data_stats, data_sweep, interchange, view
from nla_jax.errors import UserError
from nla_jax.pipeline import experiment_files
from nla_jax.util import paths


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for a mistake that the user can mend)."""
    parser = _parser()
    args, rest = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if rest and not getattr(args, "takes_config", False):
        parser.error(f"unknown argument {rest[0]!r}")
    from nla_jax.util import distributed

    status = 0
    try:
        _use_cache()
        if getattr(args, "distributed", False):
            distributed.join()
        with errors.room():
            args.work(args, rest)
        return 0
    except UserError as e:
        print(f"nla: {e}", file=sys.stderr)
        status = 2
    except distributed.Stopped as e:
        print(f"nla: {e}; the same command goes on from here", file=sys.stderr)
        if e.together:
            return 0
    except KeyboardInterrupt:
        print("nla: stopped; the same command goes on from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        if not distributed.joined():
            raise
        traceback.print_exc()
        status = 1
    distributed.leave(status)
    return status


def _joined(argv: list[str]) -> list[str]:
    """`--tokens -3:` as `--tokens=-3:`: argparse takes a value with a dash in front for an option."""
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
    fetch = data_sub.add_parser("fetch", help="download the target and the default corpora")
    fetch.add_argument("--target", default="default", help="a URI, or default")
    fetch.add_argument("--probes", action="store_true", help="also what `nla evaluate` reads with (150 MB)")
    fetch.set_defaults(work=_fetch)
    ext = data_sub.add_parser("extract", help="capture activations of a config into WORKDIR/data")
    _config_arguments(ext)
    ext.add_argument("--corpus", default="", metavar="URI", help="as --config.data.corpus; docs/corpora.md")
    ext.add_argument("--hosts", type=int, default=1, help="that share WORKDIR, each with its own devices")
    ext.add_argument("--host", type=int, default=0, help="which of them this is, from 0")
    ext.set_defaults(work=_extract, takes_config=True)
    data_explain.add(data_sub)
    data_stats.add(data_sub)
    data_sweep.add(data_sub, _config_arguments)
    data_interchange.add(data_sub)

    tr = sub.add_parser("train", help="run every stage of a config that is missing in WORKDIR")
    _config_arguments(tr)
    tr.add_argument("--from", dest="source", default="", metavar="RUN",
                    help="another run: take over its finished stages where the settings agree")
    tr.set_defaults(work=_train, takes_config=True)

    ev = sub.add_parser("evaluate", help="the grounding table of a bundle on held-out rows")
    ev.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    ev.add_argument("--data", default="", help="a store of activations; default: beside the bundle, or made")
    ev.add_argument("--splits", default="heldout", help="such as heldout,ood")
    ev.add_argument("--probes", default="all", help="families of figures, such as round_trip,form")
    ev.add_argument("--rows", type=int, default=0, help="of each split, spread over it; default: all")
    ev.add_argument("--temperature", type=float, default=1.0)
    ev.add_argument("--seed", type=int, default=0)
    ev.add_argument("--target", default="", help="where the target is now")
    ev.add_argument("--json", default="", help="also write the figures to this file")
    ev.add_argument("--markdown", default="", help="also write the tables to this file")
    ev.add_argument("--paraphraser", default="", metavar="SPEC",
                    help="openai:MODEL@URL or anthropic:MODEL; it gets all explanations")
    ev.add_argument("--key-env", default="", metavar="NAME", help="the variable with the key for URL")
    ev.add_argument("--yes", action="store_true", help="send them without being asked")
    ev.set_defaults(work=_evaluate)

    xp = sub.add_parser("explain", help="explain the tokens of a text")
    xp.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    xp.add_argument("--text", required=True)
    xp.add_argument("--tokens", default="all", help="all, an index (-1 is the last), or a range 3:9")
    xp.add_argument("--samples", type=int, default=1)
    xp.add_argument("--temperature", type=float, default=None, help="default: 0, or 1 with --samples")
    xp.add_argument("--seed", type=int, default=0)
    xp.add_argument("--target", default="", help="where the target is now")
    xp.add_argument("--json", action="store_true")
    xp.add_argument("--svg", default="", help="also write the table as a picture to this file")
    xp.set_defaults(work=_explain)
    rs = sub.add_parser("results", help="a finished run as a Markdown page with curves, or several compared")
    rs.add_argument("--workdir", required=True, nargs="+")
    rs.add_argument("--out", required=True, help="the .md file; for one run a .png is written beside it")
    rs.add_argument("--made-by", default="", help="the command that made the run")
    rs.set_defaults(work=_results)
    view.add(sub)
    interchange.add(sub)
    return p


def _config_arguments(p):
    p.add_argument(
        "--config", required=True, help="experiments/X.py[:ARG]; override with --config.rl.steps=10"
    )
    p.add_argument("--workdir", required=True)
    p.add_argument("--plain", action="store_true", help="progress in lines, on a terminal too")
    p.add_argument(
        "--distributed",
        action="store_true",
        default=os.environ.get("NLA_DISTRIBUTED", "") not in ("", "0"),
        help="be one process of a pod; also NLA_DISTRIBUTED=1 (launch/ has the ways to start one)",
    )


def _use_cache() -> None:
    """Compiled programs are kept between runs, beside the downloads."""
    import jax

    from nla_jax.util.paths import programs_dir

    jax.config.update("jax_compilation_cache_dir", programs_dir())


def _target(name: str) -> str:
    from nla_jax.lm.weights import DEFAULT_TARGET

    return DEFAULT_TARGET if name in ("", "default") else name


def _fetch(args, rest) -> None:
    from nla_jax.data import corpora
    from nla_jax.lm import weights

    print(f"target: {weights.resolve(_target(args.target))}")
    for name in ("news", "wikipedia"):
        print(f"{name}: {len(corpora.open_corpus(name))} documents")
    if args.probes:
        from nla_jax.evaluate.words import embedder, wordnet

        embedder.load()
        wordnet.wordnet()
        print("probes: sentence embedder, WordNet")


def _extract(args, rest) -> None:
    from nla_jax.pipeline import stages
    from nla_jax.util import distributed, progress

    if not 0 <= args.host < args.hosts or (args.hosts > 1 and args.distributed):
        raise UserError(f"--host {args.host} of --hosts {args.hosts}: counted from 0, and not --distributed")
    rest += [f"--config.data.corpus={args.corpus}"] if args.corpus else []
    with distributed.sigterm_stops(), progress.plainly(args.plain):
        config = experiment_files.load_config(args.config, rest)
        outcome = stages.run(config, args.workdir, only="extract", host=(args.host, args.hosts))
    if distributed.is_first():
        print(json.dumps(outcome, indent=1))


def _train(args, rest) -> None:
    from rich.console import Console

    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import stages
    from nla_jax.util import distributed, progress
    from nla_jax.view import markdown_report

    with distributed.sigterm_stops(), progress.plainly(args.plain):
        summary = stages.run(
            experiment_files.load_config(args.config, rest), args.workdir, source=args.source
        )
    if not distributed.is_first():
        return
    for split in summary["rl"]:
        columns = {
            name: markdown_report.figures_of(summary, key, split)
            for name, key in markdown_report.COLUMNS.items()
        }
        Console().print(figure_table.table(columns, f"{split}: {args.workdir}"))
    print(f"summary: {paths.path(args.workdir) / 'summary.json'}")


def _evaluate(args, rest) -> None:
    from rich.console import Console

    from nla_jax import bundle
    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import grounding

    for path in (args.json, args.markdown):
        if path and not (paths.is_remote(path) or Path(path).absolute().parent.is_dir()):
            raise UserError(f"{path}: there is no directory {Path(path).absolute().parent}; make it first")
    probes, splits = ([] if args.probes == "all" else args.probes.split(",")), args.splits.split(",")
    name, args.bundle = args.bundle or "shipped", bundle.named(args.bundle)
    found = grounding.evaluate_bundle(
        args.bundle,
        data=args.data,
        splits=splits,
        probes=probes,
        rows=args.rows,
        temperature=args.temperature,
        seed=args.seed,
        target=args.target or None,
        paraphraser=_paraphraser(args, splits, probes) if args.paraphraser else None,
    )
    out, page = {}, []
    for split, t in found.items():
        said, missing = [f"- {s}" for s in t.verdict], [f"left out: {s}" for s in t.left_out]
        Console().print(f"\n{split}: {name}\n", "\n".join(said), "\n", sep="", markup=False)
        Console().print(figure_table.table({"value": t.figures}, f"{split}: {name}"))
        Console().print("\n".join(missing), markup=False)
        out[split] = t.as_json()
        page += [f"## {split}", "", *said, "", *figure_table.markdown({"value": t.figures}), "", *missing, ""]
    if args.json:
        paths.write(paths.path(args.json), json.dumps(out, indent=1, ensure_ascii=False))
    if args.markdown:
        paths.write(paths.path(args.markdown), "\n".join(page))


def _paraphraser(args, splits: list[str], probes: list[str]):
    from nla_jax.data import store
    from nla_jax.evaluate.words import paraphrase
    from nla_jax.pipeline import held_out_rows
    from nla_jax.providers import consent

    if probes and "meaning" not in probes:
        raise UserError("--paraphraser is for the probe meaning, which --probes leaves out")
    data = Path(args.data) if args.data else held_out_rows.store_of(args.bundle, args.target or None)
    there, journal = store.read_meta(data)["splits"], held_out_rows.home(args.bundle) / "paraphrases.journal"
    texts = sum(args.rows or there.get(s, {"rows": 0})["rows"] for s in splits)
    return paraphrase.paraphraser(
        args.paraphraser, journal, texts=texts, key_env=args.key_env,
        ask_for=lambda what: consent.ask_for(what, args.yes))  # fmt: skip


def choose_tokens(spec: str, n: int) -> list[int]:
    """Token indices of "all", "-1" or "3:9" in a text of n tokens. Raises UserError."""
    try:
        if spec == "all":
            return list(range(n))
        if ":" in spec:
            a, b = (int(x) if x else None for x in spec.split(":"))
            found = list(range(n))[a:b]
            if not found:
                raise UserError(f"--tokens {spec} selects nothing in a text of {n} tokens")
            return found
        return [int(spec)]
    except ValueError:
        raise UserError(f"--tokens {spec!r}: use all, an index such as -1, or a range such as 3:9") from None


def _results(args, rest) -> None:
    from nla_jax.view import compare, markdown_report

    if len(args.workdir) > 1:
        print(compare.write(args.workdir, args.out, args.made_by))
        return
    workdir = args.workdir[0]
    made_by = args.made_by or f"nla train --config experiments/{Path(workdir).name}.py"
    print(markdown_report.write(workdir, args.out, made_by))


def _explain(args, rest) -> None:
    import jax

    import nla_jax
    from nla_jax import bundle

    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: at least 1")
    nla = nla_jax.load(bundle.named(args.bundle), args.target or None)
    positions = choose_tokens(args.tokens, len(nla.tokens(args.text)))
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if args.samples > 1 else 0.0
    reports = nla.round_trip(
        args.text,
        positions=positions,
        key=jax.random.key(args.seed),
        temperature=temperature,
        samples=args.samples,
    )
    if args.json:
        import dataclasses

        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1, ensure_ascii=False))
        return
    _print_reports(reports, f"{args.bundle or 'shipped'}: what block {nla.spec.layer} holds", args.svg)


def _print_reports(reports, title: str, svg: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nla_jax.util.terminal_text import printable

    table = Table(title=title, show_lines=True)
    table.add_column("token", no_wrap=True)
    table.add_column("explanation")
    table.add_column("FVE", justify="right")
    table.add_column("cos", justify="right")
    for r in reports:
        # Rich strips no escape sequences, and a line break is to stay.
        text = "\n".join(map(printable, r.explanation.split("\n")))
        text = escape(text) if r.ok else "[dim](no readable explanation)[/dim]"
        table.add_row(escape(repr(r.token)[1:-1]), text, f"{r.fve:.2f}", f"{r.cos:.2f}")
    Console().print(table)
    if svg:
        picture = Console(record=True, width=110, file=io.StringIO())
        picture.print(table)
        picture.save_svg(svg, title="nla explain")
