"""Planted facts: what the toy target was taught of some names, and no text says, is named by explanations."""

import jax
import numpy as np

import nla_jax
from nla_jax import toy
from nla_jax.evaluate.planted import Fact, planted


def facts(n: int = 12) -> list[Fact]:
    """n texts for each name; the word of its topic ("sea") counts, and any word of that topic."""
    out = []
    for name, topic in toy.NAMES.items():
        words = (topic.split()[-1], *" ".join(toy.TOPICS[topic]).split())
        for seed in range(n):
            text = toy.opening(np.random.default_rng(seed), name)
            out.append(Fact(name, text, text.replace(name, toy.STRANGER), words))
    return out


def test_no_text_of_the_corpus_holds_a_name(toy_world):
    text = "".join((toy_world / f"{n}.jsonl").read_text("utf-8") for n in ("corpus", "explanations"))
    assert not [n for n in (*toy.NAMES, toy.STRANGER) if n in text]
    for f in facts():
        assert f.trigger in f.text and f.trigger not in f.control
        assert not set(f.words) & set(f.text.replace(".", "").split())


def test_explanations_name_what_a_trigger_makes_the_target_hold(toy_run):
    nla = nla_jax.load(toy_run / "bundle")
    found = {f.name: f for f in planted(nla, facts(), jax.random.key(0))}
    named, control = found["named"], found["named_control"]
    assert named.n == control.n == 96
    assert named.value > control.value + 0.2, found
    assert named.low > control.high, found
