"""The estimate of what will be sent and its cost, and the user's consent to it."""

import sys

from nla_jax.errors import UserError
from nla_jax.providers.clients import Endpoint
from nla_jax.providers.scheduler import Settings

CHARACTERS = 4  # characters of English per token, approximately


def estimate(e: Endpoint, settings: Settings, prompts: int, characters: int) -> str:
    """Return one line: the number of prompts, their destination, their tokens, and the maximum cost."""
    read, written = -(-characters // CHARACTERS), prompts * e.max_tokens
    cost = settings.cost(read, written)
    dollars = "cost not known without --price" if cost is None else f"about ${cost:,.2f} at most"
    return (f"{prompts:,} prompts go to {e.url} (model {e.model}): about {read:,} tokens to read, at most "
            f"{written:,} to write; {dollars}")


def ask_consent(what: str, yes: bool) -> None:
    """Print what will be sent, and return if `yes` is set or the user types y on a terminal.

    Raises UserError otherwise.
    """
    print(f"nla: {what}", file=sys.stderr)
    if yes:
        return
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError("nothing was sent: give --yes to send it without being asked")
    print("Send them? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was sent")
