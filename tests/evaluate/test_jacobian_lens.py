"""The Jacobian lens: J against one derivative at a time, its words, and the figures from them."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import jacobian_lens
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import lens
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.lm.tokenizer import plain_ids

LONG = " ".join(["a river and the old mill of the town and a sea"] * 8)


@pytest.fixture(scope="module")
def exact(nla):
    """The NLA's runner with a target in float32."""
    return SimpleNamespace(spec=nla.spec, tok=nla.tokenizer, batch=4,
                           base=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), nla.base))


def test_a_row_is_the_mean_over_sources_of_the_sum_over_targets(exact):
    spec, lm = exact.spec, exact.spec.lm
    ids = jnp.array([[*spec.lead, *plain_ids(exact.tok, LONG)][: jacobian_lens.WIDTH]], jnp.int32)
    valid = jnp.ones(ids.shape, bool)
    x, _ = forward(params_lib.truncate(exact.base, spec.layer + 1), lm, embed(exact.base, lm, ids), valid)
    upper = {"blocks": jax.tree.map(lambda a: a[spec.layer + 1 :], exact.base["blocks"])}
    part = lm.of_blocks(spec.layer + 1, lm.n_blocks)
    d = 3
    g = jax.grad(lambda x: forward(upper, part, x, valid)[0][..., d].sum())(x)
    found = jacobian_lens.fit_lens(exact, jacobian_lens.source_rows(exact, [LONG]))
    assert found.shape == (lm.d_model, lm.d_model)
    np.testing.assert_allclose(found[d], g[0, jacobian_lens.SKIP :].mean(0), rtol=1e-3, atol=1e-5)


def test_the_lens_of_an_identity_is_the_unembedding(exact):
    h = np.random.default_rng(0).normal(size=(5, exact.spec.lm.d_model)).astype(np.float32)
    found, scores = jacobian_lens.rank_tokens(exact, np.eye(h.shape[1], dtype=np.float32), h, 3)
    logits = np.asarray(unembed(exact.base, exact.spec.lm, jnp.asarray(h)[:, None]))[:, 0]
    np.testing.assert_array_equal(found, np.argsort(-logits, 1, kind="stable")[:, :3])
    np.testing.assert_allclose(scores, np.take_along_axis(logits, found, 1), rtol=1e-4, atol=1e-5)


def test_a_lens_is_kept_for_its_own_texts_and_weights_only(exact, tmp_path, monkeypatch):
    fits, fit = [], jacobian_lens.fit_lens
    monkeypatch.setattr(jacobian_lens, "fit_lens", lambda *a: fits.append(1) or fit(*a))
    read = lambda runner, *texts: jacobian_lens.fit_or_read(runner, texts, tmp_path)
    first = read(exact, LONG)
    np.testing.assert_array_equal(read(exact, "a river", LONG), first)  # a short text is no input
    assert len(fits) == 1
    other = read(exact, LONG.replace("river", "brook"))
    assert len(fits) == 2 and not np.array_equal(other, first)
    changed = SimpleNamespace(**{**vars(exact), "base": jax.tree.map(lambda a: a * 1.1, exact.base)})
    assert not np.array_equal(read(changed, LONG), first) and len(fits) == 3


def test_short_texts_and_the_last_block_are_refused(exact):
    with pytest.raises(UserError, match="no text has 64 tokens"):
        jacobian_lens.source_rows(exact, ["a river"])
    spec = dataclasses.replace(exact.spec, layer=exact.spec.lm.n_blocks - 1)
    last = SimpleNamespace(**{**vars(exact), "spec": spec})
    with pytest.raises(UserError, match="is the last block"):
        jacobian_lens.source_rows(last, [LONG])


def test_words_of_the_lens():
    tok = SimpleNamespace(decode=lambda ids: [" river", "river", "of", "x1y", " Town", "…", "mill"][ids[0]])
    assert lens.lens_words(tok, range(7)) == ["river", "Town", "mill"]


def test_figures_of_the_lens(nla, finished, monkeypatch):
    columns = {k: v[:6] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    columns["doc_id"], columns["text"] = [f"d{i}" for i in range(6)], ["two rivers"] * 6
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    trip = dataclasses.replace(trip, explanations=["a river and a mill", "a town"] * 3)
    ev = Evidence(nla.runner, columns, trip, nla.mean_direction, train={"text": [LONG]})
    monkeypatch.setattr(lens, "lens_words", lambda tok, row: ["river", "mill"])
    found = {f.name: f.value for f in lens.lens(ev)}
    assert found["lens_said"] == 0.5 and found["lens_in_text"] == 0.5
    assert found["fve_lens"] == pytest.approx(
        ev.fve("", ev.errors(ev.reconstruct(["river mill"] * 6)), "").value)
    none = dataclasses.replace(ev, train=None)
    assert lens.lens(none) == [] and "no text has 64 tokens" in none.left_out[-1]
