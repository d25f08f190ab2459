"""Find what `--bundle` and `nla_jax.load` were given: a bundle, a run, a released pair, or nothing.

A released pair is opened in place. Its bundle, in the cache, has only a sidecar, which refers to the pair's
directories (`bundle.pair_of`).
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import import_pair, model_sidecar
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.files import peft_config
from nla_jax.lm.files.peft_read import HEAD
from nla_jax.util import path_kinds, paths

_OTHER = {"av": "ar", "ar": "av", "actor": "critic", "critic": "actor"}  # roles in the names of directories


def find(where: str | Path | Sequence = "", *, target: str = "", revision: str = "") -> Path | str:
    """Return the directory of a bundle.

    Args:
      where: a bundle; a run; AV or AR of a released pair, or the directory that contains both, or "AV,AR", or
        the two in a list; a Hub id of one of these. "": the bundle that nla_jax ships.
      target: the model that a pair explains. "": that of AV's sidecar.
      revision: of Hub ids: a branch, tag or commit.

    AV, AR or both may be PEFT adapters. Raises UserError as `import_pair.read_pair`, and if the other half of
    a pair is not found. A directory of another kind is returned as it is.
    """
    if isinstance(where, Sequence) and not isinstance(where, str):
        if len(where) != 2:
            raise UserError(f"{len(where)} places for a pair; give AV and AR")
        return _link(*(_fetch(str(w), revision) for w in where), target)
    where = str(where)
    if not where:
        print(f"no --bundle given: using the bundle that nla_jax ships, {bundle.shipped_bundle()}",
              file=sys.stderr)
        return bundle.SHIPPED
    if "," in where and not paths.path(where).exists():
        return find(where.split(","), target=target, revision=revision)
    path = _fetch(where, revision)
    if peft_config.is_adapter(path) and not (path / path_kinds.SIDECAR).is_file():
        raise UserError(f"{where} is a PEFT adapter without {path_kinds.SIDECAR}, which has the marker, the "
                        "layer and the prompts; put the sidecar of its training data there")
    role = role_of(path)
    if role:
        both = {role: path, _OTHER[role]: _other_half(where, path, role, revision)}
        return _link(both["av"], both["ar"], target)
    pairs = {"av": [], "ar": []}
    for child in _children(path) if not (path / path_kinds.SIDECAR).is_file() else ():
        if role := role_of(child):
            pairs[role].append(child)
    if not any(pairs.values()):
        return path_kinds.bundle_in(path)
    if (len(pairs["av"]), len(pairs["ar"])) != (1, 1):
        found = ", ".join(f"{r.upper()} {p.name}" for r, ps in pairs.items() for p in ps)
        raise UserError(f"{where} contains {found}: give one AV and one AR, as AV,AR")
    return _link(*pairs["av"], *pairs["ar"], target)


def role_of(directory: Path) -> str:
    """Return "av" or "ar" for a directory of a released pair, "" for any other."""
    path = directory / path_kinds.SIDECAR
    if not path.is_file():
        return ""
    if peft_config.is_adapter(directory):
        # The sidecar may be that of the training data, which has no role.
        is_ar = (directory / peft_config.AR_META).is_file() or (directory / HEAD).is_file()
        return model_sidecar.load(directory, "ar" if is_ar else "av").role
    return model_sidecar.load(directory).role if (directory / "config.json").is_file() else ""


def _fetch(where: str, revision: str) -> Path:
    """Return the local path of a directory or Hub id; a path that does not exist is returned as it is."""
    path = paths.path(where)
    if path.exists() and not paths.is_remote(where):
        return path
    if paths.is_remote(where):
        return paths.local_copy(where) if (path / path_kinds.SIDECAR).is_file() else path
    if not weights.is_hub_id(where):
        return path
    try:
        return weights.resolve(where, revision)
    except UserError as e:
        raise UserError(f"{where}: there is no such directory, and as a Hub id: {e}") from e


def _children(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _other_half(where: str, path: Path, role: str, revision: str) -> Path:
    """Return the directory of AR for that of AV, or of AV for that of AR. Raises UserError if there is not
    exactly one."""
    head, slash, name = where.rstrip("/").rpartition("/")
    other = _swap(name)
    ask = f"{where} is the {role.upper()} of a pair; give both, as AV,AR"
    if not paths.path(where).exists():
        if other == name:
            raise UserError(f"{ask}: its name does not say that of the other half")
        return _fetch(head + slash + other, revision)
    beside = paths.absolute(path).parent
    wanted = _OTHER[role]
    if other != name and (beside / other).is_dir() and role_of(beside / other) == wanted:
        return beside / other
    found = [p for p in _children(beside) if role_of(p) == wanted]
    if len(found) != 1:
        raise UserError(f"{ask}: {beside} contains {len(found) or 'no'} {wanted.upper()}"
                        + ("s" if len(found) > 1 else ""))
    return found[0]


def _swap(name: str) -> str:
    """Exchange the last role in the name of a directory: "nla-L20-av" -> "nla-L20-ar"."""
    found = list(re.finditer(r"(?<![A-Za-z])(av|ar|actor|critic)(?![A-Za-z])", name))
    return name[: found[-1].start()] + _OTHER[found[-1][0]] + name[found[-1].end() :] if found else name


def _link(av_dir: Path, ar_dir: Path, target: str) -> Path:
    """Write the sidecar of a bundle that refers to a pair into the cache, and return its directory."""
    import yaml

    places = {"av": paths.absolute(av_dir), "ar": paths.absolute(ar_dir)}
    for role, place in places.items():
        if role_of(place) != role:
            what = f"the {_OTHER[role].upper()}" if role_of(place) else "no AV or AR"
            raise UserError(f"{place} is {what} of a released pair; give AV first, then AR, as AV,AR")
    meta, tok = import_pair.read_pair(places["av"], places["ar"], target=target)
    pair = {role: str(place) for role, place in places.items()}
    pair |= {f"{role}_digest": weights.digest(place) for role, place in places.items()}
    meta |= {"pair": pair, "tokenizer": tok_lib.fingerprint(tok)}
    named = yaml.safe_dump({k: v for k, v in meta.items() if k != "created_at"}, allow_unicode=True)
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    out = paths.cache_dir() / "pairs" / digest / "bundle"
    if not (out / bundle.SIDECAR).is_file():
        out.mkdir(parents=True, exist_ok=True)
        paths.write(out / bundle.SIDECAR, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))
    return out
