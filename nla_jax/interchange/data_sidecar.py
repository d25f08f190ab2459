"""The sidecar of a data file, {file}.parquet.nla_meta.yaml: which model, layer, marker and prompts.

Read as strictly as the official reader does: unknown keys inside a block are refused, those beside the
blocks are ignored. Ours is one of these: `nla_jax`.
"""

import dataclasses
import datetime
from pathlib import Path

import nla_jax
from nla_jax import paths
from nla_jax.errors import UserError, shown
from nla_jax.interchange import blocks

SUFFIX = ".nla_meta.yaml"
KIND, SCHEMA = "nla_dataset", 1
STAGES = ("base", "av_sft", "ar_sft", "rl")
EXTRACTION = (
    "base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc",
    "injection_scale", "mse_scale",
)  # fmt: skip
API = {"model": (str,), "max_tokens": (int,), "temperature": (int, float), "instruction_prompt": (str,)}


@dataclasses.dataclass(frozen=True)
class DataMeta:
    """What a data file is.

    Attributes:
      stage: one of STAGES. base_model: the target's name, no more; fingerprint: which weights they are
        (`bundle.fingerprint`), "" where only the name is known.
      tokens, templates: None, or without templates, at most for the stage "base".
      injection_scale: norm of the injected vector, None where the file does not say.
      extraction, api_summaries: the blocks as they stand in the file.
      keeps_texts: the file has the texts that were read.
    """

    dataset_id: str
    stage: str
    row_count: int
    base_model: str
    d_model: int
    layer_index: int
    tokens: blocks.Tokens | None
    templates: blocks.Templates
    extraction: dict
    injection_scale: float | None = None
    fingerprint: str = ""
    api_summaries: dict | None = None
    keeps_texts: bool = True
    parents: tuple[str, ...] = ()

    def facts(self) -> dict:
        """What two files of one data set must agree in, flat."""
        return {
            "base_model": self.base_model,
            "d_model": self.d_model,
            "layer_index": self.layer_index,
            "base_fingerprint": self.fingerprint or None,
            "injection_scale": self.injection_scale,
            "av template": self.templates.av,
            "ar template": self.templates.ar,
            **(dataclasses.asdict(self.tokens) if self.tokens else {}),
        }


def path_of(parquet: str | Path) -> Path:
    """Where the sidecar of a data file lies."""
    parquet = paths.path(parquet)
    return parquet.with_name(parquet.name + SUFFIX)


def read(parquet: str | Path) -> DataMeta:
    """The sidecar of a data file.

    Raises UserError: there is none, it is not valid, of another kind or version, or lacks what its
    stage needs.
    """
    where = path_of(parquet)
    raw = blocks.read(where)
    for key, wanted in (("kind", KIND), ("schema_version", SCHEMA)):
        found = blocks.get(where, raw, key, type(wanted))
        if found != wanted:
            raise UserError(f"{where}: {key} is {shown(found)}, not {wanted!r}")
    stage = blocks.get(where, raw, "stage", str)
    if stage not in STAGES:
        raise UserError(f"{where}: stage is {shown(stage)}, not one of {', '.join(STAGES)}")
    at, extraction = f"{where}: extraction", _extraction(where, raw)
    ours = blocks.get(where, raw, "nla_jax", dict, {})
    d_model = extraction["d_model"]
    scale = blocks.read_scale(at, extraction, "injection_scale", d_model)
    blocks.read_scale(at, extraction, "mse_scale", d_model)
    if scale is None:
        scale = blocks.read_scale(f"{where}: nla_jax", ours, "injection_scale", d_model)
    tokens, templates = _words(where, raw, stage)
    null = type(None)
    api = blocks.get(where, raw, "api_summaries", (dict, null), None)
    if api is not None:
        blocks.known_only(f"{where}: api_summaries", api, API)
        for key in api:
            blocks.get(f"{where}: api_summaries", api, key, API[key])
    parents = blocks.get(where, raw, "parent_datasets", (list, null), None) or []
    if not all(isinstance(p, str) for p in parents):
        raise UserError(f"{where}: parent_datasets is {shown(parents)}, not a list of names")
    return DataMeta(
        dataset_id=blocks.get(where, raw, "dataset_id", str, ""),
        stage=stage,
        row_count=blocks.count(where, raw, "row_count"),
        base_model=extraction["base_model"],
        d_model=d_model,
        layer_index=extraction["layer_index"],
        tokens=tokens,
        templates=templates,
        extraction=extraction,
        injection_scale=scale,
        fingerprint=blocks.get(f"{where}: nla_jax", ours, "base_fingerprint", str, ""),
        api_summaries=api,
        keeps_texts=blocks.get(where, raw, "keep_debug_metadata", bool, True),
        parents=tuple(parents),
    )


def write(parquet: str | Path, meta: DataMeta) -> None:
    """Write the sidecar of a data file; with it the file counts as whole."""
    ours = {"base_fingerprint": meta.fingerprint, "injection_scale": meta.injection_scale}
    if meta.extraction.get("injection_scale") is not None:
        del ours["injection_scale"]
    out = {
        "kind": KIND,
        "schema_version": SCHEMA,
        "dataset_id": meta.dataset_id,
        "stage": meta.stage,
        "row_count": meta.row_count,
        "extraction": meta.extraction,
        "keep_debug_metadata": meta.keeps_texts,
        "tokens": blocks.write_tokens(meta.tokens) if meta.tokens else None,
        # The names that every generation of the official reader knows.
        "prompt_templates": blocks.write_templates(meta.templates, ("actor", "critic")),
        "api_summaries": meta.api_summaries,
        "parent_datasets": list(meta.parents),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
        "git_commit": "",
        "nla_jax": {k: v for k, v in ours.items() if v},
    }
    blocks.write(path_of(parquet), {k: v for k, v in out.items() if v is not None})


def _extraction(where: Path, raw: dict) -> dict:
    block = blocks.get(where, raw, "extraction", dict)
    at = f"{where}: extraction"
    blocks.known_only(at, block, EXTRACTION)
    if not blocks.get(at, block, "base_model", str):
        raise UserError(f"{at}: base_model is empty")
    if (norm := blocks.get(at, block, "norm", str)) != "none":
        raise UserError(f"{at}: norm is {shown(norm)}: only raw vectors ('none') can be used")
    blocks.count(at, block, "d_model")
    blocks.count(at, block, "layer_index", 0)
    blocks.get(at, block, "corpus", str, "")
    if "positions_per_doc" in block:
        blocks.count(at, block, "positions_per_doc")
    part = blocks.get(at, block, "corpus_slice", dict, {})
    blocks.known_only(f"{at}: corpus_slice", part, ("start", "length"))
    for key in part:
        blocks.count(f"{at}: corpus_slice", part, key, 0)
    return block


def _words(where: Path, raw: dict, stage: str) -> tuple[blocks.Tokens | None, blocks.Templates]:
    """Tokens and templates, which every stage but "base" must have."""
    base = stage == "base"
    if base and raw.get("tokens") is None:
        tokens = None
    else:
        tokens = blocks.read_tokens(where, raw, strict=True)
    if base and raw.get("prompt_templates") is None:
        return tokens, blocks.Templates()
    templates = blocks.read_templates(where, raw, strict=True)
    needed = {"base": (), "ar_sft": ("av", "ar")}.get(stage, ("av",))
    for role in needed:
        if getattr(templates, role) is None:
            raise UserError(f"{where}: prompt_templates: the {role} template is missing (stage {stage})")
    if stage == "ar_sft" and not tokens.critic_suffix_ids:
        ends_bare = blocks.ours(where, "ar", templates.ar).endswith("{explanation}")
        if tokens.critic_suffix_ids is None or not ends_bare:
            raise UserError(f"{where}: tokens: critic_suffix_ids is missing (stage {stage})")
    return tokens, templates
