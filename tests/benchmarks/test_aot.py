"""Compiling without the machine: HLO is read right, work is counted right, the steps are those of training.

No test needs libtpu: programs are compiled for four fake devices, whose HLO says the same things.
"""

import collections
import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot import (
    chips,
    compiler,
    counts,
    hlo,
    hlo_work,
    invariant,
    memory,
    models,
    programs,
    report,
    table,
    traced,
)
from nla_jax import configs, steps, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import decode_cost, decode_tp, model
from nla_jax.lm import params as params_lib
from nla_jax.pipeline.experiment_files import load_config
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.training import jitted_steps
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent.parent
# ml_collections loads experiment files in an old way.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# A loop of known length inside one of unknown length. The outer one carries weights that it does not
# change (element 1) and tokens that it does (element 2).
LOOPS = """HloModule loops, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%inner (p.1: (s32[], f32[8,16], bf16[4,16])) -> (s32[], f32[8,16], bf16[4,16]) {
  %p.1 = (s32[], f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%i.1, %one.1)
  %x.1 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %w.1 = bf16[4,16]{1,0} get-tuple-element(%p.1), index=2
  %whole.1 = bf16[16,16]{1,0} all-gather(%w.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %y.1 = f32[8,16]{1,0} dot(%x.1, %whole.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum.1 = f32[8,16]{1,0} all-reduce(%y.1), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t.1 = (s32[], f32[8,16]{1,0}, bf16[4,16]{1,0}) tuple(%next.1, %sum.1, %w.1)
}

%in_cond (q.1: (s32[], f32[8,16], bf16[4,16])) -> pred[] {
  %q.1 = (s32[], f32[8,16]{1,0}, bf16[4,16]{1,0}) parameter(0)
  ROOT %lt.1 = pred[] constant(true)
}

%outer (p.2: (f32[8,16], bf16[4,16], s32[])) -> (f32[8,16], bf16[4,16], s32[]) {
  %p.2 = (f32[8,16]{1,0}, bf16[4,16]{1,0}, s32[]) parameter(0)
  %x.2 = f32[8,16]{1,0} get-tuple-element(%p.2), index=0
  %w.2 = bf16[4,16]{1,0} get-tuple-element(%p.2), index=1
  %t.2 = s32[] get-tuple-element(%p.2), index=2
  %zero.2 = s32[] constant(0)
  %in.2 = (s32[], f32[8,16]{1,0}, bf16[4,16]{1,0}) tuple(%zero.2, %x.2, %w.2)
  %loop.2 = (s32[], f32[8,16]{1,0}, bf16[4,16]{1,0}) while(%in.2), condition=%in_cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %y.2 = f32[8,16]{1,0} get-tuple-element(%loop.2), index=1
  %seen.2 = f32[64,16]{1,0} all-gather(%y.2), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %part.2 = f32[8,16]{1,0} slice(%seen.2), slice={[0:8], [0:16]}
  ROOT %t.3 = (f32[8,16]{1,0}, bf16[4,16]{1,0}, s32[]) tuple(%part.2, %w.2, %t.2)
}

%out_cond (q.2: (f32[8,16], bf16[4,16], s32[])) -> pred[] {
  %q.2 = (f32[8,16]{1,0}, bf16[4,16]{1,0}, s32[]) parameter(0)
  ROOT %lt.2 = pred[] constant(true)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (f.0: f32[8,16], f.1: bf16[100,16]) -> f32[8,16] {
  %f.0 = f32[8,16]{1,0} parameter(0)
  %f.1 = bf16[100,16]{1,0} parameter(1)
  %cut = bf16[16,16]{1,0} slice(%f.1), slice={[0:16], [0:16]}
  ROOT %prod = f32[8,16]{1,0} convolution(%f.0, %cut), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,16], w: bf16[4,16], v: bf16[100,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = bf16[4,16]{1,0} parameter(1)
  %v = bf16[100,16]{1,0} parameter(2)
  %n = s32[] constant(5)
  %in = (f32[8,16]{1,0}, bf16[4,16]{1,0}, s32[]) tuple(%x, %w, %n)
  %loop = (f32[8,16]{1,0}, bf16[4,16]{1,0}, s32[]) while(%in), condition=%out_cond, body=%outer, metadata={op_name="jit(rl)/prefill/while"}
  %y = f32[8,16]{1,0} get-tuple-element(%loop), index=0
  ROOT %out = f32[8,16]{1,0} fusion(%y, %v), kind=kOutput, calls=%fused, metadata={op_name="jit(rl)/av/dot"}
}
"""  # noqa: E501


# Reading HLO


def test_how_often_instructions_run():
    module = hlo.parse(LOOPS)
    assert module.entry == "main" and len(module.computations) == 7
    times = {r.at.name: (r.times, r.open_loop, r.fused) for r in hlo.runs(module, 149)}
    assert times["y.1"] == (3 * 149, True, False)
    assert times["seen.2"] == (149, True, False)
    assert times["prod"] == (1, False, True) and times["out"] == (1, False, False)
    assert "s" not in times  # the operator of the all-reduce


def test_products_and_bytes_of_the_text():
    module = hlo.parse(LOOPS)
    inner, fused, main = (module.computations[n] for n in ("inner", "fused", "main"))
    assert hlo_work.flops(inner["y.1"], inner) == 2 * 8 * 16 * 16
    assert hlo_work.flops(fused["prod"], fused) == 2 * 8 * 16 * 16
    assert hlo_work.flops(inner["sum.1"], inner) == 0
    assert hlo_work.collective(inner["whole.1"], inner) == ("all-gather", 4 * 16 * 2 * 3)
    assert hlo_work.collective(inner["sum.1"], inner) == ("all-reduce", 2 * 8 * 16 * 4 / 2)
    assert hlo_work.collective(inner["y.1"], inner) == ("", 0)
    # The fusion reads all of its first operand and a slice of the second, and writes its result.
    assert hlo_work.traffic(module, main["out"], main) == 8 * 16 * 4 + 16 * 16 * 2 + 8 * 16 * 4
    assert hlo_work.traffic(module, main["loop"], main) == 0


@pytest.mark.parametrize("groups, size", [
    ("[2,4]<=[8]", 4), ("{{0,1,2},{3,4,5}}", 3), ("[4,4]<=[2,8]T(1,0)", 4),
    ("mesh['axis_0'=16,'axis_1'=1] {'axis_0'}", 16),
    ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0','axis_1'}", 8),
])
def test_groups_of_a_collective(groups, size):
    rest = f", channel_id=3, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true"
    assert hlo_work.group_size(hlo.Instruction("x", "f32[8]", "all-gather", ("y",), rest, False)) == size


def test_a_collective_beside_several_products_counts_once():
    """The TPU's compiler writes it into the fusion of each product that it runs beside."""
    gather = "bf16[16,16]{1,0} all-gather(%w.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}"
    mark = ', backend_config={"async_collective_fusion_config":{"flag_start":"START","flag_end":"8"}}\n'
    twice = gather + mark.replace("START", "-1") + "  %more.1 = " + gather + mark.replace("START", "2")
    module = hlo.parse(LOOPS.replace(gather + "\n", twice))
    body = module.computations["inner"]
    assert hlo_work.collective(body["whole.1"], body) == ("all-gather", 4 * 16 * 2 * 3)
    assert hlo_work.collective(body["more.1"], body) == ("", 0)
    assert hlo_work.traffic(module, body["more.1"], body) == 0


def test_bytes_of_a_slice_on_its_way():
    """An asynchronous slice reads what it takes, and writes it where the memory is not on the chip."""
    start = ("((f32[8,16]{1,0}), f32[2,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x.1), slice={[0:2], [0:16]}"
             "\n  ROOT %t.1 =")
    for layout, times in ((":S(1)", 1), ("", 2)):
        text = LOOPS.replace("  ROOT %t.1 =", "  %cut.1 = " + start.replace(":S(1)", layout))
        module = hlo.parse(text)
        body = module.computations["inner"]
        assert hlo_work.traffic(module, body["cut.1"], body) == times * 2 * 16 * 4


def test_a_reduce_scatter_as_the_tpu_writes_it():
    """One fusion of an all-reduce and the slice that is kept."""
    kept = "f32[4,16]{1,0} dynamic-slice(%sum.1, %i.1, %i.1), dynamic_slice_sizes={4,16}"
    text = LOOPS.replace("  ROOT %t.1 =", f"  ROOT %part.1 = {kept}\n  %t.1 =")
    body = hlo.parse(text).computations["inner"]
    assert hlo_work.collective(body["sum.1"], body) == ("reduce-scatter", 8 * 16 * 4 / 2)


@pytest.mark.parametrize("shape, size", [
    ("bf16[4,16]{1,0:T(8,128)(2,1)}", 128), ("f32[]", 4), ("pred[7]", 7), ("s4[8]", 4), ("u32[3]{0}", 12),
    ("f8e4m3fn[10]", 10), ("(f32[2], s32[2])", 16),
])
def test_sizes_of_shapes(shape, size):
    made = hlo.Instruction("x", shape, "add", (), "", False)
    assert sum(a.bytes for a in made.arrays) == size


def test_a_batched_product_as_a_convolution():
    """How the TPU's compiler writes [B, M, K] x [B, K, N]: places outside the window are no work."""
    text = LOOPS.replace(
        "f32[8,16]{1,0} convolution(%f.0, %cut), dim_labels=bf_io->bf",
        "f32[5,8,16]{2,1,0} convolution(%c.0, %c.1), window={size=5 stride=4 pad=0_0 lhs_dilate=5}, "
        "dim_labels=0bf_0io->0bf",
    )
    module = hlo.parse(text)
    body = dict(module.computations["fused"])
    for name, shape in (("c.0", "f32[5,8,16]{2,1,0}"), ("c.1", "f32[5,16,16]{2,1,0}")):
        body[name] = hlo.Instruction(name, shape, "parameter", (), "", False)
    assert hlo_work.flops(body["prod"], body) == 2 * 5 * 8 * 16 * 16


def test_weights_that_move_once_a_token_are_found():
    """The gather of what the loop does not change, and not those of residual streams."""
    assert [i.name for i in invariant.loop_invariant_collectives(hlo.parse(LOOPS))] == ["whole.1"]
    # Where the outer loop writes to the weights they are no weights.
    changed = LOOPS.replace("tuple(%part.2, %w.2, %t.2)", "tuple(%part.2, %new.2, %t.2)").replace(
        "  ROOT %t.3", "  %new.2 = bf16[4,16]{1,0} multiply(%w.2, %w.2)\n  ROOT %t.3")
    assert invariant.loop_invariant_collectives(hlo.parse(changed)) == []


# Counting


KERNELS = """HloModule step, is_scheduled=true

ENTRY %main (q: bf16[4,2,3,256,64], k: bf16[4,2,384,64]) -> bf16[4,2,384,64] {
  %q = bf16[4,2,3,256,64]{4,3,2,1,0} parameter(0)
  %k = bf16[4,2,384,64]{3,2,1,0} parameter(1)
  %next = s8[1,1,1]{2,1,0} constant({...})
  %splash.1 = (f32[4,2,256,128]{3,2,1,0}, bf16[4,2,3,256,64]{4,3,2,1,0}) custom-call(%next, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/av/splash_mqa_fwd_segmented_residuals/pallas_call"}
  %out = bf16[4,2,3,256,64]{4,3,2,1,0} get-tuple-element(%splash.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/av/splash_mqa_fwd_segmented_residuals/pallas_call"}
  %splash.2 = (f32[4,2,384,64]{3,2,1,0}, f32[4,2,384,64]{3,2,1,0}, bf16[4,2,1,3,256,64]{5,4,3,2,1,0}, bf16[4,2,384,64]{3,2,1,0}, bf16[4,2,384,64]{3,2,1,0}) custom-call(%next, %q, %k, %k, %out), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/av/splash_mqa_dkv_segmented_no_residuals/pallas_call"}
  ROOT %dk = bf16[4,2,384,64]{3,2,1,0} get-tuple-element(%splash.2), index=3
}
"""  # noqa: E501


def test_products_of_splash_kernels_are_counted():
    """As libtpu writes them: their notes have line breaks, and their products are nowhere in the text."""
    module = hlo.parse(KERNELS)
    body = module.computations["main"]
    assert list(body) == ["q", "k", "next", "splash.1", "out", "splash.2", "dk"] and body["dk"].root
    one = 2 * 4 * 2 * 3 * 256 * 384 * 64  # every score, once
    assert {n: hlo_work.flops(i, body) for n, i in body.items() if hlo_work.flops(i, body)} == {
        "splash.1": 2 * one, "splash.2": 5 * one}
    assert [hlo_work.attention_kernel(i) for i in body.values()] == ["", "", "", "fwd", "", "dkv", ""]
    assert {report.phase_of(r, "rl") for r in hlo.runs(module, 0) if r.at.op == "custom-call"} == {"av"}


def hand_forward(cfg, tokens, pairs):
    """Operations of the blocks of one forward pass, product by product."""
    total = 0
    for n_in, n_out in [
        (cfg.d_model, cfg.n_heads * cfg.head_dim), (cfg.d_model, cfg.n_kv_heads * cfg.head_dim),
        (cfg.d_model, cfg.n_kv_heads * cfg.head_dim), (cfg.n_heads * cfg.head_dim, cfg.d_model),
        (cfg.d_model, cfg.d_ff), (cfg.d_model, cfg.d_ff), (cfg.d_ff, cfg.d_model),
    ]:
        total += 2 * tokens * n_in * n_out
    return cfg.n_blocks * (total + 2 * 2 * pairs * cfg.n_heads * cfg.head_dim)


def test_counts_against_the_compiler():
    """A forward pass of one block: XLA's own count, which has all pairs of positions and norms besides."""
    sizes = dict(d_model=256, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=512)
    cfg = dataclasses.replace(tiny.lm(n_blocks=1), **sizes)
    params = params_lib.abstract(cfg)
    B, T = 2, 64
    run = jax.jit(lambda p, x: model.forward(p, cfg, x, jnp.ones((B, T), bool))[0])
    compiled = run.lower(params, jax.ShapeDtypeStruct((B, T, 256), jnp.float32)).compile()
    want = hand_forward(cfg, B * T, B * T * T)
    cost = compiled.cost_analysis()
    assert want < (cost[0] if isinstance(cost, list) else cost)["flops"] < 1.03 * want
    module = hlo.parse(compiled.as_text())
    found = sum(hlo_work.flops(r.at, module.computations[r.computation]) * r.times
                for r in hlo.runs(module, 1))
    assert found == want
    least = counts._blocks(cfg, 1, counts.sequences(B, T), counts.Passes(), 0)
    assert least == hand_forward(cfg, B * T, B * T * (T + 1) / 2)


def test_counts_of_an_rl_step():
    """By hand, for the published recipe on its smallest model."""
    config = configs.default()
    config.target = "Qwen/Qwen2.5-7B-Instruct"
    config.update({"layer": 20})
    config.rl.update(batch=128, group=8, max_new=150, micro_av=4, micro_ar=4, kl=0.01)
    spec = models.spec_of(config)
    least = counts.rl(config, spec)
    p = 3584 * (28 + 8) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944
    assert counts.block_sizes(spec.lm) == [p] * 28 and p == 233_046_016
    head = 3584 * 152064
    # Decoding: 149 tokens of 1024 rows through all blocks and the unembedding; attention is less than 2 %.
    assert 1 < least["decode"] / (2 * 1024 * 149 * (28 * p + head)) < 1.02
    assert 1 < least["ar"] / (2 * 1024 * 162 * 21 * (4 * p - 3584 * 18944)) < 1.03
    tokens = 4 * 60 + 1024 * 159
    blocks = 2 * tokens * 28 * (4 * p - 3584 * 18944)
    assert 1 < least["av"] / (blocks + 2 * 1024 * 150 * head * (3 + 1)) < 1.03
    assert 1 < least["reference"] / (2 * tokens * 28 * p) < 1.03
    # Adapters: no gradient of the matrices, and their own products.
    config.av.rank = config.ar.rank = 64
    adapted = counts.rl(config, spec)
    assert 0.7 < adapted["av"] / least["av"] < 0.8 and adapted["decode"] == least["decode"]
    widths = 2 * 3584 + 2 * (3584 + 512) + 2 * 3584 + 3 * (3584 + 18944)  # of wq, wk and wv, wo, and the MLP
    own = 2 * (60 + 128 * 10) * 28 * 64 * widths
    assert adapted["prefill"] - least["prefill"] == pytest.approx(own)
    # AR learns the best of each group, and reads all.
    config.rl.ar_group = 1
    best = counts.rl(config, spec)
    assert best["ar"] == pytest.approx(counts._reconstructor(spec, 1024, 162, counts.Passes(), 64)
                                       + counts._reconstructor(spec, 128, 162, counts._trained(True), 64))


HYBRID = dataclasses.replace(
    tiny.lm(n_blocks=4), d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, rotary_dim=8, d_ff=256,
    qk_norm=True, attn_gate=True, linear=(True, True, True, False), delta=(2, 4, 32, 64, 4))


def test_counts_of_linear_attention_against_the_compiler():
    """A forward pass of one period of blocks over chunks and a part of one, product by product."""
    params, B, T, N = params_lib.abstract(HYBRID), 2, 150, 3
    run = jax.jit(lambda p, x: model.forward(p, HYBRID, x, jnp.ones((B, T), bool))[0])
    module = hlo.parse(run.lower(params, jax.ShapeDtypeStruct((B, T, 128), jnp.float32)).compile().as_text())
    found = sum(hlo_work.flops(r.at, module.computations[r.computation]) * r.times
                for r in hlo.runs(module, 1))
    linear, full = counts.block_sizes(HYBRID)[::3]
    assert linear == 128 * (2 * 2 * 32 + 2 * 256 + 2 * 4) + 256 * 128 + 3 * 128 * 256
    assert full == 128 * (2 * 128 + 2 * 64) + 128 * 128 + 3 * 128 * 256
    chunk = 64 * 64 * (2 * 32 + (32 + 64) + 64) + 3 * 64 * 32 * 64  # keys, the system, inside; the state
    inverse = 2 * 2 * 16**3 + 2 * 32**3
    want = 2 * B * (T * (3 * linear + full) + 3 * 4 * N * (chunk + inverse) + 2 * T * T * 128)
    assert found == want
    least = counts._blocks(HYBRID, 4, counts.sequences(B, T), counts.Passes(), 0)
    hand = T * (3 * linear + full) + 2 * 128 * T * (T + 1) / 2
    near = 2 * 64 * 65 / 2 + 22 * 23 / 2
    hand += 3 * (near * (2 * 2 * 32 + 4 * (32 + 64) + 4 * 64) + T * 4 * 3 * 32 * 64)
    assert least == pytest.approx(2 * B * hand) and 0.8 < least / found < 1
    # One token at a time is elementwise.
    alone = counts._blocks(HYBRID, 4, counts.Tokens(T, 0), counts.Passes(), 0)
    assert alone == 2 * T * (3 * linear + full)


def test_counts_of_a_mixture():
    """A token meets its own experts, of which there are fewer than are in memory."""
    cfg = dataclasses.replace(tiny.lm(n_blocks=2), experts=(8, 3, 24))
    attention = cfg.d_model * (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
    expert = 3 * cfg.d_model * 24
    assert counts.block_sizes(cfg) == [attention + 8 * cfg.d_model + 8 * expert] * 2
    one = counts._blocks(cfg, 2, counts.Tokens(1, 0), counts.Passes(), 0)
    assert one == 2 * 2 * (attention + 8 * cfg.d_model + 3 * expert)
    shapes = {"x": "bf16[40,32]{1,0}", "w": "bf16[8,32,24]{2,1,0}", "n": "s32[8]{0}"}
    body = {n: hlo.Instruction(n, shape, "parameter", (), "", False) for n, shape in shapes.items()}
    grouped = hlo.Instruction("y", "f32[40,24]{1,0}", "ragged-dot", ("x", "w", "n"), "", True)
    assert hlo_work.flops(grouped, body) == 2 * 40 * 32 * 24


def test_the_cache_of_a_rollout():
    """By hand: one prompt before the marker, the rest once an activation, what is written once a row."""
    config = configs.default()
    config.target = "Qwen/Qwen2.5-7B-Instruct"
    config.update({"layer": 20})
    config.rl.update(batch=128, group=8, max_new=150)
    spec = models.spec_of(config)
    slot, before, own = 2 * 28 * 4 * 128 * 2, len(spec.av.before), 1 + len(spec.av.after)
    assert memory.cache(config, spec, 1) == slot * (before + 128 * own + 1024 * 150)
    assert memory.cache(config, spec, 16) == slot * (before + 8 * own + 64 * 150)
    # A device of 256 has half of an activation's rows, and its whole prompt.
    assert memory.cache(config, spec, 256) == slot * (before + own + 4 * 150)


@old_loader
def test_the_states_of_a_rollout():
    """Of Qwen3.6-27B: 151 MB a row, and keys and values of every fourth block."""
    config = load_config(f"{ROOT}/experiments/qwen3_6_27b.py", [])
    spec = models.spec_of(config)
    state = 48 * 4 * (48 * 128 * 128 + 3 * (2 * 16 + 48) * 128)
    assert decode_cost.state_bytes(spec.lm) == state and state / 1e6 == pytest.approx(156.9, abs=0.1)
    slot = 2 * 16 * 4 * 256 * 2
    assert memory.cache(config, spec, 64) == slot * (38 + 2 * 14 + 16 * 200) + 16 * state


# The steps on four fake devices


B, G, T = 8, 4, 12


@functools.cache
def tiny_config(rank=0):
    c = configs.default()
    c.dtype, c.remat, c.vocab_chunk = "float32", True, 64
    c.av.rank = c.ar.rank = rank
    c.warm_av.update(batch=16, max_tokens=T)
    c.warm_ar.update(batch=16, max_tokens=T, micro=2)
    c.rl.update(batch=B, group=G, max_new=T, micro_av=2, micro_ar=2)
    return c


SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=2), layer=0, remat=True)


@functools.cache
def compiled(name, rank=0):
    """The HLO of a step on a mesh of 2 x 2."""
    program = programs.of(tiny_config(rank), SPEC, tiny.mesh(1, 2, 2), (name,))[0]
    return hlo.parse(program.jitted.lower(*program.args).compile().as_text())


@pytest.mark.parametrize("rank", [0, 4])
def test_no_weights_move_in_the_decode_loop(rank):
    module = compiled("rl", rank)
    inside = {r.at.op for r in hlo.runs(module, T - 1) if r.open_loop}
    assert {"all-gather", "all-to-all", "reduce-scatter"} <= inside  # of residual streams
    assert invariant.loop_invariant_collectives(module) == []


def test_no_weights_of_a_hybrid_move_in_the_decode_loop(monkeypatch):
    """As a large model: scanned by periods, with adapters that are merged before the loop."""
    monkeypatch.setattr(decode_tp, "UNROLLED", 0)
    spec, mesh, config = dataclasses.replace(SPEC, lm=HYBRID), tiny.mesh(1, 2, 2), tiny_config(4)
    program = programs.of(config, spec, mesh, ("rl",))[0]
    state, base, _, batch, key = program.args
    opts = jitted_steps._rl_arguments(config, state, "rl")["opts"]
    run = jax.jit(placement.trace_under_mesh(mesh, functools.partial(steps.roll_out, spec=spec, opts=opts)))
    module = hlo.parse(run.lower(state.av.params, base, batch, key).compile().as_text())
    inside = [r for r in hlo.runs(module, T - 1) if r.open_loop]
    assert {"all-gather", "all-to-all", "reduce-scatter"} <= {r.at.op for r in inside}
    assert invariant.loop_invariant_collectives(module) == []
    work = 4 * sum(hlo_work.flops(r.at, module.computations[r.computation]) * r.times for r in inside)
    assert 1 <= work / counts.rl(config, spec)["decode"] < 1.1


@pytest.mark.parametrize("name, rank", [("warm_av", 0), ("warm_ar", 0), ("rl", 0), ("rl", 4)])
def test_work_is_shared_and_not_repeated(name, rank):
    """What four devices multiply in all is what the step takes at least, to within a sixth: here attention to
    positions that a token may not see, and the norms' small products, count for much."""
    module = compiled(name, rank)
    found = 4 * sum(hlo_work.flops(r.at, module.computations[r.computation]) * r.times
                    for r in hlo.runs(module, T - 1))
    least = sum(counts.of(tiny_config(rank), name, SPEC).values())
    assert 1 <= found / least < 1.2
    program = programs.of(tiny_config(rank), SPEC, tiny.mesh(1, 2, 2), (name,))[0]
    jaxpr = program.jitted.trace(*program.args).jaxpr.jaxpr
    assert 0.98 * found < sum(traced.products(jaxpr, 4, T - 1).values()) < 1.1 * found


@pytest.mark.parametrize("name", ["warm_av", "warm_ar"])
def test_gradients_of_blocks_are_scattered(name):
    """A sum over devices of a block's matrix goes where its part lies, and not to every device."""
    module, c = compiled(name), SPEC.lm
    outer = {c.d_ff, c.n_kv_heads * c.head_dim}  # AR's head, which is no block's, has the shape of the rest
    matrices = {(c.d_model, n) for n in outer} | {(n, c.d_model) for n in outer}
    found = collections.Counter()
    for body in module.computations.values():
        for i in body.values():
            if i.op in ("all-reduce", "reduce-scatter") and hlo_work.group_size(i) > 1:
                found[i.op] += sum(a.dims in matrices for name in i.operands for a in body[name].arrays)
    assert found["all-reduce"] == 0 and found["reduce-scatter"] > 0


def test_shapes_are_those_of_a_real_learner():
    """What is compiled for a chip that is not there has the shapes, dtypes and places of a run."""
    mesh, config = tiny.mesh(1, 2, 2), tiny_config()
    with config.unlocked():
        config = config.copy_and_resolve_references()
        config.mu_dtype = "bfloat16"
    params = verbalizer.init(tiny.talker_params(SPEC.lm), SPEC.lm)
    tx = jitted_steps.optimizer(config, "warm_av")
    real = jitted_steps.learner(mesh_lib.shard_params(params, verbalizer.table(SPEC.lm), mesh), tx, mesh)
    made = programs.learner(programs.roles(config, SPEC, mesh)[1], tx, mesh)
    assert jax.tree.structure(real) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    adam = next(s for s in jax.tree.leaves(real.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert {a.dtype for a in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


# Recipes and the command


@old_loader
@pytest.mark.parametrize("name, billions", [
    ("qwen2_5_7b", 7.616), ("gemma3_12b", 11.77), ("gemma3_27b", 27.0), ("llama3_3_70b", 70.55),
    ("qwen3_6_27b", 26.9),
])
def test_targets_of_the_recipes_are_known(name, billions):
    """As many parameters as their makers say, without the vision towers."""
    spec = models.spec_of(load_config(f"{ROOT}/experiments/{name}.py", []))
    found = sum(np.prod(s.shape, dtype=float) for s in params_lib.table(spec.lm).values())
    assert found / 1e9 == pytest.approx(billions, rel=2e-3)


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="--topology v5x:4x4: one of v5e, v5p, v6e"):
        chips.chip_of("v5x:4x4")
    with pytest.raises(UserError, match="16 devices are needed, jax has 8"):
        compiler.fake_devices("v5e:4x4")
    with pytest.raises(UserError, match="give one such as"):
        compiler.count("v5e:many")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs libtpu, which is not installed: pip install"):
        compiler.devices("v5e:4x4")


def test_the_report_of_a_step():
    """Every figure of the report of a tiny step, as it would be for a slice of four chips."""
    config, mesh = tiny_config(), tiny.mesh(1, 2, 2)
    program = programs.of(config, SPEC, mesh, ("warm_ar",))[0]
    found = report.describe(config, SPEC, program, "v5e:2x2", mesh, estimate=True)
    assert found["memory"]["fits"] and found["memory"]["total"] < 0.1
    parts = found["memory"]["parts"]
    assert parts["optimizer"] == pytest.approx(2 * parts["weights"], abs=2e-3)
    assert found["flops"]["ratio"] == pytest.approx(1.1, abs=0.1)
    assert {"all-gather", "all-reduce"} <= found["collectives"].keys()
    assert 0 < found["seconds"]["best"] <= found["seconds"]["worst"]
    shown = report.table({"target": "x", "kind": "full", "topology": "v5e:2x2", "chips": 4, "fits": True,
                          "estimate": True, "mesh": dict(mesh.shape), "steps": [found]})
    assert "| warm_ar |" in shown and "temporaries estimated" in shown
    assert "| warm_ar | **" in table.row(table.ENTRIES[0], {"steps": [found]})[0]


@old_loader
def test_the_queue_of_compilations_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """What is finished is not compiled again, until a setting changes; what failed says why."""
    entries = [table.Entry("qwen2_5_7b", "full", "v5e:4x4", "rl"),
               table.Entry("qwen2_5_7b", "lora", "v5e:2x2", "rl", table.micro(4))]
    ran = []

    def compiled(entry, path):
        ran.append(entry.kind)
        path.write_text(json.dumps({"error": "rl does not fit"}))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(table, "ENTRIES", entries)
    monkeypatch.setattr(table, "compile_one", compiled)
    table.main([str(tmp_path), "v5e:2x2"])
    table.main([str(tmp_path)])
    table.main([str(tmp_path)])
    assert ran == ["lora", "full"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("| qwen2_5_7b, lora `--config.rl.micro_av=4` ")
    assert "does not fit" in shown[-1]
    monkeypatch.setattr(table, "ENTRIES", [dataclasses.replace(entries[0], flags=table.micro(2))])
    table.main([str(tmp_path), "--print"])
    assert len(ran) == 2 and len(capsys.readouterr().out.splitlines()) == len(table.HEAD)
