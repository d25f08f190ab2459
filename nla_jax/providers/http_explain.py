"""Explanations by models over HTTP, and a report of the outcomes."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.data import explanations
from nla_jax.providers import answer_files, anthropic_batches, clients, consent
from nla_jax.providers.journal import Journal, key_of
from nla_jax.providers.scheduler import Row, Scheduler, Settings, Tally
from nla_jax.util import event_loop

if TYPE_CHECKING:
    from nla_jax.providers.target_model import Text
    from nla_jax.util.progress import Progress

EVERY = 64  # outcomes between two writes of the output


def run(texts: Sequence["Text"], out: str | Path, journal: Journal, e: clients.Endpoint, settings: Settings,
        ask: Callable, ask_for: Callable[[str], None]) -> dict:
    """Let a model over HTTP explain the texts. Prints and returns a report. An interrupted run is resumed.

    Args:
      ask: (rows, endpoint, asking) -> a coroutine that requests all rows.
      ask_for: gets a line about what will be sent and its cost; raises if the user does not agree.

    Raises UserError as `clients`, `Scheduler` and `Output` do; answers that arrived before are kept.
    """
    from nla_jax.util.progress import Progress

    def keyed(text: "Text") -> Row:
        doc, start, end = text
        prompt = explanations.instruction(doc.text[start:end])
        return key_of(prompt, e.model), prompt

    output = answer_files.Output(texts, out, lambda text: journal.get(keyed(text)[0]))
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
    # Submitted batches are paid for, so they are collected even if there is no new text.
    asking = Scheduler(journal, settings, e.model)
    try:
        if new or journal.batches:
            with Progress("explain", len(texts), cached, unit="texts") as bar:
                asking.told = _progress_callback(bar, asking.tally, output)
                event_loop.run(ask(_rows(map(keyed, texts), new, journal), e, asking))
    finally:
        output.advance()
        report = {**outcome(output), **_request_counts(asking.tally, cached), "journal": str(journal.path)}
        print(json.dumps(report, indent=1))
    return report


def _rows(rows: Iterator[Row], new: set[int], journal: Journal) -> Iterator[Row]:
    """Yield each new row once, unless the journal has its answer by then."""
    for key, prompt in rows:
        if int(key, 16) in new:
            new.discard(int(key, 16))
            if key not in journal:
                yield key, prompt


async def one_by_one(rows: Iterator[Row], e: clients.Endpoint, asking: Scheduler) -> None:
    async with clients.open_asker(e) as ask:
        await asking.ask_all(rows, ask)


def in_batches(size: int, poll: float) -> Callable:
    return lambda rows, e, asking: anthropic_batches.ask_in_batches(rows, e, asking, size=size, poll=poll)


def _progress_callback(bar: "Progress", tally: Tally, output: answer_files.Output) -> Callable[[], None]:
    def told() -> None:
        dollars = "" if tally.cost is None else f", ${tally.cost:.2f}"
        again, failed = sum(tally.again.values()), sum(tally.failed.values())
        tokens = f"{tally.tokens_in:,} + {tally.tokens_out:,} tokens"
        bar.advance(1, note=f"{tokens}{dollars}, {again} repeated, {failed} failed")
        if (tally.answered + failed) % EVERY == 0:
            output.advance()

    return told


def outcome(output: answer_files.Output) -> dict:
    """Return the numbers of texts by outcome: texts = kept + dropped + failed + left."""
    return {
        "texts": len(output.texts),
        "kept": output.kept,
        "dropped": dict(sorted(output.dropped.items())),
        "failed": dict(sorted(output.failed.items())),
        "left": len(output.texts) - output.at,
    }


def _request_counts(tally: Tally, cached: int) -> dict:
    """Return the numbers of this run's requests: asked = answered + failed + unfinished."""
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
