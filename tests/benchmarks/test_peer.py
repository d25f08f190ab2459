"""benchmarks.peer: what Tunix is given is what nla_jax computes, and the figures come out as described.

Tunix itself is not installed here, because it needs an environment of its own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, cases, data, ours, peer, rl_step
from nla_jax.errors import UserError
from nla_jax.lm import model
from nla_jax.lm.params import table

TINY = dataclasses.replace(cases.CASES["tiny"], peer=True, phases=peer.PHASES)


@pytest.fixture(scope="module")
def side():
    return ours.Side(TINY)


def test_an_injected_marker_is_the_marker(side, tmp_path):
    """A model that reads the ids of the peer's file gives the log-probabilities of AV with its vector."""
    words = peer.write_inputs(TINY, tmp_path / "in.npz", "float32")
    given = np.load(words["path"])
    assert {k.removeprefix("params/") for k in given if k.startswith("params/")} == set(table(TINY.lm))
    assert words["group"] == 4 and words["lm"]["n_blocks"] == TINY.lm.n_blocks
    n = 4
    prompt, answers = given["prompt_P"], given["answers_NT"][:n]
    assert len(prompt) == TINY.prompt and prompt[TINY.before] == data.MARKER
    ids = jnp.concatenate([jnp.tile(jnp.asarray(prompt)[None], (n, 1)), jnp.asarray(answers)], 1)
    params = data.params(TINY)
    x, _ = model.forward(params, TINY.lm, model.embed(params, TINY.lm, ids), jnp.ones(ids.shape, bool))
    logp = jax.nn.log_softmax(model.unembed(params, TINY.lm, x)[:, len(prompt) - 1 : -1])
    want = jnp.take_along_axis(logp, jnp.asarray(answers)[..., None], -1)[..., 0]
    mine = side.check(["fp32"])
    # Matrices are bfloat16 on neither side in this check, and the vector is scaled to the marker's norm.
    assert peer.check_agreement(mine, {"logp_fp32": np.asarray(want).tolist()})["logp_fp32"] < 1e-3
    with pytest.raises(agreement.SidesDisagree, match="nothing is timed"):
        peer.check_agreement(mine, {"logp_fp32": (np.asarray(want) + 0.1).tolist()})


def test_the_reference_is_the_policy(side):
    _, found = side.run("av_update")
    assert abs(found["kl"]) < 1e-4 and found["av_grad_norm"] > 0


def test_other_models_and_a_missing_environment_are_refused(tmp_path):
    for name in ("tiny_lora", "tiny_gemma3", "tiny_qwen2_5", "tiny_device"):
        with pytest.raises(UserError, match="is not a Llama with full fine-tuning"):
            peer.check_case(cases.CASES[name])
    peer.check_case(cases.CASES["cpu_full"])
    with pytest.raises(UserError, match="pip install google-tunix"):
        peer.check_python(tmp_path / "python")


class Canned:
    """In place of a process: ours takes one second for a phase, Tunix three."""

    def __init__(self, side, *_, **__):
        self.side, self.ready = side, {"jax": "1", "tunix": "2"} if side == "tunix" else {"jax": "1"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, phase=""):
        match do:
            case "machine":
                return {"gemm_bf16": 1e9, "gemm_fp32": 1e9, "bandwidth": 1e9}
            case "check":
                return {"logp_fp32": [[-1.0]], "logp_bf16": [[-1.0]]}
            case "gradient":
                return {"av_grad_norm": 2.0}
            case "phase":
                seconds = {"ours": 1.0, "tunix": 3.0}[self.side]
                return {"seconds": {phase: seconds}, "info": {"av_grad_norm": 2.0}, "cpu": seconds}
            case _:
                return {"rss": 2**30, "device": None, "notes": {}}


def test_the_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peer.child, "Process", Canned)
    monkeypatch.setattr(peer.child, "Child", Canned)
    python, path = tmp_path / "python", tmp_path / "out.json"
    python.touch()
    argv = ["--peer", "tunix", "--case", "tiny", "--peer-python", str(python), "--json", str(path)]
    assert rl_step.main([*argv, "--repeats", "2"]) == 0
    out = json.loads(path.read_text())["cases"]["tiny"]
    assert out["phases"]["rollout"]["ratio"] == out["phases"]["av_update"]["ratio"] == pytest.approx(1 / 3)
    assert out["phases"]["rollout"]["tunix_all_s"] == [3.0, 3.0]
    assert out["phases"]["rollout"]["ours_tokens_per_s"] == 64.0  # 2 activations x 4 answers x 8 tokens
    assert out["checks"] == {"logp_fp32": 0.0, "logp_bf16": 0.0, "av_update.av_grad_norm": 0.0}
    assert "ratio 0.333" in capsys.readouterr().out
