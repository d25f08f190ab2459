"""Read optimised HLO text: instructions, and how often each runs. `hlo_work` counts what they do.

The text is that of one device. A loop counts by its known trip count. The decode loop has none, because it
ends when every row has ended; the caller gives its trip count.
"""

import dataclasses
import functools
import math
import re

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations|true_computation|"
                     r"false_computation)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `fast` if it is in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        digits = "".join(c for c in self.dtype if c.isdigit())
        size = SIZES.get(self.dtype, int(digits[:2] if digits[:1] != "8" else 8) / 8 if digits else 0)
        return math.prod(self.dims) * size


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool
    number: str = ""  # of a parameter

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(
            Array(t, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout)
            for t, dims, layout in _ARRAY.findall(self.shape)
        )

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        found = {}
        for kind, names in _CALLED.findall(self.rest):
            found.setdefault(kind, []).extend(re.findall(r"[\w.\-]+", names))
        return found

    @property
    def scope(self) -> str:
        """Return the path of names under which it was traced."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """Return how often the body of a loop runs; None if that depends on data.

        Loops count from 0 to a constant, which is in the loop's attributes or in its condition.
        """
        if found := re.search(r'known_trip_count"?:?=?\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = loop.called["condition"][0]
        body, root = self.computations[condition], self.root(condition)
        constants = [body[n] for n in root.operands if body[n].op == "constant"]
        if root.op == "fusion":
            root = self.root(root.called["calls"][0])
        if root.op == "compare" and "direction=LT" in root.rest and len(constants) == 1:
            return int(constants[0].number)
        return None

    def root(self, name: str) -> Instruction:
        body = self.computations[name]
        return next((i for i in body.values() if i.root), list(body.values())[-1])


def _closing(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if not depth:
            return i + 1
    raise ValueError(f"a bracket is not closed: {text[start:start + 80]}")


def parse(text: str) -> Module:
    """Parse the computations of a module from HLO text."""
    computations, entry, body = {}, "", None
    # Every instruction is one line, except for the metadata of Pallas kernels.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.S)
    for line in text.splitlines():
        if body is None:
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                body = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.strip() == "}":
            body = None
        elif found := _LINE.match(line):
            i = _instruction(bool(found[1]), found[2], found[3])
            body[i.name] = i
    return Module(computations, entry)


def _instruction(root: bool, name: str, right: str) -> Instruction:
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    bracket = right.index("(")
    end = _closing(right, bracket)
    inside = right[bracket + 1 : end - 1]
    # If operands are written with their shapes, their names begin with %.
    names = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"^[\w.\-]+$|(?<=, )[\w.\-]+", inside)
    op, number = right[:bracket], ""
    if op in ("parameter", "constant"):
        names, number = [], inside
    return Instruction(name, shape, op, tuple(names), right[end:], root, number)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often it runs. `open_loop`: it is inside the loop of unknown length. `fused`:
    it is part of a larger instruction. `scope`: its own, or that of the instruction that contains it."""

    at: Instruction
    computation: str
    times: float
    open_loop: bool
    fused: bool
    scope: str = ""


def runs(module: Module, open_trips: float) -> list[Run]:
    """Return every instruction that runs; the loop of unknown length runs `open_trips` times."""
    out = []

    def walk(name, times, is_open, fused, scope):
        for i in module.computations[name].values():
            here = i.scope or scope
            out.append(Run(i, name, times, is_open, fused, here))
            for kind, callees in i.called.items():
                inner, opened = times, is_open
                if i.op == "while":
                    trips = module.trips(i)
                    opened = is_open or trips is None
                    inner = times * (open_trips if trips is None else trips)
                if kind == "to_apply" and i.op != "call":
                    continue  # the operator of a reduction or sort
                for callee in callees:
                    if callee in module.computations:
                        walk(callee, inner, opened, fused or i.op == "fusion", here)

    walk(module.entry, 1.0, False, False, "")
    return out
