import json

import numpy as np
import pytest

from nla_jax.data import shuffle, store, store_writer
from nla_jax.errors import UserError

D = 5
PLAN = {"target": "tiny", "layer": 1, "seed": 0}


def row(doc_id, i, scale=1.0):
    return {
        "doc_id": doc_id,
        "position": i,
        "n_tokens": i + 3,
        "text": f"text “{i}”",
        "next_text": " and so on",
        "explanation": "first\nlast" if i % 2 else "",
        "h": scale * np.arange(i + 1, i + 1 + D, dtype=np.float32),
    }


@pytest.fixture
def directory(tmp_path):
    writer = store_writer.Writer(tmp_path / "s", D, PLAN)
    for i in range(2):
        writer.write_shard("warm", i, 2, [row(f"w{i}", 10 * i + j) for j in range(3 + i)])
    writer.write_shard("heldout", 0, 1, [row("h", 1)])
    writer.commit({"drops": {"used": 8}})
    return tmp_path / "s"


def test_round_trip(directory):
    expected = [row(f"w{i}", 10 * i + j) for i in range(2) for j in range(3 + i)]
    rows = store.open_store(directory, "warm")
    assert len(rows) == 7 and [r["position"] for r in rows[1:3]] == [1, 2]
    columns = store.load_columns(directory, "warm")
    assert columns["h"].dtype == np.float32 and columns["h"].shape == (7, D)
    for i, want in enumerate(expected):
        got = rows[i]
        assert got.keys() == want.keys()
        for name in want:
            assert np.array_equal(got[name], want[name])
            assert np.array_equal(columns[name][i], want[name])
    assert list(store.load_columns(directory, "heldout", ["doc_id"]).values()) == [["h"]]


def test_tfds_and_grain_open_it(directory):
    import grain
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(directory))
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {"warm": 7, "heldout": 1}
    source = builder.as_data_source("warm")
    assert source[6]["doc_id"] == b"w1"
    np.testing.assert_array_equal(source[6]["h"], row("w1", 13)["h"])
    rows = grain.MapDataset.source(store.open_store(directory, "warm"))
    assert rows[2]["text"] == "text “2”"


def test_meta(directory):
    meta = store.read_meta(directory)
    assert meta["plan"] == PLAN | {"d_model": D} and meta["drops"] == {"used": 8}
    warm = meta["splits"]["warm"]
    norms = np.linalg.norm(store.load_columns(directory, "warm")["h"], axis=1)
    assert (warm["rows"], warm["documents"], warm["shards"]) == (7, 2, 2)
    np.testing.assert_allclose(
        [warm["norm"][k] for k in ("min", "p25", "p50", "p75", "max")],
        np.percentile(norms, [0, 25, 50, 75, 100]),
        rtol=1e-6,
    )
    assert not (directory / ".progress").exists()


def test_goes_on_where_it_stopped(tmp_path):
    first = store_writer.Writer(tmp_path, D, PLAN)
    first.write_shard("warm", 1, 3, [row("a", 1)])

    def killed():
        yield row("b", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.write_shard("warm", 0, 3, killed())
    with pytest.raises(UserError, match="unfinished extraction; run the same command again"):
        store.open_store(tmp_path, "warm")

    second = store_writer.Writer(tmp_path, D, PLAN)
    assert second.done_shards("warm", 3) == {1} and second.done_shards("rl", 3) == set()
    with pytest.raises(UserError, match=r"split 'warm' is incomplete \(shards \[0, 2\] of 3\)"):
        second.commit()
    for i in (0, 2):
        second.write_shard("warm", i, 3, [row("b", i)])
    second.commit()
    assert store.load_columns(tmp_path, "warm", ["doc_id"])["doc_id"] == ["b", "a", "b"]
    with pytest.raises(UserError, match="already complete"):
        store_writer.Writer(tmp_path, D, PLAN)


def test_other_plan_is_refused(tmp_path):
    store_writer.Writer(tmp_path, D, PLAN)
    with pytest.raises(UserError, match=r"begun with other settings \(layer, seed\)"):
        store_writer.Writer(tmp_path, D, {**PLAN, "layer": 2, "seed": 5})


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (np.full(D, np.nan), "of 'doc' at token 7 is not finite"),
        (np.array([1, np.inf, 0, 0, 0]), "of 'doc' at token 7 is not finite"),
        (np.zeros(D), "of 'doc' at token 7 is zero"),
        (np.ones(D + 1), r"of 'doc' at token 7 has shape \(6,\), not \(5,\)"),
    ],
)
def test_bad_activations_are_refused(tmp_path, h, message):
    writer = store_writer.Writer(tmp_path, D, PLAN)
    with pytest.raises(UserError, match=message):
        writer.write_shard("warm", 0, 1, [row("ok", 1), {**row("doc", 7), "h": h}])
    assert writer.done_shards("warm", 1) == set()


def test_commit_refuses_nothing_and_shared_documents(tmp_path):
    writer = store_writer.Writer(tmp_path, D, PLAN)
    with pytest.raises(UserError, match="shard 0 of split 'warm' has no row"):
        writer.write_shard("warm", 0, 1, [])
    with pytest.raises(UserError, match="no shard to commit"):
        writer.commit()
    writer.write_shard("warm", 0, 1, [row("a", 1)])
    writer.write_shard("rl", 0, 1, [row("a", 2)])
    with pytest.raises(UserError, match="document 'a' is in split"):
        writer.commit()
    assert not store.is_complete(tmp_path)


def test_damaged_stores_are_refused(directory):
    with pytest.raises(UserError, match="no split 'rl': it has heldout, warm"):
        store.open_store(directory, "rl")
    with pytest.raises(UserError, match="no column 'hh'"):
        store.load_columns(directory, "warm", ["hh"])
    shard = sorted(directory.glob("*warm*"))[0]
    data = shard.read_bytes()
    for changed in (data[:80] + b"\xff" * 40 + data[120:], bytes(len(data))):  # of the same length
        shard.write_bytes(changed)
        with pytest.raises(UserError, match="00000-of-00002: damaged|rows of 'warm' instead of 7") as e:
            store.load_columns(directory, "warm")
        assert "\n" not in str(e.value)
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=f"{len(data) - 10} bytes instead of {len(data)}"):
        store.load_columns(directory, "warm")
    shard.unlink()
    with pytest.raises(UserError, match="00000-of-00002: missing"):
        store.open_store(directory, "warm")
    (directory / store.META).write_text("{", "utf-8")
    with pytest.raises(UserError, match="nla_store.json: damaged"):
        store.read_meta(directory)
    (directory / store.META).write_text(json.dumps([]), "utf-8")
    with pytest.raises(UserError, match="nla_store.json: damaged"):
        store.read_meta(directory)
    with pytest.raises(UserError, match="no activations here"):
        store.read_meta(directory / "elsewhere")


def test_order_is_a_pure_function_of_the_step():
    n, batch = 10, 4
    draws = shuffle.epoch_indices(n, batch, seed=3, purpose="av")
    again = shuffle.epoch_indices(n, batch, seed=3, purpose="av")
    flat = np.concatenate([draws[step] for step in range(10)])
    for step in (9, 0, 5):  # any order of access
        np.testing.assert_array_equal(again[step], flat[4 * step : 4 * step + 4])
    epochs = flat.reshape(4, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(e) for e in epochs.tolist()}) == 4
    assert draws[10**7].shape == (batch,)
    step_epochs = np.concatenate([shuffle.batch_epochs(n, batch, step) for step in range(10)])
    np.testing.assert_array_equal(step_epochs, np.repeat(np.arange(4), n))


def test_order_differs_by_seed_and_purpose_and_slices_by_host():
    def epoch(seed, purpose):
        return shuffle.epoch_indices(64, 64, seed, purpose)[0].tolist()

    orders = {tuple(epoch(s, p)) for s in (0, 1) for p in ("av", "ar")}
    assert len(orders) == 4
    # Grain alone would make epoch 1 of seed 0 equal to epoch 0 of seed 1.
    assert shuffle.epoch_indices(64, 64, 0, "av")[1].tolist() != epoch(1, "av")
    whole = shuffle.epoch_indices(64, 8, 0, "av")[3]
    parts = [shuffle.epoch_indices(64, 8, 0, "av")[3][host::2] for host in range(2)]
    assert sorted(np.concatenate(parts)) == sorted(whole)
    with pytest.raises(UserError, match="batches of 4 from 0 rows"):
        shuffle.epoch_indices(0, 4, 0, "av")
