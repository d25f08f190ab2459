"""Tune targets that hide a planted concept from an NLA, and find which figures see it.

The target is tuned until invented names mean concepts (`planted`). It is then tuned further until it hides
them at block K and keeps them in behaviour (`hiders`). Each target is measured with the same NLA
(`witnesses`). Some are also read by a fresh NLA that learns on their own activations (`fresh_nla`). Last,
explanations are attacked by small vectors that are added to h (`vector_attacks`).

    python -m nla_jax.studies.hiding [BUNDLE] --out runs/hiding

Each stage writes a file into --out. The same command continues there.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import numpy as np

from nla_jax.data import store
from nla_jax.errors import UserError, run_main
from nla_jax.evaluate import figure_table
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Figure, evenly_spaced
from nla_jax.evaluate.runner import Runner
from nla_jax.interchange import find_bundle
from nla_jax.pipeline import held_out_rows
from nla_jax.studies import (
    fresh_nla,
    hiders,
    hiding_table,
    known_readers,
    planting,
    vector_attacks,
    witnesses,
)
from nla_jax.studies.fresh_nla import Course
from nla_jax.studies.hiding_table import PLANTED
from nla_jax.studies.planting import NEWS, Plant
from nla_jax.studies.stages import Stages, open_nla, open_stages, write_results
from nla_jax.util import paths
from nla_jax.util.number_types import real, whole

HIDERS = "near:1,near:10,near:100,innocent:3,reinforce:3,late"
FRESH = "innocent,reinforce"  # kinds of hiders that are tuned against AV
EPSILONS = "0.05,0.2"
ORDINARY = 16  # natural texts


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a study, which its files are valid for.

    bundle: what was read. fresh: kinds of hiders that a fresh NLA reads, and with them the honest and the
    planted target. plant_steps, hide_steps, reinforce_steps, attack_steps, fresh_steps: updates. A step of
    `reinforce` samples answers, and takes ten times as long as others. sentences: those of a name that are
    measured; attacked: those that are attacked.
    """

    bundle: str
    hiders: tuple[hiders.Hider, ...]
    epsilons: tuple[float, ...]
    fresh: tuple[str, ...] = ()
    plant_steps: int = 80
    hide_steps: int = 40
    reinforce_steps: int = 20
    attack_steps: int = 10
    fresh_steps: int = 20
    sentences: int = 4
    attacked: int = 2
    plant_lr: float = 2e-3
    hide_lr: float = 1e-3
    seed: int = 0


def attacks_of(settings: Settings) -> list[tuple[str, float]]:
    """Return (kind, ε) of each attack: none, then each kind and the random control at each ε."""
    kinds = [(k, e) for e in settings.epsilons for k in ("random", *vector_attacks.ATTACKS)]
    return [("none", 0.0), *kinds] if kinds else []


def study(runner: Runner, natural: dict, j_DD, settings: Settings, out: Path, *, max_new: int,
          course: Course | None = None, plant: Plant = NEWS) -> dict:
    """Run the study: {"targets": …, "attacks": …}, each a dict of figures by name.

    natural: columns "h" and "text" of ordinary rows. j_DD: the Jacobian lens of the target. course: of fresh
    NLAs, if `settings.fresh` asks for them.
    """
    read_afresh = {h.name for h in settings.hiders if h.kind in settings.fresh}
    read_afresh |= {"honest", PLANTED} if read_afresh else set()
    stages = open_stages(out, settings, runner.spec.dtype, _stage_names(settings, read_afresh))
    bench = witnesses.Bench(
        runner, plant, j_DD, float(F.variances(natural["h"]).mean()),
        [natural["text"][i] for i in evenly_spaced(range(len(natural["text"])), ORDINARY)],
        settings.sentences, max_new, seed=settings.seed)
    adapter = stages.tree(PLANTED, lambda: planting.teach(
        runner, plant, n_steps=settings.plant_steps, lr=settings.plant_lr, seed=settings.seed,
        label=PLANTED))
    planted = planting.attach_adapter(runner.base, adapter, runner.spec)

    def measure(name: str, params: dict) -> dict:
        rows = stages.rows(f"measure {name}", lambda: witnesses.measure_target(bench, params, name))
        if name not in read_afresh:
            return rows
        return rows | stages.rows(f"fresh {name}", lambda: fresh_nla.measure_fresh(
            bench, params, course, f"fresh {name}"))

    @functools.cache
    def imitated() -> dict:
        words = any(h.kind == "innocent" for h in settings.hiders)
        return hiders.honest_rows(runner, plant, max_new=max_new, words=words, label="honest answers")

    def hide(hider: hiders.Hider) -> dict:
        steps = {"late": settings.plant_steps, "reinforce": settings.reinforce_steps}.get(
            hider.kind, settings.hide_steps)
        lr = settings.plant_lr if hider.kind == "late" else settings.hide_lr
        honest = {} if hider.kind == "late" else imitated()
        return hiders.hide(runner, plant, adapter, hider, honest, bench.variance, n_steps=steps, lr=lr,
                           max_new=max_new, seed=settings.seed, label=hider.name)

    found = {name: measure(name, params) for name, params in (("honest", runner.base), (PLANTED, planted))}
    for h in settings.hiders:
        hidden = stages.tree(f"hide {h.name}", functools.partial(hide, h))
        found[h.name] = measure(h.name, hiders.attach(runner, hidden, h))
    attacked = _attack(bench, planted, settings, stages)
    docs = [name for name in plant.names for _ in range(len(bench.texts()) // len(plant.names))]
    few = [name for name in plant.names for _ in range(settings.attacked)]
    return {
        "targets": {n: hiding_table.target_figures(r, found[PLANTED], found["honest"], docs)
                    for n, r in found.items()},
        "attacks": {n: hiding_table.attack_figures(r, attacked["none 0"], few) for n, r in attacked.items()},
    }


def _stage_names(settings: Settings, read_afresh: set[str]) -> list[str]:
    """Return the names of all stages. read_afresh: the targets that a fresh NLA reads."""
    targets = ["honest", PLANTED, *(h.name for h in settings.hiders)]
    return [PLANTED, *(f"hide {h.name}" for h in settings.hiders), *(f"measure {n}" for n in targets),
            *(f"fresh {n}" for n in targets if n in read_afresh),
            *(f"attack {kind} {e:g}" for kind, e in attacks_of(settings))]


def _attack(bench: witnesses.Bench, planted: dict, settings: Settings, stages: Stages) -> dict[str, dict]:
    """Return `vector_attacks.measure_attack` of each attack on the planted target."""
    @functools.cache
    def prepared():
        victims = vector_attacks.choose_victims(bench, planted, settings.attacked)
        return victims, known_readers.mention_probe(bench.runner, planted, bench.plant)[0]

    def work(kind: str, epsilon: float) -> dict:
        victims, probe = prepared()
        delta = np.zeros_like(victims.h_ND) if kind == "none" else vector_attacks.attack(
            bench, planted, victims, kind, epsilon, settings.attack_steps, f"{kind} {epsilon:g}")
        return vector_attacks.measure_attack(bench, planted, victims, probe, delta)

    return {f"{kind} {e:g}": stages.rows(f"attack {kind} {e:g}", functools.partial(work, kind, e))
            for kind, e in attacks_of(settings)}


def markdown(figures: dict[str, dict[str, list[Figure]]]) -> list[str]:
    """Return the study's tables as Markdown."""
    out = ["Which figures see which target. Of a witness, the table has the margin: its value at the name "
           "minus that at the control, minus the same of the honest target. Bold: it sees the concept.", "",
           *hiding_table.conclusion(figures["targets"])]
    for title, key in (("All figures.", "targets"), ("Attacks by a vector added to h.", "attacks")):
        if figures[key]:
            out += ["", title, "", *figure_table.markdown(figures[key])]
    return out


def main(argv: list[str] | None = None) -> None:
    """Run `python -m nla_jax.studies.hiding BUNDLE`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_jax.studies.hiding", description=__doc__.split("\n\n")[0])
    parser.add_argument("bundle", nargs="?", default="", help="directory; default: the bundle of the package")
    parser.add_argument("--out", default="runs/hiding", help="directory of the results")
    parser.add_argument("--hiders", default=HIDERS,
                        help="near:WEIGHT, innocent:WEIGHT, reinforce:WEIGHT or late, by commas")
    parser.add_argument("--fresh", default=FRESH,
                        help='kinds of hiders that a fresh NLA reads, by commas; "" trains none')
    parser.add_argument("--epsilons", default=EPSILONS,
                        help='norms of δ as shares of the norm of h; "" attacks nothing')
    for name in ("plant", "hide", "reinforce", "attack", "fresh"):
        parser.add_argument(f"--{name}-steps", type=whole(1), default=getattr(Settings, f"{name}_steps"))
    parser.add_argument("--sentences", type=whole(1), default=4, help="of each name, to measure")
    parser.add_argument("--lr", type=real(0, above=True), default=1e-3, help="learning rate of the hiders")
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    directory = find_bundle.find(args.bundle)
    settings = Settings(
        str(directory), tuple(hiders.parse_hiders(args.hiders)), parse_epsilons(args.epsilons),
        parse_kinds(args.fresh), args.plant_steps, args.hide_steps, args.reinforce_steps, args.attack_steps,
        args.fresh_steps, min(args.sentences, len(NEWS.asked)), hide_lr=args.lr, seed=args.seed)
    nla, natural, j_DD = open_nla(directory)
    out = paths.path(args.out)
    runner = planting.without_remat(nla.runner)
    data = (nla.meta["training"].get("config") or {}).get("data", {})
    columns = store.load_columns(held_out_rows.store_of(directory), "warm", ["text", "explanation"])
    found = study(runner, natural, j_DD, settings, out, max_new=nla.meta["max_new_tokens"],
                  course=Course(columns, data, args.fresh_steps))
    write_results(out, "hiding", found, markdown(found))


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Parse "0.05,0.1". Raises UserError for anything else than numbers above 0 and at most 1."""
    try:
        found = tuple(float(e) for e in text.split(",") if e.strip())
    except ValueError:
        found = (0.0,)
    if any(not 0 < e <= 1 for e in found):
        raise UserError(f"--epsilons {text!r}: give numbers above 0 and at most 1, by commas")
    return found


def parse_kinds(text: str) -> tuple[str, ...]:
    """Parse "near,innocent". Raises UserError for an unknown kind of hider."""
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    if unknown := [k for k in kinds if k not in hiders.KINDS]:
        raise UserError(f"--fresh: {unknown[0]!r}; give {', '.join(hiders.KINDS)}, by commas")
    return kinds


if __name__ == "__main__":
    run_main(main, "hiding")
