"""The sidecar of a data file, {file}.parquet.nla_meta.yaml: its model, layer, marker and prompts.

The reader is as strict as the official one: it rejects unknown keys inside a block, and ignores unknown keys
at the top level. Our own block, `nla_jax`, is such a key.
"""

import dataclasses
import datetime
from pathlib import Path

import nla_jax
from nla_jax.errors import UserError, short_repr
from nla_jax.interchange import sidecar_common
from nla_jax.util import paths

SUFFIX = ".nla_meta.yaml"
KIND, SCHEMA = "nla_dataset", 1
DATA_STAGES = ("base", "av_sft", "ar_sft", "rl")
EXTRACTION = (
    "base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc",
    "injection_scale", "mse_scale",
)
API = {"model": (str,), "max_tokens": (int,), "temperature": (int, float), "instruction_prompt": (str,)}


@dataclasses.dataclass(frozen=True)
class DataMeta:
    """The contents of a data file's sidecar.

    Attributes:
      stage: one of DATA_STAGES. base_model: the target's name.
      fingerprint: that of the target's weights (`weights.fingerprint`), "" if only the name is known.
      tokens, templates: only in stage "base" may tokens be None and templates be empty.
      injection_scale: norm of the injected vector, None if the file has none.
      extraction, api_summaries: the unchanged blocks of the file.
      keeps_texts: whether the file has the texts that the target read.
    """

    dataset_id: str
    stage: str
    row_count: int
    base_model: str
    d_model: int
    layer_index: int
    tokens: sidecar_common.Tokens | None
    templates: sidecar_common.Templates
    extraction: dict
    injection_scale: float | None = None
    fingerprint: str = ""
    api_summaries: dict | None = None
    keeps_texts: bool = True
    parents: tuple[str, ...] = ()

    def facts(self) -> dict:
        """Return the facts in which the files of one data set must agree, as a flat dict."""
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
    """Return the path of a data file's sidecar."""
    parquet = paths.path(parquet)
    return parquet.with_name(parquet.name + SUFFIX)


def read(parquet: str | Path) -> DataMeta:
    """Read the sidecar of a data file.

    Raises UserError if it is missing, invalid, of another kind or version, or lacks a key that its stage
    needs.
    """
    where = path_of(parquet)
    raw = sidecar_common.read(where)
    for key, wanted in (("kind", KIND), ("schema_version", SCHEMA)):
        found = sidecar_common.get(where, raw, key, type(wanted))
        if found != wanted:
            raise UserError(f"{where}: {key} is {short_repr(found)}, not {wanted!r}")
    stage = sidecar_common.get(where, raw, "stage", str)
    if stage not in DATA_STAGES:
        raise UserError(f"{where}: stage is {short_repr(stage)}, not one of {', '.join(DATA_STAGES)}")
    at, extraction = f"{where}: extraction", _extraction(where, raw)
    ours = sidecar_common.get(where, raw, "nla_jax", dict, {})
    d_model = extraction["d_model"]
    scale = sidecar_common.read_scale(at, extraction, "injection_scale", d_model)
    sidecar_common.read_scale(at, extraction, "mse_scale", d_model)
    if scale is None:
        scale = sidecar_common.read_scale(f"{where}: nla_jax", ours, "injection_scale", d_model)
    tokens, templates = _words(where, raw, stage)
    null = type(None)
    api = sidecar_common.get(where, raw, "api_summaries", (dict, null), None)
    if api is not None:
        sidecar_common.check_keys(f"{where}: api_summaries", api, API)
        for key in api:
            sidecar_common.get(f"{where}: api_summaries", api, key, API[key])
    parents = sidecar_common.get(where, raw, "parent_datasets", (list, null), None) or []
    if not all(isinstance(p, str) for p in parents):
        raise UserError(f"{where}: parent_datasets is {short_repr(parents)}, not a list of names")
    return DataMeta(
        dataset_id=sidecar_common.get(where, raw, "dataset_id", str, ""),
        stage=stage,
        row_count=sidecar_common.count(where, raw, "row_count"),
        base_model=extraction["base_model"],
        d_model=d_model,
        layer_index=extraction["layer_index"],
        tokens=tokens,
        templates=templates,
        extraction=extraction,
        injection_scale=scale,
        fingerprint=sidecar_common.get(f"{where}: nla_jax", ours, "base_fingerprint", str, ""),
        api_summaries=api,
        keeps_texts=sidecar_common.get(where, raw, "keep_debug_metadata", bool, True),
        parents=tuple(parents),
    )


def write(parquet: str | Path, meta: DataMeta) -> None:
    """Write the sidecar of a data file. A data file without a sidecar counts as incomplete."""
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
        "tokens": sidecar_common.write_tokens(meta.tokens) if meta.tokens else None,
        # Every version of the official reader knows these names.
        "prompt_templates": sidecar_common.write_templates(meta.templates, ("actor", "critic")),
        "api_summaries": meta.api_summaries,
        "parent_datasets": list(meta.parents),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
        "git_commit": "",
        "nla_jax": {k: v for k, v in ours.items() if v},
    }
    sidecar_common.write(path_of(parquet), {k: v for k, v in out.items() if v is not None})


def _extraction(where: Path, raw: dict) -> dict:
    block = sidecar_common.get(where, raw, "extraction", dict)
    at = f"{where}: extraction"
    sidecar_common.check_keys(at, block, EXTRACTION)
    if not sidecar_common.get(at, block, "base_model", str):
        raise UserError(f"{at}: base_model is empty")
    if (norm := sidecar_common.get(at, block, "norm", str)) != "none":
        raise UserError(f"{at}: norm is {short_repr(norm)}: only raw vectors ('none') are supported")
    sidecar_common.count(at, block, "d_model")
    sidecar_common.count(at, block, "layer_index", 0)
    sidecar_common.get(at, block, "corpus", str, "")
    if "positions_per_doc" in block:
        sidecar_common.count(at, block, "positions_per_doc")
    part = sidecar_common.get(at, block, "corpus_slice", dict, {})
    sidecar_common.check_keys(f"{at}: corpus_slice", part, ("start", "length"))
    for key in part:
        sidecar_common.count(f"{at}: corpus_slice", part, key, 0)
    return block


def _words(
    where: Path, raw: dict, stage: str
) -> tuple[sidecar_common.Tokens | None, sidecar_common.Templates]:
    """Return tokens and templates, which every stage except "base" must have."""
    base = stage == "base"
    if base and raw.get("tokens") is None:
        tokens = None
    else:
        tokens = sidecar_common.read_tokens(where, raw, strict=True)
    if base and raw.get("prompt_templates") is None:
        return tokens, sidecar_common.Templates()
    templates = sidecar_common.read_templates(where, raw, strict=True)
    needed = {"base": (), "ar_sft": ("av", "ar")}.get(stage, ("av",))
    for role in needed:
        if getattr(templates, role) is None:
            raise UserError(f"{where}: prompt_templates: the {role} template is missing (stage {stage})")
    if stage == "ar_sft" and not tokens.critic_suffix_ids:
        ends_bare = sidecar_common.to_our_template(where, "ar", templates.ar).endswith("{explanation}")
        if tokens.critic_suffix_ids is None or not ends_bare:
            raise UserError(f"{where}: tokens: critic_suffix_ids is missing (stage {stage})")
    return tokens, templates
