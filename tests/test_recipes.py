"""Experiment files: the official recipe, with the facts of the release, and the small ones' variants."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from nla_jax import objectives, recipes
from nla_jax.pipeline import config_checks
from nla_jax.pipeline.experiment_files import load_config

# ml_collections loads experiment files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

RELEASED = {
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B-Instruct", 20, 150, "PARENTHESIZED HANGUL KIYEOK A", 1.41e-5),
    "gemma3_12b": ("google/gemma-3-12b-it", 32, 80000, "PARENTHESIZED HANGUL CIEUC U", 1e-5),
    "gemma3_27b": ("google/gemma-3-27b-it", 41, 60000, "PARENTHESIZED HANGUL CIEUC U", 1.41e-5),
    "llama3_3_70b": ("meta-llama/Llama-3.3-70B-Instruct", 53, 30, "SQUARE M SQUARED", 5e-6),
}
FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("arg", ["", ":runs/store", ":runs/store,lora"])
def test_recipe_is_the_released_one(name, arg):
    c = config_checks.lock(load_config(f"{FOLDER / name}.py{arg}", []))
    target, layer, alpha, marker, lr = RELEASED[name]
    assert (c.target, c.layer, c.alpha) == (target, layer, alpha)
    assert unicodedata.name(c.marker) == marker
    assert c.data.store == ("runs/store" if arg else "")
    lora = arg.endswith("lora")
    assert (c.av.rank, c.ar.rank) == ((64, 64) if lora else (0, 0))
    assert (c.rl.batch, c.rl.group, c.rl.max_new, c.rl.kl) == (128, 8, 150, 0.01)
    assert c.rl.lr_av == c.rl.lr_ar == pytest.approx(10 * lr if lora else lr)
    assert (c.rl.reward, c.rl.advantage, c.rl.policy) == ("mse", "zscore", "reinforce")
    assert (c.rl.clip, c.rl.warmup, c.rl.final_lr, c.rl.ar_group) == (1.0, 0, 1.0, 0)
    assert (c.warm_av.batch, c.warm_av.steps, c.warm_av.warmup) == (256, 1000, 50)
    assert c.warm_ar.lr == pytest.approx(2e-4 if lora else 2e-5)
    assert c.mesh.to_dict() == {"data": 1, "fsdp": -1, "tensor": 0}  # chosen on the machine
    assert c.warm_av.loss_mean == c.rl.loss_mean == "sequences"
    assert c.mu_dtype == ("bfloat16" if name == "qwen2_5_7b" else "float32")


def test_the_recipe_of_easy_nla():
    c = config_checks.lock(recipes.easy_nla("Qwen/Qwen3-8B", layer=24, marker="\u321c"))
    o = c.rl
    assert (o.batch, o.group, o.max_new, o.steps) == (128, 8, 200, 400)
    assert (o.policy, o.advantage, o.drop_equal, o.loss_mean) == ("cispo", "batch", True, "prompts")
    assert (o.reward, o.kl, o.lr_av, o.lr_ar, o.warmup, o.ar_group) == ("mse", 0.01, 2e-5, 8e-5, 10, 1)
    assert (c.av.rank, c.ar.rank, c.av.injection) == (64, 64, "norm_matched")
    per_token = o.length_penalty * np.diff(objectives.length_cost(np.arange(160, 201), 200, o.length_free))
    np.testing.assert_allclose(per_token, [0.0] * 20 + [0.01] * 20, atol=1e-6)


def get(name: str) -> dict:
    return config_checks.lock(load_config(f"{FOLDER}/{name}", [])).to_dict()


@pytest.mark.parametrize("file, first, changes", [
    ("quickstart", "replace", {"affine": {"av": {"affine": "identity"}},
                               "norm_matched": {"av": {"injection": "norm_matched"}}}),
    ("levers", "base", {"group_4": {"rl": {"batch": 16, "group": 4, "update_group": 2}},
                        "mse": {"rl": {"reward": "mse"}},
                        "no_kl": {"rl": {"kl": 0.0}}, "ar_best": {"rl": {"ar_group": 2}},
                        "target_reader": {"ar": {"kind": "frozen"}, "rl": {"steps": 21}}}),
])
def test_a_variant_differs_in_what_its_name_says(file, first, changes):
    plain = get(f"{file}.py:{first}")
    for name, change in changes.items():
        wanted = {**plain, **{section: {**plain[section], **values} for section, values in change.items()}}
        assert get(f"{file}.py:{name}") == wanted != plain
    with pytest.raises(Exception, match=f"'none'.*{first}"):
        get(f"{file}.py:none")


def test_every_arm_of_the_rewards_is_possible():
    """And is one config of its own, with steps of 64 answers and the figures of the table's command."""
    text = (FOLDER / "rewards.py").read_text("utf-8")
    loop = text.partition("for arm in ")[2].partition(";")[0].replace("\\", " ").split()
    found = [get(f"rewards.py:{arm}") for arm in loop]
    assert {c["rl"]["batch"] * c["rl"]["group"] for c in found} == {64}
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert {c["eval"]["probes"] for c in found} == {"round_trip,claims,drift,language"}
    with pytest.raises(Exception, match="known are ") as e:
        get("rewards.py:none")
    assert sorted(str(e.value).partition("known are ")[2].strip("'\"").split(", ")) == sorted(loop)


def test_every_lever_is_possible():
    """And is one config of its own."""
    text = (FOLDER / "levers.py").read_text("utf-8")
    loop = text.partition("for lever in ")[2].partition(";")[0].replace("\\", " ").split()
    found = [get(f"levers.py:{lever}") for lever in loop]
    assert {c["rl"]["batch"] * c["rl"]["group"] for c in found} == {64}
    # A step that costs more or less has another number of steps in the same time.
    other = {lever for lever, c in zip(loop, found, strict=True) if c["rl"]["steps"] != 15}
    assert other <= {"all_answers", "frozen_ar", "target_reader", "ar_best", "drill"}
    assert {c["rl"]["minutes"] for c in found} == {0} and all(c["rl"]["steps"] for c in found)
    assert len(loop) == 13 and all(a != b for i, a in enumerate(found) for b in found[:i])
    with pytest.raises(Exception, match="known are ") as e:
        get("levers.py:none")
    assert sorted(str(e.value).partition("known are ")[2].strip("'\"").split(", ")) == sorted(loop)
