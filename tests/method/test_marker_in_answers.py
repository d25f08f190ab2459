"""AV may write its own marker. In an answer it is a token like any other: h enters in the prompt only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import reconstructor, steps, verbalizer
from nla_jax.evaluate.runner import read_tag
from nla_jax.lm import model
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.rl import roles
from nla_jax.util.keys import new_key
from tests.helpers import tiny

B, G, T = 3, 4, 10
SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=3), layer=1)
MATCHED = dataclasses.replace(SPEC, alpha=1.0, av=dataclasses.replace(SPEC.av, injection="norm_matched"))


H_BD = tiny.activations(B)


@pytest.fixture(scope="module")
def base():
    """A model that writes the marker about as often as the tags."""
    tree = tiny.talker_params(SPEC.lm)
    tree["lm_head"] = tree["lm_head"].at[0, SPEC.av.marker].set(3.0)
    return tree


@pytest.fixture(scope="module")
def answers(base):
    """spec -> (Samples, start, end, ok), of which many contain the marker."""
    return functools.cache(functools.partial(sampled, base))


def sampled(base, spec):
    run = jax.jit(lambda base: steps.rollout({"params": base}, base, spec, H_BD, jnp.arange(B), new_key(0),
                                             group=G, max_new=T))
    out, start, end, ok = run(base)
    here_NT = np.asarray(out.ids_BT) == spec.av.marker
    assert here_NT.any(1).mean() > 0.3
    return out, start, end, ok


@pytest.mark.parametrize("spec", [SPEC, MATCHED], ids=["replace", "norm_matched"])
def test_a_marker_in_an_answer_is_scored_as_it_was_sampled(base, answers, spec):
    """The sampler, which embeds each id from the table, and the scorer agree on answers with markers."""
    out, *_ = answers(spec)
    logp = jax.jit(lambda base: roles.answer_logp({"params": base}, base, spec, np.repeat(H_BD, G, 0),
                                                  out.ids_BT))(base)
    written = np.arange(T)[None] < np.asarray(out.length_B)[:, None]
    np.testing.assert_allclose(np.where(written, logp, 0), out.logp_BT, atol=2e-4)


def test_a_marker_in_an_answer_has_its_own_embedding(base):
    """Against one plain pass over prompt and answer, in which only the prompt's marker is replaced by h."""
    av = SPEC.av
    ids = tiny.random_ids(np.random.default_rng(0), (B, T))
    ids[:, [1, 4, 5]] = av.marker
    e_BD = verbalizer.inject({}, H_BD, SPEC.alpha)
    prompt = np.array([*av.before, av.marker, *av.after])
    whole = np.concatenate([np.broadcast_to(prompt, (B, len(prompt))), ids], 1)
    x = model.embed(base, SPEC.lm, whole).at[:, len(av.before)].set(e_BD)
    want, _ = jax.jit(lambda base: model.forward(base, SPEC.lm, x, jnp.ones(whole.shape, bool)))(base)
    got = jax.jit(lambda base: verbalizer.response_hidden(base, SPEC.lm, av, e_BD, ids))(base)
    assert tiny.relative(got, want[:, len(prompt) - 1 : -1]) < 1e-4


def test_a_marker_in_an_answer_reaches_ar_by_ids_and_by_text(answers):
    """AR reads the id where AV wrote it, and the text of the answer has the character."""
    out, start, end, ok = (jax.tree.map(np.asarray, a) for a in answers(SPEC))
    spliced, *_ = reconstructor.splice(SPEC.ar, out.ids_BT, start, end)
    for row, a, b, got in zip(out.ids_BT, start, end, np.asarray(spliced), strict=True):
        assert np.sum(row[a:b] == SPEC.av.marker) == np.sum(got == SPEC.av.marker)
    tok = tiny.tokenizer()
    words = f"a {tiny.MARKER} here"
    said = tok_lib.plain_ids(tok, f"<explanation>\n{words}\n</explanation>")
    assert read_tag(tok.decode(said, skip_special_tokens=True)) == words
    ids, _, last = reconstructor.rows(tok, tiny.AR_TEMPLATE, [words], 0)
    assert np.sum(ids[0, : last[0] + 1] == tok.convert_tokens_to_ids(tiny.MARKER)) == 1
