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

import numpy as np

from nla_jax import api
from nla_jax.errors import run_main
from nla_jax.evaluate import capture_texts, figure_table
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.interchange import find_bundle
from nla_jax.studies import liars, planting
from nla_jax.studies.planting import NEWS, Plant
from nla_jax.util.keys import key_for
from nla_jax.util.number_types import real, whole


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
      tuned: parameters of the tuned target (`planting.teach`). mean_D: `fve.mean_direction`.
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
    likes = {k: planting.prefer(runner, b, t, plant) == own
             for k, (t, b) in read.items()}
    own = np.repeat(own, samples)
    said = {k: planting.names_concepts(t.explanations, plant).astype(float) for k, t in trip.items()}
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
    adapter = planting.teach(
        nla.runner, NEWS, n_steps=args.steps, lr=args.lr, seed=args.seed, label="planted"
    )
    tuned = planting.attach_adapter(nla.base, adapter, nla.spec)
    who = {"value": nla.runner}
    if args.liar:
        words = liars.plain_words(nla.tokenizer, liars.prompt_ids(nla.runner))
        who["private code"] = liars.private_code(nla.runner, words, args.seed)
    found = {
        name: measure_planted(
            runner, tuned, nla.mean_direction, max_new=nla.meta["max_new_tokens"], seed=args.seed, label=name
        )
        for name, runner in who.items()
    }
    print("\n".join(figure_table.markdown(found)))


if __name__ == "__main__":
    run_main(main, "planted")
