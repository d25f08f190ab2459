"""Measure nla_jax beside another JAX program that trains by reinforcement learning: `rl_step --peer tunix`.

Tunix has no injection, so the marker's own embedding is injected here, and the reference is the policy. Both
sides then compute the same logits, and the KL and its gradient are zero. Two phases are timed in turns: the
rollout of all answers, and the policy's update with the reference's forward pass. Our KL is exact over the
vocabulary, Tunix's is its estimate from the sampled tokens.

Before the timing both must agree on log-probabilities of the same answers, and on the gradient's norm.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import agreement, child, data, floors, machine
from benchmarks.cases import Case
from nla_jax.errors import UserError

PEERS = ("tunix",)
PHASES = ("rollout", "av_update")
INSTALL = "python3 -m venv .venv-tunix && .venv-tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2"


def check_python(path: Path) -> None:
    """Raise UserError if the peer's Python is missing."""
    if not path.is_file():
        raise UserError(f"--peer-python {path}: not there; make the environment with: {INSTALL}")


def check_case(case: Case) -> None:
    """Raise UserError for a case that Tunix's Llama3 does not compute."""
    lm = case.lm
    other = (lm.window, lm.qk_norm, lm.post_norms, lm.qkv_bias, lm.scale_embed, lm.final_softcap)
    plain = not any(other)
    if case.rank or case.weights == "device" or not plain or lm.activation != "silu":
        raise UserError(f"--peer tunix: case {case.name} is not a Llama with full fine-tuning; use cpu_full")


def write_inputs(case: Case, path: Path, dtype: str) -> dict:
    """Write the weights and inputs of a case for the peer; return the arguments of its process."""
    given = data.inputs(case)
    p = given.prompt
    arrays = {f"params/{k}": v for k, v in data.params(case).items() if k != "blocks"}
    arrays |= {f"params/blocks/{k}": v for k, v in data.params(case)["blocks"].items()}
    np.savez(path, prompt_P=np.array([*p.before, p.marker, *p.after], np.int32),
             answers_NT=given.answers_NT, advantage_N=given.advantage_N, **arrays)
    return {"path": str(path), "lm": dataclasses.asdict(case.lm), "dtype": dtype, "group": case.group,
            "micro": case.torch_micro, "lr": data.LR, "b2": data.B2, "clip": data.CLIP, "kl": data.KL}


def check_agreement(ours: dict, theirs: dict) -> dict:
    """Return the mean difference of log-probabilities by precision. Raises SidesDisagree if it is too large.
    """
    out = {}
    for kind, limit in agreement.LOGP.items():
        if f"logp_{kind}" in theirs:
            a, b = (np.array(s[f"logp_{kind}"], np.float64) for s in (ours, theirs))
            out[f"logp_{kind}"] = float(np.abs(a - b).mean())
            if not out[f"logp_{kind}"] <= limit:
                raise agreement.SidesDisagree(f"the sides differ, nothing is timed: {out}")
    return out


def measure(case: Case, settings: list[str], args, log) -> dict:
    """Return the figures of one case: times of both sides by phase, memory, checks and versions."""
    check_case(case)
    check_python(args.peer_python)
    case = dataclasses.replace(case, peer=True, phases=PHASES)
    times: dict = {phase: {} for phase in PHASES}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        words = write_inputs(case, Path(scratch) / "inputs.npz", args.peer_dtype)
        script = str(child.ROOT / "benchmarks" / "tunix_side.py")
        peer = stack.enter_context(child.Process(
            "tunix", [script, json.dumps(words)], child.environment(), python=args.peer_python))
        options = {"platform": args.platform, "malloc": "plain"}
        mine = stack.enter_context(child.Child("ours", case.name, [*settings, "peer=true"], options))
        rates = mine.ask("machine")
        checks = check_agreement(mine.ask("check"), peer.ask("check"))
        theirs = peer.ask("gradient")
        # Both phases run once to compile. Our update comes first, while its weights are those of the check.
        update = mine.ask("phase", phase="av_update")["info"]
        checks |= agreement.check_scalar_agreement("av_update", update, theirs)
        log.write(case=case.name, checks=checks)
        for side, phase in ((mine, "rollout"), (peer, "rollout"), (peer, "av_update")):
            side.ask("phase", phase=phase)
        end = time.monotonic() + 60 * args.minutes
        for i in range(args.repeats):
            began = time.monotonic()
            for phase in PHASES:
                for side in (mine, peer):
                    s = side.ask("phase", phase=phase)["seconds"][phase]
                    times[phase].setdefault(side.side, []).append(s)
                    log.write(case=case.name, side=side.side, phase=phase, seconds=s)
            if i + 1 >= args.least and 2 * time.monotonic() - began > end:
                break
        memory = {side.side: side.ask("memory")["rss"] for side in (mine, peer)}
        about = {side.side: side.ready for side in (mine, peer)}
    work = floors.works_by_phase(case)
    phases = {p: summary(work[p], times[p], rates) for p in PHASES}
    return {"phases": phases, "memory": memory, "checks": checks, "about": about, "dtype": args.peer_dtype,
            "rows": case.rows, "max_new": case.max_new}


def summary(work: floors.Work, times: dict, rates: dict) -> dict:
    """Return the figures of one phase, with ours / tunix as "ratio"."""
    out = floors.summary(work, times, machine.best(rates))
    return out | {"ratio": statistics.median(times["ours"]) / statistics.median(times["tunix"])}


def table(name: str, result: dict) -> str:
    """Format one case as text."""
    lines = [f"--- {name} beside Tunix {result['about']['tunix']['tunix']} ({result['dtype']})"]
    for phase, p in result["phases"].items():
        rates = f"tokens/s {p['ours_tokens_per_s']:.0f} and {p['tunix_tokens_per_s']:.0f}"
        lines.append(f"{phase}: ours {p['ours_s']:.4g} s, tunix {p['tunix_s']:.4g} s, "
                     f"ratio {p['ratio']:.3f}; {rates}")
    return "\n".join(lines)
