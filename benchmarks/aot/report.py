"""Report on a compiled step: memory by part, operations over the minimum, communication, time."""

import collections
import dataclasses
import re

from benchmarks.aot import chips, compiler, counts, hlo, hlo_work, invariant, memory, models, programs
from nla_jax.errors import UserError
from nla_jax.pipeline import config_checks, run_mesh
from nla_jax.sharding.chips import GIB, LIMIT, Chip

_PHASE = re.compile(r"\b(prefill|decode|ar|reference|av)\b")


def persistent_bytes(program) -> dict[str, int]:
    """Return the bytes per chip of what stays in memory between steps."""
    state = program.args[0]
    learners = [state.av, state.ar] if program.name == "rl" else [state]
    size = compiler.bytes_of
    return {
        "weights": sum(size(l.params) for l in learners),
        "optimizer": sum(size(l.opt) for l in learners),
        "target": size(program.args[1]) + size(program.held or {}),
        "reference": size(program.args[2]) if program.name == "rl" else 0,
    }


def phase_of(run: hlo.Run, name: str) -> str:
    """Return the phase of a step that an instruction belongs to, from its scope."""
    if name != "rl":
        return "update"
    if run.open_loop:
        return "decode"
    found = _PHASE.findall(run.scope)
    return found[-1] if found else "other"


def describe(config, spec, program, topology: str, mesh, estimate: bool = False) -> dict:
    """Compile one program and return its report as plain data. Bytes and seconds are per chip.

    estimate: compile for fake devices, and take temporary memory from `benchmarks.aot.memory`.
    """
    made = compiler.compile_program(program, "cpu" if estimate else "tpu")
    if estimate:
        temporary = int(memory.temporary_bytes(config, program.name, spec, mesh))
        made = dataclasses.replace(made, temporary=temporary, code=0)
    out = {"step": program.name, "compile_seconds": round(made.seconds, 1)}
    return out | report_of(config, spec, program, made, chips.chip_of(topology), mesh.size)


def report_of(config, spec, program, made: compiler.Compiled, chip: Chip, n_devices: int) -> dict:
    """Return the report of `describe` for a compiled program."""
    name, module = program.name, hlo.parse(made.text)
    parts = persistent_bytes(program)
    held = compiler.bytes_of(program.held or {})
    parts["temporaries"] = made.total - made.arguments
    parts["other"] = made.arguments + held - sum(persistent_bytes(program).values())
    total = made.total + held
    open_trips = config.rl.max_new - 1 if name == "rl" else 0
    work = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    moved, products = collections.Counter(), collections.Counter()
    kernels = set()
    for run in hlo.runs(module, open_trips):
        body, phase = module.computations[run.computation], phase_of(run, name)
        n = hlo_work.flops(run.at, body) * run.times
        products[phase] += n
        kernels |= {hlo_work.attention_kernel(run.at)} - {""}
        kind, size = hlo_work.collective(run.at, body)
        if kind:
            moved[kind] += size * run.times
        row = work[phase]
        row[0] += n
        row[1] += 0 if run.fused else hlo_work.traffic(module, run.at, body) * run.times
        row[2] += size * run.times
    least = counts.of(config, name, spec)
    times = {p: chips.time(chip, *w) for p, w in work.items()}
    return {
        "memory": {
            "parts": {k: _gib(v) for k, v in parts.items()},
            **({"cache": _gib(memory.cache(config, spec, n_devices))} if name == "rl" else {}),
            "total": _gib(total),
            "limit": _gib(LIMIT * chip.memory),
            "share": round(total / chip.memory, 3),
            "fits": total <= LIMIT * chip.memory,
        },
        "flops": {
            "compiled": sum(products.values()) * n_devices,
            "least": sum(least.values()),
            "ratio": round(sum(products.values()) * n_devices / sum(least.values()), 4),
            "phases": {p: [products[p] * n_devices, least.get(p, 0.0)] for p in sorted({*products, *least})},
        },
        "attention_kernels": sorted(kernels),
        "collectives": {k: round(v) for k, v in sorted(moved.items())},
        "weights_gathered_in_decode": [
            f"{i.name} {i.shape}" for i in invariant.loop_invariant_collectives(module)
        ],
        "seconds": {
            **{p: _seconds(t) for p, t in sorted(times.items())},
            "best": _short(sum(t.best for t in times.values())),
            "worst": _short(sum(t.worst for t in times.values())),
        },
    }


def _gib(n: float) -> float:
    return round(n / GIB, 3)


def _seconds(t: chips.Time) -> dict:
    parts = {"best": t.best, "products": t.products, "memory": t.memory, "links": t.links}
    return {k: _short(v) for k, v in parts.items()}


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def of(config, topology: str, names: tuple[str, ...] = (), estimate: bool = False) -> dict:
    """Report on every step of a config (or those of `names`), compiled for a topology.

    estimate: see `describe`. Raises UserError for an invalid config or topology, and for an unknown stage.
    """
    config_checks.lock(config)
    chips.chip_of(topology)
    found = compiler.fake_devices(topology) if estimate else compiler.devices(topology)
    spec = models.spec_of(config, None if estimate else found[0])
    mesh = run_mesh.make(config, spec.lm, found)
    wanted = programs.of(config, spec, mesh, names)
    if not wanted:
        raise UserError(f"--steps {','.join(names)}: no such stage, or it has no steps")
    made = [describe(config, spec, p, topology, mesh, estimate) for p in wanted]
    return {
        "target": config.target,
        "kind": f"LoRA, rank {config.av.rank}" if config.av.rank else "full",
        "topology": topology,
        "chips": len(found),
        "mesh": dict(mesh.shape),
        "estimate": estimate,
        "attention": spec.attention,
        "fits": all(s["memory"]["fits"] for s in made),
        "steps": made,
    }


def table(found: dict) -> str:
    """Format the report as a Markdown table."""
    head = (f"{found['target']}, {found['kind']}, on {found['chips']} chips ({found['topology']}), mesh "
            + " × ".join(f"{k} {v}" for k, v in found["mesh"].items()))
    head += "; temporaries estimated" if found["estimate"] else ""
    lines = [head, "", "| step | GiB a chip (limit) | weights, optimizer, target, reference, temporaries | "
             "FLOPs / least | GB sent a chip | seconds, at best to at worst |", "|---|---|---|---|---|---|"]
    for s in found["steps"]:
        m, parts = s["memory"], s["memory"]["parts"]
        sent = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in s["collectives"].items()) or "nothing"
        five = ", ".join(
            f"{parts[k]:.2f}" for k in ("weights", "optimizer", "target", "reference", "temporaries"))
        verdict = "fits" if m["fits"] else "does NOT fit"
        lines.append(f"| {s['step']} | {m['total']:.2f} ({m['limit']:.1f}), {verdict} | {five} | "
                     f"{s['flops']['ratio']:.3f} | {sent} | "
                     f"{s['seconds']['best']:.2f}–{s['seconds']['worst']:.2f} |")
        if moved := s["weights_gathered_in_decode"]:
            lines.append(f"\nThese weights are gathered for every token: {'; '.join(moved)}")
    return "\n".join(lines)
