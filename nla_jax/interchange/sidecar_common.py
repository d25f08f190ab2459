"""The common parts of the official sidecars of models and data: strict readers of their YAML blocks.

Templates in this module are the official ones, for `str.format`. AV's has the field {injection_char}, AR's
has {explanation}, and literal braces are doubled. `to_our_template` and `to_official_template` convert them.
"""

import dataclasses
import math
import string
from pathlib import Path
from typing import Any

from nla_jax.errors import UserError, short_repr
from nla_jax.util import paths

LARGEST = 1 << 20  # maximum size in bytes; a sidecar has a few thousand
SQRT_D = "sqrt_d_model"
FIELDS = {"av": ("injection_char", "marker"), "ar": ("explanation", "explanation")}  # official name, our name

@dataclasses.dataclass(frozen=True)
class Tokens:
    """The marker, the ids around it, and the ids that an AR prompt ends with: () if it ends with the
    explanation, None if the sidecar has no such key."""

    injection_char: str
    injection_token_id: int
    injection_left_neighbor_id: int
    injection_right_neighbor_id: int
    critic_suffix_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Templates:
    """Prompt templates in the official form; None if the sidecar has none."""

    av: str | None = None
    ar: str | None = None


def read(path: str | Path) -> dict:
    """Read the mapping in a YAML file. Raises UserError if the file is missing or is no such mapping."""
    import yaml

    path = paths.path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; put the sidecar into the directory of its files")
    if (size := paths.size(path)) > LARGEST:
        raise UserError(f"{path} has {size} bytes: too many for a sidecar")
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{path}: not valid YAML ({first[:200]})") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a mapping of names to values")
    return value


def as_yaml(value: dict) -> str:
    """Return a sidecar as text."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def write(path: str | Path, value: dict) -> None:
    """Write a sidecar atomically."""
    paths.write(paths.path(path), as_yaml(value))


def check_keys(where: str | Path, block: dict, known) -> None:
    """Raise UserError for a key that is not in `known`."""
    if extra := [k for k in block if k not in known]:
        raise UserError(f"{where}: unknown key {extra[0]!r}; known are {', '.join(sorted(known))}")


def get(where: str | Path, block: dict, key: str, kind: type | tuple[type, ...], *default) -> Any:
    """Return block[key], which must have exactly this type (True is no int); `default` if the key is absent.

    Raises UserError with the file, the key and the value.
    """
    if key not in block:
        if default:
            return default[0]
        raise UserError(f"{where}: {key} is missing")
    value, kinds = block[key], kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{where}: {key} is {short_repr(value)}, not {wanted}")
    return value


def token_id(where: str | Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise UserError(f"{where}: {key} is {short_repr(value)}, not a token id")
    return value


def count(where: str | Path, block: dict, key: str, least: int = 1) -> int:
    """Return block[key]. Raises UserError unless it is an integer of at least `least`."""
    value = get(where, block, key, int)
    if not least <= value < 2**31:
        raise UserError(f"{where}: {key} is {short_repr(value)}, not a number from {least}")
    return value


def read_tokens(where: str | Path, raw: dict, *, strict: bool) -> Tokens:
    """Read the `tokens` block of a sidecar's mapping `raw`. `strict` rejects unknown keys."""
    block = get(where, raw, "tokens", dict)
    at = f"{where}: tokens"
    names = [f.name for f in dataclasses.fields(Tokens)]
    if strict:
        check_keys(at, block, names)
    char = get(at, block, "injection_char", str)
    if not char:
        raise UserError(f"{at}: injection_char is empty")
    ids = [token_id(at, name, get(at, block, name, int)) for name in names[1:4]]
    suffix = get(at, block, "critic_suffix_ids", (list, type(None)), None)
    if suffix is not None:
        suffix = tuple(token_id(at, "critic_suffix_ids", i) for i in suffix)
    return Tokens(char, *ids, critic_suffix_ids=suffix)


def write_tokens(tokens: Tokens) -> dict:
    suffix = tokens.critic_suffix_ids
    return {**dataclasses.asdict(tokens), "critic_suffix_ids": None if suffix is None else list(suffix)}


def read_templates(where: str | Path, raw: dict, *, strict: bool) -> Templates:
    """Read the `prompt_templates` block with either pair of names: {av, ar} or {actor, critic}."""
    block = get(where, raw, "prompt_templates", dict)
    at = f"{where}: prompt_templates"
    if strict:
        check_keys(at, block, ("av", "ar", "actor", "critic"))
    found = {}
    for new, old in (("av", "actor"), ("ar", "critic")):
        both = [get(at, block, name, (str, type(None)), None) for name in (new, old)]
        if None not in both and both[0] != both[1]:
            raise UserError(f"{at}: {new} and {old} are two names of one template and differ; remove one")
        found[new] = both[0] if both[0] is not None else both[1]
        if found[new] is not None:
            to_our_template(at, new, found[new])
    return Templates(**found)


def write_templates(templates: Templates, names: tuple[str, str] = ("av", "ar")) -> dict:
    """Return the `prompt_templates` block. names: ("actor", "critic") for data and for older models."""
    both = zip(names, (templates.av, templates.ar), strict=True)
    return {name: text for name, text in both if text is not None}


def to_our_template(where: str | Path, role: str, template: str) -> str:
    """Convert the official template of `role` ("av" or "ar") to that of `nla_jax.prompts`.

    Raises UserError unless it has its field exactly once, and no other field.
    """
    official_field, our_field = FIELDS[role]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UserError(f"{where}: {role} template {short_repr(template)}: {e}") from e
    fields = [part[1:] for part in parts if part[1] is not None]
    if fields != [(official_field, "", None)]:
        raise UserError(
            f"{where}: {role} template {short_repr(template)} must hold {{{official_field}}} once, and no "
            "other field"
        )
    literal = [text + (f"{{{our_field}}}" if field else "") for text, field, *_ in parts]
    out = "".join(literal)
    if out.count(f"{{{our_field}}}") != 1:
        raise UserError(
            f"{where}: {role} template {short_repr(template)} also contains a literal {{{our_field}}}"
        )
    return out


def to_official_template(role: str, template: str) -> str:
    """Convert our template to the official one: the inverse of `to_our_template`."""
    official_field, our_field = FIELDS[role]
    halves = template.split(f"{{{our_field}}}")
    return f"{{{official_field}}}".join(h.replace("{", "{{").replace("}", "}}") for h in halves)


def read_scale(
    where: str | Path, block: dict, key: str, d_model: int, absent: float | str | None = None
) -> float | None:
    """Return the norm that vectors are scaled to: a positive number, or None for raw vectors.

    In the file it is a number, null (raw) or "sqrt_d_model". If the key is missing, `absent` is used.
    """
    value = block.get(key, absent)
    if value is None:
        return None
    if value == SQRT_D:
        return math.sqrt(d_model)
    if type(value) in (int, float) and 0 < value < 1e30:
        return float(value)
    raise UserError(f"{where}: {key} is {short_repr(value)}, not a positive number, null or {SQRT_D}")


def check_same(name_a: str | Path, a: dict, name_b: str | Path, b: dict) -> None:
    """Raise UserError, with the names of both files, if two flat dicts differ in a common key.

    None counts as missing. Floats may differ by a relative error of 1e-6.
    """
    for key in a:
        left, right = a[key], b.get(key)
        if left is None or right is None:
            continue
        near = type(left) is float and type(right) is float and math.isclose(left, right, rel_tol=1e-6)
        if left != right and not near:
            raise UserError(
                f"{name_a} and {name_b} do not belong together: {key} is {short_repr(left)} in the first and "
                f"{short_repr(right)} in the second"
            )
