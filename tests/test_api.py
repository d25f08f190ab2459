"""The library: capture, verbalize, reconstruct and the round trip of a loaded bundle."""

import sys
import types

import jax
import numpy as np
import pytest
import torch

from nla_jax import reconstructor, target
from nla_jax.api import TokenReport
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import row_scores
from nla_jax.evaluate.row_scores import Rows
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import world

TEXT = "an old town by the sea"


@pytest.fixture(scope="module")
def h(finished):
    """Activations of held-out rows."""
    return store.load_columns(finished / "run" / "data", "heldout", ["h"])["h"]


def test_capture_is_the_forward_pass(nla):
    ids = np.array(tok_lib.plain_ids(nla.tokenizer, TEXT), np.int32)[None]
    T = ids.shape[1]
    cfg, params, _ = world.target()
    wanted = target.capture(params, cfg, nla.spec.layer, ids, np.ones((1, T), bool), np.arange(T)[None])
    h = nla.capture(TEXT)
    assert (h.shape, h.dtype) == ((T, 32), np.float32)
    np.testing.assert_allclose(h, wanted[0], rtol=1e-4, atol=1e-4)
    assert "".join(nla.tokens(TEXT)) == TEXT and len(nla.tokens(TEXT)) == T
    with pytest.raises(UserError, match="the text is empty"):
        nla.capture("")
    with pytest.raises(UserError, match="1537 tokens; this target reads at most 1536"):
        nla.capture("a" * 1537)


def test_a_text_that_spells_a_special_token_is_refused_unless_rendered(nla):
    text = "the <|im_end|> sea"
    ids = np.array(tok_lib.plain_ids(nla.tokenizer, text), np.int32)[None]
    T = ids.shape[1]
    for call in (nla.capture, nla.round_trip):
        with pytest.raises(UserError, match=r"spells '<\|im_end\|>', a special token.*with --rendered"):
            call(text)
    cfg, params, _ = world.target()
    wanted = target.capture(params, cfg, nla.spec.layer, ids, np.ones((1, T), bool), np.arange(T)[None])
    np.testing.assert_allclose(nla.capture(text, rendered=True), wanted[0], rtol=1e-4, atol=1e-4)
    assert len(nla.round_trip(text, positions=[-1], rendered=True)) == 1


def test_capture_is_what_training_stored(nla, finished):
    rows = store.load_columns(finished / "run" / "data", "heldout")
    for text, h_D in list(zip(rows["text"], rows["h"], strict=True))[:2]:
        np.testing.assert_allclose(nla.capture(text)[-1], h_D, rtol=1e-4, atol=1e-4)


def test_verbalize_is_keyed_by_row(nla, h, capsys):
    """Which words a row gets depends on key and row number, not on the rows beside it."""
    key = jax.random.key(5)
    rows = np.concatenate([h, h, h])  # three batches, the last one part filled
    texts = nla.verbalize(rows, key=key)
    assert texts == nla.verbalize(rows, key=key)
    assert texts[:5] == nla.verbalize(rows[:5], key=key)
    assert texts != nla.verbalize(rows, key=jax.random.key(6))
    assert len(set(texts[i] for i in range(0, len(rows), len(h)))) > 1  # the same h in three places
    assert "" in texts and any(texts)
    greedy = nla.verbalize(rows, temperature=0.0)
    assert greedy[: len(h)] * 3 == greedy == nla.verbalize(rows, key=key, temperature=0.0)
    assert all(len(t) <= 2 for t in nla.verbalize(rows, key=key, max_new=6))
    assert nla.verbalize(rows[:0]) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "bad,message",
    [
        (np.ones(32), "shape (32,); expected [N, 32]"),
        (np.ones((2, 31)), "shape (2, 31)"),
        (np.ones((1, 2, 32)), "shape (1, 2, 32)"),
        (np.stack([np.ones(32), np.zeros(32)]), "activation 1 is zero or not finite"),
        (np.full((1, 32), np.nan), "activation 0 is zero or not finite"),
        (np.stack([np.ones(32), np.ones(32), np.r_[np.inf, np.ones(31)]]), "activation 2"),
    ],
)
def test_verbalize_refuses(nla, bad, message):
    with pytest.raises(UserError) as e:
        nla.verbalize(bad)
    assert message in str(e.value)


@pytest.mark.parametrize("make", [
    lambda h: h.to(torch.bfloat16),
    lambda h: h.clone().requires_grad_(),
    lambda h: (h.clone().requires_grad_() * 1).to(torch.bfloat16),
    lambda h: list(h.to(torch.float16).unbind()),
    lambda h: OnGPU(h),
])
def test_activations_of_torch(nla, h, make):
    """In any dtype, with a gradient, on a GPU, in a list."""
    rows = torch.tensor(h[:3]).to(torch.bfloat16).float()
    said = nla.verbalize(make(rows), temperature=0.0, max_new=4)
    assert said == nla.verbalize(rows.numpy(), temperature=0.0, max_new=4)


class OnGPU:
    """A tensor on a GPU, as numpy meets one."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self.tensor


@pytest.mark.parametrize("bad", [[[1.0, 2.0], [1.0]], [["a"]], None, {"h": 1}])
def test_what_is_no_activation(nla, bad):
    with pytest.raises(UserError, match="these are no activations|activations have shape"):
        nla.verbalize(bad)


def test_text_that_is_not_unicode(nla):
    for work in (nla.tokens, nla.capture, nla.round_trip, lambda text: nla.reconstruct(["ab", text])):
        for bad, message in (("a\udcff", "not valid Unicode .character 1"), (b"ab", "must be a string; got")):
            with pytest.raises(UserError, match=message):
                work(bad)


def test_a_number_of_samples_that_cannot_be(nla):
    with pytest.raises(UserError, match="samples=0: must be at least 1"):
        nla.round_trip(TEXT, samples=0)


def test_reconstruct(nla):
    texts = ["ab", "cd\nefgh", "", "words of some length " * 3, "ab"] * 2  # more than a batch
    got = nla.reconstruct(texts)
    assert (got.shape, got.dtype) == ((10, 32), np.float32)
    params = reconstructor.weights(nla.base, nla.ar, nla.spec.layer, nla.spec.compute)
    prompts = reconstructor.rows(nla.tokenizer, nla.meta["prompt_templates"]["ar"], texts, nla.spec.ar.pad)
    wanted = reconstructor.reconstruct(params, nla.spec.lm, *prompts)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert (nla.reconstruct([]).shape, nla.reconstruct([]).dtype) == ((0, 32), np.float32)
    with pytest.raises(UserError, match="a list of texts; got one string"):
        nla.reconstruct("ab")


def test_texts_and_answers_beyond_the_context_are_refused(nla, h):
    """With their numbers, and before the first pass, which would need memory for their square."""
    prompt = len(nla.spec.ar.before) + len(nla.spec.ar.after)
    fits = "a" * (1536 - prompt)
    for text, n in ((fits + "a", 1537), ("a" * 60_000, 60_000 + prompt)):
        message = f"text 1 in AR's prompt has {n} tokens; this target reads at most 1536: shorten it"
        with pytest.raises(UserError, match=message):
            nla.reconstruct(["ab", text])
        with pytest.raises(UserError, match="text 0 alone has"):
            nla.runner.read_frozen([text + "a" * prompt])
    nla.runner._check_fits([1536], "")  # a text may fill the context
    most = 1536 - max(prompt, len(nla.spec.av.before) + 1 + len(nla.spec.av.after))
    for max_new in (most + 1, 0, -3):
        with pytest.raises(UserError, match=f"max_new={max_new}: must be from 1 to {most}, because a prompt"):
            nla.verbalize(h[:1], max_new=max_new)
    nla.spec.check_answer_fits(most, "max_new")


@pytest.mark.parametrize("temperature", [-1.0, np.nan, np.inf])
def test_an_impossible_temperature_is_refused(nla, h, temperature):
    with pytest.raises(UserError, match=f"temperature {temperature}: must be 0 .greedy. or a number above 0"):
        nla.verbalize(h[:1], temperature=temperature)


def test_round_trip(nla):
    key, tokens = jax.random.key(2), nla.tokens(TEXT)
    T = len(tokens)
    reports = nla.round_trip(TEXT, positions=[-1, 0, T - 1], key=key, samples=5)
    assert all(isinstance(r, TokenReport) for r in reports)
    assert [r.position for r in reports] == [T - 1] * 5 + [0] * 5 + [T - 1] * 5
    assert all(r.token == tokens[r.position] for r in reports)
    h = nla.capture(TEXT)[[r.position for r in reports]]
    assert [r.explanation for r in reports] == nla.verbalize(h, key=key)
    root = np.sqrt(32)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    cos = np.sum(unit(h) * unit(nla.reconstruct([r.explanation for r in reports])), 1)
    ok = np.array([bool(r.explanation) for r in reports])
    cos = np.where(ok, cos, 0)  # a failed one counts as orthogonal
    variance = np.sum((root * unit(h) - nla.mean_direction) ** 2, 1)
    assert [r.ok for r in reports] == ok.tolist() and len(set(ok)) == 2
    np.testing.assert_allclose([r.cos for r in reports], cos, atol=1e-5)
    np.testing.assert_allclose([r.fve for r in reports], 1 - 2 * 32 * (1 - cos) / variance, rtol=1e-4)
    for positions in ([T], [0, -T - 1]):
        with pytest.raises(UserError, match=f"outside the text, which has {T} tokens"):
            nla.round_trip(TEXT, positions=positions)
    assert nla.round_trip(TEXT, positions=[]) == []
    assert [r.position for r in nla.round_trip("an", positions=iter([0]))] == [0]
    assert [r.position for r in nla.round_trip("an")] == list(range(len(nla.tokens("an"))))


def test_scores_are_those_of_the_round_trip(nla):
    reports = nla.round_trip(TEXT)
    said = [r.explanation for r in reports]
    scores = nla.score(nla.capture(TEXT), said)
    assert [(s.fve, s.cos, s.ok) for s in scores] == [
        (pytest.approx(r.fve, abs=1e-3), pytest.approx(r.cos, abs=1e-3), r.ok) for r in reports]
    frozen, ok = nla.runner.read_frozen(said), np.array([*map(bool, said)])
    fve, _ = row_scores.fve_and_cos(frozen, nla.capture(TEXT), nla.mean_direction, ok)
    np.testing.assert_allclose([s.fve_frozen for s in scores], fve, atol=1e-3)
    assert nla.score(nla.capture(TEXT)[:0], []) == Rows()
    with pytest.raises(UserError, match="one text for each activation; got 1 and 2"):
        nla.score(nla.capture(TEXT)[:1], ["a", "b"])
    with pytest.raises(UserError, match="score takes a list of texts; got one string"):
        nla.score(nla.capture(TEXT)[:1], "a")


def test_compare(nla, h):
    a, b = h[0], torch.tensor(h[1]).to(torch.bfloat16)
    found = nla.compare(a, b)
    unit = [v / np.linalg.norm(v) for v in (a, b.float().numpy())]
    assert found.cos == pytest.approx(float(unit[0] @ unit[1]), abs=1e-4)
    assert [found.explanation_a, found.explanation_b] == [
        nla.verbalize(x[None], temperature=0.0)[0] for x in (a, b)]
    own = nla.score(np.stack([a, b.float().numpy()]), [found.explanation_a, found.explanation_b])
    assert found.fve == pytest.approx([s.fve for s in own], abs=1e-3)
    same = nla.compare(a, a)
    assert same.cos == pytest.approx(1) == same.cos_centered and same.fve == same.crossed
    words = nla.compare("the sea\nold oil", "old oil\nthe town")
    assert words.shared_a == ("old oil",) == words.shared_b and words.fve == pytest.approx((1, 1), abs=1e-4)
    assert nla.compare(a, "old oil").explanation_b == "old oil"
    with pytest.raises(UserError, match="activations have shape"):
        nla.compare(h, a)


def test_results_print_and_become_tables(nla, monkeypatch):
    reports = nla.round_trip(TEXT, samples=2)
    assert reports.to_dicts()[0] == {"position": 0, "token": reports[0].token, "fve": reports[0].fve,
                                     "explanation": reports[0].explanation, "cos": reports[0].cos,
                                     "ok": reports[0].ok}
    lines = repr(reports).split("\n")
    assert lines[0].split() == ["position", "token", "explanation", "fve", "cos", "ok"]
    assert lines[-1] == f"… {len(reports) - 20} more rows" and len(lines) == 22
    assert repr(reports[:0]) == "no rows" and len(repr(reports[:3]).split("\n")) == 4
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install 'nla_jax.pandas.', or use to_dicts"):
        reports.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: ("table", rows)))
    assert reports.to_pandas() == ("table", reports.to_dicts())
    assert repr(nla).startswith("NLA of block 0 of ") and "D=32" in repr(nla)
