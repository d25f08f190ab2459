"""Compare the grounding table of an honest NLA with those of liars: which figure detects which fault.

    python -m nla_jax.toy runs/toy/world
    nla train --config experiments/toy.py:runs/toy/world --workdir runs/toy/run \\
      --config.lessons_av.steps=300 --config.warm_av.steps=750
    python -m nla_jax.studies.power runs/toy/run

    python -m nla_jax.studies.power runs/smollm2_135m --rows 100 --probes round_trip,independent,meaning
    python -m nla_jax.studies.power --rows 100 --probes round_trip,claims,lens --trust 20

Without a run it takes the NLA of the package.

A figure detects a fault if its interval and the honest NLA's are disjoint. Explanations are greedy, so that
a liar differs from the honest NLA in its fault alone.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nla_jax import api, bundle, prompts, toy
from nla_jax.data import store
from nla_jax.errors import UserError, did_you_mean, run_main
from nla_jax.evaluate import probe_table
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.trust import apply, measure, stretch
from nla_jax.evaluate.trust import model as trust_model
from nla_jax.interchange import find_bundle
from nla_jax.pipeline import bundle_trust, grounding, held_out_rows
from nla_jax.studies import liars
from nla_jax.util import path_kinds, paths
from nla_jax.util.keys import key_for
from nla_jax.util.number_types import whole
from nla_jax.util.tables import markdown_table

PROBES = ("round_trip", "independent", "form", "language")
HONEST = "honest"


def vocabulary(nla: api.NLA) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the words that a private code permutes, and pairs of opposites.

    For the toy, the words are those of its grammar. For another NLA, the words are `liars.plain_words`, and
    the opposites are WordNet's.
    """
    if liars.has_word_tokens(nla.runner.tok):
        return story_words(), opposite_pairs()
    words = liars.plain_words(nla.runner.tok, liars.prompt_ids(nla.runner))
    return words, liars.antonym_pairs(words)


def makers(nla: api.NLA, rows: dict, words: list[str],
           pairs: list[tuple[str, str]]) -> dict[str, Callable[[], Runner]]:
    """Return the functions that make the liars from an NLA.

    rows: columns of its training rows. words, pairs: its `vocabulary`. Only a tokenizer of whole words, as
    the toy's, allows a hidden channel.
    """
    runner = nla.runner
    made = {
        "private code": lambda: liars.private_code(runner, words),
        "opposites": lambda: liars.opposites(runner, pairs),
        "hidden channel": lambda: liars.hidden_channel(runner, words, "story"),
        "deaf": lambda: liars.deaf(runner, nla.mean_direction),
        "copyist": lambda: liars.copyist(runner, rows, nla.meta["training"]["config"]),
    }
    if not liars.has_word_tokens(runner.tok):
        del made["hidden channel"]
    return made


def choose_liars(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names of liars, or all known ones for none. Raises UserError for an unknown one."""
    for name in names:
        if name not in known:
            raise UserError(f"--liars {name!r}: not a liar of this NLA, which are {', '.join(known)}"
                            f"{did_you_mean(name, known)}")
    return list(names) or list(known)


def reversed_claims(ev: Evidence, pairs: list[tuple[str, str]]) -> list[Figure]:
    """Return the FVE by the frozen target that is lost if each word of a pair becomes the other one.

    The difference is paired, on the explanations with such a word. It is below zero for an AV that says the
    opposite.
    """
    other = {w: v for a, b in pairs for w, v in ((a, b), (b, a))}
    texts = ev.trip.explanations
    turned = [re.sub(r"[a-z]+", lambda m: other.get(m[0], m[0]), t) for t in texts]
    rows = [i for i, (a, b) in enumerate(zip(texts, turned, strict=True)) if a != b]
    if not rows:
        return []
    whole, reverse = (ev.errors(ev.read_frozen(t), ev.trip.ok) for t in (texts, turned))
    asks = "FVE by the frozen target that is lost when the claims are reversed"
    return [ev.fve_lost("lost_reversed_frozen", reverse, whole, asks, rows=rows)]


def story_words() -> list[str]:
    """Return the words of the stories, topics and moods, without the fixed words of an explanation."""
    groups = [w for named in (toy.TOPICS, toy.MOODS) for words in named.values() for w in words]
    text = re.sub(r"{\w+}", " ", " ".join([*toy.SENTENCES, *toy.TOPICS, *toy.MOODS, *groups]))
    frame = {"story", "about", "on", "then", *re.findall(r"\w+", prompts.AV_TEMPLATE)}
    return sorted(set(re.findall(r"\b[a-z]+\b", text)) - frame)


def opposite_pairs() -> list[tuple[str, str]]:
    """Return pairs of words with opposite content: of two moods, or of two topics."""
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
          n_rows: int = 0, trust: int = 0, only: Sequence[str] = ()) -> dict[str, list[Figure]]:
    """Return the figures of an honest NLA and of its liars, on the same rows.

    Args:
      run: the directory of a run or of a bundle.
      n_rows: rows of the split, evenly spaced; 0: all.
      trust: texts on which the bundle's trust model is measured (`trust_figures`); 0: it is not.
      only: names of liars; none: all.

    Raises UserError before any work: for an unknown probe or liar, for what a probe cannot fetch, for a
    missing split, and if `trust` is asked of a bundle without a trust model.
    """
    directory = paths.absolute(path_kinds.bundle_in(run))
    wanted, meta = probe_table.find_probes(probes), bundle.read_sidecar(directory)
    for probe in wanted.values():
        probe.fetch()
    data, _, settings = grounding.open_store(directory, meta, "", [split, "warm"], 0, None)
    nla = api.load(directory, batch=32)
    if trust and nla.trust is None:
        raise UserError(f"{directory} has no trust model: fit one with `nla trust`, or leave --trust out")
    rows = store.load_columns(data, "warm")
    columns = grounding.spaced_rows(store.load_columns(data, split), n_rows)
    left_out: list[str] = []
    more = {
        "warm": grounding.warm_start(nla, directory),
        "train": rows,
        "readers": held_out_rows.evaluation_dir(directory) / "readers",
        "settings": settings,
        "left_out": left_out,
    }
    words, pairs = vocabulary(nla)
    made = makers(nla, rows, words, pairs)
    chosen = choose_liars(only, list(made))
    mean_D, out = np.asarray(nla.mean_direction), {}
    how = dict(temperature=0.0, max_new=meta["max_new_tokens"], probes=list(wanted), more=more)
    for name in (HONEST, *chosen):
        runner = nla.runner if name == HONEST else made[name]()
        out[name], trip = probe_table.evaluate(runner, columns, mean_D, key_for(0, "evaluate"), label=name,
                                               **how)
        out[name] += reversed_claims(Evidence(runner, columns, trip, mean_D), pairs)
        if trust:
            out[name] += trust_figures(nla, runner, columns, trust, name)
    for line in dict.fromkeys(left_out):
        print(f"not measured: {line}", file=sys.stderr)
    return out


def trust_figures(nla: api.NLA, runner: Runner, columns: dict, n_texts: int, label: str = "") -> list[Figure]:
    """Return the figures of the honest NLA's trust model on the claims of `runner`."""
    seen = stretch.explain_stretches(runner, columns, rows=n_texts, seed=0, temperature=1.0,
                                     max_new=nla.meta["max_new_tokens"], label=label)
    if not seen.texts:
        return []
    mean_D = apply.mean_or_zero(nla.mean_direction, nla.spec.lm.d_model)
    found, true_C, docs_C = bundle_trust.labelled(runner, mean_D, seen, label)
    p_C = trust_model.trust_of(nla.trust, found)
    return measure.trust_figures(p_C, true_C, [c.kind for c in found.claims], docs_C)


def disjoint(a: Figure | None, b: Figure | None) -> bool:
    """Return whether two figures have intervals that do not overlap."""
    if a is None or b is None or a.low is None or b.low is None:
        return False
    return a.high < b.low or b.high < a.low


def detecting_figures(found: dict[str, list[Figure]], name: str) -> list[str]:
    """Return the names of figures whose intervals for this liar and the honest NLA are disjoint."""
    honest = {f.name: f for f in found[HONEST]}
    return [f.name for f in found[name] if disjoint(f, honest.get(f.name))]


def markdown(found: dict[str, list[Figure]]) -> list[str]:
    """Return the power table, figure × fault, as Markdown; bold where the figure detects the fault."""
    names = list(dict.fromkeys(f.name for fs in found.values() for f in fs))
    by = {liar: {f.name: f for f in fs} for liar, fs in found.items()}
    rows = []
    for n in names:
        cells = []
        for liar in found:
            f = by[liar].get(n)
            text = "" if f is None else f"{f.value:.3f}"
            cells.append(f"**{text}**" if liar != HONEST and disjoint(f, by[HONEST].get(n)) else text)
        rows.append([f"`{n}`", *cells])
    return markdown_table(["figure", *found], rows)


def main(argv: list[str] | None = None) -> None:
    """Run `python -m nla_jax.studies.power RUN`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_jax.studies.power", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("run", nargs="?", default="",
                        help="a run, such as that of experiments/toy.py, or a bundle; default: the package's")
    parser.add_argument("--rows", type=whole(0), default=0, help="held-out rows; default: all")
    parser.add_argument("--probes", default=",".join(PROBES))
    parser.add_argument("--trust", type=whole(0), default=0, metavar="TEXTS",
                        help="also measure the bundle's trust model, on claims about so many texts")
    parser.add_argument("--liars", default="", metavar="NAMES", help="of liars, by commas; default: all")
    args = parser.parse_args(argv)
    only = [name.strip() for name in args.liars.split(",") if name.strip()]
    found = power(find_bundle.find(args.run), args.probes.split(","), n_rows=args.rows,
                  trust=args.trust, only=only)
    print("\n".join(markdown(found)))


if __name__ == "__main__":
    run_main(main, "power")
