"""Paraphrase explanations with another language model, for `nla evaluate --paraphraser SPEC`."""

from collections.abc import Callable
from pathlib import Path

from nla_jax.lm import thinking
from nla_jax.providers import consent, questions
from nla_jax.providers.scheduler import Settings

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

    `spec` is as in `questions.find_model`. A paraphrase is None if the model gives no usable answer. Answers
    are saved in the file `journal` and not requested again.

    Args:
      texts: the maximal number of explanations, for the estimate. ask_for: as in `http_explain.run`.
      key_env: as in `clients.endpoint`.

    Raises UserError when `spec` is invalid, or when a trial request fails (key, model or address).
    """
    model = questions.find_model(spec, "paraphraser", key_env=key_env, timeout=timeout)
    settings = settings or Settings()
    ask_for(consent.estimate(model.endpoint, settings, texts, texts * (len(REWRITE) + TYPICAL)))

    def rewrite(explanations: list[str]) -> list[str | None]:
        prompts = [REWRITE.replace("{text}", t) for t in explanations]
        found = questions.ask_journalled(model, journal, settings, prompts, "the rest is not paraphrased")
        return [_usable_answer(o) for o in found]

    questions.try_model(model, settings, REWRITE.replace("{text}", TRIAL), "paraphraser")
    return rewrite


def _usable_answer(came) -> str | None:
    usable = came is not None and came.answer is not None and not came.reason
    return (thinking.split(came.answer)[0].strip() or None) if usable else None


REWRITE = """\
Rewrite the text below in other words. Keep its meaning and its line breaks. Answer with the rewritten \
text alone.

{text}"""
