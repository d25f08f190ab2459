"""Gaps: padding between real tokens, rows of padding only, and vocabularies whose ids have a gap."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from nla_jax import specs, target
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import tiny

WIDE = tiny.lm(n_blocks=3)
LOCAL = dataclasses.replace(WIDE, window=3, local=(True, False, True))


@pytest.mark.parametrize("cfg", [WIDE, LOCAL], ids=["wide", "local"])
def test_padding_between_tokens_changes_nothing(cfg):
    """Row 0 has gaps, row 1 is whole, and row 2 is all padding: no row changes another, none is NaN."""
    params, rng = tiny.params(cfg), np.random.default_rng(0)
    ids = tiny.random_ids(rng, (3, 10))
    valid = np.ones((3, 10), bool)
    valid[0, [0, 3, 4, 8]] = False
    valid[2] = False
    places = np.broadcast_to(np.arange(10), (3, 10))
    capture = jax.jit(lambda *args: target.capture(params, cfg, 2, *args))
    got = np.asarray(capture(ids, valid, places))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1], np.asarray(capture(ids[1:2], valid[1:2], places[:1]))[0], atol=1e-4)
    kept = np.flatnonzero(valid[0])
    alone = target.capture(params, cfg, 2, ids[:1, kept], np.ones((1, 6), bool), np.arange(6)[None])
    np.testing.assert_allclose(got[0, kept], alone[0], rtol=1e-4, atol=1e-4)


def with_gap(last: int):
    """A tokenizer of five tokens, the last of which has this id."""
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": last}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_an_id_beyond_the_vocabulary_is_refused():
    """It has no embedding. The number of tokens does not show it, because it is below the vocabulary's."""
    tok = with_gap(9)
    assert len(tok) == 5 and tok_lib.plain_ids(tok, "a d") == [1, 9]
    tok_lib.check_vocabulary(tok, 10)
    for size in (9, 6):
        with pytest.raises(UserError, match=f"'d' the id 9, and the model's vocabulary ends at {size - 1}:"):
            tok_lib.check_vocabulary(tok, size)
    cfg, ids = tiny.lm(vocab_size=8), np.array([[1, 9, 2]])
    h = target.capture(tiny.params(cfg), cfg, 1, ids, np.ones((1, 3), bool), np.array([[2]]))
    assert np.isnan(h).all(), "which is what the check prevents"
    with pytest.raises(UserError, match="use the model's own tokenizer"):
        specs.make_spec(cfg, tok, layer=1, dtype="float32", alpha=1.0)
