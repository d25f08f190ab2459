"""Settings that must be in place before jax is imported.

Tests run on the CPU with eight devices, so that sharded code is exercised everywhere; an
unsharded computation still runs on the first one alone. JAX_PLATFORMS set by hand wins.
Nearly all of the time goes into compiling small programs, so XLA optimises them less.

An implicit broadcast between arrays of different rank is an error in every test. Arrays of different dtypes
may not meet in tests of the method (`tests/method/conftest.py`).
"""

import os
import shutil

from tests.helpers.flags import DEVICES, FAST

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8 {FAST}".strip()
# No test talks to a model hub; a try fails at once and says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import filelock
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Files whose tests take a whole run come first: of several workers none is left alone with them."""
    first, last = {}, len(items)
    for i, item in enumerate(items):
        runs = [n for n, name in enumerate(("toy_world", "finished")) if name in item.fixturenames]
        first[item.path] = min(first.get(item.path, (last, i)), (min(runs, default=last), i))
    items.sort(key=lambda item: first[item.path])


@pytest.fixture(scope="session", autouse=True)
def one_device_for_bundles():
    """Bundles are opened on the first device, because programs for eight compile slowly. The tests of
    inference on meshes ask for `all_devices`."""
    from nla_jax.sharding import inference

    whole = inference.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "make_mesh", lambda *sizes, devices=None: whole(
            *sizes, devices=jax.devices()[:1] if devices is None else devices))
        yield whole


@pytest.fixture
def all_devices(one_device_for_bundles, monkeypatch):
    """Bundles are opened on all eight devices."""
    from nla_jax.sharding import inference

    monkeypatch.setattr(inference, "make_mesh", one_device_for_bundles)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, build): the directory that build(directory) makes, for all workers of pytest-xdist. Whoever
    asks first makes it, and others that ask wait."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name, build):
        place, whole = root / name, root / f"{name}.whole"
        with filelock.FileLock(root / f"{name}.lock"):
            if not whole.exists():
                assert not place.exists(), f"{place}: another worker could not make it"
                place.mkdir()
                build(place)
                whole.touch()
        return place

    return made


@pytest.fixture(scope="session")
def toy_world(once):
    """A toy target, corpus and explanations: `nla_jax.toy.build`, made once."""
    from tests.helpers import toys

    return once("toy", lambda place: toys.build(place / "world")) / "world"


@pytest.fixture(scope="session")
def toy_run(toy_world, once):
    """The workdir of experiments/toy.py run to its end by `nla train`, once."""
    from tests.helpers import toys

    return once("toy_run", lambda place: toys.finish(toys.train(toy_world, place / "run"))) / "run"


@pytest.fixture(scope="session")
def wheel(once):
    """A wheel of this checkout, built once."""
    from tests.helpers import wheel

    return next(once("wheel", wheel.build).glob("*.whl"))


@pytest.fixture(scope="session")
def finished(once):
    """The directory that `world.build` made: a target, a corpus and a whole run, untrained."""
    from tests.helpers import world

    return once("world", world.build)


@pytest.fixture(scope="session")
def programs(finished, tmp_path_factory):
    """A directory for `world.quick_compiles` that has what the run of `finished` compiled. Each worker has
    its own: jax does not write whole files at once."""
    place = tmp_path_factory.mktemp("programs")
    shutil.copytree(finished / "xla", place / "xla")
    return place


@pytest.fixture(scope="module")
def quick(programs):
    """Programs of a module's tests are hardly optimized, and shared with the run of `finished`."""
    from tests.helpers import world

    with world.one_device(), world.quick_compiles(programs):
        yield


@pytest.fixture(scope="module")
def nla(finished, quick):
    """The bundle of `finished`."""
    import nla_jax

    return nla_jax.load(finished / "run" / "bundle", batch=8)


@pytest.fixture(scope="module")
def engine(finished, quick):
    """The explorer's engine, warm start beside RL."""
    from nla_jax.view.explorer import bundles, engine

    run = finished / "run"
    return engine.Engine(bundles.open_sides(run / "bundle", run / "bundle_warm"), max_tokens=64)
