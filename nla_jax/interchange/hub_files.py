"""Choose the files of a bundle or an exported pair that `nla push` uploads, and check them.

Only files that belong to a bundle or a model go; any other file is left out, and named. A file that would go
and holds a secret stops the push.
"""

import dataclasses
import fnmatch
import os
import re
from pathlib import Path

from nla_jax import bundle
from nla_jax.errors import UserError, short_repr
from nla_jax.interchange import card_metadata, model_card, model_sidecar, run_summary, sidecar_common
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import packed
from nla_jax.util import path_kinds, paths

LARGEST = 50 * 10**9  # bytes of a file on the Hub
BUNDLE = ("params/*", "tokenizer/*", packed.FILE, bundle.TRUST)
MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.model",
         "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json")
TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".jinja")
SECRET_NAMES = (".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", "*credential*", "*secret*",
                ".git/*", "token", "stored_tokens", ".aws/*", ".ssh/*")
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{24,}|\bAIza[0-9A-Za-z_-]{35}|\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{40,}",
    "a Slack token": r"\bxox[baprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^\s/:@\"']+:[^\s/:@\"']{3,}@",
}


@dataclasses.dataclass(frozen=True)
class Upload:
    """What goes to one repository.

    files: name in the repository -> file, or content. left_out: name -> why. notes: what the owner should
    know before others see it.
    """

    repo: str
    files: dict[str, Path | bytes]
    left_out: dict[str, str]
    notes: list[str]

    @property
    def card(self) -> str:
        return self.files[model_card.FILE].decode()

    def size(self, name: str) -> int:
        file = self.files[name]
        return len(file) if isinstance(file, bytes) else paths.size(file)


def plan(directory: str | Path, repo: str, *, licence: str = "", base: str = "") -> list[Upload]:
    """Return what goes where: one upload for a bundle or one model, two for a pair (REPO-av, REPO-ar).

    Args:
      directory: a bundle, packed or not, or a run with one; a directory with av and ar of `nla export`, or
        one of these.
      licence: identifier for the card; default: that of the target or of the card.
      base: the target's id on the Hub, instead of the one in the sidecar.

    Raises UserError for anything else, for a bundle or model that is not whole, for a card without a licence,
    and for a file that is too large or holds a secret.
    """
    if not card_metadata.HUB_ID.fullmatch(repo):
        raise UserError(f"{short_repr(repo)} is no repository of the Hub: give OWNER/NAME, such as "
                        "ada/nla-qwen3-4b-L20")
    if base and not card_metadata.HUB_ID.fullmatch(base):
        raise UserError(f"--base-model {base!r}: give an id of the Hub, OWNER/NAME")
    licence = licence and card_metadata.check_licence(licence)
    directory = path_kinds.bundle_in(directory)
    directory = paths.local_copy(directory) if paths.is_remote(directory) else paths.path(directory)
    sidecar = directory / bundle.SIDECAR
    if not sidecar.is_file() and all((directory / r / bundle.SIDECAR).is_file() for r in ("av", "ar")):
        found = [_model(directory / role, f"{repo}-{role}", licence, base) for role in ("av", "ar")]
    elif sidecar.is_file() and (directory / "config.json").is_file():
        found = [_model(directory, repo, licence, base)]
    elif sidecar.is_file():
        found = [_bundle(directory, repo, licence, base)]
    else:
        hint = path_kinds.hint(directory) or "it has no nla_meta.yaml"
        raise UserError(f"{directory}: no bundle and no exported pair ({hint}); give a bundle, the DIR of "
                        "`nla pack --out DIR`, or that of `nla export --out DIR`")
    for upload in found:
        _check(upload)
    return found


def _bundle(directory: Path, repo: str, licence: str, base: str) -> Upload:
    there = bundle.read_sidecar(directory)
    bundle.open_trees(directory, there, LMConfig.of_plain(there["lm"]))  # raises for missing, damaged files
    run = run_summary.read_summary(directory, there) or there.get("run")
    meta = {**there, **({"run": run} if run else {}), **({"base_checkpoint": base} if base else {})}
    files, left = _choose(directory, BUNDLE)
    notes = _notes(meta)
    if not packed.is_packed(meta):
        notes.append("it is not packed: `nla pack` makes it smaller (bfloat16)")
    new = model_card.write(meta, licence=licence, name=repo)
    card = _card(directory, new, model_card.write(there), licence, repo, base, meta["base_checkpoint"])
    sidecar = directory / bundle.SIDECAR if meta == there else sidecar_common.as_yaml(meta).encode()
    return Upload(repo, {model_card.FILE: card.encode(), bundle.SIDECAR: sidecar, **files}, left, notes)


def _model(directory: Path, repo: str, licence: str, base: str) -> Upload:
    sidecar = model_sidecar.load(directory)
    place = directory / model_sidecar.NAME
    target = base or sidecar.base_checkpoint or "unknown"
    files, left = _choose(directory, MODEL)
    _check_model(directory, files, sidecar.role)
    new = model_card.write_for_model(sidecar, target, licence=licence, name=repo)
    card = _card(directory, new, "", licence, repo, base, target)
    raw = place if not base else sidecar_common.as_yaml(
        {**sidecar_common.read(place), "base_checkpoint": base}).encode()
    files = {model_card.FILE: card.encode(), model_sidecar.NAME: raw, **files}
    return Upload(repo, files, left, _notes({"base_checkpoint": target}))


def _card(directory: Path, new: str, ours: str, licence: str, repo: str, base: str, target: str) -> str:
    """Return the directory's own card with the fields that it lacks, or `new` if it has none.

    ours: the card that `nla pack` wrote there; `new` replaces it, because it has the repository's name.
    Raises UserError without a licence."""
    fields, body = card_metadata.split_card(new)
    own = directory / model_card.FILE
    if own.is_file() and (text := own.read_text("utf-8")) != ours:
        given, body = card_metadata.split_card(text)
        if licence and given.get("license", licence) != licence:
            raise UserError(f"--license {licence}: {own} says {given['license']}; change one of them")
        fields |= given | ({"base_model": base} if base else {})
        stem = repo.removesuffix("-av").removesuffix("-ar")  # a card of `nla export` names no repository
        body = body.replace("AV_DIR", f"{stem}-av").replace("AR_DIR", f"{stem}-ar")
        body = body.replace(model_card.NO_LICENCE, f"These files: {fields.get('license')}.")
    if not fields.get("license"):
        raise UserError(f"the licence of {repo} is not known: give --license ID, such as apache-2.0; the "
                        f"licence of the target {target} may bind you")
    card_metadata.check_licence(str(fields["license"]))
    if fields["license"] == "other" and not (fields.get("license_name") and fields.get("license_link")):
        raise UserError("license other needs license_name and license_link: write them into the front matter "
                        f"of {own}")
    return card_metadata.join_card(fields, body)


def _choose(directory: Path, patterns: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files that match a pattern, and for the others why they are left out."""
    files, left = {}, {}
    for name, path in sorted(paths.files(directory).items()):
        if name in (model_card.FILE, bundle.SIDECAR):
            continue
        last = name.rpartition("/")[2]
        if any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(last, p) for p in SECRET_NAMES):
            left[name] = "it may hold a secret"
        elif name.endswith(".part"):
            left[name] = "it is unfinished"
        elif any(fnmatch.fnmatch(name, p) for p in patterns):
            files[name] = path
        else:
            left[name] = "it is no file of a bundle or model"
    return files, left


def _check_model(directory: Path, files: dict, role: str) -> None:
    """Raise UserError if a file of a model is missing."""
    import json

    index = files.get("model.safetensors.index.json")
    needed = {"config.json", "tokenizer.json"} | ({"value_head.safetensors"} if role == "ar" else set())
    listed = json.loads(index.read_text("utf-8"))["weight_map"].values() if index else ["model.safetensors"]
    needed |= set(listed)
    if missing := sorted(needed - files.keys()):
        raise UserError(f"{directory / missing[0]} is missing: export the pair again (`nla export --out`)")


def _notes(meta: dict) -> list[str]:
    base = str(meta["base_checkpoint"])
    if card_metadata.base_model(base):
        return []
    return [f"others cannot find the target {base}: say what it is on the Hub with --base-model OWNER/NAME"]


def _check(upload: Upload) -> None:
    """Raise UserError for a file that is too large, and for one that holds a secret."""
    for name, file in upload.files.items():
        if (size := upload.size(name)) > LARGEST:
            raise UserError(f"{name} has {size / 1e9:.1f} GB; the Hub takes files of at most "
                            f"{LARGEST / 1e9:.0f} GB: pack or export again in smaller files, or in bfloat16")
        if not name.endswith(TEXTS):
            continue
        content = file if isinstance(file, bytes) else file.read_bytes()
        for n, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
            if what := _secret_in(line):
                raise UserError(f"{name}, line {n}: this looks like {what}; remove it before others see it")


def _secret_in(line: str) -> str:
    """Return what secret a line seems to hold, or ""."""
    known = [v for k in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if len(v := os.environ.get(k, "").strip()) > 8]
    if any(v in line for v in known):
        return "your Hugging Face token"
    return next((what for what, pattern in SECRETS.items() if re.search(pattern, line)), "")
