"""Prompts, injection at the marker, and the way of an explanation from AV's ids into AR's prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import prompts, reconstructor, target, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import model
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.training import feeds
from tests.helpers import tiny

CFG = tiny.lm(n_blocks=3)
K = 1


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def params():
    return tiny.params(CFG)


# The prompts


def test_av_prompt(tok):
    av = prompts.av_prompt(tok, tiny.AV_TEMPLATE, tiny.MARKER)
    whole = tok.decode([*av.before, av.marker, *av.after])
    assert whole == (
        f"<|im_start|>user\nSay.\n<concept>{tiny.MARKER}</concept><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tok.decode(av.open) == prompts.OPEN
    assert tok.decode(av.close) == "</explanation>" and tok.decode(av.newline) == "\n"
    assert av.pad == av.end_of_turn == tok.eos_token_id
    assert set(av.eos) == {tok.eos_token_id, tok.convert_tokens_to_ids("<|endoftext|>")}
    assert len(av.open) > 1 and len(av.close) > 1
    hash(av)
    # The response tokenised whole is opening tag, words, line break, closing tag.
    ids = tok_lib.plain_ids(tok, prompts.OPEN + "of the" + prompts.CLOSE)
    assert ids == [*av.open, *tok_lib.plain_ids(tok, "of the"), *av.newline, *av.close]


@pytest.mark.parametrize("template, marker, named", [
    ("no place", tiny.MARKER, "{marker} once"),
    ("{marker} {marker}", tiny.MARKER, "{marker} once"),
    (tiny.AV_TEMPLATE, "two words", "choose one that is a single token"),
    (tiny.AV_TEMPLATE, "<", "occurs 2 times"),
])
def test_av_prompt_refused(tok, template, marker, named):
    with pytest.raises(UserError, match=named):
        prompts.av_prompt(tok, template, marker)


@pytest.mark.parametrize("bos", [False, True])
def test_ar_prompt(bos):
    """The halves around an explanation are those of the whole string, BOS where there is one."""
    tok = tiny.tokenizer(bos)
    ar = prompts.ar_prompt(tok, tiny.AR_TEMPLATE)
    assert (ar.before[0] == tok.bos_token_id) == bos
    for text in ("of the", "a", "the\nlast\n</line>", " \u00e9\u00e9 "):
        whole = tok_lib.raw_ids(tok, tiny.AR_TEMPLATE.replace("{explanation}", text))
        assert whole == [*ar.before, *tok_lib.plain_ids(tok, text), *ar.after]


def test_ar_prompt_refused(tok):
    with pytest.raises(UserError, match="{explanation} once"):
        prompts.ar_prompt(tok, "nothing")
    with pytest.raises(UserError, match="merges with the explanation's tokens"):
        prompts.ar_prompt(tok, "<text>\n{explanation}<b>")


def test_default_templates_fit_any_tokenizer(tok):
    av = prompts.av_prompt(tok, prompts.AV_TEMPLATE, tiny.MARKER)
    ar = prompts.ar_prompt(tok, prompts.AR_TEMPLATE)
    assert tok.decode([av.marker]) == tiny.MARKER and tok.decode(av.before).endswith("<concept>")
    assert tok.decode(av.after).startswith("</concept>")
    assert ar.before == ar.after == ar.suffix == ()


# Injection


def test_injected_norm_is_alpha_whatever_the_scale():
    h_BD = tiny.activations(5)
    e = verbalizer.inject({}, h_BD, 6.0)
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 6.0, rtol=1e-5)
    np.testing.assert_allclose(verbalizer.inject({}, 1000 * h_BD, 6.0), e, rtol=1e-5, atol=1e-6)
    cos = np.sum(e * h_BD, 1) / np.linalg.norm(h_BD, axis=1) / 6
    np.testing.assert_allclose(cos, 1, rtol=1e-5)


def test_identity_affine_is_no_affine(params):
    h_BD = tiny.activations(5)
    av = verbalizer.init(params, CFG, affine=True)
    assert set(verbalizer.table(CFG, affine=True)) == set(tiny.flat(av))
    np.testing.assert_allclose(verbalizer.inject(av, h_BD, 6.0),
                               verbalizer.inject({}, h_BD, 6.0), rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda a: jnp.sum(verbalizer.inject(a, h_BD, 6.0) ** 3))(av)["inject"]
    assert np.abs(grads["w"]).max() > 0 and np.abs(grads["b"]).max() > 0
    twice = {"inject": {"w": 2 * jnp.eye(32), "b": jnp.zeros(32)}}  # the map may change the norm
    np.testing.assert_allclose(np.linalg.norm(verbalizer.inject(twice, h_BD, 6.0), axis=1), 12,
                               rtol=1e-5)


@pytest.fixture(scope="module")
def whole(params):
    """(e, hidden [B, T, D]) of a plain forward pass with the marker's embedding replaced."""
    av = tiny.spec().av
    e_BD = verbalizer.inject({}, tiny.activations(3), 6.0)
    ids = np.array([*av.before, av.marker, *av.after])
    response = tiny.random_ids(np.random.default_rng(0), (3, 7))
    ids_BT = np.concatenate([np.broadcast_to(ids, (3, len(ids))), response], 1)
    x = np.array(model.embed(params, CFG, ids_BT))
    site = len(av.before)
    assert (np.flatnonzero(ids_BT[0, : len(ids)] == av.marker) == [site]).all()
    x[:, site] = e_BD
    np.testing.assert_allclose(np.linalg.norm(x[:, site], axis=1), 6.0, rtol=1e-5)
    forward = jax.jit(model.forward, static_argnums=1)
    return e_BD, response, len(ids), forward(params, CFG, x, np.ones(x.shape[:2], bool))[0]


def test_prefill_is_the_plain_forward(params, whole):
    e_BD, _, n, x = whole
    prefill = jax.jit(verbalizer.prefill, static_argnums=(1, 2))
    (before, own), logits = prefill(params, CFG, tiny.spec().av, e_BD)
    assert (before.batch, own.batch, before.length + own.length) == (1, 3, n)
    assert before.valid_BS.all() and own.valid_BS.all()
    assert tiny.relative(logits, model.unembed(params, CFG, x[:, n - 1])) < 1e-4
    # The activation matters: rows differ by far more than rounding.
    assert tiny.relative(logits[:1], logits[1:2]) > 0.01


def test_response_hidden_is_the_plain_forward(params, whole):
    """Token t is predicted from t - 1: the last prompt token first, the last response token not."""
    e_BD, response, n, x = whole
    hidden = jax.jit(verbalizer.response_hidden, static_argnums=(1, 2))(
        params, CFG, tiny.spec().av, e_BD, response)
    assert tiny.relative(hidden, x[:, n - 1 : -1]) < 1e-4


@pytest.mark.parametrize("injection", verbalizer.INJECTIONS)
def test_a_drill_is_read_directly_behind_the_marker(params, injection):
    """Its prompt ends with the marker: the marker predicts the first token of the answer."""
    av = dataclasses.replace(tiny.spec().av, injection=injection)
    drill = prompts.drill_prompt(av)
    bare = dict(after=(), open=(), close=(av.end_of_turn,), newline=())
    assert drill == dataclasses.replace(av, **bare) != av
    v_BD = verbalizer.inject({}, tiny.activations(3), 6.0)
    response = tiny.random_ids(np.random.default_rng(0), (3, 7))
    ids_BT = np.concatenate([np.broadcast_to([*av.before, av.marker], (3, len(av.before) + 1)), response], 1)
    x, site = np.array(model.embed(params, CFG, ids_BT)), len(av.before)
    hidden = jax.jit(verbalizer.response_hidden, static_argnums=(1, 2))(params, CFG, drill, v_BD, response)
    assert hidden.shape == (3, 7, 32)
    if injection == "replace":
        x[:, site] = v_BD
        want, _ = model.forward(params, CFG, x, np.ones(x.shape[:2], bool))
        assert tiny.relative(hidden, want[:, site:-1]) < 1e-4
    without, _ = model.forward(params, CFG, model.embed(params, CFG, ids_BT), np.ones(x.shape[:2], bool))
    assert tiny.relative(hidden, without[:, site:-1]) > 0.01  # h comes in


def test_the_answer_of_a_drill_is_the_line_and_the_end_of_the_turn(tok):
    av = tiny.spec().av
    line = "\u2026 of the"
    assert feeds.response_rows(tok, prompts.drill_prompt(av), [line])[0] == [*tok_lib.inner_ids(tok, line),
                                                                       av.end_of_turn]
    assert feeds.response_rows(tok, av, [line])[0] == [
        *tok_lib.plain_ids(tok, prompts.OPEN + line + prompts.CLOSE), av.end_of_turn]


def test_gradient_flows_through_the_shared_prompt(params, whole):
    """The gradient of the prompt that is computed once equals that of the plain forward."""
    e_BD, response, n, _ = whole
    av = tiny.spec().av
    ids = jnp.array([*av.before, av.marker, *av.after])
    ids_BT = jnp.concatenate([jnp.broadcast_to(ids, (3, n)), response], 1)
    probe = jax.random.normal(jax.random.key(0), (3, 7, 32))

    def split(p, e):
        return jnp.sum(probe * verbalizer.response_hidden(p, CFG, av, e, response))

    def plain(p, e):
        x = model.embed(p, CFG, ids_BT).at[:, len(av.before)].set(e)
        x, _ = model.forward(p, CFG, x, jnp.ones(ids_BT.shape, bool))
        return jnp.sum(probe * x[:, n - 1 : -1])

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, e_BD) for f in (split, plain))
    for name, a in tiny.flat(want).items():
        scale = max(np.abs(a).max(), 1e-6)
        np.testing.assert_allclose(tiny.flat(got)[name], a, atol=2e-4 * scale, err_msg=name)


@pytest.mark.parametrize("in_place", [False, True])
def test_norm_matched_adds_after_block_1(params, in_place):
    """Against two plain halves with the addition written out between them; every gradient too."""
    av = tiny.spec().av
    matched = dataclasses.replace(av, injection="norm_matched")
    ids = np.array([*av.before, av.marker, *av.after])
    response = tiny.random_ids(np.random.default_rng(0), (3, 7))
    ids_BT = np.concatenate([np.broadcast_to(ids, (3, len(ids))), response], 1)
    valid_BT, site = np.ones(ids_BT.shape, bool), len(av.before)
    v_BD = verbalizer.inject({}, tiny.activations(3), 0.7)
    probe = jax.random.normal(jax.random.key(0), (3, 7, 32))
    none = jax.tree.map(jnp.zeros_like, params["blocks"]) if in_place else None

    def ours(p, v):
        hidden = verbalizer.response_hidden(p, CFG, matched, v, response, summed=none)
        return jnp.sum(probe * hidden), hidden

    def plain(p, v):
        halves = [jax.tree.map(lambda a, s=s: a[s], p["blocks"]) for s in (slice(2), slice(2, 3))]
        x, _ = model.forward({"blocks": halves[0]}, CFG, model.embed(p, CFG, ids_BT), valid_BT)
        at = x[:, site]
        x = x.at[:, site].set(at + jnp.sqrt(jnp.sum(at**2, 1, keepdims=True)) * v)
        x, _ = model.forward({"blocks": halves[1]}, CFG, x, valid_BT)
        return jnp.sum(probe * x[:, len(ids) - 1 : -1]), x[:, len(ids) - 1 : -1]

    grad = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))
    (got, hidden), (want, x) = grad(ours)(params, v_BD), grad(plain)(params, v_BD)
    assert tiny.relative(hidden, x) < 1e-4
    for name, a in tiny.flat(want).items():
        np.testing.assert_allclose(tiny.flat(got)[name], a, atol=2e-4 * np.abs(a).max(), err_msg=name)
    _, logits = jax.jit(verbalizer.prefill, static_argnums=(1, 2))(params, CFG, matched, v_BD)
    assert tiny.relative(logits, model.unembed(params, CFG, x[:, 0])) < 1e-4
    assert tiny.relative(logits[:1], logits[1:2]) > 0.01


# Parsing and splicing


def answers(av, n=60, width=14, seed=0):
    """Random answers as the sampler returns them: (ids, length, closed), all kinds mixed."""
    rng = np.random.default_rng(seed)
    rows, lengths, closed = [], [], []
    for i in range(n):
        words = tiny.random_ids(rng, (rng.integers(0, 6),), 250).tolist()
        opened, newline, ends = i % 5 != 0, i % 3 != 0, i % 7 != 0
        row = (list(av.open) if opened else words[:2]) + words
        row += list(av.newline) * newline + list(av.close) * ends
        if not ends and i % 2:
            row.append(av.eos[0])
        row = row[:width]
        lengths.append(len(row))
        closed.append(tuple(row[-len(av.close) :]) == av.close)
        rows.append(row + [av.pad] * (width - len(row)))
    return np.array(rows, np.int32), np.array(lengths, np.int32), np.array(closed)


@pytest.mark.parametrize("kind", ["spec", "talker"])
def test_parse_and_splice_against_plain_python(kind):
    """Unopened, unclosed, empty, cut and good answers, with and without the line break."""
    spec = getattr(tiny, kind)()
    ids, length, closed = answers(spec.av)
    start, end, ok = map(np.asarray, jax.jit(verbalizer.parse_ids, static_argnums=0)(
        spec.av, ids, length, closed))
    want = [tiny.reference_cut(spec.av, *row) for row in zip(ids, length, closed, strict=True)]
    assert 10 < sum(w is not None for w in want) < 50
    assert ok.tolist() == [w is not None for w in want]
    for i, words in enumerate(want):
        if words is not None:
            assert ids[i, start[i] : end[i]].tolist() == words

    got, valid, last = map(np.asarray, jax.jit(reconstructor.splice, static_argnums=0)(
        spec.ar, ids, start, end))
    assert got.shape == valid.shape == (60, len(spec.ar.before) + 14 + len(spec.ar.after))
    for i in range(60):
        words = ids[i, start[i] : max(end[i], start[i])].tolist()
        prompt = [*spec.ar.before, *words, *spec.ar.after]
        assert got[i, : len(prompt)].tolist() == prompt
        assert (got[i, len(prompt) :] == spec.ar.pad).all()
        assert valid[i].sum() == len(prompt) and valid[i, : len(prompt)].all()
        assert last[i] == len(prompt) - 1


def test_parse_of_named_cases(tok):
    av = tiny.spec().av
    words, newline, close = [40, 41], list(av.newline), list(av.close)
    cases = [
        ([*av.open, *words, *newline, *close], True, words),
        ([*av.open, *words, *close], True, words),
        ([*av.open, *words, *newline, *newline, *close], True, [*words, *newline]),
        ([*av.open, *newline, *close], True, None),
        ([*av.open, *close], True, None),
        (close, True, None),
        ([*words, *words, *close], True, None),
        ([*av.open, *words, av.eos[0]], False, None),
        ([*av.open, *words, *words], False, None),
        ([av.eos[0]], False, None),
    ]
    for ids, closed, want in cases:
        row = np.array([ids + [av.pad] * (16 - len(ids))])
        start, end, ok = verbalizer.parse_ids(av, row, np.array([len(ids)]), np.array([closed]))
        assert bool(ok[0]) == (want is not None), tok.decode(ids)
        if want is not None:
            assert row[0, int(start[0]) : int(end[0])].tolist() == want, tok.decode(ids)


# Reading h


@pytest.fixture(scope="module")
def ar_params(params):
    ar = reconstructor.init(params, CFG, K)
    assert set(reconstructor.table(CFG, K)) == set(tiny.flat(ar))
    rng = np.random.default_rng(0)
    ar["head"] = ar["head"] + 0.1 * rng.normal(size=(32, 32)).astype(np.float32)
    return reconstructor.weights(params, ar, K)


reconstruct = jax.jit(reconstructor.reconstruct, static_argnums=1)


def test_token_path_is_the_text_path(tok, ar_params):
    """An answer spliced by ids and the same words tokenised in their template read the same h."""
    spec = tiny.spec()
    texts = ["of the text", "a", "two\nlines of concept", "the user </ x"]
    rows = [tok_lib.plain_ids(tok, prompts.OPEN + t + prompts.CLOSE) for t in texts]
    length = np.array([len(r) for r in rows])
    ids = np.array([r + [spec.av.pad] * (40 - len(r)) for r in rows], np.int32)
    start, end, ok = verbalizer.parse_ids(spec.av, ids, length, np.ones(4, bool))
    assert ok.all()
    by_ids = reconstruct(ar_params, CFG, *reconstructor.splice(spec.ar, ids, start, end))
    ids_BT, valid_BT, last_B = reconstructor.rows(tok, tiny.AR_TEMPLATE, texts, spec.ar.pad)
    assert ids_BT.shape[1] % 16 == 0 and ids_BT.dtype == np.int32
    by_text = reconstruct(ar_params, CFG, ids_BT, valid_BT, last_B)
    assert tiny.relative(by_ids, by_text) < 1e-5
    assert tiny.relative(by_text[:1], by_text[1:2]) > 0.01


def test_padding_length_does_not_matter(tok, ar_params):
    """h is read at the last real token, whatever the padding holds and however long it is."""
    texts = ["of the text", "a"]
    narrow, wide = (reconstructor.rows(tok, tiny.AR_TEMPLATE, texts, 301, m) for m in (8, 64))
    assert wide[0].shape[1] > narrow[0].shape[1]
    garbage = np.where(wide[1], wide[0], 17)
    want = reconstruct(ar_params, CFG, *narrow)
    assert tiny.relative(reconstruct(ar_params, CFG, garbage, *wide[1:]), want) < 1e-5


def test_read_out_is_the_last_real_token_through_the_head(tok, params, ar_params):
    ids, valid, last = reconstructor.rows(tok, tiny.AR_TEMPLATE, ["of the text"], 301)
    n = int(last[0]) + 1
    assert tok.decode(ids[0, :n]) == tiny.AR_TEMPLATE.replace("{explanation}", "of the text")
    short = {"embed": params["embed"], "blocks": jax.tree.map(lambda a: a[: K + 1],
                                                              params["blocks"])}
    x, _ = model.forward(short, CFG, model.embed(short, CFG, ids[:, :n]), valid[:, :n])
    want = x[:, -1] @ ar_params["head"]
    assert tiny.relative(reconstruct(ar_params, CFG, ids, valid, last), want) < 1e-5


def test_roles_start_as_copies(params):
    """Neither role shares memory with the target: each may be donated."""
    av, ar = verbalizer.init(params, CFG), reconstructor.init(params, CFG, K)
    assert av["params"]["embed"] is not params["embed"]
    assert (av["params"]["embed"].unsafe_buffer_pointer()
            != params["embed"].unsafe_buffer_pointer()
            != ar["params"]["embed"].unsafe_buffer_pointer())
    np.testing.assert_array_equal(ar["head"], np.eye(32))
    for rank in (0, 4):
        key = jax.random.key(0)
        av = verbalizer.init(params, CFG, rank=rank, key=key)
        ar = reconstructor.init(params, CFG, K, rank=rank, key=key)
        assert {n: s.shape for n, s in verbalizer.table(CFG, rank=rank).items()} == {
            n: a.shape for n, a in tiny.flat(av).items()}
        assert {n: s.shape for n, s in reconstructor.table(CFG, K, rank=rank).items()} == {
            n: a.shape for n, a in tiny.flat(ar).items()}


# The bare explanation, and the frozen target that reads it

BARE = prompts.ARPrompt(before=(), after=(), pad=301)


@pytest.mark.parametrize("before", [(), (11, 12)])
@pytest.mark.parametrize("after", [(), (13,)])
def test_splice_of_cuts_of_all_lengths(before, after):
    """Cuts of 0, 1, some and all tokens; an empty prompt gets one token of padding."""
    ar = dataclasses.replace(BARE, before=before, after=after)
    ids = np.arange(24, dtype=np.int32).reshape(4, 6) + 100
    start, end = np.array([2, 3, 1, 0]), np.array([2, 4, 5, 6])
    got, valid, last = map(np.asarray, jax.jit(reconstructor.splice, static_argnums=0)(ar, ids, start, end))
    assert got.shape == valid.shape == (4, 6 + len(before) + len(after))
    for row, a, b, out, there, at in zip(ids, start, end, got, valid, last, strict=True):
        want = [*before, *row[a:b].tolist(), *after] or [301]
        assert out.tolist() == want + [301] * (len(out) - len(want))
        np.testing.assert_array_equal(there, np.arange(len(out)) < len(want))
        assert at == len(want) - 1


def test_bare_token_path_is_the_text_path(tok, params):
    """As above with our own template: read at the last word, and the words decide h."""
    ar = prompts.ar_prompt(tok, "{explanation}")
    weights = reconstructor.weights(params, {}, K)
    texts = ["x\n\u2026 of the text", "a", "two\nlines of concept", ""]
    rows = [tok_lib.plain_ids(tok, t) for t in texts]
    ids = np.array([[5, *r, *[7] * (30 - len(r))] for r in rows], np.int32)
    start, end = np.ones(4, np.int32), np.array([1 + len(r) for r in rows], np.int32)
    by_ids = reconstruct(weights, CFG, *reconstructor.splice(ar, ids, start, end))
    read = reconstructor.rows(tok, "{explanation}", texts, ar.pad)
    assert read[2].tolist() == [max(len(r) - 1, 0) for r in rows]
    assert read[0][3, 0] == ar.pad and read[1].sum(1).tolist() == [*map(len, rows[:3]), 1]
    by_text = reconstruct(weights, CFG, *read)
    assert np.isfinite(by_text).all() and tiny.relative(by_ids, by_text) < 1e-5
    assert tiny.relative(by_text[:1], by_text[1:2]) > 0.01


@pytest.mark.parametrize("bos", [False, True])
def test_the_frozen_ar_is_the_target(params, bos):
    """Bit for bit what `target.capture` reads at the last token of the same text."""
    tok = tiny.tokenizer(bos)
    texts = ["x\n\u2026 of the text", "two\nlines of concept", "a"]
    ids_BT, valid_BT, last_B = reconstructor.rows(tok, prompts.ar_template_for(tok), texts, 301)
    assert reconstructor.table(CFG, K, kind="frozen") == {}
    assert reconstructor.init(params, CFG, K, kind="frozen") == {}
    weights = reconstructor.weights(params, {}, K)
    assert "head" not in weights and "final_norm" not in weights
    h_BD = np.asarray(reconstruct(weights, CFG, ids_BT, valid_BT, last_B))
    lead = tok_lib.lead_ids(tok)
    n = len(lead)
    assert n == bos and (ids_BT[:, :n] == list(lead)).all()
    capture = jax.jit(target.capture, static_argnums=(1, 2, 6))
    want = capture(params, CFG, K, ids_BT[:, n:], valid_BT[:, n:], last_B[:, None] - n, lead)
    np.testing.assert_array_equal(h_BD, np.asarray(want)[:, 0])
    assert h_BD.dtype == np.float32 and tiny.relative(h_BD[:1], h_BD[1:2]) > 0.01
    # A fresh AR is the same computation: its head is the identity.
    fresh = reconstructor.weights(params, reconstructor.init(params, CFG, K), K)
    assert tiny.relative(reconstruct(fresh, CFG, ids_BT, valid_BT, last_B), h_BD) < 1e-5


def test_the_frozen_ar_reads_in_lower_precision(tok, params):
    read = reconstructor.rows(tok, "{explanation}", ["two\nlines of concept"], 301)
    low = reconstructor.weights(params, {}, K, jnp.bfloat16)
    h_BD = reconstructor.reconstruct(low, CFG, *read, dtype=jnp.bfloat16)
    want = reconstruct(reconstructor.weights(params, {}, K), CFG, *read)
    assert h_BD.dtype == np.float32 and 0 < tiny.relative(h_BD, want) < 0.1
