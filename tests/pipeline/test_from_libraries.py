"""docs/howto/from_libraries.md: what other libraries call the output of block K is what we capture.

`tests/helpers/other_libraries.py` compares the libraries themselves, where they are installed.
"""

import numpy as np
import pytest
import safetensors.torch
import torch

import nla_jax
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import other_libraries

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "an old town by the sea"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return other_libraries.write_target("", tmp_path_factory.mktemp("tiny") / "target")


@pytest.mark.parametrize("layer", [1, 3])
def test_a_forward_hook_gives_the_output_of_block_k(target, layer):
    """And so does hidden_states[K + 1], but for the last block."""
    ids = tok_lib.raw_ids(tok_lib.load(target), TEXT)
    ours = other_libraries.ours(target, layer, ids)
    theirs = other_libraries.of_transformers(target, layer, ids)
    assert other_libraries.difference(theirs, ours) < 1e-5
    beside = other_libraries.ours(target, layer - 1, ids)
    assert other_libraries.difference(theirs, beside) > 1e-2


def test_saved_activations_give_the_rows_of_the_text(nla, finished, tmp_path):
    """Activations of a hook, saved by safetensors, and the same text read by us."""
    ids = tok_lib.raw_ids(nla.tokenizer, TEXT)
    h = other_libraries.of_transformers(finished / "target", nla.spec.layer, ids)
    lead = len(nla.spec.lead)
    safetensors.torch.save_file({"h": torch.tensor(h[lead:]), "token": torch.tensor(ids[lead:])},
                                tmp_path / "h.safetensors")
    o = dict(temperature=1.0, seed=4)
    theirs = list(nla_jax.explain_rows(nla, activations=tmp_path / "h.safetensors", **o))
    ours = list(nla_jax.explain_rows(nla, texts=[TEXT], positions="all", **o))
    assert [r["explanation"] for r in theirs] == [r["explanation"] for r in ours]
    for name in ("fve", "fve_frozen", "norm", "cos_mean"):
        np.testing.assert_allclose([r[name] for r in theirs], [r[name] for r in ours], atol=1e-3)
    assert [r["input_token"] for r in theirs] == ids[lead:]
