"""A language model as judge of claims: which claims of an explanation are true of its source text?

The rules (`claims.judge_claims`) find words. A judge reads sentences, so the two differ where a claim is true
in other words, or false with the text's own. All claims of an explanation are judged in one request.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import fitted
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.words.claims import Claim
from nla_jax.lm import thinking
from nla_jax.lm.chat import make_answer
from nla_jax.lm.chat_prompts import chat_ids
from nla_jax.lm.special_tokens import break_special
from nla_jax.providers import clients, consent, own_provider, questions
from nla_jax.providers.scheduler import Settings
from nla_jax.util.batching import chunks
from nla_jax.util.keys import new_key

TARGET = "target"  # the judge that is the explained model itself
TYPICAL = 2500  # characters of a text, its explanation and its claims, for the estimate
LONGEST = 400  # tokens of an answer
_LINE = re.compile(r"\W*(\d+)\W+(yes|no|true|false)\b.*", re.IGNORECASE)
_FENCE = re.compile(r"```\w*")
_SAYS = {"yes": True, "true": True, "no": False, "false": False}


class Item(NamedTuple):
    """An explanation, its claims, and the text that it must be true of."""

    text: str
    explanation: str
    claims: Sequence[Claim]


# What became of an item: bool [len(claims)], or why there is no judgement.
Judgement = np.ndarray | str
Judge = Callable[[Runner, Sequence[Item], str], list[Judgement]]  # (runner, items, label)


def make_judge(spec: str, journal: str | Path, *, texts: int, ask_for: Callable[[str], None],
               key_env: str = "", settings: Settings | None = None, timeout: float = 120.0) -> Judge:
    """Return a judge by the model `spec`: as in `questions.find_model`, or "target", which sends nothing.

    Answers are saved in the file `journal` and not requested again.

    Args:
      texts: the maximal number of explanations, for the estimate. ask_for: as in `http_explain.run`.

    Raises UserError when `spec` is invalid, or when a trial request fails.
    """
    settings = settings or Settings()
    sizes: dict[str, int] = {}  # prompt -> number of claims
    usable = lambda prompt, answer: read_answer(answer, sizes[prompt]) is not None
    model = None
    if spec != TARGET:
        model = questions.find_model(spec, "judge", key_env=key_env, max_tokens=LONGEST, timeout=timeout,
                                     usable=usable)
        ask_for(consent.estimate(model.endpoint, settings, texts, texts * (len(JUDGE) + TYPICAL)))
        questions.try_model(model, settings, prompt_of(TRIAL), "judge")

    def judge(runner: Runner, items: Sequence[Item], label: str = "") -> list[Judgement]:
        prompts = [prompt_of(item) for item in items]
        sizes.update((p, len(item.claims)) for p, item in zip(prompts, items, strict=True))
        found = questions.ask_journalled(model or _target(runner, usable), journal, settings, prompts,
                                         "the rest is not judged", label)
        return [_judgement(o, len(item.claims)) for o, item in zip(found, items, strict=True)]

    return judge


def _judgement(came, n: int) -> Judgement:
    if came is None:
        return "not asked"
    if came.answer is None or came.reason:
        return came.reason
    read = read_answer(came.answer, n)
    return questions.UNREADABLE if read is None else read


def prompt_of(item: Item) -> str:
    """Return the request about an item."""
    lines, last = [], sum(c.kind == "ending" for c in item.claims)
    for i, c in enumerate(item.claims, 1):
        what = f'"{c.text}"'
        if c.kind == "ending":
            which = "last word" if last == 1 else f"word number {last} from the end"
            what = f"the {which} of the text is {what}"
            last -= 1
        lines.append(f"{i}. {c.kind}: {what}")
    parts = {"text": item.text, "explanation": item.explanation, "claims": "\n".join(lines)}
    return re.sub(r"{(\w+)}", lambda m: parts[m[1]], JUDGE)


def read_answer(answer: str, n: int) -> np.ndarray | None:
    """Return the judgements [n] of an answer, or None unless it judges each claim once and says no more.

    It is one line for each claim, its number and yes or no, perhaps with a reason after it. Or it is JSON: a
    list of n values, or an object with the numbers as keys. Drafts (`thinking`) and code fences are removed.
    """
    said = _FENCE.sub("", thinking.split(answer)[0]).strip()
    try:
        pairs = list(_of_json(json.loads(said)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = [_LINE.fullmatch(line.strip()) for line in said.splitlines() if line.strip()]
        if not all(found):
            return None
        pairs = [(int(m[1]), _SAYS[m[2].lower()]) for m in found]
    numbers = [k for k, _ in pairs]
    if sorted(numbers) != list(range(1, n + 1)):
        return None
    return np.array([v for _, v in sorted(pairs)], bool)


def _of_json(value) -> Iterator[tuple[int, bool]]:
    if isinstance(value, list):
        value = dict(enumerate(value, 1))
    for k, v in value.items():
        yield int(k), v if isinstance(v, bool) else _SAYS[v.lower()]


def _target(runner: Runner, usable: questions.Usable) -> questions.Model:
    """Return the frozen target as a model that answers, greedily."""
    spec, tok, batch = runner.spec, runner.tok, runner.batch
    name = f"{TARGET} {fitted.digest(runner.base)}"

    async def ask_all(rows, e, asking) -> None:
        ids = {key: (chat_ids(tok, break_special(tok, prompt)), prompt) for key, prompt in rows}
        fits = {key: v for key, v in ids.items() if len(v[0]) + LONGEST <= spec.lm.max_position}
        for key in ids.keys() - fits.keys():
            asking.failed(key, clients.Failed("a prompt that exceeds the target's context"))
        if not fits:
            return
        answer = make_answer(runner.base, spec.lm, tok, max_new=LONGEST, batch=batch, eos=spec.av.eos,
                             dtype=spec.compute)
        keys_B = jax.random.split(new_key(0), batch)  # unused, because decoding is greedy
        for part in chunks(sorted(fits, key=lambda key: len(fits[key][0])), batch):
            for key, text in zip(part, answer([fits[key][0] for key in part], keys_B), strict=True):
                if usable(fits[key][1], text):
                    asking.answered(key, clients.Answer(text))
                else:
                    asking.failed(key, clients.Failed(questions.UNREADABLE, text[:300]))

    try:
        chat_ids(tok, "a")
    except UserError as e:
        raise UserError(f"the target cannot be the judge: {e}") from e
    return questions.Model(own_provider.endpoint(name, max_tokens=LONGEST), ask_all, True)


JUDGE = """\
Another model wrote an EXPLANATION of a text that it had not seen. Say of each of its numbered claims \
whether it is true of the TEXT.

A claim is a word, a name, a number or a quotation of the explanation, in the sense that it has there. It is \
true if the text says it, in these or in other words, or clearly implies it. It is false if the text says \
something else, or nothing about it. A claim of the kind "ending" is about one word of the text's end; case \
and punctuation do not matter.

TEXT, which is cut at its end:
<text>
{text}
</text>

EXPLANATION:
<explanation>
{explanation}
</explanation>

CLAIMS:
{claims}

Answer with one line for each claim: its number, and yes or no, such as "1 yes". Write nothing else."""
TRIAL = Item("A storm at sea drove the ship", "A report on a storm.", (Claim("word", 14, 19, "storm"),))
