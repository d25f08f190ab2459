"""Checks of the settings that choose RL's reward, before any work."""

from ml_collections import ConfigDict

from nla_jax.errors import UserError
from nla_jax.evaluate.words import wordnet
from nla_jax.providers.clients import PROVIDERS
from nla_jax.rl.reading import READERS
from nla_jax.util.choices import choose

# `rl.paraphraser`: a text -> a paraphrase. Own functions take a list of texts.
PARAPHRASERS = {"wordnet": wordnet.paraphrase}


def check(c: ConfigDict) -> None:
    """Raise UserError for values and combinations of the reward's settings that make no sense."""
    o = c.rl
    if o.reader not in READERS:
        raise UserError(f"config rl.reader={o.reader!r}: must be one of {', '.join(map(repr, READERS))}")
    if o.paraphraser.partition(":")[0] in PROVIDERS:
        raise UserError(
            f"config rl.paraphraser={o.paraphraser!r}: each step would wait for {o.batch * o.group} answers "
            "of an LLM; set 'wordnet', or 'module:function' of your own"
        )
    choose(PARAPHRASERS, o.paraphraser, "config rl.paraphraser")
    for name, off in (("reader", "ar"), ("ar_reset", 0)):
        if c.ar.kind == "frozen" and o[name] != off:
            raise UserError(f"config rl.{name}={o[name]!r}: with ar.kind='frozen' the only reader is the "
                            f"frozen target; set rl.{name}={off!r}")
    if o.ar_reset and (o.reader != "ar" or not o.train_ar):
        other = f"rl.reader={o.reader!r}" if o.reader != "ar" else "rl.train_ar=False"
        raise UserError(f"config rl.ar_reset={o.ar_reset}: has no effect on the reward with {other}; set "
                        "rl.ar_reset=0")
    if o.prefix_max and not o.prefix_min:
        raise UserError(f"config rl.prefix_max={o.prefix_max}: set rl.prefix_min too, the shortest prefix")
    if o.prefix_min > (o.prefix_max or o.max_new):
        named = f"rl.prefix_max={o.prefix_max}" if o.prefix_max else f"rl.max_new={o.max_new}"
        raise UserError(f"config rl.prefix_min={o.prefix_min}: must be at most {named}")
    for name in ("patch_kl", "false_claims"):
        if o[name] and o.shuffle_h:
            raise UserError(f"config rl.{name}={o[name]}: compares with the row's text, but rl.shuffle_h "
                            f"with another row; set rl.{name}=0")
    if o.false_claims and c.activations == "online":
        raise UserError(f"config rl.false_claims={o.false_claims}: needs the texts of a store; set "
                        "activations='stored', or rl.false_claims=0")


def needs_texts(c: ConfigDict) -> str:
    """Return the first setting for which RL needs the text of every stored row, or ""."""
    names = ("false_claims", *(("patch_kl",) if c.activations == "stored" else ()))
    return next((f"rl.{name}" for name in names if c.rl[name] and c.rl.steps), "")


def needs_wordnet(c: ConfigDict) -> bool:
    """Return whether RL looks words up in WordNet."""
    paraphrases = c.rl.paraphrase and c.rl.paraphraser == "wordnet"
    return bool(c.rl.steps and (paraphrases or c.rl.false_claims))


def edits_answers(c: ConfigDict) -> bool:
    """Return whether RL edits or judges answers on the host, between its rollout and its update."""
    return bool(c.rl.paraphrase or c.rl.false_claims)
