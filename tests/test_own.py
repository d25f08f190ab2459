"""docs/howto/own.md: its code runs outside the checkout, and names that mean nothing are refused."""

import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import objectives
from nla_jax.errors import UserError
from nla_jax.pipeline import config_checks
from tests.helpers import world

PAGE = Path(__file__).resolve().parent.parent / "docs" / "howto" / "own.md"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The modules of the page in a directory of their own, which is the working directory."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_rewards.py", "my_loop.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name, _ in blocks:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_a_reward_and_an_advantage(elsewhere):
    mse, ok = jnp.array([0.05, 0.5, 0.3]), jnp.array([True, True, False])
    np.testing.assert_allclose(
        objectives.reward(mse, ok, "my_rewards:clipped"), -np.log([0.1, 0.5, 2.0]), rtol=1e-6
    )
    ranks = objectives.advantages(jnp.array([[3.0, 9.0, 1.0]]), "my_rewards:ranks")
    np.testing.assert_allclose(ranks, [[0.0, 1.0, -1.0]])


def test_a_loop(elsewhere, finished):
    sys.path.append(str(elsewhere))
    import my_loop

    rewards = my_loop.train(finished / "run" / "bundle", ["an old town by the sea", "the king went home"], 2)
    assert len(rewards) == 2 and np.isfinite(rewards).all() and max(rewards) <= -np.log(0.1) + 1e-5


def test_a_run_takes_them(elsewhere, finished):
    own = dict(reward="my_rewards:clipped", advantage="my_rewards:ranks")
    config_checks.validate(world.config(finished, rl=own))


@pytest.mark.parametrize(
    "reward, named",
    [
        ("cosine", "rl.reward='cosine': must be one of 'mse', 'log_mse', or your own as 'module:function'"),
        ("my_rewards:gone", "module 'my_rewards' has no function 'gone'"),
        ("nowhere_at_all:f", "cannot import 'nowhere_at_all'"),
    ],
)
def test_a_name_that_means_nothing(elsewhere, finished, reward, named):
    with pytest.raises(UserError, match=re.escape(named)):
        config_checks.validate(world.config(finished, rl=dict(reward=reward)))
