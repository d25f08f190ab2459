"""Say what a command computes on, and warn if jax leaves an accelerator unused."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from nla_jax.errors import UserError, one_line
from nla_jax.util import distributed

GOOGLE = "0x1ae0"  # the PCI vendor of TPUs
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # flags of CPUs that multiply bfloat16


def announce(dtype: str, attention: str = "plain", mesh: jax.sharding.Mesh | None = None) -> None:
    """Print one line about devices, mesh, dtype, attention and versions, and a warning if one is due.

    In a pod, process 0 prints. mesh: None means the first device. Raises UserError if jax has no device.
    """
    device = devices()[0] if mesh is None else mesh.devices.flat[0]
    if not distributed.is_first():
        return
    print(describe(device, dtype, attention, mesh), file=sys.stderr, flush=True)
    chosen = (jax.config.jax_platforms or "").split(",")[0] == "cpu"
    if device.platform == "cpu" and not chosen and (found := find_accelerator()):
        print(warning(*found), file=sys.stderr, flush=True)


def devices() -> list:
    """Return all devices. Raises UserError if jax has none."""
    try:
        return jax.devices()
    except RuntimeError as e:
        name = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if os.environ.get("JAX_PLATFORMS") else ""
        raise UserError(f"jax finds no device ({name}{one_line(e)}); correct or unset JAX_PLATFORMS, or "
                        "install JAX for this machine: nla_jax[cuda] or nla_jax[tpu]") from None


def product_dtype(root: Path = Path("/")) -> str:
    """Return "float32" if jax computes on a CPU without products of bfloat16, else "bfloat16".

    Such a CPU converts every operand to float32 first. A CPU that does not list its flags is taken for one.
    Raises UserError if jax has no device.
    """
    if devices()[0].platform != "cpu":
        return "bfloat16"
    try:
        lines = (root / "proc" / "cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "float32"
    return "bfloat16" if any(BFLOAT16 & {*s.split()} for s in lines if s.startswith("flags")) else "float32"


def describe(device, dtype: str, attention: str, mesh=None) -> str:
    """Return the line that `announce` prints."""
    import jaxlib

    import nla_jax

    versions = {"nla_jax": nla_jax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
                "Python": platform.python_version()}
    return "; ".join([
        f"running on {1 if mesh is None else mesh.size} x {device.device_kind} ({device.platform})",
        "no mesh" if mesh is None else "mesh " + ", ".join(f"{k} {n}" for k, n in mesh.shape.items()),
        dtype,
        f"attention {attention}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ])


def find_accelerator(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """Return ("cuda" or "tpu", the file that shows it) of an accelerator of this machine, or None."""
    env = os.environ if env is None else env
    device = root / "dev"
    gpus = sorted(device.glob("nvidia[0-9]*"))
    if (device / "dxg").exists():  # WSL has no /dev/nvidia0
        gpus += filter(None, [shutil.which("nvidia-smi", path=env.get("PATH", ""))])
    if gpus and env.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
        return "cuda", str(gpus[0])
    tpus = sorted(device.glob("accel[0-9]*"))
    if _has_google_device(root):  # /dev/vfio is for any device that a virtual machine gets
        tpus += sorted((device / "vfio").glob("[0-9]*"))
    return ("tpu", str(tpus[0])) if tpus else None


def _has_google_device(root: Path) -> bool:
    vendors = (root / "sys" / "bus" / "pci" / "devices").glob("*/vendor")
    try:
        return any(v.read_text().strip() == GOOGLE for v in vendors)
    except OSError:
        return False


def warning(kind: str, place: str) -> str:
    """Return the warning about an accelerator that jax does not use."""
    name = {"cuda": "an NVIDIA GPU", "tpu": "a TPU"}[kind]
    return "\n".join([
        "*" * 100,
        f"WARNING: this machine has {name} ({place}), but jax computes on the CPU, many times slower.",
        f"Install JAX for it: pip install 'nla_jax[{kind}]', or NLA_EXTRAS={kind} before bash launch/….sh.",
        f"JAX_PLATFORMS={kind} makes jax say why it does not use it. JAX_PLATFORMS=cpu removes this warning.",
        "*" * 100,
    ])
