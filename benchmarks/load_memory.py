"""Measure the memory of loading a pair with the layer shapes of a 7B model onto eight devices.

    python -m benchmarks.load_memory [--blocks 3] [--dtype bfloat16|int8|float32] [--fsdp 2] [--tensor 4]

Target, AV and AR have random weights in the layer shapes of Qwen2.5-7B, with fewer blocks and a smaller
vocabulary; `--blocks 28 --vocab 152064` is the whole model. Each block is one file, and the three models
share the files. Without an accelerator there are eight fake devices, whose memory is that of the process.

The host's arrays are what Python and numpy hold (tracemalloc). The process's memory is its anonymous memory
(RssAnon); with fake devices it has the shards, and the devices' part of the tensor that is on its way. The
limits are two tensors for the host's arrays, and two more for the devices. The exit status is 1 if one is
exceeded.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import re
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import numpy as np

from benchmarks.aot import models
from nla_jax.lm import pair_files, sharded_load, weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_write
from nla_jax.lm.params import nest, table
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import lazy_params

MB = 1e6
INDEX = "model.safetensors.index.json"
M_MMAP_THRESHOLD = -3  # of glibc: allocations from this size on return to the system when they are freed


def write_pair(root: Path, cfg: LMConfig, layer: int) -> None:
    """Write ROOT/target, one tensor a file, and ROOT/av and ROOT/ar, which link to its files."""
    import ml_dtypes

    some = np.random.default_rng(0).normal(0, 0.02, 99_991).astype(ml_dtypes.bfloat16)

    def lazy(spec):
        stacked = spec.axes[0] == "block"
        shape = spec.shape[1:] if stacked else spec.shape
        return lazy_params.Array(spec.shape, some.dtype, stacked, lambda i: np.resize(some, shape))

    tree = {name: lazy(spec) for name, spec in table(cfg).items()}
    weights.save_hf(root / "target", cfg, nest(tree), shard_bytes=1)
    for role, n_blocks in (("av", cfg.n_blocks), ("ar", layer + 1)):
        (root / role).mkdir()
        config = json.loads((root / "target" / "config.json").read_text())
        for key in config.keys() & {"num_hidden_layers", "max_window_layers"}:
            config[key] = n_blocks
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:n_blocks]
        (root / role / "config.json").write_text(json.dumps(config))
        index = json.loads((root / "target" / INDEX).read_text())
        block = lambda name: int((re.findall(r"\.(\d+)\.", name) or ["0"])[0])
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if block(n) < n_blocks}
        (root / role / INDEX).write_text(json.dumps(index))
        for file in index["weight_map"].values():
            (root / role / file).symlink_to(root / "target" / file)
    head = {"weight": np.eye(cfg.d_model, dtype=np.float32)}
    hf_write.save_tensors(root / "ar" / pair_files.HEAD, head)


def anonymous() -> int:
    """Return the bytes of this process's anonymous memory. Mapped files are not part of it."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def on_devices() -> dict:
    """Return the bytes of live arrays on each device."""
    found = dict.fromkeys(jax.local_devices(), 0)
    for a in jax.live_arrays():
        with contextlib.suppress(RuntimeError):  # deleted meanwhile
            for shard in a.addressable_shards:
                found[shard.device] += shard.data.nbytes
    return found


class Peak(threading.Thread):
    """Sample the host's memory until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.going = 0, True

    def run(self) -> None:
        while self.going:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def stop(self) -> int:
        self.going = False
        self.join()
        return self.most


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--fsdp", type=int, default=2)
    p.add_argument("--tensor", type=int, default=4)
    p.add_argument("--directory", default="", help="where the model is written; default: a temporary one")
    args = p.parse_args(argv)
    known = models.KNOWN["Qwen/Qwen2.5-7B-Instruct"].lm
    cfg = dataclasses.replace(known, n_blocks=args.blocks, vocab_size=args.vocab)
    with tempfile.TemporaryDirectory(dir=args.directory or None) as directory:
        return measure(Path(directory), cfg, args)


def measure(root: Path, cfg: LMConfig, args) -> int:
    """Write the pair, load it once to compile and once more, and print the memory."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    layer = max(args.blocks - 2, 0)
    write_pair(root, cfg, layer)
    mesh = mesh_lib.make(-1, args.fsdp, args.tensor)

    def load():
        _, base = sharded_load.place(root / "target", mesh, args.dtype)
        roles = pair_files.place_models(root / "av", root / "ar", cfg, mesh, args.dtype)
        return jax.block_until_ready((base, roles))

    load()  # compiles, and imports
    gc.collect()
    before, sampler = anonymous(), Peak()
    sampler.start()
    tracemalloc.start()
    began = time.monotonic()
    trees = load()
    seconds = time.monotonic() - began
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    most, shares = sampler.stop(), on_devices()
    tensor = max(np.prod(s.shape[1:] if s.axes[0] == "block" else s.shape) for s in table(cfg).values()) * 2
    shards = sum(shares.values())
    fake = jax.local_devices()[0].platform == "cpu"
    host = most - before - (shards if fake else 0)
    n = len(jax.tree.leaves(trees))
    print(f"{args.blocks} blocks of 7B, {args.dtype}, mesh {dict(mesh.shape)}, {n} arrays, {seconds:.1f} s")
    print(f"largest tensor of a file        {tensor / MB:9,.1f} MB")
    print(f"shards on all devices           {shards / MB:9,.1f} MB")
    print(f"shards on a device, least       {min(shares.values()) / MB:9,.1f} MB")
    print(f"shards on a device, most        {max(shares.values()) / MB:9,.1f} MB")
    print(f"host's arrays, peak             {arrays / MB:9,.1f} MB = {arrays / tensor:.2f} tensors")
    print(f"process's peak above the shards {host / MB:9,.1f} MB = {host / tensor:.2f} tensors")
    for device in jax.local_devices():
        if stats := device.memory_stats():
            print(f"{device}: peak {stats['peak_bytes_in_use'] / MB:,.1f} MB")
    return int(arrays > 2 * tensor or host > 4 * tensor)


if __name__ == "__main__":
    sys.exit(main())
