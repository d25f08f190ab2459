"""The card of a packed bundle: README.md, made from the sidecar and its summary of the run."""

import math

from nla_jax import bundle, configs
from nla_jax.errors import short_repr
from nla_jax.evaluate import figure_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.weights import DEFAULT_TARGET
from nla_jax.util.tables import markdown_table

SPLITS = {"heldout": "Held-out documents of the training corpus", "ood": "Documents of another corpus"}
BUNDLES = {"warm_start": "warm start", "rl": "after RL"}  # key of a summary -> column of the card


def write(meta: dict) -> str:
    """Return the card in Markdown. meta: a packed bundle's sidecar; "run" in it is the run's summary.json."""
    cfg, layer = LMConfig.of_plain(meta["lm"]), meta["extraction"]["layer_index"]
    name = target_name(meta["base_checkpoint"])
    lines = [
        f"# A natural language autoencoder of {name}, block {layer}",
        "",
        f"This bundle explains activations of {name} in English, and rebuilds them from the words alone. An "
        f"activation has {cfg.d_model} numbers and is the output of block {layer}, of blocks 0 to "
        f"{cfg.n_blocks - 1}. {_roles(meta)} The bundle does not contain the target ({_size(cfg)} "
        f"parameters): `{meta['base_checkpoint']}`.",
        "",
        *_use(meta),
        *_training(meta),
        *_figures(meta.get("run") or {}, meta["stage"]),
        *_limits(cfg, name),
        *_licence(meta, name),
    ]
    return "\n".join(lines)


def target_name(uri: str) -> str:
    """Return a short name for a target's URI: its last part, without .gguf."""
    last = str(uri).rstrip("/").split("/")[-1]
    return last.removesuffix(".gguf")


def _size(cfg: LMConfig) -> str:
    n = sum(math.prod(s.shape) for s in params_lib.table(cfg).values())
    return f"{n / 1e6:,.0f} million" if n > 5e5 else f"{n:,}"


def _roles(meta: dict) -> str:
    roles = meta["roles"]

    def said(rank):
        return f"adapters of rank {rank} (LoRA) on the target" if rank else "a full copy of the weights"

    av = f"The verbalizer (AV) is {said(roles['av_rank'])}."
    if bundle.ar_kind(meta) == "frozen":
        return f"{av} The reconstructor (AR) is the frozen target itself: it was not trained."
    return f"{av} The reconstructor (AR) is {said(roles['ar_rank'])}, and a head."


def _use(meta: dict) -> list[str]:
    return [
        "## How to use it",
        "",
        "```bash",
        'nla explain  --bundle DIR --text "The cat sat on the" --tokens=-1:',
        "nla evaluate --bundle DIR",
        "nla serve    --bundle DIR",
        "```",
        "",
        "```python",
        'nla = nla_jax.load("DIR")',
        'nla.round_trip("The cat sat on the", positions=[-1])',
        "```",
        "",
        "DIR is this directory. Omit `--bundle DIR` and the argument of `load` to use the bundle that the "
        "package ships.",
        "",
    ]


def _training(meta: dict) -> list[str]:
    run, settings = meta.get("run") or {}, meta["training"].get("config")
    out = ["## How it was made", "", f"It was made by {meta['created_by']} at {meta.get('created_at', '?')}."]
    if run.get("device"):
        out[-1] += f" The run took {sum(run['seconds'].values()):,.0f} seconds on {run['device']}."
    if meta.get("made_by"):
        out += ["", "```bash", meta["made_by"], "```"]
    if settings is None:
        out += ["", "Its training is not recorded: it was imported."]
    else:
        changed = configs.differences(configs.default().to_dict(), settings)
        out += ["", "These settings differ from the defaults (`nla_jax/configs.py`):", ""]
        rows = [[f"`{d.key}`", f"`{short_repr(d.present)}`", f"`{short_repr(d.stored)}`"] for d in changed]
        out += markdown_table(["setting", "value", "default"], rows)
        data = settings["data"]
        ood = f" The other corpus is `{data['ood']}`, for evaluation only." if data["ood"] else ""
        out += ["", f"The training corpus is `{data['corpus']}`.{ood}"]
    if run:
        rows = [[s, f"{n:,}", f"{run['documents'][s]:,}"] for s, n in run["rows"].items()]
        out += ["", *markdown_table(["split", "activations", "documents"], rows)]
        steps = run.get("steps", {})  # steps that ran; `minutes` may end a stage early
        rows = [[s, f"{steps.get(s, '')}", f"{seconds:,.1f}"] for s, seconds in run["seconds"].items()]
        out += ["", *markdown_table(["stage", "steps", "seconds"], rows)]
        out += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items()) + "."]
    return [*out, ""]


def _figures(run: dict, stage: str) -> list[str]:
    out = ["## How well it does", ""]
    if not run:
        return [*out, "The bundle came without figures. Run `nla evaluate --bundle DIR`.", ""]
    out += [
        "FVE is the fraction of the activations' variance that the reconstruction explains. In brackets there"
        " is a 95 % bootstrap interval over documents. This bundle is the column "
        f"“{BUNDLES.get(stage, stage)}”.",
    ]
    for split, title in SPLITS.items():
        columns = {
            column: [Figure(**f) for f in run[key][split]]
            for key, column in BUNDLES.items()
            if split in run.get(key, {})
        }
        if columns:
            note = run.get("notes", {}).get(split, "")  # older runs have none
            out += ["", f"### {figure_table.split_title(f'{title} (`{split}`)', note)}", ""]
            out += [*([note, ""] if note else []), *figure_table.markdown(columns)]
    return [*out, ""]


def _limits(cfg: LMConfig, name: str) -> list[str]:
    return [
        "## What it cannot do",
        "",
        f"- The verbalizer is a model of {_size(cfg)} parameters, and it invents: a description may be wrong "
        "although it reads well.",
        "- A last line after `…` recalls the last words of the text. It only repeats what the target read.",
        "- FVE measures how much of the activation the words carry. It does not show that they are true.",
        "- Run `nla evaluate` and read its grounding table before you trust an explanation.",
        f"- It is for {name} at this block only, and for texts like those of its training corpus.",
        "",
    ]


def _licence(meta: dict, name: str) -> list[str]:
    theirs = "Apache-2.0" if meta["base_checkpoint"] == DEFAULT_TARGET else "not known here: see its own card"
    return ["## Licence", "", f"This bundle: Apache-2.0. The target, {name}: {theirs}.", ""]
