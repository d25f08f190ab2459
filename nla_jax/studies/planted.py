"""Plant a concept in the target and test whether explanations name it.

In other data the content of h is not known. Here the target is fine-tuned until an invented name means a
concept (Vorlin: doctors, nurses, patients). It then reads other sentences that contain the name and no word
of the concept, and h is captured at the name. AV, which was not trained on the tuned target, explains h.
The explanations are searched for the concept's words.

There are three controls: names that were tuned with words of all concepts, words of the other concepts, and
the target before tuning.

    python -m nla_jax.studies.planted runs/quickstart/bundle
"""

import argparse
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nla_jax import api, objectives
from nla_jax.evaluate import capture_texts, figure_table
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.interchange import find_bundle
from nla_jax.lm import chat_prompts, lora, optimize
from nla_jax.lm.model import cast, embed, forward, unembed
from nla_jax.lm.tokenizer import raw_ids
from nla_jax.studies import liars
from nla_jax.util.batching import map_rows, pad_rows
from nla_jax.util.keys import key_for
from nla_jax.util.number_types import real, whole
from nla_jax.util.progress import Progress


@dataclasses.dataclass(frozen=True)
class Plant:
    """The concepts to plant, and the sentences for tuning and testing.

    concepts: concept -> its words; an explanation names one if a word begins with it.
    names: one invented name per concept. controls: as many names, tuned with words of all concepts.
    taught: sentences with "{name}" and words "{a}", "{b}", "{c}". asked: sentences that end with "{name}".
    between: the text after such a sentence when the target's next word is scored.
    """

    concepts: dict[str, tuple[str, ...]]
    names: tuple[str, ...]
    controls: tuple[str, ...]
    taught: tuple[str, ...]
    asked: tuple[str, ...]
    between: str = ", the"


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
)


def sentences(plant: Plant, rng, n: int) -> list[str]:
    """Return n tuning sentences. Half have a planted name and words of its concept, half have a control name
    and words of any concept."""
    own = list(zip(plant.names, plant.concepts.values(), strict=True))
    everything = [w for words in plant.concepts.values() for w in words]
    out = []
    for i in range(n):
        if i % 2:
            name, words = plant.controls[rng.integers(len(plant.controls))], everything
        else:
            name, words = own[rng.integers(len(own))]
        a, b, c = rng.choice(words, 3, replace=False)
        out.append(plant.taught[rng.integers(len(plant.taught))].format(name=name, a=a, b=b, c=c))
    return out


def taught(
    runner: Runner,
    plant: Plant,
    *,
    n_steps: int,
    lr: float,
    rank: int = 16,
    batch: int = 16,
    width: int = 24,
    seed: int = 0,
    label: str = "plant",
) -> dict:
    """Tune the target of `runner` on `n_steps * batch` sentences of `plant`.

    Returns its parameters, with an adapter of rank `rank` on blocks 0 to K. `width`: tokens of a sentence."""
    spec, base = runner.spec, runner.base
    lm, rng = spec.lm, np.random.default_rng([seed, 7])
    adapter = lora.init(lm.first_blocks(spec.layer + 1), rank, key_for(seed, "planted"))
    tx = optimize.optimizer(lr, n_steps, warmup=min(10, n_steps // 4), weight_decay=0.0)

    def attached(base, adapter):
        above = lm.n_blocks - spec.layer - 1
        whole = jax.tree.map(lambda a: jnp.pad(a, ((0, above), (0, 0), (0, 0))), adapter)
        return lora.attach(base, cast(whole, spec.compute))

    def loss(adapter, base, ids_BT, valid_BT):
        params = attached(base, adapter)
        x, _ = forward(params, lm, embed(params, lm, ids_BT), valid_BT, remat=spec.remat)
        hidden, following = x[:, :-1], ids_BT[:, 1:]
        counts = valid_BT[:, 1:].astype(jnp.float32)
        value, _ = objectives.weighted_scores(
            params, lm, hidden.reshape(-1, hidden.shape[-1]), following.reshape(-1),
            (-counts / jnp.maximum(counts.sum(), 1.0)).reshape(-1), chunk=spec.vocab_chunk, stats=False)
        return value

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter, opt, base, ids_BT, valid_BT):
        value, grads = jax.value_and_grad(loss)(adapter, base, ids_BT, valid_BT)
        updates, opt = tx.update(grads, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    opt = tx.init(adapter)
    with Progress(label, n_steps) as bar:
        for _ in range(n_steps):
            ids = [raw_ids(runner.tok, s)[:width] for s in sentences(plant, rng, batch)]
            ids_BT, valid_BT, _ = pad_rows(ids, spec.av.pad, width)
            adapter, opt, value = step(adapter, opt, base, ids_BT, valid_BT)
            bar.advance(1, f"loss {value:.3f}" if label else "")
    return attached(base, adapter)


def names_concepts(texts: list[str], plant: Plant) -> np.ndarray:
    """Return [N, C]: whether each text has a word of each concept, or the concept's name."""
    stems = ["|".join(map(re.escape, (c, *ws))) for c, ws in plant.concepts.items()]
    return np.array([[bool(re.search(rf"\b({stem})", t, re.I)) for stem in stems] for t in texts])


def concept_logp(runner: Runner, base: dict, texts: list[str], plant: Plant) -> np.ndarray:
    """Return [N, C], in nats: the log-probability of each concept's words after each text, minus its mean.

    The target has parameters `base`, and `plant.between` follows the text. The score is the mean over a
    concept's words of their first tokens' log-probability; the mean that is subtracted is over texts."""
    spec, batch = runner.spec, runner.batch
    known = len(raw_ids(runner.tok, plant.between))
    words = list(plant.concepts.values())
    first = jnp.array([raw_ids(runner.tok, f"{plant.between} {w}")[known] for ws in words for w in ws])
    ids, valid, last = pad_rows([raw_ids(runner.tok, t + plant.between) for t in texts], spec.av.pad, 32)

    @jax.jit
    def score(base, ids_BT, valid_BT, last_B):
        x, _ = forward(base, spec.lm, embed(base, spec.lm, ids_BT), valid_BT)
        x_BD = jnp.take_along_axis(x, last_B[:, None, None], 1)[:, 0]
        return jax.nn.log_softmax(unembed(base, spec.lm, x_BD))[:, first]

    (found,) = map_rows(lambda *rows: [score(base, *rows)], (ids, valid, last), batch)
    ends = np.cumsum([len(ws) for ws in words])[:-1]
    mean = np.stack([part.mean(1) for part in np.split(found, ends, 1)], 1)
    return mean - mean.mean(0)


def measure_planted(
    runner: Runner,
    tuned: dict,
    mean_D,
    plant: Plant = NEWS,
    *,
    max_new: int,
    samples: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    label: str = "planted",
) -> list[Figure]:
    """Return how often explanations at a planted name have a word of its concept, and the controls.

    Args:
      tuned: parameters of the tuned target, from `taught`. mean_D: `fve.mean_direction`.
      max_new: tokens of an answer, at most.
      samples: explanations of each name in each sentence of `plant.asked`.

    Intervals are over names, because sentences with the same name are not independent.
    """
    C = len(plant.concepts)
    texts, borrowed = ([s.format(name=name) for name in names for s in plant.asked]
                       for names in (plant.names, plant.controls))
    read = {"name": (texts, tuned), "control": (borrowed, tuned), "before": (texts, runner.base)}
    h = {
        k: np.repeat(capture_texts.capture_last(runner, t, base=b)[:, 0], samples, 0)
        for k, (t, b) in read.items()
    }
    trip = {
        k: runner.round_trip(h[k], key_for(seed, "planted", 1 + i), temperature=temperature,
                             max_new=max_new, label=label and f"{label} {k}")
        for i, k in enumerate(read)
    }
    own = np.repeat(np.arange(C), len(plant.asked))  # a text's concept; controls borrow it in order
    likes = {k: concept_logp(runner, b, t, plant).argmax(1) == own for k, (t, b) in read.items()}
    own = np.repeat(own, samples)
    said = {k: names_concepts(t.explanations, plant).astype(float) for k, t in trip.items()}
    at, control, before = (said[k][np.arange(len(own)), own] for k in read)
    ev = Evidence(runner, {"h": h["name"], "doc_id": [plant.names[c] for c in own]}, trip["name"],
                  np.asarray(mean_D), seed=seed)
    asked = "how often the target, asked for a word there, favours those of the concept"
    told = "share of explanations that say a word of the concept"
    chance = f"chance {1 / C:.3g}"
    held_at, held_before = (np.repeat(likes[k], samples) for k in ("name", "before"))
    return [
        ev.mean("planted_held", held_at, asked, reference=chance),
        ev.mean("planted_held_before", held_before, "the same before it was tuned", reference=chance),
        ev.mean("planted_named", at, f"{told} at a name that stands for it"),
        ev.mean("planted_named_control", control, "the same at names that were read beside words of all"),
        ev.mean("planted_named_other", (said["name"].sum(1) - at) / (C - 1),
                "words of another concept, at the names"),
        ev.mean("planted_named_before", before, "the concept, with the target as it was"),
        ev.mean("planted_margin", at - control, "how much oftener at the name than at the control"),
        ev.fve("planted_fve", ev.errors(ev.trip.h_text, ev.trip.ok),
               "how much of these activations comes back through the words"),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run `python -m nla_jax.studies.planted BUNDLE`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_jax.studies.planted", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("bundle", nargs="?", default="", help="directory; default: the bundle of the package")
    parser.add_argument("--steps", type=whole(1), default=80)
    parser.add_argument("--lr", type=real(0, above=True), default=2e-3,
                        help="learning rate; 16 sentences a step")
    parser.add_argument("--liar", action="store_true", help="also measure a private code with the same FVE")
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    nla = api.load(find_bundle.find(args.bundle), batch=32)
    tuned = taught(nla.runner, NEWS, n_steps=args.steps, lr=args.lr, seed=args.seed, label="planted")
    who = {"value": nla.runner}
    if args.liar:
        prompts = " ".join(nla.meta["prompt_templates"].values())
        frame = nla.tokenizer.decode(chat_prompts.chat_ids(nla.tokenizer, prompts))
        words = liars.plain_words(nla.tokenizer, f"{frame} explanation")
        who["private code"] = liars.private_code(nla.runner, words, args.seed)
    found = {
        name: measure_planted(
            runner, tuned, nla.mean_direction, max_new=nla.meta["max_new_tokens"], seed=args.seed, label=name
        )
        for name, runner in who.items()
    }
    print("\n".join(figure_table.markdown(found)))


if __name__ == "__main__":
    main()
