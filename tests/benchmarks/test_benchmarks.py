"""benchmarks/: floors by another count, both sides compute the same, and figures come out as described."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from benchmarks import (
    agreement,
    cases,
    child,
    data,
    floors,
    growth,
    machine,
    ours,
    reference,
    rl_step,
)
from nla_jax import verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import lora
from nla_jax.lm.params import table

TINY, LORA = cases.CASES["tiny"], cases.CASES["tiny_lora"]


@pytest.mark.parametrize("lm", [cases.SMOLLM2_135M, cases.GEMMA3_270M, cases.QWEN2_5_7B])
def test_weights_of_a_block_are_those_of_the_table(lm):
    names = [f"blocks/{name}" for name in lora.MATRICES]
    assert floors.block_weights(lm) == sum(math.prod(table(lm)[n].shape[1:]) for n in names)
    assert floors.adapter_weights(lm, 16) == sum(math.prod(s.shape[1:]) for s in lora.table(lm, 16).values())


def test_forward_operations_count_each_position_and_pair_once():
    """Positions of the whole batch as a tree of prefixes, and what each of them sees, listed one by one."""
    case, tokens = TINY, 5
    seen = {}  # (path to the position) -> number of positions it attends to
    for b, g in itertools.product(range(case.batch), range(case.group)):
        row = [("before", i) for i in range(case.before)]
        row += [("own", b, i) for i in range(1 + case.after)]
        row += [("answer", b, g, i) for i in range(tokens)]
        seen |= {place: i + 1 for i, place in enumerate(row)}
    L, heads = case.lm.n_blocks, case.lm.n_heads * case.lm.head_dim
    want = len(seen) * 2 * L * floors.block_weights(case.lm) + sum(seen.values()) * 4 * L * heads
    assert floors._rows(case, case.rows, tokens, L, case.group) == want


def test_decoding_reads_the_weights_for_every_token():
    work = floors.rollout(TINY, TINY.rows, TINY.group)
    lm, kv = TINY.lm, 2 * TINY.lm.n_blocks * TINY.lm.n_kv_heads * TINY.lm.head_dim * 2
    weights = 2 * (lm.n_blocks * floors.block_weights(lm) + lm.vocab_size * lm.d_model)
    distinct = [TINY.before + TINY.batch * (1 + TINY.after) + TINY.rows * t for t in range(1, TINY.max_new)]
    assert work.bytes == weights * TINY.max_new + kv * sum(distinct)
    assert (work.tokens, work.samples) == (TINY.rows * TINY.max_new, TINY.rows)
    assert floors.plain_decode_bytes(TINY, TINY.rows) > work.bytes - weights


def test_writing_leaves_out_the_shared_prompt():
    whole, own = floors.rollout(TINY, 6, 1), floors.writing(TINY, 6)
    L, heads = TINY.lm.n_blocks, TINY.lm.n_heads * TINY.lm.head_dim
    shared = TINY.before * 2 * L * floors.block_weights(TINY.lm)
    shared += sum(i + 1 for i in range(TINY.before)) * 4 * L * heads
    assert whole.flops - own.flops == shared and whole.bytes == own.bytes
    rates = {"gemm_bf16": 1e9, "bandwidth": 1e9}
    assert floors.explanations_per_s(TINY, 6, rates) == pytest.approx(6 / own.seconds(1e9, 1e9))
    slow = {"gemm_bf16": 1e9, "bandwidth": 1e6}  # weights that are read once for all rows limit it
    assert floors.explanations_per_s(TINY, 64, slow) > floors.explanations_per_s(TINY, 1, slow)


def test_a_part_takes_as_long_as_its_slower_half():
    assert floors.Work(((10.0, 1.0), (1.0, 30.0))).seconds(flops_per_s=2.0, bytes_per_s=3.0) == 5.0 + 10.0


def test_updates_of_adapters_need_less():
    full, small = floors.works_by_phase(TINY), floors.works_by_phase(dataclasses.replace(TINY, rank=1))
    for phase in ("av_update", "ar_update", "warm_av", "warm_ar", "step"):
        assert small[phase].flops < full[phase].flops and small[phase].bytes < full[phase].bytes, phase
    assert small["rollout"] == full["rollout"]


@pytest.mark.parametrize("name", ["tiny", "tiny_gemma3", "tiny_qwen2_5"])
def test_both_sides_compute_the_same(name):
    case = cases.CASES[name]
    found = agreement.check_agreement(*(side.Side(case).check(["fp32"]) for side in (ours, reference)))
    assert found.keys() == {"logp_fp32", "ar_fp32"}


@pytest.mark.parametrize("wanted, device, rates, dtype", [
    ("auto", "cpu", (15, 110), "float32"),  # without instructions for bfloat16
    ("auto", "cpu", (1500, 300), "bfloat16"),
    ("auto", "cuda", (15, 110), "bfloat16"),
    ("bfloat16", "cpu", (15, 110), "bfloat16"),
])
def test_the_reference_computes_in_the_faster_dtype(wanted, device, rates, dtype, monkeypatch):
    found = dict(zip(("gemm_bf16", "gemm_fp32"), rates, strict=True))
    monkeypatch.setattr(machine, "_torch_products", lambda *_: found)
    assert machine.torch_dtype(wanted, device) == dtype


@pytest.mark.parametrize("case", [LORA, cases.CASES["tiny"]], ids=["lora", "full"])
def test_a_reference_in_float32_has_no_bfloat16(case):
    side = reference.Side(case, dtype="float32")
    found = side.check()
    assert found["logp_bf16"] == found["logp_fp32"] and found["h_bf16"] == found["h_fp32"]
    assert {p.dtype for net in (side.av, side.ref, side.writer) for p in net.parameters()} == {torch.float32}


def test_sides_that_differ_are_refused():
    a = {"logp_fp32": [[-1.0]], "logp_bf16": [[-1.0]], "h_fp32": [[1.0, 0.0]], "h_bf16": [[1.0, 0.0]]}
    agreement.check_agreement(a, a)
    for other in ({"logp_fp32": [[-1.1]]}, {"h_bf16": [[1.0, 0.5]]}, {"logp_bf16": [[float("nan")]]}):
        with pytest.raises(agreement.SidesDisagree, match="nothing is timed"):
            agreement.check_agreement(a, a | other)
    with pytest.raises(agreement.SidesDisagree, match="kl is 1 in nla_jax, 2 in torch"):
        agreement.check_scalar_agreement("av_update", {"kl": 1.0}, {"kl": 2.0})


def test_updates_agree_and_every_answer_counts(monkeypatch):
    monkeypatch.setattr(verbalizer, "parse_ids", ours.whole_answers)
    a, b = ours.Side(LORA), reference.Side(LORA)
    found = agreement.check_scalar_agreement("av_update", a.run("av_update")[1], b.run("av_update")[1])
    assert found.keys() == {"av_update.kl", "av_update.av_grad_norm"}
    seconds, metrics = a.run("step")
    assert seconds > 0 and (metrics["ok"], metrics["length"]) == (1.0, LORA.max_new)
    seconds, _ = b.run("step")
    assert set(seconds) == {"rollout", "ar_update", "av_update", "step"}


class Canned:
    """In place of a process: every phase takes one second here and three there."""

    def __init__(self, side, *_):
        self.side, self.ready = side, {"device": "none"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, phase=""):
        seconds = {"ours": 1.0, "torch": 3.0}[self.side]
        match do:
            case "machine":
                return {"gemm_bf16": seconds * 1e9, "gemm_fp32": 1e9, "bandwidth": 1e9}
            case "check":
                return {"logp_fp32": [[-1.0]], "logp_bf16": [[-1.0]], "h_fp32": [[1.0]], "h_bf16": [[1.0]]}
            case "phase":
                whole = (self.side, phase) == ("torch", "step")
                parts = dict.fromkeys(("rollout", "av_update", "ar_update"), 1.0) if whole else {}
                return {"seconds": {phase: seconds, **parts}, "info": {}, "cpu": 2 * seconds}
            case _:
                return {"rss": int(seconds * 2**30), "device": None, "notes": {}}


@pytest.mark.parametrize("case", ["tiny", "tiny_device"])
def test_the_figures(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rl_step, "Child", Canned)
    path = tmp_path / "out.json"
    assert rl_step.main(["--case", case, "--repeats", "2", "--json", str(path)]) == 0
    out = json.loads(path.read_text())
    assert out["ratio_total"] == out["phases"]["step"]["ratio"] == pytest.approx(1 / 3)
    assert out["phases"]["rollout"]["ratio"] == 1.0
    assert out["phases"]["step"]["torch_all_s"] == [3.0, 3.0]
    assert out["ratio_memory"] == pytest.approx(1 / 3)
    assert out["machine"]["rates"]["gemm_bf16"] == 3e9
    for phase in cases.CASES[case].phases:
        figures = out["phases"][phase]
        assert {"ours_s", "torch_s", "ratio", "floor_s"} <= figures.keys()
        assert figures["ours_cpu_s"] == 2.0
        assert figures["ours_over_floor"] == figures["ours_s"] / figures["floor_s"]
    lines = [json.loads(x) for x in (tmp_path / "out.json.jsonl").read_text().splitlines()]
    times = {"phase": "step", "seconds": 1.0, "warm_up": False, "cpu": 2.0}
    assert {"case": case, "side": "ours", **times} in lines
    assert "ours/floor" in capsys.readouterr().out


def test_one_failed_case_does_not_lose_the_others(monkeypatch, tmp_path, capsys):
    class Breaks(Canned):
        def __init__(self, side, case, *_):
            super().__init__(side)
            if case == "tiny":
                raise RuntimeError("the process of torch ended with status 1")

    monkeypatch.setattr(rl_step, "Child", Breaks)
    path = tmp_path / "out.json"
    assert rl_step.main(["--case", "tiny", "--case", "tiny_lora", "--json", str(path)]) == 1
    out = json.loads(path.read_text())
    assert "failed" in out["cases"]["tiny"] and "ratio_total" in out["cases"]["tiny_lora"]


def test_settings():
    case = cases.choose(["tiny"], ["batch=3", "remat=false", "lm.n_blocks=5", "warm=2,7"], "step,score")[0]
    assert (case.batch, case.remat, case.lm.n_blocks, case.warm) == (3, False, 5, (2, 7))
    assert case.phases == ("step", "score")
    for names, settings, phases, message in (
        (["none"], [], "", "no case 'none'"),
        (["tiny"], ["size=1"], "", "no setting 'size'"),
        (["tiny"], [], "stop", "--phases stop"),
        (["tiny"], ["lengths=4,2,8"], "step", "only for --phases score,av_update,ar_update"),
        (["tiny"], ["lengths=4,2,9"], "score", "1 <= LEAST < MEAN < MOST <= 8"),
    ):
        with pytest.raises(UserError, match=message):
            cases.choose(names, settings, phases)


def test_answers_of_several_lengths():
    one = cases.choose(["tiny"], ["batch=50"], "av_update")[0]
    case = cases.choose(["tiny"], ["batch=50", "lengths=4,2,8"], "av_update")[0]
    assert data.lengths(one).tolist() == [8] * 200
    found = data.lengths(case)
    assert found.min() >= 2 and found.max() <= 8 and 3.5 < found.mean() < 4.5
    tokens = [floors.works_by_phase(c)["av_update"].tokens for c in (one, case)]
    assert tokens == [200 * 8, 200 * 4]
    with pytest.raises(UserError, match="add --no-torch"):
        rl_step.main(["--case", "tiny", "--phases", "score", "--set", "lengths=4,2,8"])


def test_a_line_is_found():
    fit = growth.line([1, 2, 3], [5.0, 7.0, 9.0])
    assert (fit["constant"], fit["slope"], fit["explained"]) == pytest.approx((3.0, 2.0, 1.0))
    assert growth.line([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])["explained"] < 0.99


def test_a_child_that_dies_is_reported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(RuntimeError, match="ended with status"):
        child.Child("ours", "none", [], {"platform": "cpu"})


def test_a_case_that_the_time_does_not_suffice_for_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rl_step, "Child", Canned)
    path = tmp_path / "out.json"
    argv = ["--case", "tiny", "--case", "tiny_lora", "--minutes", "0", "--json", str(path)]
    assert rl_step.main(argv) == 0
    out = json.loads(path.read_text())
    assert list(out["cases"]) == ["tiny"] and out["left_out"] == ["tiny_lora"]
    assert "then=--case tiny_lora" in capsys.readouterr().err
