"""nla_meta.yaml of a released AV or AR directory: reads and writes both versions of the schema."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from nla_jax.errors import UserError, short_repr
from nla_jax.interchange import sidecar_common
from nla_jax.interchange.sidecar_common import SQRT_D, Templates, Tokens

NAME, KIND, NEWEST = "nla_meta.yaml", "nla_model", 2
ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
# The keys that are read; `more` keeps all others at the top level.
READ = (
    "kind", "schema_version", "role", "stage", "base_checkpoint", "d_model", "extraction", "tokens",
    "prompt_templates", "critic", "ar", "extraction_layer_index", "layer", "chat_template_kwargs",
)


@dataclasses.dataclass(frozen=True)
class ModelSidecar:
    """The contents of a model's sidecar.

    role: "av" or "ar". layer: K, the block whose output is h, or None if the sidecar has none.
    injection_scale, mse_scale: the norms to which vectors are scaled for injection and for the error, None
    for raw vectors. injection: as in `verbalizer.INJECTIONS`, "" if the sidecar does not say; with
    "norm_matched", injection_scale is a fraction of the residual's norm. enable_thinking: the variable of
    that name in the chat template, None if the sidecar does not say.
    """

    role: str
    d_model: int
    tokens: Tokens
    templates: Templates
    injection_scale: float | None
    mse_scale: float | None
    layer: int | None = None
    stage: str = ""
    base_checkpoint: str = ""
    injection: str = ""
    enable_thinking: bool | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(directory: str | Path, role: str = "") -> ModelSidecar:
    """Read the sidecar in a model's directory. Raises UserError if it is missing or invalid.

    role: of an adapter, "av" or "ar". Its sidecar may be that of its training data, which has no role.
    """
    path = Path(directory) / NAME
    raw = sidecar_common.read(path)
    if role and raw.get("kind") == "nla_dataset":
        raw = _of_dataset(path, raw, role)
    return parse(path, raw)


def _of_dataset(where: Path, raw: dict, role: str) -> dict:
    """Return the mapping of a model's sidecar from that of its training data."""
    extraction = sidecar_common.get(where, raw, "extraction", dict)
    return {
        **{k: raw[k] for k in ("stage", "tokens", "prompt_templates") if k in raw},
        "kind": KIND,
        "role": role,
        "base_checkpoint": extraction.get("base_model"),
        "d_model": extraction.get("d_model"),
        "extraction": {"injection_scale": SQRT_D} | extraction,
    }


def parse(where: str | Path, raw: dict) -> ModelSidecar:
    """Parse a mapping read from `where`. Unknown keys are allowed; wrong types raise UserError."""
    kind = sidecar_common.get(where, raw, "kind", str)
    if kind != KIND:
        hint = "; give that bundle to `nla evaluate` and `nla explain`" if kind == "nla_bundle" else ""
        raise UserError(f"{where}: kind is {short_repr(kind)}, not {KIND!r}{hint}")
    version = sidecar_common.get(where, raw, "schema_version", int, 1)
    if not 1 <= version <= NEWEST:
        raise UserError(f"{where}: schema_version {short_repr(version)} is not 1 to {NEWEST}")
    role = sidecar_common.get(where, raw, "role", str)
    if role not in ROLES:
        raise UserError(f"{where}: role is {short_repr(role)}, not one of {', '.join(ROLES)}")
    text = (str, type(None))
    d_model = sidecar_common.count(where, raw, "d_model")
    extraction = sidecar_common.get(where, raw, "extraction", (dict, type(None)), None) or {}
    at = f"{where}: extraction"
    return ModelSidecar(
        role=ROLES[role],
        d_model=d_model,
        tokens=sidecar_common.read_tokens(where, raw, strict=False),
        templates=sidecar_common.read_templates(where, raw, strict=False),
        injection_scale=sidecar_common.read_scale(at, extraction, "injection_scale", d_model),
        mse_scale=sidecar_common.read_scale(
            at, extraction, "mse_scale", d_model, absent=SQRT_D
        ),
        layer=_layer(where, raw, extraction),
        stage=sidecar_common.get(where, raw, "stage", text, None) or "",
        base_checkpoint=sidecar_common.get(where, raw, "base_checkpoint", text, None) or "",
        injection=sidecar_common.get(at, extraction, "injection", str, ""),
        enable_thinking=sidecar_common.get(
            f"{where}: chat_template_kwargs",
            sidecar_common.get(where, raw, "chat_template_kwargs", (dict, type(None)), None) or {},
            "enable_thinking", (bool, type(None)), None,
        ),
        more={k: v for k, v in raw.items() if k not in READ},
    )


def _layer(where: str | Path, raw: dict, extraction: dict) -> int | None:
    """Return K from any of its keys, or None. `num_hidden_layers` is an older name of the same number."""
    critic = {}
    for name in ("ar", "critic"):
        critic |= sidecar_common.get(where, raw, name, (dict, type(None)), None) or {}
    older = "extraction_layer_index" if "extraction_layer_index" in critic else "num_hidden_layers"
    said = {
        "extraction_layer_index": raw,
        "layer": raw,
        "extraction: layer_index": extraction,
        f"critic: {older}": critic,
    }
    found = {}
    for name, block in said.items():
        key = name.split(": ")[-1]
        if block.get(key) is not None:
            found[name] = sidecar_common.count(where, block, key, least=0)
    if len(set(found.values())) > 1:
        raise UserError(f"{where} has different layers: {found}")
    return next(iter(found.values()), None)


def check_agreement(av_dir: str | Path, av: ModelSidecar, ar_dir: str | Path, ar: ModelSidecar) -> None:
    """Raise UserError, with the names of both files, if the sidecars of a pair disagree."""

    def facts(s: ModelSidecar) -> dict:
        return {
            "d_model": s.d_model,
            "extraction_layer_index": s.layer,
            "injection": s.injection or None,
            "injection_scale": s.injection_scale,
            "mse_scale": s.mse_scale,
            "chat_template_kwargs: enable_thinking": s.enable_thinking,
            **{f"tokens: {k}": v for k, v in dataclasses.asdict(s.tokens).items()},
            **{f"prompt_templates: {k}": v for k, v in dataclasses.asdict(s.templates).items()},
        }

    sidecar_common.check_same(Path(av_dir) / NAME, facts(av), Path(ar_dir) / NAME, facts(ar))


def to_mapping(sidecar: ModelSidecar, schema: int = NEWEST) -> dict:
    """Return the mapping of a sidecar of this schema. Its scales are numbers, as the client needs them."""
    import nla_jax

    new = schema > 1
    names = ("av", "ar") if new else ("actor", "critic")
    critic = {"extraction_layer_index" if new else "num_hidden_layers": sidecar.layer}
    return {
        "kind": KIND,
        "schema_version": schema,
        "role": names[("av", "ar").index(sidecar.role)],
        "stage": sidecar.stage,
        "base_checkpoint": sidecar.base_checkpoint,
        "d_model": sidecar.d_model,
        **({"extraction_layer_index": sidecar.layer} if new else {}),
        "extraction": {
            "injection_scale": sidecar.injection_scale,
            "mse_scale": sidecar.mse_scale,
            **({"injection": sidecar.injection} if sidecar.injection else {}),
        },
        **({} if sidecar.enable_thinking is None else
           {"chat_template_kwargs": {"enable_thinking": sidecar.enable_thinking}}),
        "tokens": sidecar_common.write_tokens(sidecar.tokens),
        "prompt_templates": sidecar_common.write_templates(sidecar.templates, names),
        **({"critic": critic} if sidecar.role == "ar" else {}),
        "trained_on": [],
        "parent_checkpoints": [],
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
        **sidecar.more,
    }


def save(directory: str | Path, sidecar: ModelSidecar, schema: int = NEWEST) -> None:
    sidecar_common.write(Path(directory) / NAME, to_mapping(sidecar, schema))
