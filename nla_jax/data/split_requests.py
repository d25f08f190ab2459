"""The capture requests of each split of a config."""

from nla_jax.data import capture_requests, document_choice, explanations, splits
from nla_jax.data.capture_requests import Request
from nla_jax.data.corpora import list_counts
from nla_jax.errors import UserError


def requests(
    data, seed: int, tok, rl: bool = True
) -> tuple[dict[str, list[Request]], dict, dict]:
    """Return (requests by split, numbers of explanations used or left out by reason, counts of documents).

    The counts are `document_choice.Selection.counts`.

    Args:
      data: the `data` part of a config (`nla_jax.configs`).
      seed: of documents, positions, windows and cuts. tok: the target's tokenizer.
      rl: whether to capture the RL split (False with online activations).

    Raises:
      UserError: as `corpora` and `capture_requests`, or if a split would be empty.
    """
    path, named = _explanations(data)
    found = document_choice.select(data, seed, tok, named)
    home, left_out = found.home, f"left out: {list_counts(found.counts['left out'])}"
    window = _window(data, tok, seed)
    for split, wanted in [
        ("warm", data.warm_windows or data.explanations),
        ("rl", data.rl_windows),
    ]:
        if wanted and not found.counts["documents"].get(split):
            raise UserError(
                f"corpus {data.corpus!r} has no document for split {split!r} ({left_out}): give more "
                "documents or change data.warm_fraction"
            )
    out: dict[str, list] = {"warm": [], "rl": [], "heldout": []}
    drops: dict = {}
    if data.explanations:
        out["warm"], drops = _explanation_requests(data, seed, tok, found, path)
        out["heldout"], _ = _explanation_requests(data, seed, tok, found, path, "heldout")
    if not out["heldout"]:
        if not home["heldout"]:
            raise UserError(
                f"corpus {data.corpus!r} has no held-out document ({left_out}): give more documents"
            )
        out["heldout"] = capture_requests.window_requests(
            home["heldout"], positions=1, max_windows=data.heldout_rows, **window
        )
    for split, n in [("warm", data.warm_windows), ("rl", data.rl_windows if rl else 0)]:
        if n:
            out[split] += capture_requests.window_requests(
                home[split], positions=data.positions, max_windows=n, **window
            )
    if data.ood:
        if not home["ood"]:
            raise UserError(f"corpus {data.ood!r} has no usable document ({left_out})")
        n = -(-data.ood_rows // data.ood_positions)
        out["ood"] = capture_requests.window_requests(
            home["ood"], positions=data.ood_positions, max_windows=n, **window
        )
    return {k: v for k, v in out.items() if v}, drops, found.counts


def fresh_requests(data, seed: int, tok, split: str, fresh_seed: int) -> list[Request]:
    """Return the requests of "warm" or "rl" with a new draw of documents, windows, positions and cuts.

    `fresh_seed` is the seed of this draw, and `seed` that of the other splits. Near duplicates between the
    splits are dropped. Raises UserError as `requests`.
    """
    path, named = _explanations(data)
    found = document_choice.select(data, seed, tok, named, (split, fresh_seed))
    out = []
    if split == "warm" and data.explanations:
        out, _ = _explanation_requests(data, fresh_seed, tok, found, path)
    if n := {"warm": data.warm_windows, "rl": data.rl_windows}[split]:
        if not found.home[split]:
            raise UserError(
                f"corpus {data.corpus!r} has no document for split {split!r}: give more documents"
            )
        window = _window(data, tok, fresh_seed)
        out += capture_requests.window_requests(
            found.home[split], positions=data.positions, max_windows=n, **window
        )
    return out


def sample_rows(found: list[Request], n_rows: int) -> list[Request]:
    """Choose requests with about `n_rows` rows by a keyed hash; return all if they have fewer."""
    there = sum(len(r.positions) for r in found)
    return found if there <= n_rows else _choose(found, max(len(found) * n_rows // there, 1))


def _explanation_requests(data, seed: int, tok, found: document_choice.Selection, path, split: str = "warm"):
    """Return (requests of the explained texts of a split, numbers used or left out by reason)."""
    cuts = data.cuts_per_text if split == "warm" else 1
    requests, drops = capture_requests.explanation_requests(
        found.named, tok, split, jsonl_path=path, warm=data.warm_fraction, cuts_per_text=cuts,
        positions=data.explained_positions if split == "warm" else 1, seed=seed,
        dropped=found.dropped)
    n = {"warm": data.explained_rows * cuts, "heldout": data.heldout_rows}[split]
    return _choose(requests, n), drops


def _window(data, tok, seed: int) -> dict:
    return dict(tok=tok, window_tokens=data.window_tokens, min_position=data.min_position, seed=seed)


def _explanations(data):
    """Return (path of the explanations or None for the shipped ones, ids of their documents)."""
    path = None if data.explanations == "shipped" else data.explanations
    return path, explanations.document_ids(path) if data.explanations else frozenset()


def _choose(found: list, n: int) -> list:
    """Choose n requests (0: all) by a keyed hash of document and explanation, independent of their order."""
    if not n or len(found) <= n:
        return found
    # All cuts of one text share its end, so they are kept or dropped together.
    rank = sorted(
        range(len(found)),
        key=lambda i: (splits.keyed_hash("choose", found[i].doc_id, found[i].explanations[-1:]), i),
    )
    return [found[i] for i in sorted(rank[:n])]
