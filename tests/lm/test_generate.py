"""Sampling with a cache is the full forward pass, row by row, whatever else is in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import objectives, verbalizer
from nla_jax.lm import generate, kv_cache, lora, model
from tests.helpers import tiny

CFG = tiny.lm(n_blocks=2)  # decoding is unrolled over blocks: few compile fast
PAD = 301
sample = jax.jit(generate.sample, static_argnums=1,
                 static_argnames=("max_new", "stop_ids", "eos_ids", "pad_id"))
forward = jax.jit(model.forward, static_argnums=1, static_argnames=("keep_kv", "remat"))


@pytest.fixture(scope="module")
def params():
    return tiny.params(CFG)


@pytest.fixture(scope="module")
def w(params):
    return generate.decode_weights(params, CFG, jnp.float32)


@jax.jit
def full_logits(params, ids_BT, valid_BT):
    x, _ = model.forward(params, CFG, model.embed(params, CFG, ids_BT), valid_BT)
    return model.unembed(params, CFG, x)


@jax.jit
def prefilled(params, ids_BT, valid_BT):
    """(cache, logits of the next token) of left-padded or whole prompts."""
    x, kv = model.forward(params, CFG, model.embed(params, CFG, ids_BT), valid_BT, keep_kv=True)
    return kv, model.unembed(params, CFG, x[:, -1])


def keys(n, seed=0):
    return generate.row_keys(jax.random.key(seed), jnp.arange(n))


def prompts(n=4, length=10, seed=0):
    ids_BT = tiny.random_ids(np.random.default_rng(seed), (n, length))
    return ids_BT, np.ones((n, length), bool)


# The cache


def test_decoding_token_by_token_is_the_full_forward(params, w):
    """Logits of every step, rows with and without left padding, 24 tokens after a prefill of 8."""
    ids_BT = tiny.random_ids(np.random.default_rng(0), (3, 32))
    valid_BT = np.ones((3, 32), bool)
    valid_BT[1, :5] = False
    want = full_logits(params, ids_BT, valid_BT)
    kv, first = prefilled(params, ids_BT[:, :8], valid_BT[:, :8])
    assert tiny.relative(first, want[:, 7]) < 1e-4

    @jax.jit
    def decode(w, kv):
        prompt = kv_cache.make_levels(kv, 3, jnp.float32)
        written = kv_cache.allocate(CFG, CFG.n_blocks, first, 24, jnp.float32)

        def step(written, slot):
            logits, written = generate._decode_token(
                w, CFG, jnp.array(ids_BT)[:, 8 + slot], slot, prompt, written)
            return written, logits

        return jax.lax.scan(step, written, jnp.arange(24))[1]

    logits = np.swapaxes(decode(w, kv), 0, 1)
    for t in range(24):
        assert tiny.relative(logits[:, t], want[:, 8 + t]) < 1e-4, t


def test_forward_in_pieces(params):
    """`past` and `join`: three pieces, the first shared by all rows, equal the whole."""
    ids_BT = tiny.random_ids(np.random.default_rng(1), (3, 20))
    ids_BT[:, :6] = ids_BT[0, :6]
    valid_BT = np.ones((3, 20), bool)
    valid_BT[2, 15:] = False
    want, _ = forward(params, CFG, model.embed(params, CFG, ids_BT), valid_BT)
    piece = functools.partial(forward, params, CFG, keep_kv=True)
    x = model.embed(params, CFG, ids_BT)
    a, kv = piece(x[:1, :6], valid_BT[:1, :6])
    b, kv_b = piece(x[:, 6:11], valid_BT[:, 6:11], past=kv)
    assert kv_b.length == 5
    kv = model.join(kv, kv_b)
    assert (kv.batch, kv.length) == (3, 11)
    c, _ = piece(x[:, 11:], valid_BT[:, 11:], past=kv)
    got = jnp.concatenate([jnp.repeat(a, 3, 0), b, c], 1)
    assert tiny.relative(got[valid_BT], want[valid_BT]) < 1e-5


@pytest.mark.parametrize("kind", ["tied", "untied with adapters"])
def test_stored_log_probs_are_the_scorers(kind):
    """`verbalizer.write` against `response_hidden` + `token_scores`, every token written."""
    base_spec = tiny.spec()
    cfg = tiny.lm(tied=kind == "tied", n_blocks=2)
    base = tiny.params(cfg)
    av = verbalizer.init(base, cfg, rank=0 if kind == "tied" else 4, key=jax.random.key(5))
    if "lora" in av:  # `b` starts at zero: move it, so that the adapter does something
        av = jax.tree.map(lambda a: a + 0.02, av)
    h_BD = tiny.activations(3)

    @jax.jit
    def both(av, h_BD):
        params = verbalizer.weights(base, av)
        e_BD = verbalizer.inject(av, h_BD, base_spec.alpha)
        out = verbalizer.write(params, cfg, base_spec.av, e_BD, keys(6), group=2, max_new=20)
        e_ND = jnp.repeat(e_BD, 2, 0)
        x = verbalizer.response_hidden(params, cfg, base_spec.av, e_ND, out.ids_BT)
        logp, _, _ = objectives.token_scores(
            params, cfg, x.reshape(-1, x.shape[-1]), out.ids_BT.reshape(-1), chunk=50)
        return out, logp.reshape(out.ids_BT.shape)

    out, logp = both(av, h_BD)
    written = np.arange(20)[None] < out.length_B[:, None]
    assert written.sum() > 60
    np.testing.assert_allclose(out.logp_BT[written], logp[written], atol=1e-4)


# Who is in the batch does not matter


def test_batch_mates_group_and_padding_do_not_matter(params, w):
    ids_BT, valid_BT = prompts()
    kv, logits = prefilled(params, ids_BT, valid_BT)
    whole = sample(w, CFG, kv, logits, keys(4), max_new=16)
    assert len(np.unique(np.asarray(whole.ids_BT), axis=0)) == 4

    for row in (0, 3):  # alone
        kv, logits = prefilled(params, ids_BT[row : row + 1], valid_BT[row : row + 1])
        one = sample(w, CFG, kv, logits, keys(4)[row : row + 1], max_new=16)
        np.testing.assert_array_equal(one.ids_BT[0], whole.ids_BT[row])
        np.testing.assert_allclose(one.logp_BT[0], whole.logp_BT[row], atol=1e-4)

    # Seven tokens of garbage as left padding.
    wide = np.concatenate([tiny.random_ids(np.random.default_rng(9), (4, 7)), ids_BT], 1)
    kv, logits = prefilled(params, wide, np.arange(17)[None].repeat(4, 0) >= 7)
    padded = sample(w, CFG, kv, logits, keys(4), max_new=16)
    np.testing.assert_array_equal(padded.ids_BT, whole.ids_BT)
    np.testing.assert_allclose(padded.logp_BT, whole.logp_BT, atol=1e-4)


def test_group_size_does_not_matter(params):
    """Sample g of row r depends on its own key alone: two of four samples, and other rows gone."""
    spec, h_BD = tiny.spec(), tiny.activations(2)

    @functools.partial(jax.jit, static_argnames="group")
    def write(h_BD, keys_N, group):
        e = verbalizer.inject({}, h_BD, spec.alpha)
        return verbalizer.write(params, CFG, spec.av, e, keys_N, group=group, max_new=12)

    four = write(h_BD, keys(8), group=4)
    two = write(h_BD, keys(8)[jnp.array([0, 1, 4, 5])], group=2)
    np.testing.assert_array_equal(two.ids_BT, four.ids_BT[jnp.array([0, 1, 4, 5])])
    np.testing.assert_allclose(two.logp_BT, four.logp_BT[jnp.array([0, 1, 4, 5])], atol=1e-4)
    assert len(np.unique(np.asarray(four.ids_BT), axis=0)) == 8


def test_in_pieces_it_is_the_same(params, w):
    """Written 1, 5 or all tokens at a time: ids, log-probabilities, lengths, what was closed."""
    kv, logits_BV = prefilled(params, *prompts())
    ids = np.asarray(sample(w, CFG, kv, logits_BV, keys(4), max_new=24).ids_BT)
    ends = dict(stop_ids=(int(ids[0, 6]), int(ids[0, 7])), eos_ids=(int(ids[1, 10]),), pad_id=PAD)
    whole = sample(w, CFG, kv, logits_BV, keys(4), max_new=24, temperature=0.7, **ends)
    go_on = jax.jit(functools.partial(generate.continue_decoding, cfg=CFG, **ends))
    for size in (1, 5, 24):
        now = generate.begin(CFG, kv, logits_BV, keys(4), max_new=24, temperature=0.7, dtype=jnp.float32,
                             **ends)
        for until in range(size, 24 + size, size):
            now = go_on(w, now=now, until=min(until, 24))
            assert int(now.t) == min(until, 24) or bool(now.done_B.all())
        for got, wanted in zip(jax.tree.leaves(now.samples()), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_greedy_is_the_argmax_of_the_full_forward(params, w):
    ids_BT, valid_BT = prompts()
    kv, logits = prefilled(params, ids_BT, valid_BT)
    out = sample(w, CFG, kv, logits, keys(4), max_new=16, temperature=0.0)
    again = sample(w, CFG, kv, logits, keys(4, seed=1), max_new=16, temperature=0.0)
    np.testing.assert_array_equal(out.ids_BT, again.ids_BT)
    text = np.concatenate([ids_BT, out.ids_BT], 1)
    logits = full_logits(params, text, np.ones_like(text, bool))[:, 9:-1]
    np.testing.assert_array_equal(out.ids_BT, logits.argmax(-1))
    logp = np.take_along_axis(jax.nn.log_softmax(logits), np.asarray(out.ids_BT)[..., None], -1)
    np.testing.assert_allclose(out.logp_BT, logp[..., 0], atol=1e-4)


def test_every_token_has_its_own_key(params, w):
    """Token t of a row is drawn with fold_in(key, t): shown where all tokens are equally likely."""
    even = {**w, "unembed": jnp.zeros_like(w["unembed"])}
    kv, logits = prefilled(params, *prompts())
    out = sample(even, CFG, kv, 0 * logits, keys(4), max_new=16)
    for row, key in enumerate(keys(4)):
        u = jnp.stack([jax.random.uniform(jax.random.fold_in(key, t)) for t in range(16)])
        np.testing.assert_array_equal(out.ids_BT[row], drawn(np.zeros(304), u))
    assert len(np.unique(out.ids_BT)) > 40


# Drawing one token

draw = jax.jit(generate.draw)


def drawn(logits_V, u_B, temperature=1.0):
    u_B = jnp.asarray(u_B, jnp.float32)
    logits = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (len(u_B), len(logits_V)))
    return np.asarray(draw(logits, u_B, temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_follows_the_softmax(temperature):
    """An even grid of u gives each token its share, to within one draw at either end."""
    logits = 2 * np.random.default_rng(0).normal(size=304)
    n = 8192
    counts = np.bincount(drawn(logits, (np.arange(n) + 0.5) / n, temperature), minlength=304)
    probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert np.abs(counts - n * probs).max() < 1.1


def test_draw_of_uniform_numbers():
    """Chi-square of independent draws: 303 degrees of freedom, mean 303, deviation 25."""
    logits = np.random.default_rng(1).normal(size=304)
    n = 16384
    counts = np.bincount(drawn(logits, jax.random.uniform(jax.random.key(0), n)), minlength=304)
    expected = n * np.exp(logits) / np.exp(logits).sum()
    assert 200 < ((counts - expected) ** 2 / expected).sum() < 430


@pytest.mark.parametrize("size", [1, 128, 129, 304])
def test_draw_never_yields_a_token_without_probability(size):
    """Few possible tokens anywhere, -inf or underflowing elsewhere; u at its ends and between."""
    rng = np.random.default_rng(size)
    edges = [0.0, 1e-45, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24, 1.0]
    u = np.concatenate([edges, rng.uniform(size=121)]).astype(np.float32)
    supports = [[0], [size - 1], [size // 2], [0, size - 1]]
    supports += [rng.choice(size, rng.integers(1, min(size, 6) + 1), False) for _ in range(12)]
    for nothing in (-np.inf, -1e4):
        for support in supports:
            logits = np.full(size, nothing, np.float32)
            logits[support] = rng.normal(size=len(support))
            assert set(drawn(logits, u)) <= set(np.asarray(support).tolist())
    # Dense: the first and last tokens are the ends.
    logits = rng.normal(size=size)
    ends = drawn(logits, np.float32([0.0, 1.0]) if size > 1 else np.float32([0, 0]))
    np.testing.assert_array_equal(ends, [0, size - 1])


def test_draw_at_temperature_0_and_near():
    logits = np.random.default_rng(0).normal(size=304).astype(np.float32)
    u = np.linspace(0, 1, 50, dtype=np.float32)
    assert set(drawn(logits, u, 0.0)) == {int(logits.argmax())}
    assert set(drawn(logits, u, 1e-4)) == {int(logits.argmax())}


# Where a row ends


def reference_end(row, stop, eos):
    """(length, closed) of an answer, in plain Python."""
    for t in range(len(row)):
        if stop and tuple(row[max(0, t + 1 - len(stop)) : t + 1]) == stop:
            return t + 1, True
        if row[t] in eos:
            return t + 1, False
    return len(row), False


def test_stops(params, w):
    """Stop sequence, EOS (at position 0 too) and the cap; done rows keep pad and log-prob 0."""
    ids_BT, valid_BT = prompts(8)
    kv, logits = prefilled(params, ids_BT, valid_BT)
    free = sample(w, CFG, kv, logits, keys(8), max_new=16, pad_id=PAD)
    assert (np.asarray(free.length_B) == 16).all() and not free.closed_B.any()
    text = np.asarray(free.ids_BT).tolist()
    seen = {t for row in text[2:] for t in row}
    first = text[1][0]
    assert first not in seen
    cases = [
        (tuple(text[0][4:7]), (first,)),  # three tokens in the middle; EOS at once
        (tuple(text[3][13:16]), (PAD, text[4][7])),  # a stop that ends at the cap is a stop
        ((), (text[2][15], text[5][3])),  # no stop sequence; EOS as the very last
    ]
    for stop, eos in cases:
        out = sample(w, CFG, kv, logits, keys(8), max_new=16, stop_ids=stop, eos_ids=eos,
                     pad_id=PAD)
        want = [reference_end(row, stop, eos) for row in text]
        assert list(zip(out.length_B.tolist(), out.closed_B.tolist(), strict=True)) == want
        kept = np.arange(16)[None] < out.length_B[:, None]
        np.testing.assert_array_equal(out.ids_BT, np.where(kept, free.ids_BT, PAD))
        np.testing.assert_array_equal(out.logp_BT, np.where(kept, free.logp_BT, 0.0))
        assert set(want) - {(16, False)}, "no row stopped: the case tests nothing"


def test_all_rows_done_at_once(params, w):
    """Every row ends at position 0."""
    ids_BT, valid_BT = prompts(2)
    kv, logits = prefilled(params, ids_BT, valid_BT)
    out = sample(w, CFG, kv, logits, keys(2), max_new=8, eos_ids=tuple(range(304)), pad_id=PAD)
    assert out.length_B.tolist() == [1, 1] and not out.closed_B.any()
    assert (np.asarray(out.ids_BT)[:, 1:] == PAD).all() and (out.logp_BT[:, 1:] == 0).all()


# Adapters


def test_fresh_adapter_equals_its_base(params):
    ids_BT, valid_BT = prompts(2)
    fresh = lora.attach(params, lora.init(CFG, 4, jax.random.key(1)))
    np.testing.assert_array_equal(full_logits(fresh, ids_BT, valid_BT),
                                  full_logits(params, ids_BT, valid_BT))
    assert fresh["blocks"]["wq"] is params["blocks"]["wq"]


def test_attached_equals_merged_and_learns(params):
    """W + a b both ways; the gradient reaches a and b of every matrix, and not the base."""
    ids_BT, valid_BT = prompts(2)
    adapter = jax.tree.map(lambda a: a + 0.05, lora.init(CFG, 4, jax.random.key(1)))
    attached = lora.attach(params, adapter)
    merged = lora.merge(attached)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    want = full_logits(params, ids_BT, valid_BT)
    got = full_logits(attached, ids_BT, valid_BT)
    assert tiny.relative(full_logits(merged, ids_BT, valid_BT), got) < 1e-4
    assert tiny.relative(got, want) > 0.01

    def loss(adapter):
        return jnp.mean(jnp.square(full_logits(lora.attach(params, adapter), ids_BT, valid_BT)))

    grads = tiny.flat(jax.jit(jax.grad(loss))(adapter))
    assert set(grads) == set(lora.table(CFG, 4))
    for name, g in grads.items():
        assert (np.abs(g).max((1, 2)) > 0).all(), name  # in every block
    assert {n: a.shape for n, a in grads.items()} == {
        n: s.shape for n, s in lora.table(CFG, 4).items()
    }


def test_gradient_of_a_fresh_adapter_moves_b_first(params):
    ids_BT, valid_BT = prompts(2)

    def loss(adapter):
        return jnp.mean(jnp.square(full_logits(lora.attach(params, adapter), ids_BT, valid_BT)))

    grads = tiny.flat(jax.jit(jax.grad(loss))(lora.init(CFG, 4, jax.random.key(1))))
    for name, g in grads.items():
        assert (np.abs(g).max() > 0) == name.endswith("/b"), name
