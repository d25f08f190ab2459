"""How unusual a vector is for a bundle, and at which norm it is injected."""

import json

import jax
import numpy as np
import pytest
import yaml

import nla_jax
from nla_jax import bundle
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import distribution as D
from nla_jax.evaluate import fve as F

RNG = np.random.default_rng(0)
H = (RNG.normal(size=(2000, 16)) + 10 * np.eye(16)[0]) * RNG.uniform(5, 7, (2000, 1))
MEAN = F.mean_direction(H)
KNOWN = D.statistics(H, MEAN)


def test_statistics_are_small_and_are_read_again():
    assert len(json.dumps(KNOWN)) < 400
    assert D.checked(yaml.safe_load(yaml.safe_dump(KNOWN)), "here") == KNOWN and D.checked(None, "") is None
    norms = np.linalg.norm(H, axis=1)
    np.testing.assert_allclose(KNOWN["norm"], np.percentile(norms, D.LEVELS), rtol=1e-4)
    assert KNOWN["mean_norm"] == pytest.approx(norms.mean(), rel=1e-4)
    few = D.statistics(np.repeat(H, 11, 0), MEAN)
    assert few["rows"] <= D.MOST and few["norm"] == pytest.approx(KNOWN["norm"], rel=0.05)


@pytest.mark.parametrize("bad", [[], {"norm": 1}, {**KNOWN, "norm": [1.0]}, {**KNOWN, "mean_norm": "x"},
                                 {**KNOWN, "cos_mean": [float("nan")] * 11}, {**KNOWN, "levels": None}])
def test_statistics_that_are_none(bad):
    with pytest.raises(UserError, match="here: activations are no statistics"):
        D.checked(bad, "here")


def test_unusual_vectors_are_named():
    usual = D.compare_rows(H[:500], MEAN, KNOWN)
    assert sum(bool(f.unusual) for f in usual) < 8
    assert np.mean([f.norm_percentile for f in usual]) == pytest.approx(50, abs=3)
    cases = {"angle": H[:5] - H[5:10], "norm": 9 * H[:5], "norm, angle": 50 * (H[:5] - H[5:10])}
    for what, vectors in cases.items():
        found = D.compare_rows(F.normalise(vectors) * 16 if what == "angle" else vectors, MEAN, KNOWN)
        assert {f.unusual for f in found} == {what}, what
    (fit,) = D.compare_rows(H[:1], MEAN, None)
    assert fit.cos_mean == pytest.approx(usual[0].cos_mean) and fit.unusual is fit.norm_percentile is None
    assert D.compare_rows(H[:1], None, None)[0].cos_mean is None


def test_strengths():
    assert D.strengths(H, "mean", None) is None
    np.testing.assert_array_equal(D.strengths(H[:3], 0.5, None), np.float32([0.5] * 3))
    raw = D.strengths(H, "raw", KNOWN)
    assert raw.mean() == pytest.approx(1, rel=1e-3) and raw.dtype == np.float32
    with pytest.raises(UserError, match="no statistics of its training activations.*nla pack --store"):
        D.strengths(H, "raw", None)
    for bad in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(UserError, match="must be mean, raw, or a number above 0"):
            D.parse_scale(bad)


def test_a_run_keeps_the_statistics_of_its_activations(finished):
    h = store.load_columns(finished / "run" / "data", "warm", ["h"])["h"]
    for name in ("bundle", "bundle_warm"):
        meta = bundle.read_sidecar(finished / "run" / name)
        assert meta["activations"] == D.statistics(h, meta["mean_direction"])


def test_the_shipped_bundle_has_them():
    known = bundle.read_sidecar(bundle.SHIPPED)["activations"]
    assert known == D.checked(known, "") and known["rows"] > 3000


def test_scale_changes_what_av_reads(nla, finished):
    h = store.load_columns(finished / "run" / "data", "heldout", ["h"])["h"]
    key = jax.random.key(1)
    usual = nla.verbalize(h, key=key)
    assert nla.verbalize(h, key=key, scale=1) == usual == nla.verbalize(7 * h, key=key)
    most = nla.meta["max_new_tokens"]
    logp = [nla.runner.write(h, key, temperature=0.0, max_new=most, label="", strength=s)[3]
            for s in (None, np.full(len(h), 0.05, np.float32))]
    assert np.abs(logp[0] - logp[1]).max() > 1e-3
    rows = nla_jax.explain_rows(nla, activations=h[:3], scale="raw", scores=())
    assert [r["explanation"] or "" for r in rows] == nla.verbalize(h[:3], temperature=0.0, scale="raw")
