"""Impossible numbers in a config: each has a stated range, and 0 means what the table says."""

import math
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nla_jax import configs
from nla_jax.data import capture_requests
from nla_jax.errors import UserError
from nla_jax.evaluate import fve
from nla_jax.lm import optimize
from nla_jax.pipeline import activations, config_checks, config_ranges, context
from tests.helpers import tiny

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "api" / "configs.md"
ROW = re.compile(r"\| `[\w.]+` \| (?:(-?\d+) \((.+)\), or )?from (\S+) to (\S+) \| (.+) \|")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def stated() -> dict[str, tuple]:
    """{setting: (lowest, highest, the number with a meaning of its own or None)}, as documented."""
    found = {}
    for also, _, low, high, names in (m.groups() for m in ROW.finditer(PAGE.read_text("utf-8"))):
        for name in names.split(", "):
            found[name.strip("`")] = number(low), number(high), None if also is None else float(also)
    return found


DEFAULT, SPEC = configs.default(), tiny.spec()
PROMPT = len(SPEC.av.before) + 1 + len(SPEC.av.after)


def with_value(key: str, value):
    """The default config with one setting changed, whatever its type."""
    c = DEFAULT.copy_and_resolve_references()
    section, _, name = key.rpartition(".")
    with (c[section] if section else c).ignore_type():
        (c[section] if section else c)[name] = value
    return c


def refusal(c) -> str:
    with pytest.raises(UserError) as e:
        config_checks.validate(c)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_the_documentation_has_the_table():
    assert config_ranges.markdown() in PAGE.read_text("utf-8")


def test_every_number_has_a_range_with_its_default():
    c = configs.default()
    found = {k: config_ranges.value_of(c, k) for k in configs.keys(c)}
    found = {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert found.keys() == stated().keys() and len(found) > 80
    assert [k for k, v in found.items() if v not in config_ranges.range_of(k)] == []


@pytest.mark.parametrize(
    "key, value, range_",
    [
        ("rl.clip", -1.0, "0 (no clipping), or from 0.001 to 1,000,000"),
        ("rl.clip", math.nan, "0 (no clipping), or from 0.001 to 1,000,000"),
        ("warm_av.clip", 1e-12, "0 (no clipping), or from 0.001 to 1,000,000"),
        ("rl.kl", -0.01, "from 0 to 1,000"),
        ("rl_drill.kl", math.inf, "from 0 to 1,000"),
        ("rl.length_penalty", -1.0, "from 0 to 1,000"),
        ("lessons_ar.weight_decay", -0.1, "from 0 to 1"),
        ("rl.final_lr", math.nan, "from 0 to 1"),
        ("warm_ar.final_lr", -0.5, "from 0 to 1"),
        ("warm_ar.lr", 1e-30, "from 1e-07 to 1"),
        ("rl_drill.lr_av", math.nan, "from 1e-07 to 1"),
        ("rl.minutes", math.nan, "0 (no limit), or from 0.001 to 1,000,000"),
        ("alpha", math.inf, "0 (automatic), or from 0.001 to 100,000,000"),
        ("eval.temperature", -1.0, "0 (greedy), or from 0.001 to 100"),
        ("eval.bootstrap", -1, "0 (no intervals), or from 1 to 100,000"),
        ("data.heldout_rows", 1, "from 2 to 1,000,000,000"),
        ("data.cuts_per_text", 14, "from 1 to 13"),
        ("mesh.fsdp", 0, "-1 (all remaining devices), or from 1 to 1,000,000,000"),
        ("seed", -1, "from 0 to 4,294,967,295"),
        ("seed", 2**32, "from 0 to 4,294,967,295"),
        ("rl.steps", 2**31, "from 0 to 1,000,000,000"),
        ("rl.kl", None, "a number: from 0 to 1,000"),
        ("rl.steps", True, "a whole number: from 0 to 1,000,000,000"),
        ("rl.steps", 2.0, "a whole number: from 0 to 1,000,000,000"),
    ],
)
def test_an_impossible_number_is_refused_with_its_range(key, value, range_):
    assert refusal(with_value(key, value)) == f"config {key}={value!r}: must be {range_}"


@settings(max_examples=4000, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(st.data())
def test_numbers_are_accepted_as_stated(data):
    """Any number for any setting: the check accepts it exactly if the documentation does."""
    key = data.draw(st.sampled_from(sorted(STATED)))
    (low, high, also), whole = STATED[key], config_ranges.numbers()[key] is int
    edges = [x for edge in (low, high, 0.0 if also is None else also) for x in (edge, edge - 1, edge + 1)]
    if whole:
        value = data.draw(st.sampled_from([int(x) for x in edges]) | st.integers())
    else:
        near = [math.nextafter(x, x + d) for x in (low, high) for d in (-1, 1)]
        value = data.draw(st.sampled_from([*edges, *near]) | st.floats() | st.floats(low, high))
    accepted = low <= value <= high or value == also
    c = with_value(key, value)
    if accepted:
        config_ranges.check(c)
    else:
        with pytest.raises(UserError) as e:
            config_ranges.check(c)
        assert str(e.value).startswith(f"config {key}={value!r}: must be ")


STATED = stated()


def test_clip_0_means_no_clipping():
    grads = {"w": jnp.array([300.0, -400.0, 0.0])}

    def moments(clip):
        tx = optimize.optimizer(1e-3, 10, clip=clip)
        _, state = tx.update(grads, tx.init(grads), grads)
        return np.asarray(optax.tree.get(state, "mu")["w"])

    np.testing.assert_allclose(moments(0.0), [30, -40, 0], rtol=1e-5)
    np.testing.assert_allclose(moments(0.0), moments(1e6), rtol=1e-5)
    np.testing.assert_allclose(moments(1.0), [0.06, -0.08, 0], rtol=1e-5)


def test_a_run_with_and_one_without_clipping_have_one_state():
    """So that the setting does not change what a checkpoint holds."""
    w = {"w": jnp.zeros(3)}
    states = [optimize.optimizer(1e-3, 10, clip=clip).init(w) for clip in (0.0, 1.0)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_bootstrap_0_means_no_intervals():
    rng, docs = np.random.default_rng(0), list("abcdef")
    error, variance = rng.random(6), 1 + rng.random(6)
    assert fve.interval(error, variance, docs, n=0) == (None, None)
    low, high = fve.interval(error, variance, docs, n=50)
    assert low < fve.fve(error, variance) < high


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.window_tokens", 1025, "a window of config data.window_tokens has 1025 tokens; this target"),
        ("warm_ar.max_tokens", 1025, "a row of config warm_ar.max_tokens has 1025 tokens; this target"),
        ("warm_av.max_tokens", 1024, f"a row of config warm_av.max_tokens has {1024 + PROMPT} tokens"),
        ("rl.max_new", 1024, f"config rl.max_new=1024: must be from 1 to {1024 - PROMPT}, because a prompt"),
        ("rl_drill.max_new", 1024, "config rl_drill.max_new=1024: must be from 1 to"),
        ("eval.max_new", 1024, "config eval.max_new=1024: must be from 1 to"),
    ],
)
def test_a_length_beyond_the_targets_context_is_refused(key, value, message):
    """Before the model is loaded: positions beyond the context give results without a meaning."""
    c = with_value(key, value)
    c.rl_drill.steps = 1
    with pytest.raises(UserError) as e:
        context._check_lengths(c, SPEC)
    assert message in str(e.value)
    if key == "data.window_tokens":
        c.data.store = "taken"  # whose texts are not read
        context._check_lengths(c, SPEC)


def test_a_text_beyond_the_targets_context_is_refused_before_the_capture():
    r = types.SimpleNamespace(lm=SPEC.lm, tok=tiny.tokenizer(bos=True))

    def wanted(n):
        return {"warm": [capture_requests.Request("d7", np.zeros(n, np.int32), (0,), ("",), ("",), ("",))]}

    activations.check_lengths(r, wanted(1023))
    with pytest.raises(UserError, match="a text of document 'd7' has 1025 tokens; this target reads at most"):
        activations.check_lengths(r, wanted(1024))
