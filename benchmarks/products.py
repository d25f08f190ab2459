"""Measure the rates of a step's matrix products, by library and by dtypes.

    python -m benchmarks.products [--model smollm2_135m_full] [--rows 4096]

For each matrix of a block and for the unembedding, this times the forward product and the gradients of x and
of W, with `nla_jax.lm.model.dense` and with PyTorch in bfloat16. It then times plain JAX products by operand
and result dtype, because XLA's CPU backend is not equally fast for all of them.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from benchmarks import cases, machine
from nla_jax.lm.model import dense
from nla_jax.util.keys import new_key, normal


def _rate(f, args, work: float) -> float:
    return machine._best(lambda: f(*args), jax.block_until_ready, work)


def jax_rates(m: int, k: int, n: int, transposed: bool = False) -> dict:
    """Time x [m, k] times W [k, n] (stored as [n, k] if transposed) by `dense`, and both gradients."""
    x = normal(new_key(0), (m, k))
    w = normal(new_key(1), (n, k) if transposed else (k, n)).astype(jnp.bfloat16)
    g = normal(new_key(2), (m, n))

    def back(x, w, g, which):
        return jax.vjp(lambda x, w: dense(x, w, transposed), x, w)[1](g)[which]

    work = 2.0 * m * k * n
    return {
        "forward": _rate(jax.jit(lambda x, w: dense(x, w, transposed)), (x, w), work),
        "grad_x": _rate(jax.jit(lambda x, w, g: back(x, w, g, 0)), (x, w, g), work),
        "grad_w": _rate(jax.jit(lambda x, w, g: back(x, w, g, 1)), (x, w, g), work),
    }


def torch_rates(m: int, k: int, n: int) -> dict:
    """Time the same products with PyTorch, with bfloat16 operands and results."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    x, w, g = (torch.randn(s, device=device).bfloat16() for s in ((m, k), (n, k), (m, n)))
    work = 2.0 * m * k * n
    return {
        "forward": machine._best(lambda: x @ w.T, wait, work),
        "grad_x": machine._best(lambda: g @ w, wait, work),
        "grad_w": machine._best(lambda: g.T @ x, wait, work),
    }


def by_types(m: int, k: int, n: int) -> dict:
    """Time JAX's product of [m, k] and [k, n], and one contracted over rows, by operand and result dtype."""
    out = {}
    for of, to in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        x = normal(new_key(0), (m, k)).astype(of)
        w = normal(new_key(1), (k, n)).astype(of)
        g = normal(new_key(2), (m, n)).astype(of)
        dot = lambda a, b, dims, to=to: jax.lax.dot_general(
            a, b, (dims, ((), ())), preferred_element_type=jnp.dtype(to))
        work = 2.0 * m * k * n
        out[f"{of} -> {to}"] = {
            "rows x columns": _rate(jax.jit(lambda x, w, dot=dot: dot(x, w, ((1,), (0,)))), (x, w), work),
            "over rows": _rate(jax.jit(lambda x, g, dot=dot: dot(x, g, ((0,), (0,)))), (x, g), work),
        }
    return out


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2_135m_full", help="the case that gives the shapes")
    p.add_argument("--rows", type=int, default=4096)
    p.add_argument("--no-torch", action="store_true")
    p.add_argument("--json", type=argparse.FileType("w"))
    args = p.parse_args(argv)
    lm = cases.choose([args.model], [])[0].lm
    heads, kv = lm.n_heads * lm.head_dim, lm.n_kv_heads * lm.head_dim
    shapes = {"q, o": (lm.d_model, heads), "k, v": (lm.d_model, kv), "gate, up": (lm.d_model, lm.d_ff),
              "down": (lm.d_ff, lm.d_model), "vocabulary": (lm.d_model, lm.vocab_size)}
    out = {"machine": machine.describe(), "rows": args.rows, "products": {}}
    for name, (k, n) in shapes.items():
        m = min(args.rows, 1024) if name == "vocabulary" else args.rows
        sides = {"ours": jax_rates(m, k, n, name == "vocabulary" and lm.tied)}
        if not args.no_torch:
            sides["torch"] = torch_rates(m, k, n)
        out["products"][name] = {"shape": (m, k, n), **sides}
        for side, rates in sides.items():
            words = "  ".join(f"{what} {rate / 1e9:8.0f}" for what, rate in rates.items())
            print(f"{name:11} {m}x{k}x{n}  {side:5}  GFLOP/s: {words}", flush=True)
    out["types"] = by_types(args.rows, lm.d_model, lm.d_ff)
    for types, rates in out["types"].items():
        words = "  ".join(f"{what} {rate / 1e9:8.0f}" for what, rate in rates.items())
        print(f"{types:22} GFLOP/s: {words}", flush=True)
    if args.json:
        json.dump(out, args.json, indent=1)


if __name__ == "__main__":
    main()
