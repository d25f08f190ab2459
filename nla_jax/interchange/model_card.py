"""The card of a bundle or an exported pair: README.md, made from the sidecar and its run's summary."""

import math

from nla_jax import bundle, configs
from nla_jax.errors import short_repr
from nla_jax.evaluate import figure_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.interchange import card_metadata
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.weights import DEFAULT_TARGET
from nla_jax.util.tables import markdown_table

FILE = "README.md"
NO_LICENCE = "The licence of these files is not stated."
SPLITS = {"heldout": "Held-out documents of the training corpus", "ood": "Documents of another corpus"}
BUNDLES = {"warm_start": "warm start", "rl": "after RL"}  # key of a summary -> column of the card
_ALWAYS = (
    "- FVE measures how much of the activation the words carry. It does not show that they are true.",
    "- Run `nla evaluate` and read its grounding table before you trust an explanation.",
)
ROLES = {"": "A natural language autoencoder", "av": "The verbalizer (AV) of a natural language autoencoder",
         "ar": "The reconstructor (AR) of a natural language autoencoder"}


def write(meta: dict, role: str = "", *, licence: str = "", base: str = "", name: str = "",
          adapter: bool = False) -> str:
    """Return the card in Markdown, with front matter.

    Figures that were not measured are left out, and named.

    Args:
      meta: the sidecar of a bundle; "run" in it is the run's summary.json, with the figures of `nla evaluate`
        under "evaluation".
      role: "av" or "ar" for one directory of an exported pair.
      adapter: whether that directory is a PEFT adapter.
      licence, base: instead of those that the target gives (`card_metadata`). name: of the model on the Hub.
    """
    cfg, layer = LMConfig.of_plain(meta["lm"]), meta["extraction"]["layer_index"]
    target = target_name(meta["base_checkpoint"])
    figures = figures_of(meta)
    title = f"{ROLES[role]} of {target}, block {layer}"
    lines = [
        f"# {title}",
        "",
        f"This autoencoder explains activations of {target} in English, and rebuilds them from the words "
        f"alone. An activation has {cfg.d_model} numbers and is the output of block {layer}, of blocks 0 to "
        f"{cfg.n_blocks - 1}. {_roles(meta)} The target ({_size(cfg)} parameters) is not in these files: "
        f"`{meta['base_checkpoint']}`.",
        "",
        *_headline(meta, figures),
        *_use(meta, role, name, adapter),
        *_training(meta),
        *_figures(meta.get("run") or {}, meta["stage"]),
        *_limits(cfg, target, figures),
        *_licence(meta, target, licence),
    ]
    fields = card_metadata.front_matter(meta, figures, name or title, licence, base)
    return card_metadata.join_card(fields, "\n".join(lines))


def write_for_model(sidecar, target: str, *, licence: str = "", name: str = "") -> str:
    """Return the card of one directory of a pair from its sidecar (`model_sidecar`), which has no figures."""
    title = f"{ROLES[sidecar.role]} of {target_name(target)}, block {sidecar.layer}"
    meta = {"base_checkpoint": target}
    lines = [
        f"# {title}", "",
        f"An activation has {sidecar.d_model} numbers and is the output of block {sidecar.layer} of "
        f"`{target}`.", "", *_headline(meta, {}), *_use(meta, sidecar.role, name), "## What it cannot do", "",
        *_ALWAYS, "", *_licence(meta, target_name(target), licence),
    ]
    fields = card_metadata.front_matter(meta, {}, name or title, licence)
    return card_metadata.join_card(fields, "\n".join(lines))


def figures_of(meta: dict) -> dict[str, list[Figure]]:
    """Return split -> figures of this bundle: the run's own, then what only `nla evaluate` measured."""
    run = meta.get("run") or {}
    key = "rl" if meta["stage"] == "rl" else "warm_start"
    out = {split: [Figure(**f) for f in run.get(key, {}).get(split, [])] for split in SPLITS}
    for split, found in (run.get("evaluation") or {}).items():
        known = {f.name for f in out.get(split, [])}
        out.setdefault(split, []).extend(Figure(**f) for f in found if f["name"] not in known)
    return {split: found for split, found in out.items() if found}


def _headline(meta: dict, figures: dict[str, list[Figure]]) -> list[str]:
    out = ["## Figures", ""]
    if not figures:
        return [*out, "The bundle came without figures. Run `nla evaluate --bundle DIR`.", ""]
    known = {split: {f.name: f for f in found} for split, found in figures.items()}
    settings = ((meta.get("training") or {}).get("config") or {}).get("eval") or {}
    at = f" (temperature {settings['temperature']:g})" if "temperature" in settings else ""
    rows = [[words + (at if "sampled" in words else ""), reader,
             *(figure_table.cell(found.get(name)) or "not measured" for found in known.values())]
            for name, (words, reader) in card_metadata.HEADLINE.items()
            if any(name in found for found in known.values())]
    notes = (meta.get("run") or {}).get("notes", {})  # older runs have none
    columns = [f"{figure_table.split_title(split, notes.get(split, ''))}, n = {max(f.n for f in found)}"
               for split, found in figures.items()]
    missing = [f"{words}, by {reader}" for name, (words, reader) in card_metadata.HEADLINE.items()
               if not any(name in found for found in known.values())]
    missing += [f"any figure on {SPLITS[split][0].lower()}{SPLITS[split][1:]} (`{split}`)"
                for split in SPLITS if split not in figures]
    out += [
        "FVE is the fraction of the activations' variance that the reconstruction explains; 1 is exact. AR "
        "was trained together with AV. The frozen target was not: no private code between AV and AR can "
        "raise its figure. In brackets there is a 95 % bootstrap interval over documents.", "",
        *markdown_table(["figure", "read by", *columns], rows),
    ]
    out += [line for split in figures if notes.get(split) for line in ("", notes[split])]
    if missing:
        out += ["", f"Not measured: {'; '.join(missing)}. `nla evaluate` measures them."]
    return [*out, ""]


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


def _use(meta: dict, role: str, name: str, adapter: bool = False) -> list[str]:
    if role:
        other = {"av": "ar", "ar": "av"}[role]
        here = {role: name or f"{role.upper()}_DIR", other: _sibling(name, role, other)}
        return [
            "## How to use it", "",
            f"It is one half of a pair; the other is {here[other]}. [nla_jax](https://pypi.org/project/nla-jax/)"
            + (" reads both; peft loads each onto the target." if adapter else
               " reads both, and so does the official code."), "",
            "```bash",
            f"nla import  --av {here['av']} --ar {here['ar']} --out bundle",
            'nla explain --bundle bundle --text "The cat sat on the" --tokens=-1:',
            "```", "",
        ]
    place = name or "DIR"
    where = f"{name} is this repository." if name else (
        "DIR is this directory. Omit `--bundle DIR` and the argument of `load` to use the bundle that the "
        "package ships.")
    get = [f"hf download {name} --local-dir DIR", ""] if name else []
    place = "DIR" if name else place
    return [
        "## How to use it",
        "",
        "```bash",
        *get,
        f'nla explain  --bundle {place} --text "The cat sat on the" --tokens=-1:',
        f"nla evaluate --bundle {place}",
        f"nla serve    --bundle {place}",
        "```",
        "",
        "```python",
        "import nla_jax",
        "",
        f'nla = nla_jax.load("{place}")',
        'nla.round_trip("The cat sat on the", positions=[-1])',
        "```",
        "",
        where,
        "",
    ]


def _sibling(name: str, role: str, other: str) -> str:
    """Return the repository of the other half of a pair."""
    stem = name.removesuffix(f"-{role}")
    return f"{stem}-{other}" if stem != name else f"{other.upper()}_DIR"


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
    if not run:
        return []
    out = ["## All figures of the run", "", f"This bundle is the column “{BUNDLES.get(stage, stage)}”."]
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


def _limits(cfg: LMConfig, name: str, figures: dict[str, list[Figure]]) -> list[str]:
    true = next((f for found in figures.values() for f in found if f.name == "claim_precision"), None)
    share = f" Of its claims {true.value:.0%} are true of the text, by rules." if true else ""
    return [
        "## What it cannot do",
        "",
        f"- The verbalizer is a model of {_size(cfg)} parameters, and it invents: a description may be wrong "
        f"although it reads well.{share}",
        "- A last line after `…` recalls the last words of the text. It only repeats what the target read.",
        *_ALWAYS,
        f"- It is for {name} at this block only, and for texts like those of its training corpus.",
        "",
    ]


def _licence(meta: dict, name: str, licence: str) -> list[str]:
    ours = licence or card_metadata.licence_of(meta["base_checkpoint"])
    theirs = "Apache-2.0" if meta["base_checkpoint"] == DEFAULT_TARGET else "see its own card"
    said = f"These files: {ours}." if ours else NO_LICENCE
    return ["## Licence", "", f"{said} The target, {name}: {theirs}.", ""]
