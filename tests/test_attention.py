"""Fused attention against plain attention: the splash kernel interpreted, cuDNN's by what it is told.

The reference is `products.attend`, which is compared with transformers elsewhere. Operands are float32, so
that only the order of sums differs: 2e-5 of the root mean square of what is compared.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from nla_jax import layout
from nla_jax.errors import UserError
from nla_jax.lm import attention, model, products
from tests import tiny

CLOSE = 2e-5
LM = dataclasses.replace(tiny.lm(), head_dim=128, d_model=16, n_blocks=3, d_ff=24, vocab_size=40)
LOCAL = dict(window=50, local=(True, False, True))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The splash kernel as plain operations."""
    made = splash_attention_kernel.make_splash_mqa_single_device
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mqa_single_device",
                        functools.partial(made, interpret=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens of two rows behind `before` slots; `short`: how many of row 1 are padding, on the left if below
    0; `local`: as the block is, or None where the model has no windows."""

    T: int
    before: int = 0
    short: int = 0
    local: bool | None = None
    all_local: bool = False
    cap: float | None = None
    kv_heads: int = 2


CASES = {
    "causal": Case(130, kv_heads=4),
    "behind a prefix, padded on the right": Case(70, before=61, short=23),
    "padded on the left": Case(75, before=9, short=-31, cap=3.0),
    "many slots before": Case(20, before=540, short=5),
    "local": Case(140, before=30, short=12, local=True, all_local=True),
    "local among wide": Case(75, short=-12, local=True, kv_heads=1),
    "wide among local": Case(75, short=-12, local=False, kv_heads=1),
}


def setting(case: Case):
    """(config, q, k, v, the plain mask, validity of tokens and of slots)."""
    lm = dataclasses.replace(LM, attn_softcap=case.cap, n_kv_heads=case.kv_heads, query_scalar=100.0)
    if case.local is not None:
        lm = dataclasses.replace(lm, window=50, local=(True, case.all_local, True))
    T, S = case.T, case.before + case.T
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, T, lm.n_heads, lm.head_dim))
    k, v = rng.normal(size=(2, 2, lm.n_kv_heads, S, lm.head_dim))
    valid_BT = np.ones((2, T), bool)
    valid_BT[1, T - case.short :] = False
    if case.short < 0:
        valid_BT[1] = np.arange(T) >= -case.short
    valid_BS = np.concatenate([np.ones((2, case.before), bool), valid_BT], 1)
    at = np.arange(S)
    mask = (at[case.before :, None] >= at)[None] & valid_BS[:, None]
    if case.local:
        mask &= at[case.before :, None] - at < lm.window
    return lm, *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), mask, valid_BT, valid_BS


def compared(case: Case, run):
    """`run(lm, q, k, v, seen, valid_BT, valid_BS)` has the outputs and gradients of plain attention."""
    lm, q, k, v, mask, valid_BT, valid_BS = setting(case)
    weight = np.random.default_rng(1).normal(size=(*valid_BT.shape, lm.n_heads * lm.head_dim))
    weight = jnp.asarray(weight * valid_BT[..., None], jnp.float32)

    def plain(q, k, v):
        return products.attend(q, k, v, mask, jnp.float32, lm.query_scalar, lm.attn_softcap)

    def other(q, k, v):
        return run(lm, q, k, v, mask, valid_BT, valid_BS)

    def both(f):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(weight)

    want, got = (jax.jit(functools.partial(both, f))() for f in (plain, other))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.isfinite(a).all(), name
        if name == "out":
            a, b = a[valid_BT], b[valid_BT]
        assert tiny.relative(a, b) < CLOSE, name


@pytest.mark.parametrize("name", CASES)
def test_splash_is_plain_attention(name):
    def run(lm, q, k, v, mask, valid_BT, valid_BS):
        local_B = jnp.full(2, bool(CASES[name].local))
        rows = attention.Rows(*(jnp.asarray(a, jnp.int32) for a in (valid_BT, valid_BS)), local_B)
        return attention.fused("splash", lm, q, k, v, rows, jnp.float32)

    compared(CASES[name], run)
