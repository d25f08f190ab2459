"""`nla data explain`: explanations by the target, by another model, or from a file, and a report."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.errors import UserError
from nla_jax.providers import answer_files, clients, consent, http_explain, own_provider
from nla_jax.providers.journal import RETRIABLE, Journal
from nla_jax.providers.scheduler import Settings
from nla_jax.util import locks, paths, writable
from nla_jax.util.choices import choose

if TYPE_CHECKING:  # this module imports jax, which is slow
    from nla_jax.providers.target_model import Text


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = sub.add_parser("explain", help="write explanations: by the target, another model, or from a file")
    p.add_argument("--provider", default="local", metavar="NAME",
                   help=f"source of answers: {', '.join(PROVIDERS)}, or module:function; docs/data.md")
    p.add_argument("--target", default="default",
                   help="the model, for local and for chat: corpora: a URI, or default")
    p.add_argument("--corpus", default="news")
    p.add_argument("--out", required=True, help="JSONL file to append to; a stopped run is resumed")
    p.add_argument("--n", type=int, default=100, help="number of texts to explain")
    p.add_argument("--min-words", type=int, default=50)
    p.add_argument("--max-words", type=int, default=95)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-new", "--max-tokens", dest="max_tokens", type=int, default=None,
                   help="maximum number of tokens of an answer; default: 160 for local, else 400")
    p.add_argument("--temperature", type=float, default=None, help="default: 0.7 for local, else unset")
    p.add_argument("--batch", type=int, default=16, help="texts per batch, for local")
    http = p.add_argument_group("models over HTTP", "keys are read from environment variables only")
    http.add_argument("--model", default="")
    http.add_argument("--base-url", default="",
                      help="such as http://127.0.0.1:8000/v1; default: the provider's own")
    http.add_argument("--key-env", default="", metavar="NAME",
                      help="the environment variable with the key; needed if a --base-url server wants one")
    http.add_argument("--concurrency", type=int, default=None,
                      help="number of concurrent requests (8) or batches (4)")
    http.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer")
    http.add_argument("--retries", type=int, default=6, help="tries of a request after the first")
    http.add_argument("--backoff", type=float, default=1.0,
                      help="seconds before the first retry; doubled for each further one")
    http.add_argument("--price", type=_price, default=None, metavar="READ,WRITTEN",
                      help="dollars per million tokens read and written, for the estimate and the report")
    http.add_argument("--yes", action="store_true", help="send without confirmation")
    http.add_argument("--journal", default="", help="the file of all outcomes; default: OUT.journal")
    http.add_argument("--retry", type=_kinds, default=(), metavar="KIND,…",
                      help=f"request rows again that have no usable answer: {', '.join(RETRIABLE)}")
    http.add_argument("--batch-size", type=int, default=2000, help="texts per batch, for anthropic-batch")
    http.add_argument("--poll", type=float, default=60.0, help="seconds between two checks of a batch")
    file = p.add_argument_group("a file of answers (--provider file)")
    file.add_argument("--requests", default="", metavar="FILE", help="write the open requests, and end")
    file.add_argument("--answers", default="", metavar="FILE", help="read the answers")
    p.set_defaults(work=_explain)


def _price(text: str) -> tuple[float, float]:
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, such as 3,15") from None
    return read, written


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= RETRIABLE.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: use {', '.join(RETRIABLE)}")
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

    if args.n < 1:
        raise UserError(f"--n {args.n}: must be at least 1")
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
        batch=args.batch,
        max_new=160 if args.max_tokens is None else args.max_tokens,
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
        max_tokens=400 if args.max_tokens is None else args.max_tokens)
    if args.batch_size < 1 or args.poll < 0:
        raise UserError(f"--batch-size {args.batch_size}, --poll {args.poll}: must be at least 1 and 0")
    _ask(args, e, http_explain.in_batches(args.batch_size, args.poll) if batch else http_explain.one_by_one)


def _own(args, function) -> None:
    if args.base_url or args.key_env or (args.temperature, args.max_tokens) != (None, None):
        raise UserError("--base-url, --key-env, --temperature and --max-tokens are not for a provider of "
                        "your own: its function decides them")
    _ask(args, own_provider.endpoint(args.provider, args.model), own_provider.asker(function))


def _ask(args, e: clients.Endpoint, ask) -> None:
    batch = args.provider == "anthropic-batch"
    at_a_time = (4 if batch else 8) if args.concurrency is None else args.concurrency
    settings = Settings(at_a_time, args.retries, args.backoff, args.price)
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
