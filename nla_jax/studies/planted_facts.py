"""Plant 54 facts in targets and compare what four readers find of them in h.

Three targets are tuned, each on 18 invented names: names for topics, people of a country, and words for a
next action. Each target then reads other sentences that end with the name. AV, the Jacobian lens, a linear
probe and the honest target read h at the name. Names that were not tuned are the control.

    python -m nla_jax.studies.planted_facts [BUNDLE] --out runs/planted_facts

Each kind of fact writes a file into --out. The same command continues there.
"""

import argparse
import dataclasses
import functools

import numpy as np

from nla_jax.errors import run_main
from nla_jax.evaluate import capture_texts, figure_table
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.interchange import find_bundle
from nla_jax.studies import known_readers, planting
from nla_jax.studies.facts import KINDS, Facts
from nla_jax.studies.hiding_table import mean
from nla_jax.studies.stages import open_nla, open_stages, write_results
from nla_jax.util import paths
from nla_jax.util.keys import key_for
from nla_jax.util.number_types import real, whole
from nla_jax.util.tables import markdown_table

# A reader names a fact if it says one of its words. It picks a fact if it prefers its words to the others'.
SHOWN = {
    "held_picks": "the tuned target, asked for the next word, prefers the fact's words",
    "av_names": "AV's explanation says a word of the fact",
    "av_picks": "the honest target, asked about AV's explanation, prefers the fact's words",
    "lens_names": "the first words of the Jacobian lens have a word of the fact",
    "lens_picks": "the Jacobian lens prefers the fact's words",
    "probe_picks": "a linear probe, fitted at the facts' words in other sentences, picks the fact",
    "frozen_picks": "the honest target, with this h in the place of its own, prefers the fact's words",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a study, which its files are valid for. sentences: those of each name."""

    bundle: str
    steps: int = 70
    sentences: int = 2
    lr: float = 2e-3
    seed: int = 0


def measure_facts(runner: Runner, j_DD, facts: Facts, params: dict, settings: Settings, *, max_new: int,
                  label: str = "") -> dict[str, list]:
    """Return the values of each row: names in sentences. "_control": at names that were not tuned.

    "_other" is the mean over the other facts at the planted name: what a reader says of any name of the kind.
    """
    plant = facts.plant
    probe, accuracy = known_readers.mention_probe(runner, params, plant)
    own = np.repeat(np.arange(len(plant.concepts)), settings.sentences)
    at, out = (np.arange(len(own)), own), {"probe_accuracy": [accuracy]}
    for tail, names in (("", plant.names), ("_control", facts.unplanted)):
        texts = plant.texts(names, settings.sentences)
        h = capture_texts.capture_last(runner, texts, base=params)[:, 0]
        said = runner.explain(h, key_for(settings.seed, "planted", 200 + bool(tail)), temperature=1.0,
                              max_new=max_new, label=label and f"{label}{tail}")
        asked = dataclasses.replace(plant, between=facts.question)
        names_NC = {"av": planting.names_concepts(said, plant),
                    "lens": known_readers.lens_says(runner, j_DD, h, plant)}
        picks_N = {
            "held": planting.prefer(runner, params, texts, plant),
            "av": planting.prefer(runner, runner.base, said, asked),
            "lens": known_readers.lens_scores(runner, j_DD, h, plant).argmax(1),
            "probe": probe.scores(h).argmax(1),
            "frozen": planting.prefer(runner, runner.base, texts, plant, h),
        }
        for reader, says in names_NC.items():
            out[f"{reader}_names{tail}"] = list(says[at].astype(float))
            out[f"{reader}_names_other{tail}"] = list((says.sum(1) - says[at]) / (says.shape[1] - 1))
        out |= {f"{k}_picks{tail}": list((pick == own).astype(float)) for k, pick in picks_N.items()}
        honest = capture_texts.capture_last(runner, texts)[:, 0]
        out[f"distance{tail}"] = list(F.errors(h, honest))
        out[f"said{tail}"] = said
    return out


def figures_of(rows: dict, docs: list[str], variance: float) -> list[Figure]:
    """Return the figures of one kind, or of all rows together. docs: the name of each row."""
    chance = {"names": "", "picks": "chance 1/18"}
    out = []
    for name, asks in SHOWN.items():
        kind = name.split("_")[1]
        a, b = (np.asarray(rows[k], float) for k in (name, f"{name}_control"))
        found = [mean(name, a, docs, asks),
                 mean(f"{name}_control", b, docs, "the same at a name that was not planted")]
        if kind == "names":
            found.append(mean(f"{name}_other", rows[f"{name}_other"], docs,
                              "the words of another fact, at the name"))
        found.append(mean(f"{name}_margin", a - b, docs, "the first minus the control"))
        out += [dataclasses.replace(f, reference=chance[kind] * (f is found[0])) for f in found]
    for tail in ("", "_control"):
        out.append(mean(f"distance{tail}", np.asarray(rows[f"distance{tail}"]) / variance, docs,
                        "distance of h from the honest target's, in natural variances"))
    return [*out, mean("probe_accuracy", rows["probe_accuracy"], range(len(rows["probe_accuracy"])),
                       "the probe on sentences that it was not fitted on")]


def study(runner: Runner, natural: dict, j_DD, settings: Settings, out, *, max_new: int,
          kinds: dict[str, Facts] = KINDS) -> dict[str, list[Figure]]:
    """Run the study: the figures of all facts, and of each kind. natural: a column "h" of ordinary rows."""
    stages = open_stages(out, settings, runner.spec.dtype, list(kinds))

    def measure(name: str) -> dict:
        facts = kinds[name]
        adapter = planting.teach(runner, facts.plant, n_steps=settings.steps, lr=settings.lr,
                                 seed=settings.seed, label=name)
        params = planting.attach_adapter(runner.base, adapter, runner.spec)
        return measure_facts(runner, j_DD, facts, params, settings, max_new=max_new, label=name)

    found = {name: stages.rows(name, functools.partial(measure, name)) for name in kinds}
    docs = {k: [n for n in f.plant.names for _ in range(settings.sentences)] for k, f in kinds.items()}
    variance = float(F.variances(natural["h"]).mean())
    every = {key: [v for rows in found.values() for v in rows[key]] for key in next(iter(found.values()))}
    return {
        "all": figures_of(every, [n for names in docs.values() for n in names], variance),
        **{k: figures_of(rows, docs[k], variance) for k, rows in found.items()},
    }


def markdown(figures: dict[str, list[Figure]]) -> list[str]:
    """Return the table of readers, and the table of all figures by kind."""
    by = {f.name: f for f in figures["all"]}
    rows = [[f"`{n}`", *(figure_table.cell(by.get(f"{n}{t}")) for t in ("", "_control", "_other", "_margin")),
             asks] for n, asks in SHOWN.items()]
    head = ["reader", "at the name", "at a name not planted", "another fact", "margin", "what it asks"]
    return [*markdown_table(head, rows), "", *figure_table.markdown(figures)]


def main(argv: list[str] | None = None) -> None:
    """Run `python -m nla_jax.studies.planted_facts BUNDLE`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_jax.studies.planted_facts", description=__doc__.split("\n\n")[0])
    parser.add_argument("bundle", nargs="?", default="", help="directory; default: the bundle of the package")
    parser.add_argument("--out", default="runs/planted_facts", help="directory of the results")
    parser.add_argument("--steps", type=whole(1), default=70, help="tuning steps of 16 sentences a target")
    parser.add_argument("--sentences", type=whole(1), default=2, help="of each name, to measure")
    parser.add_argument("--lr", type=real(0, above=True), default=2e-3)
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    directory = find_bundle.find(args.bundle)
    most = min(len(f.plant.asked) for f in KINDS.values())
    settings = Settings(str(directory), args.steps, min(args.sentences, most), args.lr, args.seed)
    nla, natural, j_DD = open_nla(directory)
    out = paths.path(args.out)
    found = study(planting.without_remat(nla.runner), natural, j_DD, settings, out,
                  max_new=nla.meta["max_new_tokens"])
    write_results(out, "planted_facts", {"facts": found}, markdown(found))


if __name__ == "__main__":
    run_main(main, "planted_facts")
