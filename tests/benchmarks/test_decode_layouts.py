"""The formulas of decoding's cost, against a compiled loop and by hand, and what is chosen by them."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from benchmarks.aot import attention, decode_layouts, decode_loop, pods, programs, report
from nla_jax.errors import UserError
from nla_jax.lm import decode_cost
from nla_jax.pipeline import run_mesh
from nla_jax.sharding import chips
from nla_jax.sharding.mesh import AXES
from tests.benchmarks.test_aot import SPEC, old_loader, tiny_config
from tests.helpers import tiny

SHAPE = decode_cost.Rollout(32, 8, len(SPEC.av.before), 1 + len(SPEC.av.after), 12)
SLOW = dataclasses.replace(chips.CHIPS["v5e"], ici=1e6)  # links that no layout should use
FAST = dataclasses.replace(chips.CHIPS["v5e"], ici=1e15)


@pytest.mark.parametrize("fsdp, tensor", [(4, 1), (2, 2), (1, 4)])
def test_formulas_against_the_compiler(fsdp, tensor):
    """Of one token: what is sent and by how many collectives are equal, and products nearly."""
    program = decode_loop.program(tiny_config(), SPEC, tiny.mesh(1, fsdp, tensor))
    found = decode_loop.counted(program.jitted.lower(*program.args).compile().as_text())
    token = decode_cost.per_token(SPEC.lm, SHAPE, 4, tensor, item=4)
    # Whether every row has ended is summed over devices too.
    ended = found.collectives.get("all-reduce", 0)
    assert sum(found.collectives.values()) - ended == token.collectives
    assert found.links == pytest.approx(token.links, abs=16 * ended)
    assert found.flops == pytest.approx(token.flops, rel=0.05)
    assert found.before > 0 or fsdp == 1


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_that_rest_are_those_of_a_learner(rank):
    one = jax.sharding.AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    config = tiny_config(rank).copy_and_resolve_references()
    config.layer = SPEC.layer
    exact = sum(report.persistent_bytes(programs.rl(config, SPEC, one)).values())
    assert run_mesh.resting_bytes(config, SPEC.lm) == pytest.approx(exact, rel=0.02)


def test_the_fastest_size_that_fits():
    """Slow links: whole weights, if they fit. Fast links: all chips share. Without rates: the smallest."""
    lm, sizes = SPEC.lm, dict.fromkeys((1, 2, 4), 0.0)
    choose = lambda chip, memory: decode_cost.choose_tensor(lm, SHAPE, 4, sizes, memory, chip)
    assert (choose(SLOW, 1e9), choose(None, 1e9)) == (1, 1)
    small = decode_cost.memory_bytes(lm, SHAPE, 4, 2)
    assert (choose(SLOW, small), choose(None, small), choose(None, small - 1)) == (2, 2, 4)
    assert choose(SLOW, 0.0) == 4
    assert decode_cost.choose_tensor(lm, SHAPE, 4, sizes, 1e9, FAST, hop=0) == 4


def test_a_mesh_that_the_config_leaves_open():
    """The size is chosen among those whose batches divide."""
    config = tiny_config().copy_and_resolve_references()
    config.mesh.update(data=1, fsdp=-1, tensor=0)
    sizes = lambda: tuple(run_mesh.make(config, SPEC.lm, jax.devices()[:4]).shape.values())
    assert sizes() == (1, 4, 1)
    config.rl.batch = 6
    assert sizes() == (1, 2, 2)
    assert run_mesh.resting_by_tensor(config, SPEC.lm, 4).keys() == {2, 4}
    config.mesh.update(data=3)
    with pytest.raises(UserError, match="needs 3 devices; there are 4|needs 6 devices|needs 12 devices"):
        sizes()


@old_loader
def test_costs_of_layouts():
    """7B on 16 v5e by hand; and that the tables have what they say."""
    c = decode_layouts.Case.of("qwen2_5_7b", "v5e:4x4")
    token, D, Q, K, V = c.token(8), 3584, 3584, 512, 152064
    block = 7 * D * (2 + 4 + 2 + 4) + 7 / 8 * (4 * (Q + 2 * K) + 2 * Q)
    ends = 7 * 4 + 7 / 8 * 2 * D + 7 * 2 * D + 7 / 8 * 4 * V  # ids, embeddings, the last state, logits
    assert token.links == pytest.approx(64 * (28 * block + ends))
    assert (token.collectives, token.hops) == (28 * 8 + 4, 7)
    assert token.weights == pytest.approx(2 * (7.07e9 / 8), rel=0.01)
    whole = c.token(1)
    assert (whole.links, whole.collectives) == (0, 0) and c.token(1, 1).weights == whole.weights / 2
    assert not c.fits(1) and c.fits(c.chosen()) and c.seconds(c.chosen()) <= c.seconds(8)
    assert c.chosen(hop=0) >= c.chosen() >= c.chosen(hop=1e-4)
    shown = decode_layouts.seconds_table([c])
    assert shown.count("**") == 2 and shown.splitlines()[2].startswith("| qwen2_5_7b | v5e:4x4 |")
    assert "T = 1, int8" in decode_layouts.parts_table([c]) and "3 µs" in decode_layouts.hops_table([c])


@old_loader
def test_states_and_period_of_a_hybrid():
    """The 27B with linear attention on 64 v5e, as its loop was compiled: 523.3 MB sent a token."""
    token = decode_layouts.Case.of("qwen3_6_27b", "v5e:8x8").token(8)
    assert token.links == pytest.approx(523.3e6, rel=2e-3) and token.collectives == 306 + 129 + 129


@old_loader
def test_steps_on_pods():
    """Inside a slice, rows that grow with the chips keep a step's time; fixed rows do not divide it."""
    first, more = (pods.pod_step("llama3_3_70b", "v5p", n, 4 * n) for n in (256, 1024))
    assert more.products == pytest.approx(first.products, rel=0.01)
    assert more.links == pytest.approx(first.links, rel=0.01) and (first.network, more.network) == (0, 0)
    fixed = pods.pod_step("llama3_3_70b", "v5p", 1024, 1024)
    assert fixed.products == pytest.approx(first.products / 4) and fixed.best > first.best / 2
    assert pods.pod_step("llama3_3_70b", "v5e", 512, 2048).network > 0
    assert pods.pod_step("llama3_3_70b", "v5e", 2048, 1024) is None
    shown = pods.cost_table(pods.PRICES | {"v5e": 0.0})
    assert [line for line in shown.splitlines() if "v5e:4x4" in line][0].endswith("| 0–0 |")


@old_loader
def test_attention_of_long_texts():
    lm = decode_layouts.Case.of("qwen2_5_7b", "v5e:4x4").lm
    assert attention.scores_bytes(lm, 4096) == 6 * 28 * 4096**2
    short, long = (attention.capture_seconds(lm, 21, n, chips.CHIPS["v5e"]) for n in (512, 32768))
    assert short["floor"] < short["kernel"] < short["plain"]
    assert long["kernel"] < 1.1 * long["floor"] < long["plain"] / 2
    assert 128 <= attention.crossover(lm, 21, chips.CHIPS["v5e"], 0.8) < 32768
    local = dataclasses.replace(lm, local=(True,) * 28, window=512)
    assert attention.capture_seconds(local, 21, 32768, chips.CHIPS["v5e"])["kernel"] < 0.75 * long["kernel"]
