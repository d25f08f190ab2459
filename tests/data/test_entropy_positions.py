"""Positions by the target's uncertainty: the scores against the full distribution, and the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.data import entropy_positions as E
from nla_jax.errors import UserError
from nla_jax.lm.model import embed, forward, unembed
from tests.helpers import tiny

TEXTS = [[5, 9, 60, 61, 62, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]]


@pytest.fixture(scope="module", params=[(), (0,)], ids=["plain", "with a lead"])
def scored(request):
    spec = tiny.spec(lead=request.param)
    base = tiny.params(spec.lm)
    return spec, base, E.score_tokens(base, spec, TEXTS, batch=2)


def test_scores_are_those_of_the_full_distribution(scored):
    spec, base, found = scored
    for ids, got in zip(TEXTS, found, strict=True):
        row = jnp.array([[*spec.lead, *ids]], jnp.int32)
        x, _ = forward(base, spec.lm, embed(base, spec.lm, row), jnp.ones(row.shape, bool))
        logp_TV = np.asarray(jax.nn.log_softmax(unembed(base, spec.lm, x)))[0, len(spec.lead) :]
        np.testing.assert_allclose(got["entropy"], -(np.exp(logp_TV) * logp_TV).sum(1), atol=1e-4)
        wanted = [-logp_TV[t, i] for t, i in enumerate(ids[1:])] + [0.0]
        np.testing.assert_allclose(got["surprise"], wanted, atol=1e-4)


def test_one_text_gets_its_highest(scored):
    spec, base, found = scored
    for by in E.KINDS:
        wanted = sorted(np.argsort(-found[2][by], kind="stable")[:3].tolist())
        assert E.telling_positions(base, spec, TEXTS[2], 3, by=by) == wanted
    with pytest.raises(UserError, match="must be one of entropy, surprise"):
        E.telling_positions(base, spec, TEXTS[2], 3, by="loss")


def test_the_highest_scores_are_chosen():
    score = [1.0, 5.0, 4.0, 5.0, 0.0, 3.0]
    assert E.choose_positions(score, 2) == [1, 3]
    assert E.choose_positions(score, 3) == [1, 2, 3]
    assert E.choose_positions(score, 3, apart=2) == [1, 3, 5]
    assert E.choose_positions(score, 3, allowed={0, 4}) == [0, 4]  # no more are eligible
    assert E.choose_positions([2.0, 2.0, 2.0], 2) == [0, 1]
    assert E.choose_positions([], 2) == []


@pytest.mark.parametrize("n, apart, score, said", [
    (0, 1, [1.0], "at least 1"), (1, 0, [1.0], "at least 1"), (1, 1, [1.0, float("nan")], "not finite")])
def test_impossible_choices_are_refused(n, apart, score, said):
    with pytest.raises(UserError, match=said):
        E.choose_positions(score, n, apart=apart)
