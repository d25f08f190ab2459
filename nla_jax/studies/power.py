"""Which probe sees which fault: the grounding table of an honest NLA beside those of known liars.

    python -m nla_jax.toy runs/toy/world
    nla train --config experiments/toy.py:runs/toy/world --workdir runs/toy/run
    python -m nla_jax.studies.power runs/toy/run

    python -m nla_jax.studies.power runs/smollm2_135m --rows 100 --probes round_trip,independent,meaning

A figure "sees" a fault when its interval lies apart from the honest NLA's. Explanations are greedy, so
that a liar differs from the honest one in its fault alone.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nla_jax import api, prompts, toy
from nla_jax.data import store
from nla_jax.evaluate import probe_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.pipeline import grounding
from nla_jax.studies import liars
from nla_jax.util.keys import key_for

PROBES = ("round_trip", "independent", "form", "language")
HONEST = "honest"


def faulty(nla: api.NLA, rows: dict) -> dict[str, Runner]:
    """The liars made from an NLA; `rows`: columns of its training rows.

    Of the toy every word is known. Of any other NLA the words are `liars.plain_words`, the opposites are
    those of WordNet, and there is no hidden channel, which needs a tokenizer of whole words.
    """
    runner = nla.runner
    if is_toy := liars.has_word_tokens(runner.tok):
        words, pairs = spoken(), counterparts()
    else:
        words = liars.plain_words(runner.tok, _prompt_text(runner))
        pairs = liars.antonym_pairs(words)
    channel = {"hidden channel": liars.hidden_channel(runner, words, "story")} if is_toy else {}
    return {
        "private code": liars.private_code(runner, words),
        "opposites": liars.opposites(runner, pairs),
        **channel,
        "deaf": liars.deaf(runner, nla.mean_direction),
        "copyist": liars.copyist(runner, rows, nla.meta["training"]["config"]),
    }


def _prompt_text(runner: Runner) -> str:
    """The words of AV's prompt and tags, which keep their meaning."""
    av = runner.spec.av
    return runner.tok.decode([*av.before, *av.after, *av.open, *av.close])


def spoken() -> list[str]:
    """The words of the stories, of their topics and moods: all that an explanation says, less its frame."""
    groups = [w for named in (toy.TOPICS, toy.MOODS) for words in named.values() for w in words]
    text = re.sub(r"{\w+}", " ", " ".join([*toy.SENTENCES, *toy.TOPICS, *toy.MOODS, *groups]))
    frame = {"story", "about", "on", "then", *re.findall(r"\w+", prompts.AV_TEMPLATE)}
    return sorted(set(re.findall(r"\b[a-z]+\b", text)) - frame)


def counterparts() -> list[tuple[str, str]]:
    """Each word and the one that says something else in its place: another mood, another topic."""
    pairs = [("happy", "sad"), *_paired(toy.MOODS["happy"], toy.MOODS["sad"])]
    topics = list(toy.TOPICS)
    for first, second in zip(topics[::2], topics[1::2], strict=True):
        pairs += [(first.split()[-1], second.split()[-1])]
        pairs += _paired(toy.TOPICS[first], toy.TOPICS[second])
    return pairs


def _paired(groups, others) -> list[tuple[str, str]]:
    both = zip(groups, others, strict=True)
    return [pair for a, b in both for pair in zip(a.split(), b.split(), strict=False)]


def power(run: str | Path, probes: Sequence[str] = PROBES, split: str = "heldout",
          n_rows: int = 0) -> dict[str, list[Figure]]:
    """Figures of the honest NLA of `run` and of each liar made from it, on the same rows: `n_rows` of the
    split, evenly spread, or all for 0."""
    run = Path(run).absolute()
    nla = api.load(run / "bundle", batch=32)
    rows = store.load_columns(run / "data", "warm")
    columns = grounding.some_rows(store.load_columns(run / "data", split), n_rows)
    more = {
        "warm": grounding.warm_start(nla, run / "bundle"),
        "train": rows,
        "readers": run / "readers",
        "settings": nla.meta["training"]["config"],
    }
    return {
        name: probe_table.evaluate(
            runner,
            columns,
            np.asarray(nla.mean_direction),
            key_for(0, "evaluate"),
            temperature=0.0,
            max_new=nla.meta["max_new_tokens"],
            label="",
            probes=probes,
            more=more,
        )[0]
        for name, runner in {HONEST: nla.runner, **faulty(nla, rows)}.items()
    }


def disjoint(a: Figure | None, b: Figure | None) -> bool:
    """Whether two figures' intervals do not overlap."""
    if a is None or b is None or a.low is None or b.low is None:
        return False
    return a.high < b.low or b.high < a.low


def seen_by(found: dict[str, list[Figure]], name: str) -> list[str]:
    """The figures whose interval lies apart from the honest NLA's for this liar."""
    honest = {f.name: f for f in found[HONEST]}
    return [f.name for f in found[name] if disjoint(f, honest.get(f.name))]


def markdown(found: dict[str, list[Figure]]) -> list[str]:
    """The power table: figure × fault, bold where the figure sees the fault."""
    names = list(dict.fromkeys(f.name for fs in found.values() for f in fs))
    by = {liar: {f.name: f for f in fs} for liar, fs in found.items()}
    rows = [["figure", *found], ["---"] * (len(found) + 1)]
    for n in names:
        cells = []
        for liar in found:
            f = by[liar].get(n)
            text = "" if f is None else f"{f.value:.3f}"
            cells.append(f"**{text}**" if liar != HONEST and disjoint(f, by[HONEST].get(n)) else text)
        rows.append([f"`{n}`", *cells])
    return [f"| {' | '.join(r)} |" for r in rows]


def main(argv: list[str] | None = None) -> None:
    """`python -m nla_jax.studies.power RUN`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_jax.studies.power", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("run", help="the workdir of a training run, such as that of experiments/toy.py")
    parser.add_argument("--rows", type=int, default=0, help="held-out rows; default: all")
    parser.add_argument("--probes", default=",".join(PROBES))
    args = parser.parse_args(argv)
    print("\n".join(markdown(power(args.run, args.probes.split(","), n_rows=args.rows))))


if __name__ == "__main__":
    main()
