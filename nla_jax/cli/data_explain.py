"""`nla data explain`: explanations by the target, by another model, or from a file, and a report."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.providers import answer_files, clients, consent, http_explain, own_provider
from nla_jax.providers.journal import RETRIABLE, Journal
from nla_jax.providers.scheduler import Settings
from nla_jax.util import locks, paths, writable
from nla_jax.util.choices import choose
from nla_jax.util.number_types import real, whole

if TYPE_CHECKING:  # this module imports jax, which is slow
    from nla_jax.providers.target_model import Text


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = parser.add(sub, "explain", "write explanations: by the target, another model, or from a file",
                   'nla data explain --out mine.jsonl --corpus "file:texts/*.txt"')
    p.add_argument("--provider", default="local", metavar="NAME",
                   help=f"source of answers: {', '.join(PROVIDERS)}, or module:function; docs/data.md")
    p.add_argument("--target", default="default", metavar="URI",
                   help="the model, for local and for chat: corpora: a URI, or default")
    p.add_argument("--corpus", default="news", metavar="URI", help="the texts; docs/corpora.md")
    p.add_argument("--out", required=True, metavar="FILE",
                   help="JSONL file to append to; a stopped run is resumed")
    p.add_argument("--n", type=flags.COUNT, default=100, metavar="N", help="number of texts to explain")
    p.add_argument("--min-words", type=flags.COUNT, default=50, metavar="N", help="minimum length of a text")
    p.add_argument("--max-words", type=flags.COUNT, default=95, metavar="N", help="maximum length of a text")
    flags.add_seed(p, "of the choice of texts, and of local sampling")
    p.add_argument("--max-new", type=flags.COUNT, default=None, metavar="N",
                   help="maximum number of tokens of an answer; default: 160 for local, else 400")
    flags.add_temperature(p, None, "of sampling; default: 0.7 for local, else unset")
    p.add_argument("--batch", type=flags.COUNT, default=None, metavar="N",
                   help="texts per batch; default: 16 for local, 2000 for anthropic-batch")
    http = p.add_argument_group("models over HTTP", "keys are read from environment variables only")
    http.add_argument("--model", default="", metavar="NAME", help="the provider's name of the model")
    http.add_argument("--base-url", default="", metavar="URL",
                      help="such as http://127.0.0.1:8000/v1; default: the provider's own")
    http.add_argument("--key-env", default="", metavar="NAME",
                      help="the environment variable with the key; needed if a --base-url server wants one")
    http.add_argument("--concurrency", type=flags.COUNT, default=None, metavar="N",
                      help="number of concurrent requests or batches; default: 8 requests, 4 batches")
    http.add_argument("--timeout", type=real(0, above=True), default=120.0, metavar="S",
                      help="seconds for one answer")
    http.add_argument("--retries", type=whole(0), default=6, metavar="N",
                      help="tries of a request after the first")
    http.add_argument("--backoff", type=real(0), default=1.0, metavar="S",
                      help="seconds before the first retry; doubled for each further one")
    flags.add_price(http)
    http.add_argument("--yes", action="store_true", help="send without confirmation")
    http.add_argument("--journal", default="", metavar="FILE",
                      help="the file of all outcomes; default: OUT.journal")
    http.add_argument("--retry", type=_kinds, default=(), metavar="KIND,…",
                      help=f"request rows again that have no usable answer: {', '.join(RETRIABLE)}")
    http.add_argument("--poll", type=real(0), default=60.0, metavar="S",
                      help="seconds between two checks of a batch")
    file = p.add_argument_group("a file of answers (--provider file)")
    file.add_argument("--requests", default="", metavar="FILE", help="write the open requests, and end")
    file.add_argument("--answers", default="", metavar="FILE", help="read the answers")
    p.set_defaults(work=_explain)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= RETRIABLE.keys():
        raise argparse.ArgumentTypeError(f"{text}: must be of {', '.join(RETRIABLE)}")
    return kinds


def _explain(args, rest) -> None:
    chosen = choose(PROVIDERS, args.provider, "--provider")
    for name in ("out", "journal", "requests", "answers"):
        setattr(args, name, paths.expand(getattr(args, name)))
    for file in filter(None, (args.out, args.out + ".dropped", args.journal)):
        writable.check_output(file, makes_directory=True)
    with _lock(args.out):
        report = chosen(args) if args.provider in PROVIDERS else _own(args, chosen)
    if report:
        print(json.dumps(report, indent=1))


def _lock(out: str):
    """Hold the lock of the file that answers are appended to."""
    if paths.is_remote(out) or Path(out).is_dir():  # refused later, with the reason
        return contextlib.nullcontext()
    place = Path(out).with_name(f"{Path(out).name}{locks.NAME}")
    return locks.hold(place, out)


def _texts(args) -> list["Text"]:
    from nla_jax.lm.weights import DEFAULT_TARGET
    from nla_jax.providers import target_model

    words = (args.min_words, args.max_words)
    target = DEFAULT_TARGET if args.target in ("", "default") else args.target
    return target_model.choose_texts(target_model.corpus_of(args.corpus, target), args.n, words, args.seed)


def _local(args) -> dict:
    from nla_jax.lm.weights import DEFAULT_TARGET
    from nla_jax.providers import target_model

    if args.model or args.base_url:
        raise UserError("--model and --base-url do not apply to --provider local: its model is the --target")
    return target_model.run(
        DEFAULT_TARGET if args.target in ("", "default") else args.target,
        args.corpus,
        args.out,
        n=args.n,
        batch=args.batch or 16,
        max_new=args.max_new or 160,
        temperature=0.7 if args.temperature is None else args.temperature,
        words=(args.min_words, args.max_words),
        seed=args.seed,
    )


def _file(args) -> dict:
    if bool(args.requests) == bool(args.answers):
        raise UserError("--provider file needs either --requests FILE, to write the open requests, or "
                        "--answers FILE, to read the answers")
    source = answer_files.AnswerFile(args.answers) if args.answers else None
    texts = _texts(args)
    output = answer_files.Output(texts, args.out, source)
    if not source:
        return {
            "texts": len(texts),
            "requests": answer_files.write_requests(texts, output.has, args.requests),
        }
    output.advance()
    return http_explain.outcome(output)


def _http(args) -> None:
    batch = args.provider == "anthropic-batch"
    e = clients.endpoint(
        args.provider.removesuffix("-batch"), args.model, args.base_url, args.key_env,
        temperature=args.temperature, timeout=args.timeout,
        max_tokens=args.max_new or 400)
    in_batches = http_explain.in_batches(args.batch or 2000, args.poll)
    _ask(args, e, in_batches if batch else http_explain.one_by_one)


def _own(args, function) -> None:
    if args.base_url or args.key_env or (args.temperature, args.max_new) != (None, None):
        raise UserError("--base-url, --key-env, --temperature and --max-new are not for a provider of "
                        "your own: its function decides them")
    _ask(args, own_provider.endpoint(args.provider, args.model), own_provider.asker(function))


def _ask(args, e: clients.Endpoint, ask) -> None:
    batch = args.provider == "anthropic-batch"
    settings = Settings(args.concurrency or (4 if batch else 8), args.retries, args.backoff, args.price)
    texts = _texts(args)
    diary = Path(args.journal or args.out + ".journal")
    if diary.resolve() in (Path(args.out).resolve(), Path(args.out + ".dropped").resolve()):
        raise UserError(f"{diary} cannot be the journal and an output at the same time")
    with Journal(diary) as journal:
        if journal.batches and not batch:
            raise UserError(f"{diary} has {len(journal.batches)} batches whose answers were not collected: "
                            "collect them with --provider anthropic-batch")
        journal.forget(args.retry)
        http_explain.run(
            texts, args.out, journal, e, settings, ask, lambda what: consent.ask_consent(what, args.yes)
        )


PROVIDERS = {
    "local": _local,
    **dict.fromkeys(clients.PROVIDERS, _http),
    "anthropic-batch": _http,
    "file": _file,
}
