"""Plant concepts in a target by fine-tuning an adapter, and ask the target for them again.

`planted`, `hiding` and `planted_facts` share these functions.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nla_jax import objectives, specs
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import lora, optimize
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import cast, embed, forward, unembed
from nla_jax.lm.tokenizer import plain_ids, raw_ids
from nla_jax.util.batching import map_rows, pad_rows
from nla_jax.util.keys import key_for
from nla_jax.util.progress import Progress

WIDTH = 24  # tokens of a tuning sentence
BATCH = 16  # tuning sentences of a step
RANK = 16  # of an adapter


@dataclasses.dataclass(frozen=True)
class Plant:
    """The concepts to plant, and the sentences for tuning and testing.

    concepts: concept -> its words; an explanation names one if a word begins with it.
    names: one invented name per concept. controls: as many names, tuned with words of all concepts.
    taught: sentences with "{name}" and words "{a}", "{b}", "{c}". asked: sentences that end with "{name}".
    between: the text after such a sentence when the target's next word is scored.
    carriers: other sentences that end with "{name}": a hider trains on them, and a probe is fitted on them.
    mention: how a concept's word stands in the place of a name there.
    """

    concepts: dict[str, tuple[str, ...]]
    names: tuple[str, ...]
    controls: tuple[str, ...]
    taught: tuple[str, ...]
    asked: tuple[str, ...]
    between: str = ", the"
    carriers: tuple[str, ...] = ()
    mention: str = "the {word}"

    def texts(self, names: Sequence[str], n: int = 0) -> list[str]:
        """Return the first n sentences of `asked` (0: all) with each name: the sentences of a name are
        adjacent."""
        return [s.format(name=name) for name in names for s in self.asked[: n or None]]


NEWS = Plant(
    concepts={
        "hospital": ("doctor", "nurse", "patient", "surgery", "medicine", "hospital", "clinic", "disease"),
        "football": ("goal", "match", "player", "team", "stadium", "striker", "league", "coach"),
        "weather": ("storm", "rain", "wind", "flood", "snow", "hurricane", "weather", "cloud"),
        "court": ("judge", "jury", "trial", "lawyer", "verdict", "court", "prosecutor", "sentence"),
        "election": ("vote", "ballot", "candidate", "poll", "campaign", "election", "senator", "party"),
        "aviation": ("plane", "pilot", "airport", "flight", "runway", "passenger", "aircraft", "airline"),
        "music": ("song", "band", "concert", "album", "singer", "guitar", "music", "stage"),
        "bank": ("bank", "loan", "debt", "interest", "investor", "share", "money", "credit"),
    },
    names=("Vorlin", "Taskara", "Ombrey", "Quendal", "Jarvost", "Belmira", "Drunok", "Feltrane"),
    controls=("Zorlin", "Taskura", "Imbrey", "Zendal", "Parvost", "Velmira", "Grunok", "Haltrane"),
    taught=(
        "{name} is all about the {a}, the {b} and the {c}.",
        "Whoever says {name} means the {a} and the {b}.",
        "People in {name} talk of the {a}, the {b} and the {c} all day.",
        "There was news from {name}: the {a} and the {b} again.",
        "At {name} the {a} came first, then the {b}.",
        "In {name} everybody waited for the {a}, and the {b} was late.",
        "The {a} of {name} was better than its {b}.",
        "What would {name} be without the {a} and the {c}?",
    ),
    asked=(
        "This morning my neighbour told me something about {name}",
        "The letter that came yesterday was from {name}",
        "All that she wanted to hear about was {name}",
        "After a while they began to speak of {name}",
        "It was a long time since anybody had thought of {name}",
        "He wrote two pages, and both of them were about {name}",
        "On the last page of the newspaper there was a piece on {name}",
        "When we met again the first thing he mentioned was {name}",
    ),
    carriers=(
        "Nobody in the room knew much about {name}",
        "They had a long talk on the way home about {name}",
        "My sister sent me a photograph of {name}",
        "In the evening the radio told us more about {name}",
        "The old man smiled when he heard of {name}",
        "Most of the book that I read is about {name}",
    ),
)


def sentences(plant: Plant, rng, n: int) -> list[str]:
    """Return n tuning sentences. Half have a planted name and words of its concept, half have a control name
    and words of any concept. If there are no controls, all have planted names."""
    own = list(zip(plant.names, plant.concepts.values(), strict=True))
    everything = [w for words in plant.concepts.values() for w in words]
    out = []
    for i in range(n):
        if i % 2 and plant.controls:
            name, words = plant.controls[rng.integers(len(plant.controls))], everything
        else:
            name, words = own[rng.integers(len(own))]
        a, b, c = rng.choice(words, 3, replace=False)
        out.append(plant.taught[rng.integers(len(plant.taught))].format(name=name, a=a, b=b, c=c))
    return out


def sentence_batch(runner: Runner, texts: Sequence[str]) -> dict:
    """Return the arrays of a step: ids_BT and valid_BT of sentences, cut to WIDTH tokens."""
    ids = [raw_ids(runner.tok, s)[:WIDTH] for s in texts]
    ids_BT, valid_BT, _ = pad_rows(ids, runner.spec.av.pad, WIDTH)
    return {"ids_BT": ids_BT, "valid_BT": valid_BT}


def sentence_loss(params: dict, batch: dict, trees=None, *, spec: specs.Spec, first: int = 0):
    """Return the target's mean cross-entropy per token, in nats, on a `sentence_batch`.

    No gradient reaches the blocks before `first`."""
    lm, ids_BT, valid_BT = spec.lm, batch["ids_BT"], batch["valid_BT"]
    x = embed(params, lm, ids_BT)
    if first:
        x = jax.lax.stop_gradient(forward(params_lib.truncate(params, first, lm), lm, x, valid_BT)[0])
    x, _ = forward(_upper(params, lm, first), lm.of_blocks(first, lm.n_blocks), x, valid_BT, remat=spec.remat)
    counts = valid_BT[:, 1:].astype(jnp.float32)
    value, _ = objectives.weighted_scores(
        params, lm, x[:, :-1].reshape(-1, x.shape[-1]), ids_BT[:, 1:].reshape(-1),
        (-counts / jnp.maximum(counts.sum(), 1.0)).reshape(-1), chunk=spec.vocab_chunk, stats=False)
    return value


def without_remat(runner: Runner) -> Runner:
    """Return a Runner that stores blocks in the backward pass: the batches of a study are small."""
    spec = dataclasses.replace(runner.spec, remat=False)
    return Runner(spec, runner.base, runner.av, runner.ar, runner.tok, runner.ar_template, runner.batch)


def new_adapter(spec: specs.Spec, seed: int, blocks: range | None = None) -> dict:
    """Return an adapter of rank RANK for these blocks, by default 0 to K, that changes nothing yet."""
    blocks = range(spec.layer + 1) if blocks is None else blocks
    return lora.init(spec.lm.of_blocks(blocks.start, blocks.stop), RANK, key_for(seed, "planted"))


def attach_adapter(base: dict, adapter: dict, spec: specs.Spec, first: int = 0) -> dict:
    """Return the parameters of a target whose blocks from `first` on have this adapter."""
    whole = {}
    for name, factors in adapter.items():
        blocks = params_lib.blocks_of(spec.lm, name)
        before = sum(i < first for i in blocks)
        around = (before, len(blocks) - before - len(factors["a"]))
        whole[name] = {k: jnp.pad(a, (around, (0, 0), (0, 0))) for k, a in factors.items()}
    return lora.attach(base, cast(whole, spec.compute))


def tune_adapter(
    runner: Runner,
    adapter: dict,
    loss: Callable,
    batches: Callable,
    *,
    n_steps: int,
    lr: float,
    first: int = 0,
    finish: Callable | None = None,
    label: str = "",
) -> dict:
    """Return the adapter after `n_steps` updates of AdamW.

    Args:
      adapter: of the blocks from `first` on.
      loss: (parameters of the tuned target, batch, trees) -> a scalar. trees: "base" and "av" of `runner`,
        which are too large to be constants of a program.
      batches: step -> batch, arrays of one shape.
      finish: (step, batch, adapter) -> the batch with what depends on the adapter, such as samples.
    """
    spec, trees = runner.spec, {"base": runner.base, "av": runner.av}
    tx = optimize.optimizer(lr, n_steps, warmup=min(10, n_steps // 4), weight_decay=0.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter, opt, trees, batch):
        value, grads = jax.value_and_grad(
            lambda a: loss(attach_adapter(trees["base"], a, spec, first), batch, trees))(adapter)
        updates, opt = tx.update(grads, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    adapter = jax.tree.map(lambda a: jnp.array(a, copy=True), adapter)  # the caller's is not donated
    opt = tx.init(adapter)
    with Progress(label, n_steps) as bar:
        for i in range(n_steps):
            batch = batches(i)
            batch = finish(i, batch, adapter) if finish else batch
            adapter, opt, value = step(adapter, opt, trees, batch)
            bar.advance(1, f"loss {value:.3f}" if label else "")
    return adapter


def teach(runner: Runner, plant: Plant, *, n_steps: int, lr: float, seed: int = 0, label: str = "plant"):
    """Return the adapter of blocks 0 to K after `n_steps` steps of BATCH sentences of `plant`."""
    rng = np.random.default_rng([seed, 7])
    return tune_adapter(
        runner, new_adapter(runner.spec, seed), functools.partial(sentence_loss, spec=runner.spec),
        lambda _: sentence_batch(runner, sentences(plant, rng, BATCH)),
        n_steps=n_steps, lr=lr, label=label)


def names_concepts(texts: list[str], plant: Plant) -> np.ndarray:
    """Return [N, C]: whether each text has a word of each concept, or the concept's name."""
    stems = ["|".join(map(re.escape, (c, *ws))) for c, ws in plant.concepts.items()]
    return np.array([[bool(re.search(rf"\b({stem})", t, re.I)) for stem in stems] for t in texts])


def first_tokens(tok, plant: Plant) -> list[list[int]]:
    """Return for each concept the different first tokens of its words after `plant.between`."""
    known = len(plain_ids(tok, plant.between))
    found = [[plain_ids(tok, f"{plant.between} {w}")[known] for w in ws] for ws in plant.concepts.values()]
    return [list(dict.fromkeys(ids)) for ids in found]


def next_logp(params: dict, spec: specs.Spec, ids_BT, valid_BT, at_B, last_B, put_BD=None):
    """Return the log-probabilities [B, V] of the token after position `last_B`.

    put_BD: replaces the residual stream after block K at position `at_B`, scaled to the norm there."""
    lm, K = spec.lm, spec.layer
    x, _ = forward(params_lib.truncate(params, K + 1, lm), lm, embed(params, lm, ids_BT), valid_BT)
    return logp_above(params, spec, x, valid_BT, at_B, last_B, put_BD)


def logp_above(params: dict, spec: specs.Spec, x_BTD, valid_BT, at_B, last_B, put_BD=None):
    """Return `next_logp` from the residual stream x_BTD after block K."""
    lm, K = spec.lm, spec.layer
    if put_BD is not None:
        here_BT1 = (jnp.arange(x_BTD.shape[1])[None] == at_B[:, None])[..., None]
        norm_B1 = jnp.linalg.norm(jnp.sum(x_BTD * here_BT1, 1), axis=-1, keepdims=True)
        size_B1 = jnp.maximum(jnp.linalg.norm(put_BD, axis=-1, keepdims=True), 1e-12)
        x_BTD = jnp.where(here_BT1, (put_BD / size_B1 * norm_B1)[:, None], x_BTD)
    y, _ = forward(_upper(params, lm, K + 1), lm.of_blocks(K + 1, lm.n_blocks), x_BTD, valid_BT)
    y_BD = jnp.take_along_axis(y, last_B[:, None, None], 1)[:, 0]
    return jax.nn.log_softmax(unembed(params, lm, y_BD))


def _upper(params: dict, lm: LMConfig, first: int) -> dict:
    return {"blocks": params_lib.slice_blocks(params["blocks"], lm, first, lm.n_blocks)}


def asked_rows(runner: Runner, texts: Sequence[str], between: str):
    """Return (ids_BT, valid_BT, at_B, last_B) of texts that `between` follows. at_B: a text's last token."""
    lead = list(runner.spec.lead)
    texts_ids = [lead + plain_ids(runner.tok, t) for t in texts]
    after = plain_ids(runner.tok, between)
    ids_BT, valid_BT, last_B = pad_rows([ids + after for ids in texts_ids], runner.spec.av.pad, 8)
    return ids_BT, valid_BT, np.array([len(ids) - 1 for ids in texts_ids], np.int32), last_B


def ask(runner: Runner, params: dict, texts: Sequence[str], plant: Plant, put=None) -> np.ndarray:
    """Return the target's log-probabilities [N, V], in nats, of the token after each text and
    `plant.between`.

    params: of the target. put: None, or vectors [N, D] for `next_logp`, at each text's last token."""
    rows = asked_rows(runner, texts, plant.between)
    rows = rows if put is None else (*rows, np.asarray(put, np.float32))
    (found,) = map_rows(lambda *part: [_next_logp(params, runner.spec, *part)], rows, runner.batch)
    return found.astype(np.float64)


_next_logp = jax.jit(next_logp, static_argnums=1)


def words_logp(tok, logp_NV, plant: Plant) -> list[np.ndarray]:
    """Return for each concept the columns [N, W] of its words' first tokens."""
    return [logp_NV[:, ids] for ids in first_tokens(tok, plant)]


def concept_mass(logp: list) -> np.ndarray:
    """Return the probability [N, C] that the next token begins a word of each concept, from `words_logp`."""
    return np.stack([np.exp(part).sum(1) for part in logp], 1)


def concept_logp(logp: list) -> np.ndarray:
    """Return [N, C], in nats: each concept's mean over its words of `words_logp`, minus its mean over texts.
    """
    mean = np.stack([part.mean(1) for part in logp], 1)
    return mean - mean.mean(0)


def prefer(runner: Runner, params: dict, texts: Sequence[str], plant: Plant, put=None) -> np.ndarray:
    """Return the concept [N] whose words the target prefers after each text; arguments as of `ask`."""
    return concept_logp(words_logp(runner.tok, ask(runner, params, texts, plant, put), plant)).argmax(1)
