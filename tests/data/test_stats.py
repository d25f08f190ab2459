"""`nla data stats`: figures of a store with known contents."""

import json

import numpy as np
import pytest

from nla_jax.data import stats, store, store_writer
from nla_jax.errors import UserError
from tests.helpers import world

D, N = 24, 600


def activations(n=N):
    """A mean, two strong directions, noise, and a dimension that dominates."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(n, D)) + 2.0
    h[:, 3] += 6 * rng.normal(size=n)
    h[:, 7] = 300 + rng.normal(size=n)
    return h.astype(np.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "store"
    writer = store_writer.Writer(path, D, {})
    for split, first, n in [("warm", 0, N), ("heldout", 10_000, 40)]:
        h_ND = activations(n)
        writer.write_shard(split, 0, 1, [
            {"doc_id": f"d{first + i // 4}", "position": 50 + i % 9, "n_tokens": 60 + i % 9,
             "text": f"text {min(i, n - 3)}", "next_text": "", "explanation": "", "h": h_ND[i]}
            for i in range(n)])
    corpus = {"documents": {"warm": 9}, "left out": {"empty": 2}, "near duplicates": {"warm": 1}}
    writer.commit({"corpus": corpus})
    return path


def test_figures_of_known_activations(directory):
    found = stats.of_split(directory, "warm")
    f, h = found.figures, activations().astype(np.float64)
    assert (f["rows"], f["documents"], f["not finite or zero"]) == (N, N // 4, 0)
    norms = np.linalg.norm(h, axis=1)
    assert f["norm"]["p75"] == pytest.approx(np.quantile(norms, 0.75))
    assert f["alpha"] == 300 and f["norm"]["p0"] == pytest.approx(norms.min())
    x = h / norms[:, None] * np.sqrt(D)
    assert f["variance"] == pytest.approx(x.var(0).mean(), rel=1e-6)
    assert f["share of the mean"] == pytest.approx((x.mean(0) ** 2).sum() / D, rel=1e-6)
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    assert f["components"]["1"] == pytest.approx(values[0] / values.sum(), rel=1e-6)
    assert f["components"]["10"] == pytest.approx(values[:10].sum() / values.sum(), rel=1e-6)
    assert "50" not in f["components"]
    assert [m["dimension"] for m in f["massive"]] == [7] and f["massive"][0]["share"] > 0.9
    assert f["massive"][0]["largest"] == pytest.approx(np.abs(h[:, 7]).max())
    assert (f["tokens"]["p100"], f["position"]["p0"]) == (68, 50)
    assert (f["texts there twice"], f["activations there twice"]) == (2, 0)


def test_a_sample_stands_for_all_of_a_large_split(directory, monkeypatch):
    monkeypatch.setattr(stats, "SAMPLE", 100)
    few = stats.of_split(directory, "warm").figures
    assert few["sample"] == 100 and few["rows"] == N
    h = activations()[::6].astype(np.float64)
    x = h / np.linalg.norm(h, axis=1, keepdims=True) * np.sqrt(D)
    assert few["variance"] == pytest.approx(x.var(0).mean(), rel=1e-6)


def test_fewer_rows_than_dimensions_give_the_same_spectrum():
    h = activations(10)
    shape, shares = stats._shape(h)
    x = h.astype(np.float64)
    x *= np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(shares["components"], values / values.sum(), atol=1e-9)
    assert shape["sample"] == 10


def test_activations_that_are_not_finite_are_counted(directory, monkeypatch):
    rows = [dict(store.open_store(directory, "heldout")[i]) for i in range(6)]
    for i, bad in [(1, np.nan), (2, np.inf), (4, 0.0)]:
        rows[i]["h"] = np.full(D, bad, np.float32)

    class Fake(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    monkeypatch.setattr(store, "open_store", lambda *_: Fake(rows))
    found = stats.of_split(directory, "heldout").figures
    assert found["not finite or zero"] == 3 and found["sample"] == 3 and np.isfinite(found["variance"])
    monkeypatch.setattr(store, "open_store", lambda *_: Fake(rows[1:3]))
    with pytest.raises(UserError, match="'heldout' has no finite activation"):
        stats.of_split(directory, "heldout")


def test_the_command(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    args = ["data", "stats", "--store", directory, "--json", tmp_path / "s.json"]
    assert world.nla(*args, "--png", tmp_path / "s.png", "--markdown", tmp_path / "s.md") == 0
    said = capsys.readouterr().out
    assert "7: 9" in said and "near duplicates of other splits dropped: 1 warm" in said
    whole = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert whole["splits"].keys() == {"heldout", "warm"} and whole["corpus"]["left out"] == {"empty": 2}
    assert whole["splits"]["warm"] == stats.of_split(directory, "warm").figures
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "s.md").read_text("utf-8")
    assert "\n| rows | 40 | 600 |\n" in page and "![curves](s.png)" in page
    assert world.nla("data", "stats", "--store", directory, "--splits", "rl") == 2
    assert "no split 'rl'" in capsys.readouterr().err
    assert world.nla("data", "stats", "--store", directory, "--json", tmp_path / "no" / "s.json") == 2
    assert "create it first" in capsys.readouterr().err
    assert world.nla("data", "stats", "--store", tmp_path) == 2
    assert "no activations here" in capsys.readouterr().err


def test_a_damaged_shard_is_named(directory, tmp_path):
    import shutil

    shutil.copytree(directory, tmp_path / "s")
    (shard,) = (tmp_path / "s").glob("*-warm.*")
    data = bytearray(shard.read_bytes())
    data[20_000:30_000] = b"\xff" * 10_000  # the same size: only reading shows it
    shard.write_bytes(data)
    with pytest.raises(UserError, match="split 'warm' is damaged near row .*extract again"):
        stats.of_split(tmp_path / "s", "warm")
