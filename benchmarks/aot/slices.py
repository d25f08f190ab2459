"""Find the smallest slice that each recipe fits on, from shapes and the formulas of docs/scaling.md.

Nothing is compiled.

    python -m benchmarks.aot.slices
"""

import jax
from jax.sharding import AxisType

from benchmarks.aot import counts, memory, models, programs
from benchmarks.aot.report import persistent_bytes
from nla_jax.pipeline import run_mesh
from nla_jax.sharding import chips
from nla_jax.sharding.mesh import AXES, resolve_sizes

# Available slices, smallest first.
SHAPES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


def need(config, topology: str, n: int, tensor: int) -> tuple[float, float]:
    """Return (bytes per chip of the RL step, temporary bytes among them) on n chips."""
    mesh = jax.sharding.AbstractMesh(resolve_sizes(1, -1, tensor, n), AXES, axis_types=(AxisType.Auto,) * 3)
    spec = models.spec_of(config)
    temporary = memory.temporary_bytes(config, "rl", spec, mesh)
    return sum(persistent_bytes(programs.rl(config, spec, mesh)).values()) + temporary, temporary


def smallest(config, kind: str):
    """Return (topology, chips, bytes per chip, tensor) of the smallest slice that fits, or None.

    Microbatches are those of the config, but have at least as many rows as there are chips.
    """
    from benchmarks.aot.compiler import count

    chip = chips.CHIPS[kind]
    limit = chips.LIMIT * chip.memory
    for shape in SHAPES[kind]:
        topology, n = f"{kind}:{shape}", count(f"{kind}:{shape}")
        c = config.copy_and_resolve_references()
        rows = c.rl.batch * c.rl.group
        c.rl.micro_av = c.rl.micro_ar = max(1, min(c.rl.micro_av, rows // n))
        tensor = c.mesh.tensor and min(c.mesh.tensor, n)
        tensor = tensor or run_mesh.choose_tensor(c, models.spec_of(c).lm, n, chip.memory, chip)
        total, _ = need(c, topology, n, tensor)
        if total <= limit:
            return topology, n, total, tensor
    return None


RECIPES = [*((name, kind) for name in ("qwen2_5_7b", "gemma3_12b", "gemma3_27b", "llama3_3_70b")
             for kind in ("full", "lora")), ("qwen3_6_27b", "easy_nla")]


def main():
    from nla_jax.pipeline.experiment_files import load_config

    print("| recipe | " + " | ".join(SHAPES) + " |\n|---|" + "---|" * len(SHAPES))
    for name, kind in RECIPES:
        config = load_config(f"experiments/{name}.py" + (":,lora" if kind == "lora" else ""), [])
        work = sum(counts.rl(config, models.spec_of(config)).values())
        cells = []
        for chip in SHAPES:
            found = smallest(config, chip)
            if found is None:
                cells.append("none of these")
                continue
            topology, n, total, _ = found
            at_peak = work / n / chips.CHIPS[chip].flops
            cells.append(f"{topology.partition(':')[2]}: {total / chips.GIB:.1f} GiB, {at_peak:.1f} s")
        print(f"| {name}, {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
