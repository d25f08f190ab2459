"""Settings that must be in place before jax is imported.

Tests run on the CPU with eight devices, so that sharded code is exercised everywhere; an
unsharded computation still runs on the first one alone. JAX_PLATFORMS set by hand wins.
Nearly all of the time goes into compiling small programs, so XLA optimises them less.
"""

import os

DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
# No test talks to a model hub; a try fails at once and says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A toy target, corpus and explanations: `nla_jax.toy.build`, made once."""
    from tests import toys

    return toys.build(tmp_path_factory.mktemp("toy") / "world")


@pytest.fixture(scope="session")
def toy_run(toy_world):
    """The workdir of experiments/toy.py run to its end by `nla train`, once."""
    from tests import toys

    workdir = toy_world.parent / "run"
    toys.finish(toys.train(toy_world, workdir))
    return workdir


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory that `world.build` made: a target, a corpus and a whole run, untrained."""
    import world

    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def quick(finished):
    """Programs of a module's tests are hardly optimized, and shared with the run of `finished`."""
    import world

    with world.one_device(), world.quick_compiles(finished):
        yield


@pytest.fixture(scope="module")
def nla(finished, quick):
    """The bundle of `finished`."""
    import nla_jax

    return nla_jax.load(finished / "run" / "bundle", batch=8)


@pytest.fixture(scope="module")
def engine(finished, quick):
    """The explorer's engine, warm start beside RL."""
    from nla_jax.view import engine, sides

    run = finished / "run"
    return engine.Engine(sides.open_sides(run / "bundle", run / "bundle_warm"), max_tokens=64)
