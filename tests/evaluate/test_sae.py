"""The sparse autoencoder: it finds planted directions, is kept, and counts what a reconstruction keeps."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import sae as S
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import sae
from nla_jax.training import loop

D, TRUE = 32, 20


def sparse_rows(n: int, seed: int = 0):
    """Rows of three of TRUE orthonormal directions each, beside a common mean, and which three."""
    rng = np.random.default_rng(seed)
    w_MD = np.linalg.qr(np.random.default_rng(9).normal(size=(D, D)))[0][:TRUE]
    on_NM = rng.permuted(np.arange(TRUE)[None].repeat(n, 0) < 3, axis=1)
    h_ND = (on_NM * rng.uniform(2, 4, on_NM.shape)) @ w_MD + 0.2
    return (h_ND * rng.uniform(1, 9, (n, 1))).astype(np.float32), on_NM, w_MD  # of any norm


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The training rows and the SAE of them, in a directory."""
    place, (h_ND, *_) = tmp_path_factory.mktemp("readers"), sparse_rows(512)
    return h_ND, place, S.train_or_read(h_ND, place)


def test_the_k_largest_are_kept():
    a = jnp.array([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
    np.testing.assert_array_equal(S.top_k(a, 2), [[3, 0, 2, 0], [0, 0, 5, 0]])


def test_planted_directions_are_found(fitted):
    _, _, (params, k) = fitted
    h_ND, _, w_MD = sparse_rows(64, seed=1)  # rows that it did not see
    z_NM = S.latents_of(params, h_ND, k)
    assert ((z_NM > 0).sum(1) <= k).all()
    np.testing.assert_allclose(S.latents_of(params, 7 * h_ND, k), z_NM, atol=1e-4)  # the scale has no part
    assert F.fve(F.errors(S.reconstruct(params, z_NM), h_ND), F.variances(h_ND)) > 0.8
    cos = w_MD @ np.asarray(params["decoder"]).T
    np.testing.assert_allclose(np.linalg.norm(params["decoder"], axis=1), 1, atol=1e-5)
    assert np.median(cos.max(1)) > 0.6


def test_it_is_kept_for_its_own_rows(fitted, monkeypatch):
    h_ND, place, (params, _) = fitted
    trained, fit = [], loop.fit
    monkeypatch.setattr(S, "STEPS", 2)
    monkeypatch.setattr(S.loop, "fit", lambda name, *a, **kw: trained.append(name) or fit(name, *a, **kw))
    S.train_or_read(h_ND, None)
    assert trained == ["sae"]
    monkeypatch.undo()
    monkeypatch.setattr(S.loop, "fit", None)
    again, _ = S.train_or_read(h_ND, place)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(TypeError):  # other rows are trained on
        S.train_or_read(h_ND + 1, place)
    with pytest.raises(UserError, match="at least 64 training rows; there are 9"):
        S.train_or_read(h_ND[:9], place)


def test_sizes_grow_with_the_rows():
    assert S.sizes(64) == {"latents": 8, "k": 2, "batch": 64, "steps": 40}
    assert S.sizes(10**6) == {"latents": 2048, "k": 32, "batch": 512, "steps": 400}


def evidence(h_train_ND, place, h_hat_ND, h_ND, ok_N):
    columns = {"h": h_ND, "doc_id": [f"d{i}" for i in range(len(h_ND))], "text": [""] * len(h_ND)}
    trip = SimpleNamespace(h_text=h_hat_ND, ok=ok_N)
    return Evidence(None, columns, trip, F.mean_direction(h_train_ND), bootstrap=200,
                    train={"h": h_train_ND}, readers=place)


@pytest.fixture
def figures(fitted):
    h_train_ND, place, _ = fitted
    h_ND, *_ = sparse_rows(40, seed=2)

    def made(h_hat_ND, ok_N=None):
        ok_N = np.ones(len(h_ND), bool) if ok_N is None else ok_N
        return {f.name: f for f in sae.sae(evidence(h_train_ND, place, h_hat_ND, h_ND, ok_N))}

    return h_ND, made


def test_a_perfect_reconstruction_keeps_all_and_makes_nothing(figures):
    h_ND, made = figures
    found = made(3 * h_ND)
    assert [found["sae_kept"].value, found["sae_kept_weighted"].value] == pytest.approx([1.0, 1.0])
    assert [found["sae_made"].value, found["sae_made_weighted"].value] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found["sae_kept_shuffled"].high < 0.7 < found["fve_sae"].value
    assert found["sae_made_shuffled"].low > 0.3
    assert found["sae_kept_mean"].value < 0.7
    assert "sae_kept_quotation" not in found  # the rows have no texts


def test_counts_are_those_of_shared_latents(figures, fitted):
    h_ND, made = figures
    _, _, (params, k) = fitted
    ok_N = np.arange(40) > 9
    h_hat_ND = h_ND + np.random.default_rng(3).normal(size=h_ND.shape).astype(np.float32) * 4
    found = made(h_hat_ND, ok_N)
    z, w = (S.latents_of(params, x, k) for x in (h_ND, h_hat_ND))
    w[~ok_N] = 0  # a failed answer keeps nothing
    assert found["sae_kept"].value == pytest.approx(((z > 0) & (w > 0)).sum() / (z > 0).sum())
    assert found["sae_made"].value == pytest.approx(1 - ((z > 0) & (w > 0)).sum() / (w > 0).sum())
    assert found["sae_kept_weighted"].value == pytest.approx(np.minimum(z, w).sum() / z.sum(), rel=1e-4)
    assert 0.1 < found["sae_kept"].value < 0.95


def test_without_training_rows_it_says_what_it_needs(fitted):
    h_ND, place, _ = fitted
    ev = evidence(h_ND[:8], place, h_ND[:8], h_ND[:8], np.ones(8, bool))
    assert sae.sae(ev) == [] and "at least 64 training rows" in ev.left_out[0]
