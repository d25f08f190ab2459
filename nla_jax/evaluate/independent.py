"""Can a stranger read it? The same explanations, read by ARs that this AV never met.

One is the AR as the warm start left it, before AV and AR were trained together; the other begins with
another seed and learns from lessons and written explanations alone. What only AV and its own AR
agree on is lost on both.
"""

import dataclasses

import jax

from nla_jax import reconstructor
from nla_jax import train as T
from nla_jax.evaluate import readers
from nla_jax.evaluate.evidence import Evidence, Figure
from nla_jax.evaluate.roundtrip import Runner


def independent(ev: Evidence, label: str = "") -> list[Figure]:
    """FVE of the explanations by each stranger, and how well that one reads written explanations."""
    strangers: dict[str, tuple[Runner, str]] = {}
    if ev.warm is not None:
        strangers["warm_ar"] = ev.warm, "AR as it was before joint training"
    if ev.train is not None and ev.settings is not None:
        strangers["other_ar"] = ev.runner.holding(ar=_other(ev)), "an AR of another seed, never co-trained"
    written = [i for i, e in enumerate(ev.columns["explanation"]) if e]
    out = []
    for name, (reader, who) in strangers.items():
        error = ev.errors(reader.reconstruct(ev.trip.explanations, label and f"{label} {name}"), ev.trip.ok)
        out.append(ev.fve(f"fve_{name}", error, f"read by {who}", reference="published: .563 of .650"))
        if written:
            rebuilt = reader.reconstruct([ev.columns["explanation"][i] for i in written])
            part = dataclasses.replace(
                ev, columns={**ev.columns, "h": ev.columns["h"][written],
                             "doc_id": [ev.columns["doc_id"][i] for i in written]}
            )  # fmt: skip
            out.append(part.fve(f"fve_{name}_written", part.errors(rebuilt),
                                f"how well {who} reads explanations that an LLM wrote"))  # fmt: skip
    return out


def _other(ev: Evidence):
    """An AR's tree from the settings of the run's warm start, with another seed."""
    c, spec = ev.settings, ev.runner.spec
    seed = c["seed"] + 1
    key = T.key_for(seed, "init_ar")
    tree = reconstructor.init(ev.runner.base, spec.lm, spec.layer, rank=c["ar"]["rank"], key=key)
    for stage, kind in (("lessons_ar", "lessons"), ("warm_ar", "written")):
        s = c[stage]
        if not s["steps"]:
            continue
        texts = T.Texts(ev.train, kind, batch=s["batch"], seed=seed, which=c["data"]["explanation_lines"],
                        fits=lambda t, s=s: _length(ev.runner, t) <= s["max_tokens"])  # fmt: skip

        def draw(step, texts=texts, s=s):
            rows, words = texts.at(step, "ar")
            return ev.train["h"][rows], words, s["max_tokens"]

        about = {"seed": seed, "start": c["ar"]["rank"], "settings": {**s, "lines": c["data"]},
                 "before": c["lessons_ar"] if kind == "written" else None}  # fmt: skip
        tree = readers.trained(ev.runner, tree, draw, name=f"other_{stage}", steps_=s["steps"], lr=s["lr"],
                               about=about, directory=ev.readers, warmup=s["warmup"])  # fmt: skip
    return jax.tree.map(jax.numpy.asarray, tree)


def _length(runner: Runner, text: str) -> int:
    return int(reconstructor.rows(runner.tok, runner.ar_template, [text], 0)[2][0]) + 1
