"""Count what instructions of optimised HLO do: products, collectives, memory traffic."""

import math
import re

import numpy as np

from benchmarks.aot.hlo import Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SPLASH = re.compile(r"/splash_m[hq]a_(fwd|dq|dkv)_")
# Instructions without memory traffic: views, and starts or ends of operations that are counted elsewhere.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
         "optimization-barrier", "after-all", "partition-id", "replica-id", "iota", "copy-done"}


def flops(i: Instruction, body: dict[str, Instruction]) -> float:
    """Return the operations of a product (a multiply-add counts 2); 0 for other instructions."""
    if kernel := attention_kernel(i):
        return _splash(i, body, kernel)
    if i.op not in ("dot", "convolution", "ragged-dot"):
        return 0.0
    left, right = (body[n].arrays[0].dims for n in i.operands[:2])
    result = i.arrays[0].dims
    if i.op == "ragged-dot":  # each row of the left operand meets one of the right one's matrices
        return 2.0 * math.prod(left) * result[-1]
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        k = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(result) * math.prod(k)
    return _convolution(i, left, right, result)


def attention_kernel(i: Instruction) -> str:
    """Return the kind of a splash attention kernel, "fwd", "dq" or "dkv"; "" for other instructions."""
    found = _SPLASH.search(i.scope) if i.op == "custom-call" else None
    return found[1] if found else ""


def _splash(i, body, phase: str) -> float:
    """Return the operations of a splash attention kernel, which the compiler does not report. They include
    tiles that the kernel skips."""
    q, k = [a.dims for n in i.operands for a in body[n].arrays[:1] if a.dtype == "bf16"][:2]
    products = {"fwd": 2, "dq": 3, "dkv": 4}[phase]
    if phase == "dkv" and len(i.arrays) > 4:  # this kernel also computes dq
        products = 5
    return 2.0 * products * math.prod(q) * k[-2]


def _convolution(i, left, right, result) -> float:
    # XLA for TPU writes batched products as convolutions; window positions in the padding do not count.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    a, b, c = labels[1], labels[2], labels[3]
    groups = int((re.search(r"feature_group_count=(\d+)", i.rest) or [0, 1])[1])
    batches = int((re.search(r"batch_group_count=(\d+)", i.rest) or [0, 1])[1])
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or [0, ""])[1]))
    places = 1
    for d in range(sum(ch.isdigit() for ch in a)):
        def value(key, default, d=d):
            return window[key].split("x")[d] if key in window else default

        n_in, n_out, size = left[a.index(str(d))], result[c.index(str(d))], right[b.index(str(d))]
        low = int(str(value("pad", "0_0")).split("_")[0])
        stride, dilate = int(value("stride", 1)), int(value("lhs_dilate", 1))
        at = (np.arange(n_out)[:, None] * stride + np.arange(size) * int(value("rhs_dilate", 1)) - low)
        inside = (at >= 0) & (at < (n_in - 1) * dilate + 1) & (at % dilate == 0)
        places *= int(inside.sum())
    batch, features = result[c.index("b")], result[c.index("f")]
    return 2.0 * places * batch * features * left[a.index("f")] / groups / batches


def group_size(i: Instruction) -> int:
    """Return the number of devices in a group of a collective, from any of HLO's notations."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", i.rest):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", i.rest):
        return len(found[1].split(","))
    return 2


def collective(i: Instruction, body: dict[str, Instruction]) -> tuple[str, float]:
    """Return (kind, bytes that each device sends by a ring algorithm); ("", 0) for other instructions."""
    kind = i.op.removesuffix("-start")
    if kind not in COLLECTIVES or _is_continuation(i):
        return "", 0.0
    n = group_size(i)
    size = sum(a.bytes for name in i.operands for a in body[name].arrays)
    # XLA for TPU writes some reduce-scatters as a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and any(j.root and j.op == "dynamic-slice" and i.name in j.operands
                                    for j in body.values()):
        kind = "reduce-scatter"
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
    return kind, size * share.get(kind, (n - 1) / n)


def _is_continuation(i: Instruction) -> bool:
    """Return whether a collective only continues an earlier one: XLA for TPU repeats an asynchronous
    collective in every product that overlaps with it."""
    began = re.search(r'async_collective_fusion_config":\{"flag_start":"(-?\d+)"', i.rest)
    return bool(began) and began[1] != "-1"


def traffic(module: Module, i: Instruction, body: dict[str, Instruction]) -> float:
    """Return the bytes that an instruction reads from and writes to main memory; slices count their size."""
    if i.op in _FREE or i.op.endswith("-done") or _is_continuation(i):
        return 0.0
    out = _bytes(i)
    if i.op.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        taken = i.arrays[-2] if i.op.endswith("-start") else i.arrays[0]  # of (operand, result, context)
        given = body[i.operands[0]].arrays[0]
        return taken.bytes * (not given.fast) + taken.bytes * (not taken.fast)
    if i.op == "dynamic-update-slice":
        return 2 * _bytes(body[i.operands[1]])
    if i.op.endswith("-start"):  # (operand, result, ...): in and out
        return sum(_bytes(body[n]) for n in i.operands) * 2
    if i.op != "fusion":
        return out + sum(_bytes(body[n]) for n in i.operands)
    name = i.called["calls"][0]
    inner = module.computations[name]
    given = [j for j in inner.values() if j.op == "parameter" and not j.arrays[0].fast]
    return _bytes_written(module.root(name), inner) + sum(_bytes_read(module, name, j) for j in given)


def _bytes(i: Instruction) -> float:
    return sum(a.bytes for a in i.arrays if not a.fast)


def _bytes_read(module: Module, computation: str, i: Instruction) -> float:
    """Return the bytes read of a value inside a fusion: only the slices, if all of its users take slices."""
    total = 0.0
    for u in module.computations[computation].values():
        for k in (k for k, name in enumerate(u.operands) if name == i.name):
            if u.op in ("dynamic-slice", "slice", "gather"):
                total += _bytes(u) if not k else 0.0
            elif u.op == "bitcast":
                total += _bytes_read(module, computation, u)
            elif u.op == "fusion":
                callee = u.called["calls"][0]
                inner = module.computations[callee].values()
                given = next(j for j in inner if j.op == "parameter" and j.number == str(k))
                total += _bytes_read(module, callee, given)
            elif u.op == "tuple" or _is_continuation(u) or "AsyncCollective" in u.rest:
                continue  # passed on, or counted at its start
            elif u.op != "dynamic-update-slice" or k:
                return _bytes(i)
    return min(total, _bytes(i))


def _bytes_written(root: Instruction, inner) -> float:
    if root.op == "tuple":
        return sum(_bytes_written(inner[n], inner) for n in root.operands)
    if root.op == "parameter" or _is_continuation(root) or "AsyncCollectiveDone" in root.rest:
        return 0.0
    if root.op == "bitcast":
        return _bytes_written(inner[root.operands[0]], inner)
    if root.op == "dynamic-update-slice":
        return _bytes(inner[root.operands[1]])
    return _bytes(root)
