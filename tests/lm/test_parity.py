"""The forward pass against transformers in PyTorch, float32: random tiny Llamas and the default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from nla_jax import target
from nla_jax.lm import model, ops, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import tiny

# Largest error over the root mean square, float32 against float32.
TOLERANCE = 1e-4
K = 2  # the block whose output is h in the tiny models


def in_torch(cfg, params, folder):
    """The same parameters as a transformers model, by way of an export."""
    weights.save_hf(folder, cfg, jax.tree.map(np.asarray, params))
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def torch_forward(net, ids_BT, valid_BT):
    """(logits_BTV, hidden states by number) with positions that count real tokens only."""
    positions = np.maximum(np.cumsum(valid_BT, 1) - 1, 0)
    with torch.no_grad():
        out = net(
            input_ids=torch.tensor(ids_BT, dtype=torch.long),
            attention_mask=torch.tensor(valid_BT.astype(np.int64)),
            position_ids=torch.tensor(positions, dtype=torch.long),
            output_hidden_states=True, use_cache=False,
        )
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    cfg = tiny.lm(tied=request.param == "tied")
    params = tiny.params(cfg)
    return cfg, params, in_torch(cfg, params, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_hidden_state(pair, side):
    """Logits, h at K, and `target.capture`: 650 tokens, rows of three lengths."""
    cfg, params, net = pair
    lengths = np.array([300, 230, 120])
    ids_BT = tiny.random_ids(np.random.default_rng(0), (3, 300), cfg.vocab_size)
    valid_BT = np.arange(300)[None] < lengths[:, None]
    if side == "left":
        valid_BT = valid_BT[:, ::-1].copy()
    assert valid_BT.sum() >= 500
    logits_torch, states = torch_forward(net, ids_BT, valid_BT)

    x_BTD, kv = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)
    assert kv is None
    logits = model.unembed(params, cfg, x_BTD)
    assert tiny.relative(logits[valid_BT], logits_torch[valid_BT]) < TOLERANCE

    positions = np.where(valid_BT, np.arange(300)[None], -1)
    h = target.capture(params, cfg, K, ids_BT, valid_BT, positions)
    assert h.dtype == jnp.float32
    assert tiny.relative(h[valid_BT], states[K + 1][valid_BT]) < TOLERANCE
    # One block off would be noticed: the neighbours in depth are far away.
    assert tiny.relative(h[valid_BT], states[K][valid_BT]) > 100 * TOLERANCE

    short = params_lib.truncate(params, K + 1)
    x_BTD, _ = model.forward(short, cfg, model.embed(short, cfg, ids_BT), valid_BT)
    np.testing.assert_array_equal(x_BTD[valid_BT], h[valid_BT])


def test_padding_side_does_not_matter():
    """A row's real tokens give the same h, whatever stands around them."""
    cfg = tiny.lm()
    params = tiny.params(cfg)
    rng = np.random.default_rng(1)
    words = tiny.random_ids(rng, (20,), cfg.vocab_size)
    ids_BT = tiny.random_ids(rng, (3, 32), cfg.vocab_size)  # garbage stands in the padding
    valid_BT = np.zeros((3, 32), bool)
    for row, start in enumerate([0, 12, 5]):
        ids_BT[row, start : start + 20] = words
        valid_BT[row, start : start + 20] = True
    x = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)[0][valid_BT]
    x = x.reshape(3, 20, -1)
    assert tiny.relative(x[1], x[0]) < 1e-5
    assert tiny.relative(x[2], x[0]) < 1e-5


def test_remat_and_bfloat16():
    """Recomputing changes nothing; bfloat16 weights keep the residual stream in float32."""
    cfg = tiny.lm()
    params = tiny.params(cfg)
    ids_BT = tiny.random_ids(np.random.default_rng(0), (2, 16), cfg.vocab_size)
    valid_BT = np.ones((2, 16), bool)

    def loss(p, remat):
        x, _ = model.forward(p, cfg, model.embed(p, cfg, ids_BT), valid_BT, remat=remat)
        return jnp.mean(jnp.square(model.unembed(p, cfg, x)))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, saved = grad(params, False), grad(params, True)
    tiny.assert_trees_close(saved, plain, rtol=1e-5, atol=1e-6)

    low = model.cast(params, jnp.bfloat16)
    assert low["blocks"]["wq"].dtype == jnp.bfloat16
    assert low["blocks"]["attn_norm"].dtype == low["final_norm"].dtype == jnp.float32
    exact, _ = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)
    x, _ = model.forward(low, cfg, model.embed(low, cfg, ids_BT), valid_BT)
    assert x.dtype == jnp.float32
    assert tiny.relative(x, exact) < 0.1


def test_gradients_of_dense():
    """The hand-written backward pass of `dense` is that of a matrix product."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 4))
    x, g = x.astype(np.float32), g.astype(np.float32)
    for transposed in (False, True):
        w = rng.normal(size=(4, 5) if transposed else (5, 4)).astype(np.float32)
        y, back = jax.vjp(lambda x, w, t=transposed: model.dense(x, w, t), x, w)
        want, want_back = jax.vjp(lambda x, w, t=transposed: x @ (w.T if t else w), x, w)
        np.testing.assert_allclose(y, want, atol=1e-5)
        for got, expected in zip(back(g), want_back(g), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_gradients_of_attention(dtype, tolerance):
    """The hand-written backward pass of `attend` is that of softmax attention with every head on its own."""
    B, T, S, H, K, d = 3, 8, 13, 6, 2, 16
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, d), (B, K, S, d), (B, K, S, d), (B, T, H * d)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    mask = jnp.asarray(rng.random((B, T, S)) < 0.7).at[..., 0].set(True)

    def whole(q, k, v):
        k, v = (jnp.repeat(a, H // K, 1) for a in (k, v))
        scores = jnp.einsum("bthd,bhsd->bhts", q, k) / d**0.5
        probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
        return jnp.einsum("bhts,bhsd->bthd", probs, v).reshape(B, T, H * d)

    def gradient(fn):
        return jax.jit(jax.grad(lambda *a: jnp.sum(fn(*a) * weight), argnums=(0, 1, 2)))(q, k, v)

    got = gradient(lambda q, k, v: model.attend(q, k, v, mask, dtype))
    for a, b in zip(got, gradient(whole), strict=True):
        assert tiny.relative(a, b) < tolerance


def test_products_over_rows_in_bfloat16():
    """The CPU's own way to gradients of weights gives what a product in float32 of the same numbers does."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(2, 3, 70, n)), jnp.bfloat16) for n in (24, 40))
    got = jax.jit(ops.contract_rows)(a, b)
    assert got.dtype == jnp.float32 and got.shape == (2, 3, 24, 40)
    np.testing.assert_allclose(
        got, np.einsum("xyni,xyno->xyio", *(np.asarray(x, np.float32) for x in (a, b))), rtol=1e-4, atol=1e-4)


def test_default_target(tmp_path):
    """SmolLM2-135M-Instruct from its GGUF file; massive activations, so errors are relative."""
    path = weights.resolve(weights.DEFAULT_TARGET)
    cfg, params = weights.load(path)
    tok = tok_lib.load(path)
    text = (
        "The committee had expected a quiet afternoon, but when the minister stood up and tore the "
        "report in half, every camera in the room turned towards him and the chairman dropped his "
        "pen."
    )
    ids_BT = np.array([tok_lib.plain_ids(tok, text)], np.int32)
    valid_BT = np.ones_like(ids_BT, bool)
    net = in_torch(cfg, params, tmp_path)
    logits_torch, states = torch_forward(net, ids_BT, valid_BT)
    del net
    layer = cfg.default_layer()

    def ours(params, ids_BT, valid_BT):
        x, _ = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)
        every = np.arange(ids_BT.shape[1])[None]
        return (model.unembed(params, cfg, x),
                target.capture(params, cfg, layer, ids_BT, valid_BT, every))

    logits, h = jax.jit(ours)(params, ids_BT, valid_BT)
    assert tiny.relative(logits, logits_torch) < TOLERANCE
    np.testing.assert_array_equal(np.argmax(logits, -1), logits_torch.argmax(-1))
    # A few entries of the first token are hundreds of times larger than the rest: row by row.
    for t in range(ids_BT.shape[1]):
        assert tiny.relative(h[0, t], states[layer + 1][0, t]) < TOLERANCE, t
