"""Measure the machine's best rates of matrix products and of memory, and describe it."""

import os
import platform
import time
from pathlib import Path

# Sizes for a CPU and for a GPU. gemm: (m, k, n); stream: entries of a float32 array.
SMALL = {"gemm": ((4096, 576, 1536), (2048, 2048, 2048)), "stream": 1 << 27}
LARGE = {"gemm": ((8192, 8192, 8192),), "stream": 1 << 28}


def _best(call, wait, work: float, repeats: int = 6) -> float:
    """Return `work` divided by the shortest of several times, after one warm-up call."""
    wait(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - begin)
    return work / min(seconds)


def measure_jax() -> dict:
    """Return "gemm_bf16" and "gemm_fp32" in operations per second, and "bandwidth" in bytes per second."""
    import jax
    import jax.numpy as jnp

    from nla_jax.util.keys import new_key, normal

    gpu = jax.default_backend() != "cpu"
    sizes, out = LARGE if gpu else SMALL, {}
    for name, dtype in (("gemm_bf16", jnp.bfloat16), ("gemm_fp32", jnp.float32)):
        rates = []
        for m, k, n in sizes["gemm"]:
            a = normal(new_key(0), (m, k)).astype(dtype)
            b = normal(new_key(1), (k, n)).astype(dtype)
            exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
            kind = dtype if gpu else jnp.float32

            def product(a, b, exact=exact, kind=kind):
                return jax.lax.dot(a, b, precision=exact, preferred_element_type=kind)

            f = jax.jit(product)
            rates.append(_best(lambda f=f, a=a, b=b: f(a, b), jax.block_until_ready, 2.0 * m * k * n))
        out[name] = max(rates)
    x = jnp.ones(sizes["stream"], jnp.float32)
    add, total = jax.jit(lambda x: x + 1), jax.jit(jnp.sum)
    out["bandwidth"] = max(
        _best(lambda: add(x), jax.block_until_ready, 2.0 * x.nbytes),
        _best(lambda: total(x), jax.block_until_ready, 1.0 * x.nbytes),
    )
    return out


def measure_torch(device: str) -> dict:
    """Return the same rates, measured with PyTorch."""
    import torch

    sizes = LARGE if device != "cpu" else SMALL
    wait, out = _wait(device), _torch_products(device, sizes["gemm"])
    x = torch.ones(sizes["stream"], device=device)
    y = torch.empty_like(x)
    out["bandwidth"] = max(
        _best(lambda: y.copy_(x), wait, 2.0 * x.nbytes), _best(lambda: x.sum(), wait, 1.0 * x.nbytes)
    )
    return out


def _wait(device: str):
    import torch

    return (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize())


def _torch_products(device: str, shapes) -> dict:
    """Return "gemm_bf16" and "gemm_fp32", PyTorch's best rates over products (m, k, n)."""
    import torch

    wait, out = _wait(device), {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for name, dtype in (("gemm_bf16", torch.bfloat16), ("gemm_fp32", torch.float32)):
        rates = []
        for m, k, n in shapes:
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
            rates.append(_best(lambda a=a, b=b: a @ b, wait, 2.0 * m * k * n))
        out[name] = max(rates)
    torch.set_float32_matmul_precision(precision)
    return out


def add_torch_dtype(parser) -> None:
    """Add the option --torch-dtype, whose value `torch_dtype` takes."""
    parser.add_argument("--torch-dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                        help="of the reference's products; auto: the faster one on a CPU, bfloat16 on a GPU")


def torch_dtype(wanted: str, device: str) -> str:
    """Return the dtype of PyTorch's products: `wanted`, or for "auto" the faster one.

    That is float32 on a CPU without instructions for bfloat16, and bfloat16 on a GPU."""
    if wanted != "auto":
        return wanted
    if device != "cpu":
        return "bfloat16"
    rates = _torch_products(device, SMALL["gemm"][:1])
    return "float32" if rates["gemm_fp32"] > rates["gemm_bf16"] else "bfloat16"


def best(*measured: dict) -> dict:
    """Return the highest rate of each kind, because a floor must be a lower bound for both sides."""
    names = {name for m in measured for name in m}
    return {name: max(m[name] for m in measured if name in m) for name in sorted(names)}


def describe() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
        flags = next((x for x in lines if x.startswith("flags")), "")
        has = set(flags.split())
        if "amx_bf16" in has:
            cpu += " with AMX"
        elif has and "avx512_bf16" not in has:
            cpu += " without bfloat16"
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def rss_peak() -> int | None:
    """Return the process's peak resident memory since `rss_reset`, in bytes; None where it is unknown."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def rss_reset() -> bool:
    """Reset the peak of resident memory (Linux). Returns whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
