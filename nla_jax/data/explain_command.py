"""`nla data explain`: who explains, what is asked of whom, and the sum of what came of it."""

import argparse
import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.data import answers, explanations
from nla_jax.errors import UserError
from nla_jax.providers import batches, clients, consent
from nla_jax.providers.asking import Asking, Row, Settings, Tally
from nla_jax.providers.journal import RETRIABLE, Journal, key_of

if TYPE_CHECKING:  # with jax behind them
    from nla_jax.data.explainer import Text
    from nla_jax.metrics import Progress

PROVIDERS = ("local", "openai", "anthropic", "anthropic-batch", "file")
EVERY = 64  # outcomes between two looks at what can be written


def add(sub) -> None:
    """Add the command to the subparsers of `nla data`."""
    p = sub.add_parser("explain", help="write explanations: by the target, another model, or from a file")
    p.add_argument("--provider", default="local", choices=PROVIDERS, help="who explains; docs/data.md")
    p.add_argument("--target", default="default", help="of local, and of chat: corpora: a URI, or default")
    p.add_argument("--corpus", default="news")
    p.add_argument("--out", required=True, help="JSONL file, appended to; a stopped run goes on")
    p.add_argument("--n", type=int, default=100, help="texts to explain")
    p.add_argument("--min-words", type=int, default=50)
    p.add_argument("--max-words", type=int, default=95)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-new", "--max-tokens", dest="max_tokens", type=int, default=None,
                   help="tokens of an answer; default: 160 of local, 400 of the others")
    p.add_argument("--temperature", type=float, default=None, help="default: 0.7 of local, else the server's")
    p.add_argument("--batch", type=int, default=16, help="of local: texts at a time")
    http = p.add_argument_group("models behind HTTP", "keys come from the environment and from nowhere else")
    http.add_argument("--model", default="")
    http.add_argument("--base-url", default="", help="such as http://127.0.0.1:8000/v1; default: their own")
    http.add_argument("--key-env", default="", metavar="NAME",
                      help="the variable with the key; needed with --base-url if that server wants a key")
    http.add_argument("--concurrency", type=int, default=None, help="requests (8) or batches (4) at a time")
    http.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer")
    http.add_argument("--retries", type=int, default=6, help="of a request, after the first try")
    http.add_argument("--backoff", type=float, default=1.0, help="seconds before a retry; doubled each time")
    http.add_argument("--price", type=_price, default=None, metavar="READ,WRITTEN",
                      help="dollars for a million tokens read and written, for the estimate and the sum")
    http.add_argument("--yes", action="store_true", help="send without being asked")
    http.add_argument("--journal", default="", help="what was answered; default: OUT.journal")
    http.add_argument("--retry", type=_kinds, default=(), metavar="KIND,…",
                      help=f"ask again for rows that came to nothing: {', '.join(RETRIABLE)}")
    http.add_argument("--batch-size", type=int, default=2000, help="texts in a batch of anthropic-batch")
    http.add_argument("--poll", type=float, default=60.0, help="seconds between two looks at a batch")
    file = p.add_argument_group("a file of answers (--provider file)")
    file.add_argument("--requests", default="", metavar="FILE", help="write what there is to ask, and end")
    file.add_argument("--answers", default="", metavar="FILE", help="read what was answered")
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
    if args.provider == "local":
        report = _local(args)
    elif args.provider == "file":
        report = _file(args)
    else:
        report = _http(args)
    if report:
        print(json.dumps(report, indent=1))


def _texts(args) -> list["Text"]:
    from nla_jax.data import explainer
    from nla_jax.lm.weights import DEFAULT_TARGET

    if args.n < 1:
        raise UserError(f"--n {args.n}: at least 1")
    words = (args.min_words, args.max_words)
    target = DEFAULT_TARGET if args.target in ("", "default") else args.target
    return explainer.choose_texts(explainer.corpus_of(args.corpus, target), args.n, words, args.seed)


def _local(args) -> dict:
    from nla_jax.data import explainer
    from nla_jax.lm.weights import DEFAULT_TARGET

    if args.model or args.base_url:
        raise UserError("--model and --base-url are not for --provider local: its model is the --target")
    return explainer.run(
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
        raise UserError("--provider file needs --requests FILE, to write what there is to ask, or --answers "
                        "FILE, to read what was answered")
    source = answers.AnswerFile(args.answers) if args.answers else None
    texts = _texts(args)
    output = answers.Output(texts, args.out, source)
    if not source:
        return {"texts": len(texts), "requests": answers.write_requests(texts, output.has, args.requests)}
    output.advance()
    return _came(output)


def _http(args) -> None:
    kind = args.provider.removesuffix("-batch")
    batch = args.provider == "anthropic-batch"
    e = clients.endpoint(
        kind, args.model, args.base_url, args.key_env, temperature=args.temperature, timeout=args.timeout,
        max_tokens=400 if args.max_tokens is None else args.max_tokens)  # fmt: skip
    at_a_time = (4 if batch else 8) if args.concurrency is None else args.concurrency
    settings = Settings(at_a_time, args.retries, args.backoff, args.price)
    if args.batch_size < 1 or args.poll < 0:
        raise UserError(f"--batch-size {args.batch_size}, --poll {args.poll}: at least 1 and 0 are needed")
    texts = _texts(args)
    diary = Path(args.journal or args.out + ".journal")
    if diary.resolve() in (Path(args.out).resolve(), Path(args.out + ".dropped").resolve()):
        raise UserError(f"{diary} cannot be the journal and an output at the same time")
    with Journal(diary) as journal:
        if journal.batches and not batch:
            raise UserError(f"{diary} has {len(journal.batches)} batches whose answers are not here yet: "
                            "collect them with --provider anthropic-batch")
        journal.forget(args.retry)
        ask = _in_batches(args.batch_size, args.poll) if batch else _one_by_one
        run(texts, args.out, journal, e, settings, ask, lambda what: consent.ask_for(what, args.yes))


def run(texts: Sequence["Text"], out: str | Path, journal: Journal, e: clients.Endpoint, settings: Settings,
        ask: Callable, ask_for: Callable[[str], None]) -> dict:  # fmt: skip
    """Let a model behind HTTP explain the texts; goes on where it was stopped. Prints the sum and returns it.

    Args:
      ask: (rows, endpoint, asking) -> a coroutine that asks for all rows. ask_for: is told what would be sent
        and what it may cost, and raises when it may not be.

    Raises UserError as `clients`, `Asking` and `Output` do; what is answered by then is kept.
    """
    from nla_jax.metrics import Progress

    def keyed(text: "Text") -> Row:
        doc, start, end = text
        prompt = explanations.instruction(doc.text[start:end])
        return key_of(prompt, e.model), prompt

    output = answers.Output(texts, out, lambda text: journal.get(keyed(text)[0]))
    new, characters = set(), 0
    for text in texts:
        if not output.has(text):
            key, prompt = keyed(text)
            if key not in journal and int(key, 16) not in new:
                new.add(int(key, 16))
                characters += len(prompt)
    if new:
        ask_for(consent.estimate(e, settings, len(new), characters))
    cached = len(texts) - len(new)
    # Batches that were handed in are paid for: they are collected even if nothing else is asked.
    asking = Asking(journal, settings, e.model)
    try:
        if new or journal.batches:
            with Progress("explain", len(texts), cached, unit="texts") as bar:
                asking.told = _teller(bar, asking.tally, output)
                asyncio.run(ask(_rows(map(keyed, texts), new, journal), e, asking))
    finally:
        output.advance()
        report = {**_came(output), **_spent(asking.tally, cached), "journal": str(journal.path)}
        print(json.dumps(report, indent=1))
    return report


def _rows(rows: Iterator[Row], new: set[int], journal: Journal) -> Iterator[Row]:
    """Those that are new, each once, unless they are answered by the time that they are taken."""
    for key, prompt in rows:
        if int(key, 16) in new:
            new.discard(int(key, 16))
            if key not in journal:
                yield key, prompt


async def _one_by_one(rows: Iterator[Row], e: clients.Endpoint, asking: Asking) -> None:
    async with clients.asker(e) as ask:
        await asking.ask_all(rows, ask)


def _in_batches(size: int, poll: float) -> Callable:
    return lambda rows, e, asking: batches.ask_in_batches(rows, e, asking, size=size, poll=poll)


def _teller(bar: "Progress", tally: Tally, output: answers.Output) -> Callable[[], None]:
    def told() -> None:
        dollars = "" if tally.cost is None else f", ${tally.cost:.2f}"
        again, failed = sum(tally.again.values()), sum(tally.failed.values())
        tokens = f"{tally.tokens_in:,} + {tally.tokens_out:,} tokens"
        bar.advance(1, note=f"{tokens}{dollars}, {again} repeated, {failed} failed")
        if (tally.answered + failed) % EVERY == 0:
            output.advance()

    return told


def _came(output: answers.Output) -> dict:
    """What has come of the texts: texts = kept + dropped + failed + left."""
    return {
        "texts": len(output.texts),
        "kept": output.kept,
        "dropped": dict(sorted(output.dropped.items())),
        "failed": dict(sorted(output.failed.items())),
        "left": len(output.texts) - output.at,
    }


def _spent(tally: Tally, cached: int) -> dict:
    """What this run has asked for: asked = answered + failed + unfinished."""
    return {
        "cached": cached,
        "asked": tally.asked,
        "answered": tally.answered,
        "failed now": dict(sorted(tally.failed.items())),
        "unfinished": tally.asked - tally.answered - sum(tally.failed.values()),
        "repeated": dict(sorted(tally.again.items())),
        "tokens read": tally.tokens_in,
        "tokens written": tally.tokens_out,
        "dollars": tally.cost and round(tally.cost, 6),
    }
