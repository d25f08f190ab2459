"""Activations of TransformerLens, nnsight, SAELens and transformers beside ours, on one target.

    python -m tests.helpers.other_libraries                       a tiny random Llama
    python -m tests.helpers.other_libraries --target default      the shipped NLA's target
    python -m tests.helpers.other_libraries --target default --save DIR

Needs torch, and compares the libraries that are installed: pip install transformer-lens nnsight sae-lens. The
target is written in Hugging Face layout first. Prints each library's largest difference from `nla.capture`'s
arithmetic, as a share of the largest activation, and exits with 1 if one is above --most. --save writes
DIR/LIBRARY.safetensors, for `nla explain --activations`, and DIR/ours.npy.

The functions below are what docs/howto/from_libraries.md shows. `tests/pipeline/test_from_libraries.py` runs
the one that needs torch alone.
"""

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np

from nla_jax import target
from nla_jax.lm import sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib

TEXT = "The old lighthouse keeper climbed the stairs and looked out over the sea."


def of_transformers(directory: Path, layer: int, ids: list[int]) -> np.ndarray:
    """A forward hook on block K, whose output is the residual stream after it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = {}

    def keep(module, given, out):
        found["h"] = out if isinstance(out, torch.Tensor) else out[0]

    with torch.no_grad(), contextlib.closing(_Hook(model.model.layers[layer], keep)):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    h = found["h"][0].numpy()
    if layer + 1 < len(model.model.layers):  # the last hidden state is after the final norm
        np.testing.assert_array_equal(h, states[layer + 1][0].numpy())
    return h


class _Hook:
    def __init__(self, module, function):
        self._handle = module.register_forward_hook(function)

    def close(self) -> None:
        self._handle.remove()


def of_transformer_lens(directory: Path, layer: int, ids: list[int]) -> np.ndarray:
    """`hook_resid_post` of TransformerLens's bridge, which has the weights as they are."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(directory), hf_model=_eager(directory),
                                                tokenizer=tok_lib.load(directory))
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=name)
    return cache[name][0].numpy()


def of_nnsight(directory: Path, layer: int, ids: list[int]) -> np.ndarray:
    """The output of block K in an nnsight trace."""
    import torch
    from nnsight import NNsight

    model = NNsight(_eager(directory))
    with torch.no_grad(), model.trace(torch.tensor([ids])):
        out = model.model.layers[layer].output.save()
    h = out if isinstance(out, torch.Tensor) else out[0]
    return h.reshape(len(ids), -1).detach().numpy()


def of_sae_lens(directory: Path, layer: int, ids: list[int]) -> np.ndarray:
    """What an SAE reads that is attached to `hook_resid_post` of SAELens's model."""
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    name, hf = f"blocks.{layer}.hook_resid_post", _eager(directory)
    model = SAETransformerBridge.boot_transformers(str(directory), hf_model=hf,
                                                   tokenizer=tok_lib.load(directory))
    sae = StandardSAE(StandardSAEConfig(d_in=hf.config.hidden_size, d_sae=8))
    sae.cfg.metadata.hook_name = name
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(torch.tensor([ids]), saes=[sae])
    read = next(k for k in cache if k.endswith("hook_sae_input"))
    assert sae.W_dec.shape == (8, hf.config.hidden_size)  # rows are vectors of the residual stream
    return cache[read][0].numpy()


def _eager(directory: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


LIBRARIES = {"transformers": of_transformers, "transformer_lens": of_transformer_lens,
             "nnsight": of_nnsight, "sae_lens": of_sae_lens}


def ours(directory: Path, layer: int, ids: list[int]) -> np.ndarray:
    """h of all ids by our target in float32; `ids` include what the tokenizer puts first."""
    cfg, base = sharded_load.place(directory, dtype="float32")
    ids_BT = np.array([ids], np.int32)
    h = target.capture(base, cfg, layer, ids_BT, np.ones_like(ids_BT, bool), np.arange(len(ids))[None])
    return np.asarray(h)[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays, as a share of the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def write_target(uri: str, directory: Path) -> Path:
    """A target in Hugging Face layout."""
    if not uri:
        from tests.helpers import world

        return world.write_target(directory, n_blocks=4)
    path = weights.resolve(weights.DEFAULT_TARGET if uri == "default" else uri)
    cfg, base = sharded_load.place(path, dtype="float32")
    tok_lib.save(tok_lib.load(path), directory)
    weights.save_hf(directory, cfg, base)
    return directory


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", default="", help="a target's URI, or default; without it a tiny Llama")
    p.add_argument("--layer", type=int, default=-1)
    p.add_argument("--most", type=float, default=1e-4, help="the largest difference that is accepted")
    p.add_argument("--save", default="", metavar="DIR")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_target(args.target, Path(scratch) / "target")
        tok, cfg = tok_lib.load(directory), weights.read_config(directory)
        layer = cfg.default_layer() if args.layer == -1 else args.layer
        ids = tok_lib.raw_ids(tok, TEXT)
        wanted, worst = ours(directory, layer, ids), 0.0
        if args.save:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            np.save(Path(args.save) / "ours.npy", wanted)
        for name, capture in LIBRARIES.items():
            if not importlib.util.find_spec(name):
                print(f"{name:18} is not installed")
                continue
            h = capture(directory, layer, ids)
            worst = max(worst, found := difference(h, wanted))
            print(f"{name:18} block {layer}, {len(ids)} tokens: largest difference {found:.1e}")
            if args.save:
                from safetensors.numpy import save_file

                save_file({"h": np.ascontiguousarray(h[len(tok_lib.lead_ids(tok)) :])},
                          Path(args.save) / f"{name}.safetensors")
    return int(worst > args.most)


if __name__ == "__main__":
    sys.exit(main())
