"""Settings of jax in the environment, as the kind of random keys and 64-bit numbers, change no result."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from nla_jax import reconstructor, steps, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import decode_tp, generate, optimize
from nla_jax.lm import params as params_lib
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from nla_jax.util import keys
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parent.parent.parent
B, G, T = 2, 2, 4
SPEC = tiny.talker(lm=tiny.smallest(3), layer=1)
MATCHED = dataclasses.replace(SPEC, av=dataclasses.replace(SPEC.av, injection="norm_matched"))
OPTS = tiny.rl_options(G, T, advantage="zscore", kl=0.1, length_penalty=0.5, length_free=1, ar_group=1)


@functools.cache
def base_params():
    return jax.tree.map(np.asarray, tiny.talker_params(SPEC.lm))


def rl_arguments(key, rank: int = 2):
    """(state, base, reference, batch, key) of an RL step with an affine map, and the optimizer."""
    tx = optimize.optimizer(1e-3, 10, mu_dtype="bfloat16")
    base = jax.tree.map(jnp.asarray, base_params())
    av = verbalizer.init(base, SPEC.lm, rank=rank, affine=True, key=keys.new_key(1))
    ar = reconstructor.init(base, SPEC.lm, SPEC.layer, rank=rank, key=keys.new_key(2))
    state = steps.RLState(optimize.learner(av, tx), optimize.learner(ar, tx))
    batch = {"h_BD": tiny.activations(B, 8), "row_B": np.arange(B, dtype=np.int32)}
    return (state, base, jax.tree.map(np.asarray, av), batch, key), tx


def outcome(key) -> dict[str, np.ndarray]:
    """Every array of an RL step, which captures h and updates both roles, by name."""
    (state, base, ref, _, key), tx = rl_arguments(key)
    texts = {"read_ids_BT": tiny.random_ids(np.random.default_rng(0), (B, T)),
             "read_valid_BT": np.ones((B, T), bool), "read_at_B": np.full(B, T - 1, np.int32),
             "row_B": np.arange(B, dtype=np.int32)}
    run = functools.partial(steps.rl, spec=MATCHED, opts=OPTS, tx_av=tx, tx_ar=tx)
    return tiny.flat((state, jax.jit(run)(state, base, ref, texts, key)))


@functools.cache
def usual():
    return outcome(keys.new_key(7))


@pytest.fixture(autouse=True)
def usual_promotion():
    """optax multiplies its count with floats, and captured numpy arrays have no exempt place."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_64_bit_numbers_change_nothing():
    """Parameters, moments, metrics and samples keep their dtypes and their values."""
    want = usual()
    with jax.enable_x64(True):
        got = outcome(keys.new_key(7))
    assert got.keys() == want.keys() and len(want) > 100
    for name, a in want.items():
        assert got[name].dtype == a.dtype, name
        if np.issubdtype(a.dtype, np.integer):
            assert np.array_equal(got[name], a), name
        else:
            np.testing.assert_allclose(*map(np.float32, (got[name], a)), rtol=1e-4, atol=1e-6, err_msg=name)


def arrays_of(jaxpr) -> set:
    """(dtype, rank) of every result of a jaxpr, with the jaxprs inside of it."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {(v.aval.dtype, len(v.aval.shape)) for v in eqn.outvars if hasattr(v.aval, "dtype")}
        for inner in jaxprs_in_params(eqn.params):
            found |= arrays_of(inner)
    return found


@pytest.mark.parametrize("sizes, rank", [(None, 2), ((1, 2, 4), 2), ((1, 2, 4), 0)])
def test_64_bit_numbers_make_no_64_bit_floats(sizes, rank, monkeypatch):
    """A step holds no array of float64, on one device and with the collectives of a mesh."""
    if not rank:  # as a large model
        monkeypatch.setattr(decode_tp, "UNROLLED", 0)
    base_params()
    with jax.enable_x64(True):
        (state, base, ref, batch, key), tx = rl_arguments(keys.new_key(7), rank)
        opts = dataclasses.replace(OPTS, micro_av=2, micro_ar=2)
        spec = dataclasses.replace(MATCHED, remat=True)
        run = functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx, tx_ar=tx)
        if sizes:
            mesh = tiny.mesh(*sizes)
            base = mesh_lib.shard_params(base, params_lib.table(SPEC.lm), mesh)
            tables = {"av": verbalizer.table(SPEC.lm, rank=rank, affine=True),
                      "ar": reconstructor.table(SPEC.lm, SPEC.layer, rank=rank)}
            trees = {role: mesh_lib.shard_params(getattr(state, role).params, table, mesh)
                     for role, table in tables.items()}
            state = steps.RLState(**{r: jitted_steps.learner(t, tx, mesh) for r, t in trees.items()})
            ref, run = trees["av"], jitted_steps.jit_step(run, state)
            batch = mesh_lib.shard_batch(batch, mesh)
        traced = (run if sizes else jax.jit(run)).trace(state, base, ref, batch, key)
    wide = {(d, n) for d, n in arrays_of(traced.jaxpr.jaxpr) if d == np.float64}
    assert {n for _, n in wide} <= {0}, "only numbers of the schedule may be float64"


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_default_kind_of_keys_changes_nothing(impl):
    """A caller's key of the environment's kind gives the samples of the usual one."""
    rows, h_BD = jnp.arange(3, dtype=jnp.int32), tiny.activations(3, 8)
    base = base_params()

    def samples(n):
        return jax.jit(lambda key: steps.rollout({"params": base}, base, SPEC, h_BD[:n], rows[:n], key,
                                                 group=G, max_new=T)[0].ids_BT)(jax.random.key(5))

    want = samples(3)
    with jax.default_prng_impl(impl):
        assert jax.random.key_impl(jax.random.key(5)) == impl
        assert np.array_equal(samples(3), want)
        assert np.array_equal(samples(1), want[:G]), "a sample does not depend on the batch"
        tiny.assert_trees_close(params_lib.init(SPEC.lm, keys.new_key(3)), usual_init())
        assert keys.key_for(4, "rl", 2).dtype == keys.new_key(0).dtype


@functools.cache
def usual_init():
    return params_lib.init(SPEC.lm, jax.random.key(3, impl="threefry2x32"))


def test_what_is_drawn_does_not_depend_on_the_environment():
    """The numbers themselves, so that a run goes on with the same samples in another version of jax."""
    key = keys.new_key(3)
    for changed in (contextlib.nullcontext(), jax.threefry_partitionable(False), jax.enable_x64(True),
                    jax.default_prng_impl("rbg"), jax.numpy_dtype_promotion("strict")):
        with changed:
            u, normal = keys.uniform(key), keys.normal(key, (2,))
            assert (u.dtype, normal.dtype) == (np.float32, np.float32)
            assert float(u) == pytest.approx(0.07405257)
            assert float(jax.jit(lambda k: keys.uniform(k))(keys.new_key(3))) == float(u)
            np.testing.assert_allclose(normal, [-1.446257, 1.539381], rtol=1e-5)


def test_keys_of_callers():
    want = jax.random.key_data(keys.new_key(5))
    for key in (jax.random.key(5), jax.random.key(5, impl="rbg"), jax.random.PRNGKey(5)):
        assert np.array_equal(jax.random.key_data(keys.to_threefry(key)), want)
    for wrong in (jnp.zeros(3, jnp.uint32), jnp.zeros(2), jnp.int32(5)):
        with pytest.raises(UserError, match="make it by jax.random.key"):
            generate.row_keys(wrong, jnp.arange(2))


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_beyond_32_bits_are_refused(seed):
    """They would give other keys with 64-bit numbers than without."""
    with pytest.raises(UserError, match=f"seed {seed}: must be from 0 to 4294967295"):
        keys.new_key(seed)


def test_every_key_of_the_package_names_its_kind():
    made = re.compile(r"random\.(key|PRNGKey|wrap_key_data)\(")
    files = [p for folder in ("nla_jax", "benchmarks", "experiments") for p in (ROOT / folder).rglob("*.py")]
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            if made.search(line) and ">>>" not in line and "verbalize(h" not in line:
                assert "impl=" in line, f"{path}: {line}"
