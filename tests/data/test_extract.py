"""Extraction: the same rows whoever writes the shards, in whatever order, killed or not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_jax.data import extract, request_batches, store, store_writer
from nla_jax.errors import UserError
from nla_jax.util import distributed, paths
from tests.helpers import extracting, world


def shards(directory) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(directory).iterdir() if "array_record" in p.name}


def contents(directory) -> dict[str, dict]:
    """Every row in its place. (The bytes of a record differ between processes: its fields have no order.)"""
    splits = store.read_meta(directory)["splits"]
    columns = {split: store.load_columns(directory, split) for split in splits}
    return {s: {**c, "h": c["h"].tobytes(), "position": c["position"].tolist(),
                "n_tokens": c["n_tokens"].tolist()} for s, c in columns.items()}


@pytest.fixture(scope="module")
def requests():
    return extracting.wanted()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, requests):
    """The store that one process wrote."""
    directory = tmp_path_factory.mktemp("alone") / "data"
    extracting.run(directory, requests=requests)
    return directory


def test_every_position_is_there_once_with_its_h(alone, requests):
    for split, wanted in requests.items():
        columns = store.load_columns(alone, split)
        got = {(d, t): h for d, t, h in zip(columns["doc_id"], columns["text"], columns["h"], strict=True)}
        want = {}
        for r in wanted:
            h_1PD = extracting.capture(r.ids[None], np.ones((1, len(r.ids)), bool), np.array([r.positions]))
            want |= {(r.doc_id, t): h for t, h in zip(r.texts, h_1PD[0], strict=True)}
        assert got.keys() == want.keys() and len(columns["h"]) == len(want)
        assert all((got[k] == want[k]).all() for k in want)


def start(directory, host, hosts, seconds):
    """One host in a process of its own."""
    argv = [sys.executable, "-m", extracting.__name__, directory, host, hosts, seconds]
    where = [str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(where)}
    return subprocess.Popen(list(map(str, argv)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_three_processes_one_of_them_killed(alone, tmp_path):
    directory = tmp_path / "data"
    hosts = [start(directory, i, 3, 0.2) for i in range(3)]
    deadline = time.monotonic() + 120
    while not list(directory.glob("*-00001-of-*")):  # the first shard of host 1
        assert hosts[1].poll() is None and time.monotonic() < deadline, hosts[1].communicate()
        time.sleep(0.005)
    hosts[1].kill()
    for host in (hosts[0], hosts[2]):
        said, errors = host.communicate()
        assert host.returncode == 0 and b"belong to other hosts" in said, errors
    hosts[1].communicate()
    assert hosts[1].returncode == -9
    with pytest.raises(UserError, match="unfinished extraction"):
        store.read_meta(directory)
    extracting.run(directory, (1, 3))
    assert contents(directory) == contents(alone)
    meta, want = store.read_meta(directory), store.read_meta(alone)
    assert meta == want and not (directory / ".progress").exists()


class Killed(BaseException):
    pass


@settings(max_examples=8, deadline=None)
@given(
    hosts=st.integers(1, 4), order=st.randoms(use_true_random=False), batch=st.integers(1, 9),
    rows_per_shard=st.sampled_from([5, 16, 40, 1000]), kill=st.integers(1, 12),
)
def test_any_sharding_gives_the_same_rows(
    alone, requests, tmp_path_factory, hosts, order, batch, rows_per_shard, kill
):
    directory = tmp_path_factory.mktemp("hosts") / "data"
    calls = 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == kill:
            raise Killed
        return extracting.capture(*args)

    left = [*range(hosts), *range(hosts)]  # everyone may come twice
    order.shuffle(left)
    for i in [*left, *range(hosts)]:
        if store.is_complete(directory):
            break
        try:
            extracting.run(directory, (i, hosts), capture=dies, batch=batch, rows_per_shard=rows_per_shard,
                           requests=requests)
        except (Killed, distributed.Stopped):
            pass
    for split in requests:
        got, want = (store.load_columns(d, split) for d in (directory, alone))
        keyed = [
            {(d, t, n): (h.tobytes(), p) for d, t, n, h, p in zip(
                c["doc_id"], c["text"], c["next_text"], c["h"], c["position"], strict=True)}
            for c in (got, want)
        ]
        assert keyed[0] == keyed[1] and len(got["h"]) == len(want["h"])


def test_leftovers_take_the_place_of_filler(requests):
    some = [r for group in requests.values() for r in group]
    some = sorted(some, key=lambda r: len(r.ids))
    made = list(request_batches.batches(some, 8))
    assert sorted(id(r) for b in made for r in b.requests) == sorted(map(id, some))
    widths = [b.ids_BT.shape[1] for b in made]
    assert widths == sorted(widths) and all(len(r.ids) <= b.ids_BT.shape[1] for b in made for r in b.requests)

    def request(n):
        one = some[0]
        ids = np.ones(n, np.int32)
        return type(one)("d", ids, (n - 1,), ("t",), ("",), ("",))

    # 3 short ones find room among 4 longer ones; 5 do not.
    def sizes(n):
        few, many = [request(9)] * n, [request(90)] * 4
        return [b.ids_BT.shape for b in request_batches.batches(few + many, 8)]

    assert sizes(3) == [(8, 96)] and sizes(5) == [(8, 64), (8, 96)] and sizes(11) == [(8, 64), (8, 96)]


def test_bfloat16_is_half_and_its_error_is_stated(alone, tmp_path, requests):
    half = tmp_path / "half"
    meta = extracting.run(half, dtype="bfloat16", requests=requests)
    for split in requests:
        a, b = (store.load_columns(d, split)["h"] for d in (alone, half))
        assert b.dtype == np.float32 and 0 < np.abs(b / a - 1).max() <= 2**-8
        assert store.open_store(half, split)[0]["h"].dtype == np.float32
    both = [np.concatenate([store.load_columns(d, s)["h"] for s in meta["splits"]]) for d in (alone, half)]
    a, b = (h.astype(np.float64) for h in both)
    said = meta["storage"]
    assert said["dtype"] == "bfloat16"
    assert said["largest relative error"] == pytest.approx(np.abs(1 - b / a).max())
    assert said["mean squared error"] == pytest.approx((((a - b) ** 2).sum(1) / (a**2).sum(1)).mean())
    exact = {"dtype": "float32", "largest relative error": 0.0, "mean squared error": 0.0}
    assert store.read_meta(alone)["storage"] == exact
    with pytest.raises(UserError, match=r"other settings \(storage\)"):
        begun = tmp_path / "begun"
        store_writer.Writer(begun, 3, {})
        store_writer.Writer(begun, 3, {}, "bfloat16")


def test_a_vector_that_is_not_finite_ends_it_and_what_was_whole_stays(tmp_path, requests):
    def broken(*args):
        h = extracting.capture(*args)
        h[0, 0, 3] = np.nan
        return h

    calls = iter([extracting.capture] * 3)
    with pytest.raises(UserError, match=r"the activation of 'd\d+' at token \d+ is not finite") as e:
        extracting.run(tmp_path / "d", capture=lambda *a: next(calls, broken)(*a), requests=requests)
    assert "\n" not in str(e.value)
    whole = shards(tmp_path / "d")
    assert whole
    extracting.run(tmp_path / "d", requests=requests)
    assert whole.items() <= shards(tmp_path / "d").items()


def test_the_meter_counts_what_was_computed(requests):
    meter = extract.Meter(extracting.capture)
    one = next(request_batches.batches(requests["warm"], 4))
    meter(one)
    assert "forward passes" not in meter.said()  # nothing but the time with compiling in it
    for _ in range(4):
        meter(one)
    line = meter.said()
    tokens = 5 * sum(len(r.ids) for r in one.requests)
    padding = 1 - tokens / (5 * one.ids_BT.size)
    assert f"{tokens:,} tokens in" in line and f"{padding:.0%} of the slots are padding" in line
    assert "the forward passes of the others need" in line


def test_hosts_of_the_command(tmp_path, capsys):
    for wrong, said in (
        (["--hosts", 2, "--host-index", 2], "counts from 0"),
        (["--host-index", -1], "--host-index -1: must be at least 0"),
        (["--hosts", 0], "--hosts 0: must be at least 1"),
    ):
        argv = ["data", "extract", "--config", "x.py", "--workdir", tmp_path, *wrong]
        assert world.nla(*argv) == 2
        assert said in capsys.readouterr().err


def test_two_writers_of_one_small_file(tmp_path):
    paths.write(tmp_path / "f", "one")
    paths.write(tmp_path / "f", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "two"
