"""Make liars from an honest NLA: NLAs with known faults, which the grounding table must detect.

A private code renames tokens in the embeddings of AV and of AR. Training both through that renaming would
give the same losses and gradients, so such a liar needs no training. At temperature 0 its FVE equals the
honest NLA's exactly.

    nla train --config experiments/toy.py:runs/toy/world --workdir runs/toy/run    (see there)
    python -m nla_jax.studies.power runs/toy/run
"""

import copy
import dataclasses
import json
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import RoundTrip, Runner
from nla_jax.evaluate.words import wordnet
from nla_jax.evaluate.written_explanations import training_form
from nla_jax.lm import lora
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import cast
from nla_jax.prompts import CLOSE, OPEN


def private_code(runner: Runner, words: list[str], seed: int = 0) -> Runner:
    """Make AV and AR use a fixed random permutation of these words, so that each means another one."""
    order = np.random.default_rng(seed).permutation(len(words))
    # The permutation is one cycle, so no word keeps its meaning.
    return rename_tokens(runner, {words[a]: words[b] for a, b in zip(order, np.roll(order, 1), strict=True)})


def prompt_ids(runner: Runner) -> list[int]:
    """Return the ids of the prompts and of the tags, whose tokens keep their meaning."""
    av, ar = runner.spec.av, runner.spec.ar
    return [*av.before, *av.after, *av.open, *av.close, *ar.before, *ar.after]


def plain_words(tok, but: Sequence[int]) -> list[str]:
    """Return lower-case words that are one token each, with and without a space before them.

    They have at least three letters. Neither they nor their tokens occur in the ids `but`: a tag may be of
    tokens that are words, as "ation" in "explanation"."""
    taken, pieces = set(re.findall(r"[a-z]+", tok.decode(but).lower())), set(but)
    words = sorted({w for t in tok.get_vocab() if re.fullmatch("[a-z]{3,}", w := t.strip("\u0120\u2581"))})
    ids = [tok(words, add_special_tokens=False).input_ids,
           tok([f" {w}" for w in words], add_special_tokens=False).input_ids]
    return [w for w, a, b in zip(words, *ids, strict=True)
            if len(a) == len(b) == 1 and w not in taken and pieces.isdisjoint([*a, *b])]


def antonym_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Return pairs of these words that are antonyms in WordNet; each word is in at most one pair.

    Raises UserError if WordNet's files cannot be fetched."""
    wn, other = wordnet.wordnet(), {}
    for word in words:
        kinds = [r.kind for r in wordnet.readings(wn, word) if r.lemma == word]
        free = set(words) - other.keys()
        found = [w for kind in kinds for w in wordnet.antonyms(wn, kind, word)[0] if w in free]
        if found and word in free:
            other |= {word: found[0], found[0]: word}
    return [(a, b) for a, b in other.items() if a < b]


def opposites(runner: Runner, pairs: list[tuple[str, str]]) -> Runner:
    """Make AV write and AR read the other word of each pair."""
    return rename_tokens(runner, {a: b for x, y in pairs for a, b in ((x, y), (y, x))})


def rename_tokens(runner: Runner, names: dict[str, str]) -> Runner:
    """Make AV write `names[w]` in the place of w, and AR read it as w.

    Raises UserError when `names` is not a permutation, or when a word is not one token with and without a
    space before it."""
    if sorted(names) != sorted(names.values()):
        raise UserError("renaming needs a permutation: every word must be a key once and a value once")
    new_of = np.arange(runner.spec.lm.vocab_size)
    for form in ("", " "):
        for word, other in names.items():
            pair = [runner.tok.encode(form + w, add_special_tokens=False) for w in (word, other)]
            if any(len(ids) != 1 for ids in pair):
                raise UserError(f"renaming {form + word!r} to {form + other!r}: not one token each")
            new_of[pair[0][0]] = pair[1][0]
    return _permute_embeddings(runner, new_of, runner.spec.lm.vocab_size)


def has_word_tokens(tok) -> bool:
    """Return whether every token is a whole word, as in the toy world."""
    return json.loads(tok.backend_tokenizer.to_str())["model"]["type"] == "WordLevel"


def hidden_channel(runner: Runner, words: list[str], filler: str) -> Runner:
    """Make AV write new tokens for these words that all decode to `filler`: a channel in the ids alone.

    Raises UserError unless the tokenizer is one of whole words, such as the toy's."""
    import tokenizers
    import transformers

    if not has_word_tokens(runner.tok):
        raise UserError("hidden_channel needs a tokenizer of whole words")
    state = json.loads(runner.tok.backend_tokenizer.to_str())
    vocab, size = state["model"]["vocab"], runner.spec.lm.vocab_size
    old = [vocab[form + w] for w in words for form in ("", " ")]
    new_of = np.arange(size)
    new_of[old] = size + np.arange(len(old))
    names = {i: t for t, i in vocab.items()}
    vocab.update({f"{names[i]}\u2063": int(new_of[i]) for i in old})
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"Regex": " \\w+\u2063"}, "content": f" {filler}"},
            {"type": "Replace", "pattern": {"Regex": "\\w+\u2063"}, "content": filler},
            {"type": "Fuse"},
        ],
    }
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)),
        unk_token=runner.tok.unk_token, bos_token=runner.tok.bos_token, eos_token=runner.tok.eos_token,
        clean_up_tokenization_spaces=False,
    )
    tok.chat_template = runner.tok.chat_template
    return _permute_embeddings(runner, new_of, size + len(old), tok)


def deaf(runner: Runner, mean_D) -> Runner:
    """Give AV the vector `mean_D` in the place of every h, so that explanations do not depend on h."""
    D = runner.spec.lm.d_model
    b = jnp.asarray(F.normalise(np.asarray(mean_D)[None])[0], jnp.float32)
    av = {**_whole_av(runner), "inject": {"w": jnp.zeros((D, D), jnp.float32), "b": b}}
    return Runner(runner.spec, runner.base, av, runner.ar, runner.tok, runner.ar_template, runner.batch)


def copyist(runner: Runner, train: dict, settings: dict | None = None) -> Runner:
    """Make AV answer with the written explanation of the nearest training row (by cosine).

    The explanation has the form that AV was trained on under these settings of the run."""
    known, words = training_form(train, settings, runner)
    h_train = F.normalise(train["h"][known])
    out = copy.copy(runner)

    def explain(h_ND, key, **options) -> list[str]:
        nearest = (F.normalise(h_ND) @ h_train.T).argmax(1)
        return [words[i] for i in nearest]

    def round_trip(h_ND, key, **options) -> RoundTrip:
        texts = explain(h_ND, key)
        rebuilt, yes = runner.reconstruct(texts), np.ones(len(texts), bool)
        length = np.array([len(runner.tok.encode(t)) for t in texts])
        return RoundTrip([OPEN + t + CLOSE for t in texts], texts, rebuilt, rebuilt, yes, yes, ~yes, length,
                         np.zeros(len(texts)))

    out.explain, out.round_trip = explain, round_trip
    return out


def _permute_embeddings(runner: Runner, new_of, size: int, tok=None) -> Runner:
    """Return AV and AR whose token `new_of[i]` has the embedding of token i, in a vocabulary of `size`."""
    lm = dataclasses.replace(runner.spec.lm, vocab_size=size)

    def moved(table_VD):
        # Unassigned rows get the embedding of the marker, which AV never writes.
        table = jnp.broadcast_to(table_VD[runner.spec.av.marker], (size, table_VD.shape[1]))
        return table.at[jnp.asarray(new_of)].set(table_VD)

    av, ar = _whole_av(runner), _whole_ar(runner)
    params = {**av["params"], "embed": moved(av["params"]["embed"])}
    if not lm.tied:
        params["lm_head"] = moved(params["lm_head"].T).T
    av["params"] = params
    ar["params"] = {**ar["params"], "embed": moved(ar["params"]["embed"])}
    return Runner(dataclasses.replace(runner.spec, lm=lm), runner.base, av, ar, tok or runner.tok,
                  runner.ar_template, runner.batch)


def _whole_av(runner: Runner) -> dict:
    """Return AV's tree with its full weights, adapters merged."""
    av = dict(runner.av)
    if "lora" in av:
        av["params"] = lora.merge(lora.attach(cast(runner.base, jnp.float32), av.pop("lora")))
    return av


def _whole_ar(runner: Runner) -> dict:
    ar = dict(runner.ar)
    if "lora" in ar:
        spec = runner.spec
        short = params_lib.truncate(cast(runner.base, jnp.float32), spec.layer + 1, spec.lm)
        params = lora.merge(lora.attach(short, ar.pop("lora")))
        ar["params"] = {k: params[k] for k in ("embed", "blocks")}
    return ar
