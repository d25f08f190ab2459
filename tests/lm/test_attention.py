"""Fused attention against plain attention: the splash kernel interpreted, cuDNN's by what it is told.

The reference is `ops.attend`, which is compared with transformers elsewhere. Operands are float32, so
that only the order of sums differs: 2e-5 of the root mean square of what is compared.
"""

import collections
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from benchmarks.aot import programs
from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.lm import attention_kernels, model, ops
from nla_jax.pipeline import config_checks, context
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from tests.helpers import tiny, world

CLOSE = 2e-5
LM = dataclasses.replace(tiny.lm(), head_dim=128, d_model=16, n_blocks=3, d_ff=24, vocab_size=40)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The splash kernel as plain operations."""
    made = splash_attention_kernel.make_splash_mqa_single_device
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mqa_single_device",
                        functools.partial(made, interpret=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens of two rows behind `before` slots. short: how many of row 1 are padding, on the left if below
    0. local: whether the block is, None where the model has no windows."""

    T: int
    before: int = 0
    short: int = 0
    local: bool | None = None
    all_local: bool = False
    cap: float | None = None
    kv_heads: int = 2


CASES = {
    "causal": Case(75, kv_heads=4),
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
        return ops.attend(q, k, v, mask, jnp.float32, lm.query_scalar, lm.attn_softcap)

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
        rows = attention_kernels.Rows(*(jnp.asarray(a, jnp.int32) for a in (valid_BT, valid_BS)), local_B)
        return attention_kernels.attend_fused("splash", lm, q, k, v, rows, jnp.float32)

    compared(CASES[name], run)


def test_cudnn_is_told_what_plain_attention_is_told(monkeypatch):
    """With XLA's own implementation of the same function in cuDNN's place."""
    asked = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kw):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **kw)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)

    def run(lm, q, k, v, mask, *_):
        return attention_kernels.attend_fused("cudnn", lm, q, k, v, mask, q.dtype)

    for name in ("causal", "behind a prefix, padded on the right", "local among wide"):
        compared(CASES[name], run)


@pytest.fixture
def a_cudnn(monkeypatch):
    """No GPU is needed to lower for one."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def test_cudnn_is_called(a_cudnn):
    """Both directions lower for a GPU as calls of cuDNN, odd lengths and a mask included."""
    lm, q, k, v, mask, *_ = setting(dataclasses.replace(CASES["behind a prefix, padded on the right"], T=71))

    def f(q, k, v):
        return attention_kernels.attend_fused("cudnn", lm, q, k, v, mask, jnp.bfloat16).sum()

    text = jax.jit(jax.grad(f, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    called = set(re.findall(r"__cudnn\$(\w+)", text))
    assert called == {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}


def test_cudnn_is_called_in_a_step_on_a_mesh(a_cudnn):
    """Once a pass: AR's forward, again in its backward, the reference, AV's two. The rest stays plain."""
    c = configs.default()
    c.rl.update(batch=8, group=4, max_new=12)
    spec = tiny.talker(remat=True, attention="cudnn", dtype="bfloat16")
    step = programs.rl(c, spec, tiny.mesh(1, 2, 2))
    text = step.jitted.trace(*step.args).lower(lowering_platforms=("cuda",)).as_text()
    called = collections.Counter(re.findall(r"custom_call @__cudnn\$(\w+)", text))
    assert called == {"fmhaScaleBiasSoftmax": 5, "fmhaScaleBiasSoftmaxBackward": 2}


# A whole forward pass


def passed(lm, params, kernel: str, *, left: bool = False, prefix: bool = True, mesh=None,
           summed: bool = False) -> dict:
    """Hidden states ("y" where tokens are real) and gradients of blocks, prefix and tokens."""
    rng = np.random.default_rng(3)
    B, T, P = 8, 21, 5
    x = jnp.asarray(rng.normal(size=(B, T, lm.d_model)), jnp.float32)
    first = jnp.asarray(rng.normal(size=(P, lm.d_model)), jnp.float32) if prefix else None
    lengths = np.array([21, 9, 15, 1, 20, 3, 17, 21])[:, None]
    at = np.arange(T)[None]
    valid = at >= T - lengths if left else at < lengths
    weight = jnp.asarray(rng.normal(size=(B, T, lm.d_model)) * valid[..., None], jnp.float32)

    def loss(blocks, first, x):
        zeros = jax.tree.map(jnp.zeros_like, blocks) if summed else None
        y, _ = model.forward({"blocks": blocks}, lm, x, valid, prefix_PD=first, remat=True, summed=zeros,
                             attention=kernel)
        return jnp.sum(y * weight), y

    step = jax.value_and_grad(loss, (0, 1, 2) if prefix else (0, 2), has_aux=True)
    blocks, first = (mesh_lib.replicate(a, mesh) if mesh else a for a in (params["blocks"], first))
    (_, y), grads = jax.jit(placement.trace_under_mesh(mesh, step))(
        blocks, first, mesh_lib.shard_batch(x, mesh) if mesh else x
    )
    return {"y": np.asarray(y)[valid], "all": np.asarray(y), "grads": tiny.flat(list(grads))}


def same(a, b):
    assert np.isfinite(a["all"]).all()
    assert tiny.relative(a["y"], b["y"]) < CLOSE
    for name, g in a["grads"].items():
        assert np.isfinite(g).all(), name
        assert tiny.relative(g, b["grads"][name]) < 10 * CLOSE, name


GEMMA = dataclasses.replace(LM, window=7, local=(True, False, True), attn_softcap=4.0, qk_norm=True)


@pytest.mark.parametrize("lm, setting", [(LM, {}), (GEMMA, {"left": True, "prefix": False})])
def test_a_forward_pass_with_splash_is_the_plain_one(lm, setting):
    params = tiny.params(lm)
    same(*(passed(lm, params, kernel, **setting) for kernel in ("splash", "plain")))


def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows():
    """Blocks' gradients summed block by block (`scan.scan_summed`), as where microbatches are."""
    params, mesh = tiny.params(GEMMA), tiny.mesh(1, 4, 2)
    got = passed(GEMMA, params, "splash", mesh=mesh, summed=True)
    same(got, passed(GEMMA, params, "plain"))


def test_behind_a_past_windows_that_bite_are_plain():
    """Slots between a past and a row padded on the left would be counted."""
    params = tiny.params(GEMMA)
    x = jnp.ones((2, 9, GEMMA.d_model))
    past = model.forward(params, GEMMA, x[:1], jnp.ones((1, 9), bool), keep_kv=True)[1]

    def text(attention, past):
        return str(jax.make_jaxpr(lambda x: model.forward(
            params, GEMMA, x, jnp.ones((2, 9), bool), past=past, attention=attention)[0])(x))

    assert "pallas_call" in text("splash", None) and "pallas_call" not in text("splash", past)
    assert text("splash", past) == text("plain", past)


# The switch


def device(platform: str, version: str = "", capability: str = "9.0"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability,
                                 client=types.SimpleNamespace(platform_version=version))


CPU, TPU, H100, ROCM = device("cpu"), device("tpu"), device("gpu", "cuda 13000"), device("gpu", "rocm 70000")
A100 = device("gpu", "cuda 13000", "8.0")
WIDE = dataclasses.replace(LM, head_dim=256)
SMALL = dataclasses.replace(LM, head_dim=16)


@pytest.mark.parametrize("on, lm, dtype, found", [
    (CPU, LM, "bfloat16", "plain"), (TPU, LM, "bfloat16", "splash"), (H100, LM, "bfloat16", "cudnn"),
    (ROCM, LM, "bfloat16", "plain"), (TPU, LM, "float32", "plain"), (H100, LM, "float32", "plain"),
    (TPU, GEMMA, "bfloat16", "splash"), (H100, GEMMA, "bfloat16", "plain"), (TPU, SMALL, "bfloat16", "plain"),
    (H100, SMALL, "bfloat16", "cudnn"), (H100, WIDE, "bfloat16", "cudnn"), (A100, WIDE, "bfloat16", "plain"),
])
def test_auto_is_the_kernel_of_the_device_where_it_can_do_it(on, lm, dtype, found):
    assert attention_kernels.resolve("auto", on, lm, dtype) == found
    assert attention_kernels.resolve("plain", on, lm, dtype) == "plain"
    long = "plain" if found == "plain" else f"long {found}"
    assert attention_kernels.resolve("long", on, lm, dtype) == long


def test_long_is_the_kernel_for_long_passes_only(monkeypatch):
    """From LONG tokens on, a forward pass has the kernel, with the same result; below, it is plain."""
    lm = dataclasses.replace(tiny.lm(), head_dim=64)
    params, ids = tiny.params(lm), jnp.arange(24).reshape(2, 12)
    x = model.embed(params, lm, ids)

    def run(attention, n):
        return lambda x: model.forward(params, lm, x[:, :n], jnp.ones((2, n), bool), attention=attention)[0]

    monkeypatch.setattr(attention_kernels, "LONG", 12)
    text = lambda attention, n: str(jax.make_jaxpr(run(attention, n))(x))
    assert "pallas_call" in text("long splash", 12) and text("long splash", 11) == text("plain", 11)
    assert [attention_kernels.at_length(a, 12) for a in ("plain", "cudnn", "long cudnn")] == [
        "plain", "cudnn", "cudnn"]
    got, want = (run(a, 12)(x) for a in ("long splash", "plain"))
    np.testing.assert_allclose(got, want, atol=2e-4 * float(jnp.sqrt(jnp.mean(want**2))))


@pytest.mark.parametrize("choice, on, lm, dtype, says", [
    ("splash", CPU, LM, "bfloat16", "it runs on tpu, and this is cpu"),
    ("cudnn", TPU, LM, "bfloat16", "it runs on cuda, and this is tpu"),
    ("cudnn", ROCM, LM, "bfloat16", "it runs on cuda, and this is rocm"),
    ("splash", TPU, LM, "float32", "it takes bfloat16, and dtype is float32"),
    ("splash", TPU, SMALL, "bfloat16", "heads are of 16, not a multiple of 8 from 64 on"),
    ("cudnn", A100, WIDE, "bfloat16", "heads are of 256, not a multiple of 8 up to 128"),
    ("cudnn", H100, GEMMA, "bfloat16", "this model caps its scores, which cuDNN does not"),
])
def test_a_kernel_that_cannot_do_it_is_refused_in_a_line(choice, on, lm, dtype, says):
    with pytest.raises(UserError) as err:
        attention_kernels.resolve(choice, on, lm, dtype)
    assert str(err.value) == f"config attention={choice!r}: {says}; set attention=auto or attention=plain"


def test_a_run_refuses_it_before_any_work(tmp_path):
    world.write_target(tmp_path / "target")
    c = world.config(tmp_path, attention="splash")
    c.rl.batch = 8
    with pytest.raises(UserError, match="attention='splash': it runs on tpu, and this is cpu"):
        context.open_run(config_checks.lock(c), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="attention='flash': must be one of 'long', 'auto', 'plain', 'cudnn"):
        config_checks.lock(world.config(tmp_path, attention="flash"))
