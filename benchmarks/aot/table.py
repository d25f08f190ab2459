"""Make the compiled table of docs/scaling.md: compile its entries one at a time, each result in a file.

    python -m benchmarks.aot.table DIR [WORD …]   # compile missing entries (whose commands have these words)
    python -m benchmarks.aot.table DIR --print    # print the table of existing results and compile nothing

Run it from the root of the repository, with libtpu. It can be stopped at any time and keeps finished results.
An entry is compiled again if its settings change, because a hash of them is part of the file's name.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Entry:
    """One command of `python -m benchmarks.aot`: recipe, its kind, slice, steps, and further settings.

    kind: "full", "lora" (the variant of the experiment file), or the name of a recipe without variants."""

    recipe: str
    kind: str
    topology: str
    steps: str
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        config = f"experiments/{self.recipe}.py" + (":,lora" if self.kind == "lora" else "")
        return ["--config", config, "--topology", self.topology, "--steps", self.steps, *self.flags]


def tensor(n: int) -> tuple[str]:
    return (f"--config.mesh.tensor={n}",)


def micro(n: int) -> tuple[str, ...]:
    return f"--config.rl.micro_av={n}", f"--config.rl.micro_ar={n}"


PARTS = ("weights", "optimizer", "target", "reference", "temporaries")
HEAD = ("| recipe | slice | step | GiB a chip | FLOPs / least | GB sent a chip | weights sent in decoding | "
        "seconds, all overlapped to nothing overlapped |", "|---|---|---|---|---|---|---|---|")
WARM = "warm_av,warm_ar"
BF16 = ("--config.mu_dtype=bfloat16",)  # Adam's first moments
ENTRIES = (
    Entry("qwen2_5_7b", "full", "v5e:4x4", "rl", tensor(8)),
    Entry("qwen2_5_7b", "full", "v5e:4x4", WARM, tensor(8)),
    Entry("qwen2_5_7b", "full", "v5e:4x4", "rl"),
    Entry("qwen2_5_7b", "lora", "v5e:2x2", "rl"),
    Entry("llama3_3_70b", "full", "v5e:16x16", "rl", (*tensor(32), *micro(2))),
    Entry("llama3_3_70b", "full", "v5e:16x16", "rl", micro(1)),
    Entry("llama3_3_70b", "lora", "v5p:2x2x4", "rl", (*tensor(8), *micro(2))),
    Entry("gemma3_12b", "full", "v5e:4x8", "rl"),
    Entry("gemma3_27b", "full", "v5e:8x8", "rl", BF16),
    Entry("llama3_3_70b", "full", "v5e:16x16", WARM),
    Entry("gemma3_12b", "lora", "v5e:4x4", "rl"),
    Entry("gemma3_27b", "lora", "v5e:4x8", "rl"),
    Entry("qwen3_6_27b", "easy_nla", "v5e:8x8", "rl", tensor(16)),
    Entry("qwen3_6_27b", "easy_nla", "v6e:4x4", "rl", tensor(8)),
    Entry("qwen3_6_27b", "easy_nla", "v6e:4x8", "rl", tensor(8)),
    Entry("qwen3_6_27b", "easy_nla", "v5p:2x2x2", "rl"),
    Entry("qwen2_5_7b", "full", "v6e:2x4", "rl"),
    Entry("qwen2_5_7b", "full", "v5p:2x2x1", "rl", micro(2)),
)


def file_of(entry: Entry, directory: Path) -> Path:
    """Return the file of an entry's result; its name has a hash of every setting of the config."""
    from nla_jax.pipeline.experiment_files import load_config

    config = load_config(entry.arguments[1], list(entry.flags)).to_json(sort_keys=True)
    digest = hashlib.sha256(config.encode()).hexdigest()[:8]
    name = f"{entry.recipe}-{entry.kind}-{entry.topology.replace(':', '_')}-{entry.steps.replace(',', '+')}"
    return directory / f"{name}-{digest}.json"


def compile_one(entry: Entry, path: Path) -> None:
    """Run `python -m benchmarks.aot` and save its output, or its error message."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.aot", "--json", *entry.arguments],
                          capture_output=True, text=True)
    found = json.loads(done.stdout) if done.stdout else {"error": done.stderr.strip().splitlines()[-1]}
    path.write_text(json.dumps(found | {"command": " ".join(entry.arguments)}, indent=1))


def row(entry: Entry, found: dict) -> list[str]:
    """Return the lines of the table, one per step."""
    what = f"{entry.recipe}, {entry.kind}" + "".join(f" `{f}`" for f in entry.flags)
    if "error" in found:
        return [f"| {what} | {entry.topology} | {entry.steps} | {found['error'][:120]} | | | | |"]
    out = []
    for s in found["steps"]:
        m, sent = s["memory"], s["collectives"]
        parts = ", ".join(f"{k} {m['parts'][k]:.2f}" for k in PARTS if m["parts"][k] > 0.005)
        sent = sorted(((v, k) for k, v in sent.items() if v > 5e8), reverse=True)
        kinds = ", ".join(f"{k} {v / 1e9:.0f}" for v, k in sent)
        total = f"**{m['total']:.2f}**" if m["fits"] else f"{m['total']:.2f}, over {m['limit']:.1f}"
        moved = "none" if not s["weights_gathered_in_decode"] else "YES"
        cells = (what, entry.topology, s["step"], f"{total}: {parts}", f"{s['flops']['ratio']:.3f}", kinds,
                 moved if s["step"] == "rl" else "",
                 f"{s['seconds']['best']:.3g}–{s['seconds']['worst']:.3g}")
        out.append("| " + " | ".join(cells) + " |")
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("words", nargs="*", help="only entries whose command has all of these")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    lines = list(HEAD)
    for entry in ENTRIES:
        path = file_of(entry, args.directory)
        wanted = all(w in " ".join(entry.arguments) for w in args.words)
        if not path.exists() and wanted and not args.print:
            compile_one(entry, path)
            print(path.name, file=sys.stderr, flush=True)
        if path.exists():
            lines += row(entry, json.loads(path.read_text()))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
