"""Paraphrase explanations with another language model, for `nla evaluate --paraphraser SPEC`."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from nla_jax.errors import UserError, short_repr
from nla_jax.lm import thinking
from nla_jax.providers import clients, consent
from nla_jax.providers.journal import Journal, key_of
from nla_jax.providers.scheduler import Scheduler, Settings
from nla_jax.util import event_loop

SPEC = re.compile(rf"({'|'.join(clients.PROVIDERS)}):(\S+?)(?:@(https?://\S+))?")
TYPICAL = 500  # characters of an explanation for the estimate; most have fewer
TRIAL = 'A report on a storm at sea.\nIt ends on "the captain", so "said" is next.'


def make_paraphraser(
    spec: str,
    journal: str | Path,
    *,
    texts: int,
    ask_for: Callable[[str], None],
    key_env: str = "",
    settings: Settings | None = None,
    timeout: float = 120.0,
) -> Callable[[list[str]], list[str | None]]:
    """Return a function from explanations to paraphrases by the model `spec`.

    `spec` is `openai:MODEL`, `openai:MODEL@URL` or `anthropic:MODEL`. A paraphrase is None if the model gives
    no usable answer. Answers are saved in the file `journal` and not requested again.

    Args:
      texts: the maximal number of explanations, for the estimate. ask_for: as in `http_explain.run`.
      key_env: as in `clients.endpoint`.

    Raises UserError when `spec` is invalid, or when a trial request fails (key, model or address).
    """
    found = SPEC.fullmatch(spec)
    if not found:
        raise UserError(f"no paraphraser {spec!r}: write openai:MODEL@http://HOST:PORT/v1, openai:MODEL or "
                        "anthropic:MODEL")
    kind, model, url = found.groups()
    e = clients.endpoint(kind, model, url or "", key_env, max_tokens=400, timeout=timeout)
    settings = settings or Settings()
    ask_for(consent.estimate(e, settings, texts, texts * (len(REWRITE) + TYPICAL)))

    def rewrite(explanations: list[str]) -> list[str | None]:
        prompts = [REWRITE.replace("{text}", t) for t in explanations]
        keys = [key_of(p, model) for p in prompts]
        with Journal(journal) as j:
            new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in j}
            try:
                event_loop.run(_ask(e, Scheduler(j, settings, model), iter(new.items())))
            except UserError as err:
                print(f"nla: {err}; the rest is not paraphrased", file=sys.stderr)
            return [_usable_answer(j.get(k)) for k in keys]

    event_loop.run(_try(e, settings))
    return rewrite


async def _try(e: clients.Endpoint, settings: Settings) -> None:
    async with clients.open_asker(e) as ask:
        try:
            await Scheduler(None, settings, e.model).patient(lambda: ask(REWRITE.replace("{text}", TRIAL)))
        except clients.Failed as f:
            about = f"{f.reason} ({short_repr(f.detail)})"
            raise UserError(f"{e.url} does not answer as a paraphraser: {about}") from None


async def _ask(e: clients.Endpoint, asking: Scheduler, rows) -> None:
    async with clients.open_asker(e) as ask:
        await asking.ask_all(rows, ask)


def _usable_answer(came) -> str | None:
    usable = came is not None and came.answer is not None and not came.reason
    return (thinking.split(came.answer)[0].strip() or None) if usable else None


REWRITE = """\
Rewrite the text below in other words. Keep its meaning and its line breaks. Answer with the rewritten \
text alone.

{text}"""
