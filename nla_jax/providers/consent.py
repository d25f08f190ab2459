"""What would be sent and what it may cost, said before anything is; and a yes to it."""

import sys

from nla_jax.errors import UserError
from nla_jax.providers.clients import Endpoint
from nla_jax.providers.scheduler import Settings

CHARACTERS = 4  # of English in a token, about


def estimate(e: Endpoint, settings: Settings, prompts: int, characters: int) -> str:
    """One line: how many prompts go where, how many tokens that is, and what it may cost."""
    read, written = -(-characters // CHARACTERS), prompts * e.max_tokens
    cost = settings.cost(read, written)
    dollars = "cost not known without --price" if cost is None else f"about ${cost:,.2f} at most"
    return (f"{prompts:,} prompts go to {e.url} (model {e.model}): about {read:,} tokens to read, at most "
            f"{written:,} to write; {dollars}")


def ask_for(what: str, yes: bool) -> None:
    """Show what would be sent and return when it may be: `yes`, or a y typed on a terminal.

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
