"""Let ARs that were not trained jointly with this AV read its explanations.

One AR ("other") has another seed. It is trained on lessons and written explanations only, as in the run's
warm start. The second ("warm") is the run's own AR after the warm start. Neither can read a private code
that AV and AR developed in joint training.
"""

import numpy as np
from ml_collections import ConfigDict

from nla_jax import reconstructor
from nla_jax.evaluate import fitted, trained_readers
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.written_explanations import written
from nla_jax.training import feeds
from nla_jax.util.keys import key_for

MOST, ROWS = 60, 32  # steps per stage of the other AR's training, and rows per step, at most
AR_STAGES = ("lessons_ar", "warm_ar")  # those of `configs.STAGES` that train AR


def independent(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of the explanations by each of the two ARs, a control, and FVE of written explanations."""
    if not ev.runner.ar:
        ev.left_out.append("fve_other_ar, fve_warm_ar: AR is the frozen target, which was not trained")
        return []
    strangers: dict[str, tuple[Runner, str]] = {}
    if ev.warm is not None:
        since = "this run's " if (ev.settings or {}).get("init") else ""
        strangers["warm_ar"] = ev.warm, f"AR as it was before {since}joint training"
    if ev.train is not None and any(s["steps"] for s in _stages(ev)) and _has_training_columns(ev):
        # The warm start's Runner has the tokenizer that the other AR is trained with.
        reader = ev.warm or ev.runner
        told = "an AR of another seed, never co-trained"
        strangers["other_ar"] = reader.with_trees(ar=_train_other_ar(ev, reader)), told
    else:
        ev.left_out.append("fve_other_ar: needs the run's config and the training rows of its warm start")
    if ev.warm is None:
        ev.left_out.append("fve_warm_ar: needs a bundle of RL, and the warm start's bundle next to it")
    texts, ok, h = ev.trip.explanations, ev.trip.ok, ev.columns["h"]
    rows, words = written(ev)
    other = rows_of_other_documents(ev.columns["doc_id"])
    out = []
    for name, (reader, who) in strangers.items():
        h_hat = reader.reconstruct(texts, label and f"{label} {name}")
        whole, mixed = ev.errors(h_hat, ok), ev.errors(h_hat[other], ok[other])
        out += [
            ev.fve(f"fve_{name}", whole, f"read by {who}", reference="published: .563 of .650"),
            ev.fve(f"fve_{name}_shuffled", mixed, "another document's explanations, read by the same"),
        ]
        if len(rows):
            rebuilt = np.zeros_like(h)
            rebuilt[rows] = reader.reconstruct(words)
            asks = f"explanations that an LLM wrote, read by {who}"
            out.append(ev.fve(f"fve_{name}_written", ev.errors(rebuilt), asks, rows=rows))
    return out


def _stages(ev: Evidence) -> list[dict]:
    """Return the settings of AR's warm-start stages; [] if the NLA's config is not known."""
    return [ev.settings[name] for name in AR_STAGES] if ev.settings else []


def _has_training_columns(ev: Evidence) -> bool:
    """Return whether the training rows have the column that each warm-start stage needs."""
    return all(any(ev.train[column]) or not s["steps"]
               for column, s in zip(("text", "explanation"), _stages(ev), strict=True))


def _train_other_ar(ev: Evidence, runner: Runner):
    """Train an AR with the run's warm-start settings, another seed and at most MOST steps per stage."""
    c, spec = ev.settings, runner.spec
    seed = c["seed"] + 1
    key = key_for(seed, "init_ar")
    tree = reconstructor.init(runner.base, spec.lm, spec.layer, rank=c["ar"]["rank"], key=key)
    about = {"seed": seed, "lines": c["data"]["explanation_lines"],
             "ending": c["data"].get("ending_tokens", 0),
             "rows": fitted.digest(ev.train["h"], ev.train["text"], ev.train["explanation"])}
    for stage, s in zip(AR_STAGES, _stages(ev), strict=True):
        n = min(s["steps"], MOST)
        if not n:
            continue
        pairing = feeds.pairs_arguments(ConfigDict(c), stage, runner.tok, spec, runner.ar_template)
        batch = min(s["batch"], ROWS)
        texts = feeds.WarmStartPairs(ev.train, **{**pairing, "seed": seed, "batch": batch})

        def draw(step, texts=texts, s=s):
            rows, words = texts.at(step, "ar")
            return ev.train["h"][rows], words, s["max_tokens"]

        optimizer = {"lr": s["lr"], "warmup": min(s["warmup"], max(n // 4, 1)), "final": s["final_lr"],
                     "clip": s["clip"], "weight_decay": s["weight_decay"]}
        tree = trained_readers.train_reader(
            runner,
            tree,
            draw,
            name=f"other_{stage}",
            n_steps=n,
            optimizer=optimizer,
            about={**about, "batch": batch, "max_tokens": s["max_tokens"]},
            directory=ev.readers,
        )
    return tree
