"""The line about what a command computes on, and the warning about an accelerator that is not used."""

import jax
import pytest

from nla_jax.errors import UserError
from nla_jax.util import hardware
from tests.helpers import tiny


def lay(root, *files, vendor: str = ""):
    """A root directory with these files, and a PCI device if there is a vendor."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if vendor:
        place = root / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"{vendor}\n")
    return root


@pytest.mark.parametrize("files,vendor,found", [
    ((), "", None),
    (("dev/null", "dev/nvidiactl", "dev/nvidia-uvm"), "", None),
    (("dev/nvidia0", "dev/nvidia1"), "", ("cuda", "dev/nvidia0")),
    (("dev/accel0", "dev/accel1"), "", ("tpu", "dev/accel0")),
    (("dev/accel/accel0",), "", None),  # a neural processor in a laptop
    (("dev/vfio/vfio", "dev/vfio/0"), "0x1ae0", ("tpu", "dev/vfio/0")),
    (("dev/vfio/vfio",), "0x1ae0", None),
    (("dev/vfio/vfio", "dev/vfio/12"), "0x10de", None),
    (("dev/dxg",), "", None),
])
def test_what_shows_an_accelerator(tmp_path, files, vendor, found):
    lay(tmp_path, *files, vendor=vendor)
    assert hardware.find_accelerator(tmp_path, {}) == (found and (found[0], str(tmp_path / found[1])))


@pytest.mark.parametrize("text,dtype", [
    ("processor: 0\nflags\t\t: fpu avx2 fma\n", "float32"),
    ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", "bfloat16"),
    ("processor: 0\nflags\t\t: fpu amx_bf16\n", "bfloat16"),
    ("processor: 0\nmodel name: avx512_bf16\nflags: fpu\n", "float32"),
    (None, "float32"),
])
def test_the_dtype_of_a_cpu_is_one_that_it_multiplies(tmp_path, text, dtype):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert hardware.product_dtype(tmp_path) == dtype


def test_other_devices_multiply_bfloat16(tmp_path, monkeypatch):
    class Chip:
        platform = "tpu"

    monkeypatch.setattr(hardware, "devices", lambda: [Chip()])
    assert hardware.product_dtype(tmp_path) == "bfloat16"


def test_gpus_of_wsl_and_hidden_ones(tmp_path):
    lay(tmp_path, "dev/dxg", "bin/nvidia-smi")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"/none:{tmp_path / 'bin'}"}
    assert hardware.find_accelerator(tmp_path, env) == ("cuda", str(tmp_path / "bin" / "nvidia-smi"))
    for hidden in ("", "-1"):
        assert hardware.find_accelerator(tmp_path, env | {"CUDA_VISIBLE_DEVICES": hidden}) is None


@pytest.mark.parametrize("kind,name", [("cuda", "an NVIDIA GPU"), ("tpu", "a TPU")])
def test_a_loud_warning_if_jax_uses_the_cpu_all_the_same(monkeypatch, capsys, kind, name):
    monkeypatch.setattr(hardware, "find_accelerator", lambda: (kind, "/dev/it"))
    hardware.announce("bfloat16")  # the tests set JAX_PLATFORMS=cpu: whoever chooses the CPU is not warned
    assert len(capsys.readouterr().err.splitlines()) == 1
    chosen = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        hardware.announce("bfloat16")
    finally:
        jax.config.update("jax_platforms", chosen)
    line, *loud = capsys.readouterr().err.splitlines()
    assert line.startswith("running on 1 x cpu (cpu); no mesh; bfloat16; attention plain; nla_jax ")
    assert f"WARNING: this machine has {name} (/dev/it), but jax computes on the CPU" in loud[1]
    assert f"pip install 'nla_jax[{kind}]'" in loud[2] and set(loud[0]) == set(loud[-1]) == {"*"}


def test_the_line_names_the_mesh_and_versions():
    line = hardware.describe(jax.devices()[0], "float32", "cudnn", tiny.mesh(2, 2, 1))
    assert line.startswith("running on 4 x cpu (cpu); mesh data 2, fsdp 2, tensor 1; float32; attention c")
    assert f"jax {jax.__version__}, jaxlib " in line and line.count("\n") == 0


def test_a_platform_that_is_not_there(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda':\n no CUDA-capable device")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"no device \(JAX_PLATFORMS=cuda: Unable to.*unset JAX_PLAT"):
        hardware.announce("float32")
