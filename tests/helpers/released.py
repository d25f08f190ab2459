"""A tiny random pair in the layout of the official release, as the official code would leave it.

    ROOT/target, ROOT/av (fp32, several files), ROOT/ar (K+1 blocks, a head), each with a tokenizer

The sidecars are written here by hand, and `Reconstructor` and `injected` follow the description of
the format in torch, so that nothing of nla_jax is compared with itself.
"""

import json
import math
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers import family_pairs, tiny

AV_TEMPLATE = "Say {{all}} of it.\n<concept>{injection_char}</concept>\nPlease explain."
AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"
CASES = {  # family -> (case of `family_pairs`, K, injection scale, whether the tokenizer adds a token)
    "qwen2": ("qwen2 window untied", 2, 6.0, False),
    "gemma3": ("gemma3_text", 5, 80000.0, True),
}
FOR_ADAPTERS = {
    **CASES,
    "qwen3_5": ("qwen3_5_text", 2, 6.0, False),
    "phi3": ("phi3", 2, 6.0, False),
    "gemma4": ("gemma4_text", 2, 6.0, True),
}


def tokenizer(bos: bool):
    tok = tiny.tokenizer(bos=bos)
    if bos:
        tok.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    return tok


def chat(tok, template: str = AV_TEMPLATE) -> list[int]:
    turns = [{"role": "user", "content": template.format(injection_char=tiny.MARKER)}]
    return tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def sidecar(tok, role: str, schema: int, layer: int, scale: float, base: str, **templates) -> dict:
    """The mapping of one sidecar of either generation, as the release has it; D is 32."""
    templates = {"av": AV_TEMPLATE, "ar": AR_TEMPLATE, **templates}
    ids = chat(tok, templates["av"])
    at = ids.index(tok.convert_tokens_to_ids(tiny.MARKER))
    ending = tok(templates["ar"].split("{explanation}")[1], add_special_tokens=False)["input_ids"]
    old = {"av": "actor", "ar": "critic"}
    name = (lambda r: r) if schema == 2 else old.get
    meta = {
        "kind": "nla_model", "schema_version": schema, "role": name(role), "stage": "rl",
        "base_checkpoint": base, "d_model": 32, "created_by": "somebody", "unheard_of": {"a": [1]},
        "extraction": {"injection_scale": scale, "mse_scale": math.sqrt(32)},
        "tokens": {
            "injection_char": tiny.MARKER, "injection_token_id": ids[at],
            "injection_left_neighbor_id": ids[at - 1], "injection_right_neighbor_id": ids[at + 1],
            "critic_suffix_ids": ending[1:] if role == "ar" else None,
        },
        "prompt_templates": {name(r): templates[r] for r in ("av", "ar")},
    }
    if schema == 2:
        meta["extraction_layer_index"] = layer
    if role == "ar":
        meta["critic"] = {"extraction_layer_index" if schema == 2 else "num_hidden_layers": layer}
        meta["extraction"]["injection_scale"] = scale if schema == 2 else None
    return meta


def write(root: Path, family: str, schema: int = 2) -> Path:
    """Target, AV and AR of a family under `root`, which is returned."""
    case, layer, scale, bos = FOR_ADAPTERS[family]
    tok = tokenizer(bos)
    net = family_pairs.torch_model(case, vocab_size=304)
    net.save_pretrained(root / "target")
    shake(net, 1)
    net.save_pretrained(root / "av", max_shard_size="60KB")
    ar = family_pairs.torch_model(case, vocab_size=304, num_hidden_layers=layer + 1)
    shake(ar, 2)
    ar.save_pretrained(root / "ar")
    weights = load_file(root / "ar" / "model.safetensors")
    if family == "qwen2":  # no final norm and no head in the file, as in the release
        weights = {k: v for k, v in weights.items() if k not in ("model.norm.weight", "lm_head.weight")}
    else:  # both, and meaningless
        weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, root / "ar" / "model.safetensors", metadata={"format": "pt"})
    head = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    save_file({"weight": head}, root / "ar" / "value_head.safetensors")
    for role in ("target", "av", "ar"):
        tok.padding_side = "right" if role == "ar" else "left"
        tok.save_pretrained(root / role)
    for role in ("av", "ar"):
        meta = sidecar(tok, role, schema, layer, scale, str(root / "target"))
        write_sidecar(root / role, meta)
    return root


def shake(net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)


def write_sidecar(directory: Path, meta: dict) -> None:
    (directory / "nla_meta.yaml").write_text(yaml.safe_dump(meta, allow_unicode=True), "utf-8")


def read_sidecar(directory: Path) -> dict:
    return yaml.safe_load((directory / "nla_meta.yaml").read_text("utf-8"))


def templates(directory: Path) -> dict:
    """{"av": ..., "ar": ...} of a sidecar of either generation."""
    found = read_sidecar(directory)["prompt_templates"]
    return {"av": found.get("av") or found["actor"], "ar": found.get("ar") or found["critic"]}


class Reconstructor(torch.nn.Module):
    """Blocks 0 to K, the identity for a final norm, and a head, read at the last token."""

    def __init__(self, directory: Path):
        super().__init__()
        self.tok = transformers.AutoTokenizer.from_pretrained(directory)
        assert self.tok.padding_side == "right"
        self.template = templates(directory)["ar"]
        net = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        config = json.loads((directory / "config.json").read_text())
        assert len(net.model.layers) == config["num_hidden_layers"] == len(config["layer_types"])
        net.model.norm = torch.nn.Identity()
        self.body = net.model.eval()
        self.head = torch.nn.Linear(32, 32, bias=False)
        self.head.load_state_dict(load_file(directory / "value_head.safetensors"))

    @torch.no_grad()
    def forward(self, texts: list[str]):
        """h [N, D], one text at a time."""
        rows = []
        for text in texts:
            prompt = self.template.format(explanation=text)
            ids = self.tok(prompt, add_special_tokens=True, return_tensors="pt")["input_ids"]
            rows.append(self.head(self.body(ids, use_cache=False).last_hidden_state[0, -1].float()))
        return torch.stack(rows).numpy()


def injected(net, tok, meta: dict, h):
    """Embeddings [1, T, D] of the AV's prompt with one activation h [D] written over the marker's."""
    said, scale = meta["tokens"], meta["extraction"]["injection_scale"]
    template = meta["prompt_templates"].get("av") or meta["prompt_templates"]["actor"]
    ids = chat(tok, template)
    sites = [
        i for i in range(1, len(ids) - 1)
        if ids[i] == said["injection_token_id"] and ids[i - 1] == said["injection_left_neighbor_id"]
        and ids[i + 1] == said["injection_right_neighbor_id"]
    ]
    assert len(sites) == 1
    with torch.no_grad():
        x = net.get_input_embeddings()(torch.tensor([ids])).float().clone()
    h = torch.as_tensor(h).float()
    x[0, sites[0]] = h * scale / h.norm()
    return x
