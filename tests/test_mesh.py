"""One device and four fake ones do the same work; every parameter stands where the table says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from nla_jax import mesh as mesh_lib
from nla_jax import reconstructor, steps, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import lora
from nla_jax.lm import params as params_lib
from tests import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=1), layer=0)
B, G, T = 4, 2, 8
# Gradient descent with momentum: differences stay as small as rounding makes them, where Adam
# divides a gradient near zero by its own size.
TX = optax.sgd(0.1, momentum=0.9)
ADAM = steps.optimizer(1e-3, 10)
OPTS = steps.RLOptions(
    group=G, max_new=T, reward="mse", advantage="mean", kl=0.1, length_penalty=0.0,
    train_ar=True, micro_av=1, micro_ar=1,
)  # fmt: skip
# Largest difference between one device and four, relative to the largest entry of the leaf: sums
# are taken in another order.
TOLERANCE = 1e-4
AV_TABLE = verbalizer.table(SPEC.lm)
AR_TABLE = reconstructor.table(SPEC.lm, SPEC.layer)


def meshes():
    return [(4, 1, 1), (1, 4, 1), (1, 2, 2)]


def run_rl(sizes):
    """Two RL steps on a mesh: (state, metrics of both steps, compilations)."""
    count = int(np.prod(sizes))
    mesh = mesh_lib.make(*sizes, devices=jax.devices()[:count])
    params = tiny.talker_params(SPEC.lm)
    base = mesh_lib.place(params, params_lib.table(SPEC.lm), mesh)
    av = mesh_lib.place(verbalizer.init(params, SPEC.lm), AV_TABLE, mesh)
    ref = mesh_lib.place(verbalizer.init(params, SPEC.lm), AV_TABLE, mesh)
    ar = mesh_lib.place(reconstructor.init(params, SPEC.lm, SPEC.layer), AR_TABLE, mesh)
    state = steps.RLState(mesh_lib.learner(av, TX, mesh), mesh_lib.learner(ar, TX, mesh))
    step = mesh_lib.jit_step(
        functools.partial(steps.rl, spec=SPEC, opts=OPTS, tx_av=TX, tx_ar=TX), state)
    rows = {"h_BD": tiny.activations(B), "row_B": np.arange(B, dtype=np.int32)}
    batch, logs = mesh_lib.batch(rows, mesh), []
    for i in range(3):
        state, metrics = step(state, base, ref, batch, jax.random.key(i))
        logs.append(jax.tree.map(np.asarray, metrics))
    return mesh, state, logs, step._cache_size()


@pytest.fixture(scope="module")
def one_device():
    return run_rl((1, 1, 1))


def assert_close(got, want, tolerance=TOLERANCE):
    got, want = tiny.flat(got), tiny.flat(want)
    assert got.keys() == want.keys()
    for name, a in want.items():
        scale = max(np.abs(a).max(initial=0), 1e-6)
        np.testing.assert_allclose(got[name], a, atol=tolerance * scale, err_msg=name)


@pytest.fixture(scope="module", params=meshes(), ids=str)
def four_devices(request):
    return run_rl(request.param)


def test_rl_on_four_devices(one_device, four_devices):
    """Three steps: the same tokens, metrics, parameters and moments; every first ratio is one."""
    _, want, want_logs, _ = one_device
    _, got, got_logs, _ = four_devices
    for a, b in zip(got_logs, want_logs, strict=True):
        np.testing.assert_array_equal(a["ids_BGT"], b["ids_BGT"])
        assert a["ratio_off_max"] < 1e-4
        for name in b.keys() - {"ids_BGT", "ratio_off_max", "ratio_off_mean"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert_close(got, want)
    assert 0 < want_logs[0]["ok"] < 1 and want_logs[2]["kl"] > 1e-5


def test_placement_survives_training(four_devices):
    """After three donated steps parameters and moments are where they began; one compilation."""
    mesh, state, _, compilations = four_devices
    for role, table in ((state.av, AV_TABLE), (state.ar, AR_TABLE)):
        for tree in (role.params, role.opt[0].trace):
            assert_placed(tree, table, mesh)
    assert compilations == 1


def assert_placed(tree, table, mesh):
    for name, value in named(tree).items():
        spec = mesh_lib.spec_of(value.shape, table[name].axes, mesh)
        want = jax.sharding.NamedSharding(mesh, spec)
        assert value.sharding.is_equivalent_to(want, value.ndim), (name, value.sharding)


def named(tree):
    """{"a/b": array}, on the devices."""
    return {"/".join(k.key for k in path): a
            for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def warm_batches():
    rng = np.random.default_rng(0)
    ids = tiny.random_ids(rng, (8, 16))
    length = rng.integers(4, 17, 8)
    valid = np.arange(16)[None] < length[:, None]
    h = tiny.activations(8)
    return ({"h_BD": h, "ids_BT": ids, "mask_BT": valid},
            {"h_BD": h, "ids_BT": ids, "valid_BT": valid, "last_B": (length - 1).astype(np.int32),
             "weight_B": np.float32([1, 1, 1, 0, 1, 1, 0, 1])})


def run_warm(sizes):
    """Three warm-start steps of both roles with adapters, AV in two microbatches."""
    mesh = mesh_lib.make(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    params = tiny.talker_params(SPEC.lm)
    base = mesh_lib.place(params, params_lib.table(SPEC.lm), mesh)
    av = verbalizer.init(params, SPEC.lm, rank=4, affine=True, key=jax.random.key(0))
    av_table = verbalizer.table(SPEC.lm, rank=4, affine=True)
    ar = reconstructor.init(params, SPEC.lm, SPEC.layer, rank=4, key=jax.random.key(1))
    ar_table = reconstructor.table(SPEC.lm, SPEC.layer, rank=4)
    out = []
    for step, tree, table, rows, micro in (
        (steps.warm_start_av, av, av_table, warm_batches()[0], 2),
        (steps.warm_start_ar, ar, ar_table, warm_batches()[1], 1),
    ):
        role = mesh_lib.learner(mesh_lib.place(tree, table, mesh), TX, mesh)
        run = mesh_lib.jit_step(functools.partial(step, spec=SPEC, tx=TX, micro=micro), role)
        batch = mesh_lib.batch(rows, mesh)
        for _ in range(3):
            role, metrics = run(role, base, batch)
        assert run._cache_size() == 1
        assert_placed(role.params, table, mesh)
        out.append((jax.tree.map(np.asarray, role), jax.tree.map(np.asarray, metrics)))
    return out


def test_warm_start_on_four_devices():
    assert_close(run_warm((1, 2, 2)), run_warm((1, 1, 1)))


# Where things stand


def test_learner_places_moments_like_parameters():
    mesh = mesh_lib.make(1, 2, 2)
    params = verbalizer.init({}, SPEC.lm, rank=4, affine=True, key=jax.random.key(0))
    table = verbalizer.table(SPEC.lm, rank=4, affine=True)
    role = mesh_lib.learner(mesh_lib.place(params, table, mesh), ADAM, mesh)
    adam = next(s for s in jax.tree.leaves(role.opt, is_leaf=lambda s: hasattr(s, "mu"))
                if hasattr(s, "mu"))
    for tree in (role.params, adam.mu, adam.nu):
        assert_placed(tree, table, mesh)
    sharded = [n for n, a in named(adam.mu).items() if not a.sharding.is_fully_replicated]
    assert len(sharded) > 10
    for counter in (adam.count, role.skipped, role.skipped_run):
        assert counter.sharding.is_fully_replicated and counter.sharding.mesh == mesh


@pytest.mark.parametrize("name, spec, shard", [
    ("embed", P("tensor", "fsdp"), (152, 16)),
    ("blocks/wq", P(None, "fsdp", "tensor"), (1, 16, 16)),
    ("blocks/wk", P(None, "fsdp", "tensor"), (1, 16, 8)),
    ("blocks/wo", P(None, "tensor", "fsdp"), (1, 16, 16)),
    ("blocks/w_down", P(None, "tensor", "fsdp"), (1, 32, 16)),
    ("blocks/attn_norm", P(None, None), (1, 32)),
    ("final_norm", P(None), (32,)),
    ("lm_head", P("fsdp", "tensor"), (16, 152)),
])  # fmt: skip
def test_where_parameters_go(name, spec, shard):
    """By hand, so that a change of the rules is seen."""
    mesh = mesh_lib.make(1, 2, 2)
    entry = params_lib.table(SPEC.lm)[name]
    assert mesh_lib.spec_of(entry.shape, entry.axes, mesh) == spec
    placed = mesh_lib.place({"x": np.zeros(entry.shape)}, {"x": entry}, mesh)["x"]
    assert placed.addressable_shards[0].data.shape == shard


def test_rules_cover_every_axis_of_every_table():
    """And no rule is left over; matrices are split over both axes, so none hides as None."""
    tables = [
        params_lib.table(tiny.lm(tied=True)), params_lib.table(tiny.lm(tied=False)),
        lora.table(tiny.lm(), 4), verbalizer.table(tiny.lm(), affine=True),
        verbalizer.table(tiny.lm(), rank=4), reconstructor.table(tiny.lm(), 2),
        reconstructor.table(tiny.lm(), 2, rank=4),
    ]  # fmt: skip
    used = {axis for table in tables for spec in table.values() for axis in spec.axes}
    assert used == set(mesh_lib.RULES)
    for table in tables:
        for name, spec in table.items():
            assert len(spec.axes) == len(spec.shape), name
    for name, spec in params_lib.table(tiny.lm(tied=False)).items():
        if "norm" not in name:
            assert {mesh_lib.RULES[a] for a in spec.axes} - {None} == {"fsdp", "tensor"}, name
    assert set(mesh_lib.RULES.values()) <= {None, *mesh_lib.AXES}


def test_a_wrong_axis_name_fails():
    mesh = mesh_lib.make(1, 2, 2)
    wrong = {"w": params_lib.Spec((4, 4), ("model", "modle"))}
    with pytest.raises(KeyError, match="modle"):
        mesh_lib.place({"w": jnp.ones((4, 4))}, wrong, mesh)
    with pytest.raises(KeyError, match="other"):
        mesh_lib.place({"other": jnp.ones((4, 4))}, wrong, mesh)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = mesh_lib.make(1, 2, 2)
    assert mesh_lib.spec_of((5, 6), ("vocab", "model"), mesh) == P(None, "fsdp")


def test_sizes():
    assert mesh_lib.make().shape == {"data": 4, "fsdp": 1, "tensor": 1}
    assert mesh_lib.make(1, -1, 2).shape == {"data": 1, "fsdp": 2, "tensor": 2}
    assert mesh_lib.make(2, devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize("sizes, named", [
    ((3, 1, 1), "needs 3 devices; there are 4"),
    ((8, 1, 1), "needs 8 devices; there are 4"),
    ((-1, 3, 1), "needs 3 devices; there are 4"),
    ((-1, 8, 1), "needs 8 devices; there are 4"),
    ((-1, -1, 1), "at most one of them -1"),
    ((0, 1, 1), "positive numbers"),
    ((-2, 1, 1), "positive numbers"),
])  # fmt: skip
def test_sizes_refused(sizes, named):
    with pytest.raises(UserError, match=named):
        mesh_lib.make(*sizes)


def test_batch_over_devices():
    mesh = mesh_lib.make(1, 2, 2)
    placed = mesh_lib.batch({"h": np.ones((4, 3)), "row": np.arange(4)}, mesh)
    assert placed["h"].addressable_shards[0].data.shape == (2, 3)
    assert {tuple(s.data.tolist()) for s in placed["row"].addressable_shards} == {(0, 1), (2, 3)}
    with pytest.raises(UserError, match="a batch of 3 rows does not divide over 2 devices"):
        mesh_lib.batch({"h": np.ones((3, 3))}, mesh)
    for leaf in jax.tree.leaves(mesh_lib.replicated({"a": np.ones(3)}, mesh)):
        assert leaf.sharding.is_fully_replicated
