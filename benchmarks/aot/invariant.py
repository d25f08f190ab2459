"""Find loop-invariant collectives in the decode loop: weights that should be gathered before it."""

from benchmarks.aot.hlo import Instruction, Module
from benchmarks.aot.hlo_work import COLLECTIVES


def loop_invariant_collectives(module: Module) -> list[Instruction]:
    """Return the collectives inside loops of unknown length whose operand is the same for every token.

    Values that such a loop changes vary: tokens, residual streams, caches. A collective that depends on none
    of them moves weights once per token, and should be hoisted out of the loop.
    """
    out = []
    for body in list(module.computations.values()):
        for i in body.values():
            if i.op == "while" and module.trips(i) is None:
                out += _of_loop(module, i.called["body"][0])
    return out


def _of_loop(module: Module, name: str) -> list[Instruction]:
    body = module.computations[name]
    root = module.root(name)
    given = next(i for i in body.values() if i.op == "parameter")
    varies = [not _is_unchanged(body, n, given, k) for k, n in enumerate(root.operands)]
    found: dict[str, Instruction] = {}
    _follow(module, name, [varies], found)
    return list(found.values())


def _is_unchanged(body, name, given, k) -> bool:
    """Return whether `name` is element k of the loop's input, or a copy of it."""
    i = body[name]
    while i.op in ("copy", "bitcast", "copy-done", "copy-start"):
        i = body[i.operands[0]]
    index = f"index={k}"
    return i.op == "get-tuple-element" and i.operands[0] == given.name and index in i.rest.split(", ")


def _any(value) -> bool:
    return any(map(_any, value)) if isinstance(value, list) else value


def _follow(module: Module, name: str, given: list, found: dict):
    """Return which parts of the root vary, given which parameters vary; collect invariant collectives."""
    known = {}
    for i in module.computations[name].values():
        known[i.name] = _one(module, i, [known[n] for n in i.operands if n in known], given, found)
        if i.op.removesuffix("-start") in COLLECTIVES:
            if _any(known[i.name]):
                found.pop(i.name, None)
            else:
                found[i.name] = i
    return known[module.root(name).name]


def _one(module, i: Instruction, operands: list, given: list, found: dict):
    if i.op == "parameter":
        return given[int(i.number)]
    if i.op == "tuple":
        return operands
    if i.op == "get-tuple-element":
        value = operands[0]
        return value[int(i.rest.split("index=")[1].split(",")[0])] if isinstance(value, list) else value
    if i.op in ("optimization-barrier", "copy", "bitcast") and operands:
        return operands[0]
    if i.op == "while":
        state = operands[0]
        while True:  # iterate to a fixed point of what varies
            after = _follow(module, i.called["body"][0], [state], found)
            joined = [_any(a) or _any(b) for a, b in zip(state, after, strict=True)]
            if joined == [_any(s) for s in state]:
                return state
            state = joined
    if i.op in ("fusion", "call", "async-start") and "calls" in i.called or i.op == "call":
        for callee in [*i.called.get("calls", ()), *i.called.get("to_apply", ())]:
            _follow(module, callee, operands, found)
    return _any(operands)
