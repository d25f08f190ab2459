"""The front matter of a model card: the YAML by which the Hugging Face Hub lists and links a model."""

import re

from nla_jax.errors import UserError, short_repr
from nla_jax.evaluate.figure_table import split_title
from nla_jax.evaluate.probe_types import Figure
from nla_jax.lm.weights import DEFAULT_TARGET, GEMMA3_270M

FENCE = "---"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
BASES = {DEFAULT_TARGET: "HuggingFaceTB/SmolLM2-135M-Instruct", GEMMA3_270M: "google/gemma-3-270m"}
# Licences of targets by the name on the Hub, from their own cards. Others must be given.
LICENCES = (
    (r"HuggingFaceTB/SmolLM2-", "apache-2.0"),
    (r"Qwen/Qwen3(\.\d)?-", "apache-2.0"),
    (r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B", "apache-2.0"),
    (r"Qwen/Qwen2\.5-3B", "other"),
    (r"meta-llama/(Meta-)?Llama-3\.1-", "llama3.1"),
    (r"meta-llama/Llama-3\.2-", "llama3.2"),
    (r"meta-llama/Llama-3\.3-", "llama3.3"),
    (r"google/gemma-[123]", "gemma"),
    (r"microsoft/phi-4", "mit"),
)
# Identifiers that the Hub knows and that models use; `other` needs a name and a link.
KNOWN = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m",
    "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0",
    "mpl-2.0", "unlicense", "afl-3.0", "artistic-2.0", "isc", "wtfpl", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
}
HEADLINE = {  # figure -> (words, reader)
    "fve": ("FVE of sampled explanations", "AR"),
    "fve_frozen_target": ("FVE of sampled explanations", "the frozen target"),
    "fve_greedy": ("FVE of greedy explanations", "AR"),
    "fve_greedy_frozen_target": ("FVE of greedy explanations", "the frozen target"),
    "fve_shuffled": ("FVE of another text's explanations", "AR"),
    "fve_mean_direction": ("FVE of the mean direction", "no reader"),
    "claim_precision": ("share of claims that are true of the text", "rules"),
    "claim_precision_shuffled": ("the same against another document's text", "rules"),
}


def base_model(uri: str) -> str:
    """Return the target's id on the Hub, or "" for a local path or an unknown wheel."""
    uri = str(uri)
    return BASES.get(uri, uri if HUB_ID.fullmatch(uri) and not uri.endswith(".gguf") else "")


def licence_of(uri: str) -> str:
    """Return the licence of a target by its Hub id, or "" if it is not known here."""
    base = base_model(uri)
    return next((licence for pattern, licence in LICENCES if re.match(pattern, base)), "")


def check_licence(licence: str) -> str:
    """Return a licence's identifier. Raises UserError if the Hub does not know it."""
    if licence not in KNOWN:
        raise UserError(f"--license {short_repr(licence)}: not an identifier of the Hub, such as apache-2.0, "
                        "mit, gemma or llama3.3; for another one use other, with license_name and "
                        "license_link in the card's front matter")
    return licence


def front_matter(meta: dict, figures: dict[str, list[Figure]], name: str, licence: str = "",
                 base: str = "") -> dict:
    """Return the fields for a bundle's card.

    Args:
      figures: split -> figures of this bundle. name: of the model. licence, base: instead of those that the
        target's name gives; fields that are not known are left out.
    """
    licence = licence or licence_of(meta["base_checkpoint"])
    base = base or base_model(meta["base_checkpoint"])
    kind = "adapter" if meta.get("roles", {}).get("av_rank") else "finetune"
    relation = {"base_model": base, "base_model_relation": kind} if base else {}
    settings = (meta.get("training") or {}).get("config") or {}
    notes = (meta.get("run") or {}).get("notes", {})
    results = [r for split, found in figures.items()
               if (r := _result(split, found, settings, notes.get(split, "")))]
    return {
        **({"license": licence} if licence else {}),
        "language": ["en"],
        "library_name": "nla_jax",
        **relation,
        "tags": ["natural-language-autoencoder", "nla", "interpretability", "jax"],
        **({"model-index": [{"name": name, "results": results}]} if results else {}),
    }


def _result(split: str, figures: list[Figure], settings: dict, note: str) -> dict:
    """Return one result of the model-index: figures on a data set."""
    known = {f.name: f for f in figures}
    metrics = [{"type": n, "name": f"{words}, by {reader}", "value": round(known[n].value, 4)}
               for n, (words, reader) in HEADLINE.items() if n in known]
    if not metrics:
        return {}
    data = settings.get("data") or {}
    corpus = str(data.get("ood" if split == "ood" else "corpus") or "unknown")
    return {
        "task": {"type": "text-generation", "name": "Explanations of activations"},
        "dataset": {"type": re.sub(r"[^\w./-]", "_", corpus)[:80], "split": split,
                    "name": f"{corpus}, {split_title(split, note)}"},
        "metrics": metrics,
    }


def split_card(text: str) -> tuple[dict, str]:
    """Return (front matter, body) of a card; {} without front matter. Raises UserError for damaged YAML."""
    import yaml

    text = text.removeprefix("\ufeff")
    if not text.startswith(f"{FENCE}\n"):
        return {}, text
    head, closed, body = text.removeprefix(f"{FENCE}\n").partition(f"\n{FENCE}\n")
    if not closed:
        raise UserError(f"README.md: its front matter has no closing {FENCE}")
    try:
        found = yaml.safe_load(head) or {}
    except yaml.YAMLError as e:
        raise UserError(f"README.md: its front matter is not YAML ({str(e).splitlines()[0]})") from e
    if not isinstance(found, dict):
        raise UserError("README.md: its front matter is no mapping")
    return found, body.lstrip("\n")


def join_card(fields: dict, body: str) -> str:
    """Return a card with front matter."""
    import yaml

    head = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
    return f"{FENCE}\n{head}{FENCE}\n\n{body}"
