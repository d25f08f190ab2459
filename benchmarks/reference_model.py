"""The PyTorch reference's models and losses: transformers' classes with nla_jax's weights and adapters."""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks.cases import Case
from nla_jax.lm.files.hf_write import family_of

HF_NAMES = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj", "w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj",
            "w_down": "mlp.down_proj"}


class LinearWithAdapters(torch.nn.Module):
    """A frozen linear map with adapters for several roles; the shared list `role` has the active one."""

    def __init__(self, linear: torch.nn.Linear, role: list):
        super().__init__()
        self.weight, self.bias, self.role = linear.weight, linear.bias, role
        self.a, self.b = torch.nn.ParameterDict(), torch.nn.ParameterDict()

    def add(self, name: str, a, b, trained: bool):
        """Add the adapter of a role from nla_jax's factors a [in, r] and b [r, out]."""
        for where, value in ((self.a, a), (self.b, b)):
            value = torch.from_numpy(np.ascontiguousarray(value.T)).to(self.weight.device)
            where[name] = torch.nn.Parameter(value, requires_grad=trained)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        name = self.role[0]
        return y + F.linear(F.linear(x, self.a[name]), self.b[name]) if name in self.a else y

    def merged(self, name: str):
        kind = self.weight.dtype
        return torch.addmm(self.weight, self.b[name].to(kind), self.a[name].to(kind))


def hf_config(case: Case):
    family, raw = family_of(Path("config.json"), case.lm)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return family, transformers.AutoConfig.from_pretrained(folder)


def build(case: Case, device, dtype, tree: dict | None):
    """Make a causal language model with the weights of `tree` (None: random weights, made on the device)."""
    family, config = hf_config(case)
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    net = net.eval().requires_grad_(False)
    if tree is None:
        return net
    own = dict(net.named_parameters())
    flat = {k: v for k, v in tree.items() if k != "blocks"}
    flat |= {f"blocks/{k}": v for k, v in tree["blocks"].items()}
    for name, array in flat.items():
        blocks = range(case.lm.n_blocks) if name.startswith("blocks/") else [None]
        for i in blocks:
            one = array if i is None else array[i]
            offset = family.norm_offset if "norm" in name else 0.0
            value = torch.from_numpy(np.ascontiguousarray(one if name == "embed" else one.T)) - offset
            own.pop(family.hf[name].format(i=i)).data.copy_(value)
    if own:
        raise SystemExit(f"weights without a value: {', '.join(own)}")
    return net


def first_blocks(body, n: int):
    """Return blocks 0..n-1 of a model without its final norm; all modules are shared with the model."""
    short = copy.copy(body)
    short._modules = dict(body._modules)
    short.layers, short.norm = body.layers[:n], torch.nn.Identity()
    return short


def scaled_mse(h_hat, h):
    scale = h.shape[-1] ** 0.5
    return (F.normalize(h_hat.float(), dim=-1) - F.normalize(h.float(), dim=-1)).mul(scale).square().mean(-1)


def chunk_loss(logits, ref_logits, ids, adv, total: float, kl_weight: float):
    """Return (policy-gradient loss with exact KL, sum of the KL) of a chunk of positions."""
    logp = F.log_softmax(logits.float(), -1)
    ref = F.log_softmax(ref_logits.float(), -1)
    kl = (logp.exp() * (logp - ref)).sum(-1)
    chosen = logp.gather(-1, ids[:, None])[:, 0]
    return ((-adv * chosen + kl_weight * kl).sum()) / total, kl.detach().sum()


def cross_entropy(logits, ids, total: float):
    return F.cross_entropy(logits.float(), ids, reduction="sum") / total
