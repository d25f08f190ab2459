"""The activations of a run: a store (WORKDIR/data), or none with online activations.

Without a store, alpha and the mean direction are measured on some training activations and written to
WORKDIR/measured.json. Evaluation rows are captured when they are needed, and kept in memory.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from nla_jax import target
from nla_jax.data import document_choice, extract, split_requests, splits, store, store_writer
from nla_jax.evaluate import distribution, fve
from nla_jax.lm import attention_kernels, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.pipeline import fingerprints, foreign_store, run_directory
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import distributed, paths

MEASURED_ROWS = 4096  # number of training rows for alpha and the mean direction, without a store
FILE = run_directory.MEASURED


def layer_of(r) -> int:
    return r.lm.default_layer() if r.config.layer == -1 else r.config.layer


def capture_of(r, layers: tuple[int, ...] = ()):
    """Return capture(ids_BT, valid_BT, positions_BP) -> h_BPD of a run's target, replicated on all processes.

    With `layers` it returns h_BPLD of these blocks.
    """
    lead = tok_lib.lead_ids(r.tok)
    c = r.config
    choice = c.attention if c.attention in ("plain", "long") else "auto"  # the devices may be others
    attention = attention_kernels.resolve(choice, r.mesh.devices.flat[0], r.lm, c.dtype)
    read = functools.partial(target.capture, layer=layer_of(r), attention=attention)
    if layers:
        read = functools.partial(target.capture_layers, layers=layers)
    jitted = jax.jit(
        functools.partial(read, cfg=r.lm, lead=lead), out_shardings=mesh_lib.replicated_sharding(r.mesh)
    )

    def capture(ids_BT, valid_BT, positions_BP):
        texts = {"ids_BT": ids_BT, "valid_BT": valid_BT, "positions_BP": positions_BP}
        return jitted(r.base, **mesh_lib.shard_batch(texts, r.mesh))

    return capture


def write_store(r, host: tuple[int, int] = (0, 1)) -> dict:
    """Link the store that the config names, or capture h for every split. Returns the store's meta.

    With online activations RL's rows are left out, because only RL reads them.
    """
    c, directory = r.config, r.workdir / "data"
    if c.data.store and not distributed.broadcast_flags(store.is_complete(directory)):
        distributed.run_on_first(
            lambda: foreign_store.link_store(c.data.store, directory, weights.fingerprint(r.path))
        )
    if store.is_complete(directory):
        return store.read_meta(directory)
    wanted, drops, corpus = _requests(r)
    plan = {
        "target": weights.fingerprint(r.path),
        "layer": layer_of(r),
        "dtype": c.dtype,
        "seed": c.seed,
        "data": fingerprints.as_begun(c, r.workdir),
        **({"lead": list(lead)} if (lead := tok_lib.lead_ids(r.tok)) else {}),
    }
    if c.activations != "stored":
        plan["activations"] = c.activations
    if "chat:" in c.data.corpus + c.data.ood:
        plan["chat_template"] = r.tok.chat_template
    return extract.extract(
        directory,
        wanted,
        r.lm.d_model,
        capture_of(r),
        plan=plan,
        batch=c.data.batch,
        pad_id=r.tok.eos_token_id or 0,
        dtype=c.data.storage,
        host=host,
        notes={"drops": drops, "corpus": corpus, "digest": weights.digest(r.path),
               "tokenizer": tok_lib.fingerprint(r.tok)},
    )


def check_lengths(r, wanted: dict) -> None:
    """Raise UserError for a text that exceeds the target's context. wanted: requests by split."""
    lead = len(tok_lib.lead_ids(r.tok))
    for found in wanted.values():
        for request in found:
            r.lm.check_fits(lead + len(request.ids), f"a text of document {request.doc_id!r}")


def _requests(r):
    found = split_requests.requests(r.config.data, r.config.seed, r.tok, rl=r.config.activations == "stored")
    check_lengths(r, found[0])
    if distributed.is_first():
        print(document_choice.log_line(found[2]), file=sys.stderr)
    return found


def _capture_in_memory(r, wanted: list, label: str) -> dict:
    pad_id = r.tok.eos_token_id or 0
    return extract.capture_in_memory(
        wanted, capture_of(r), batch=r.config.data.batch, pad_id=pad_id, label=label
    )


def measure(r) -> dict:
    """Measure training activations for a run without a store. Returns the entries of a store's meta."""
    wanted, drops, corpus = _requests(r)
    splits.check_disjoint({s: (q.doc_id for q in found) for s, found in wanted.items()})
    warm = _capture_in_memory(r, split_requests.sample_rows(wanted["warm"], MEASURED_ROWS), "measure")
    norm = store_writer.quantiles(np.linalg.norm(warm["h"].astype(np.float64), axis=1))
    if distributed.is_first():
        about = {"rows": len(warm["h"]), "norm": norm}
        about["mean_direction"] = fve.mean_direction(warm["h"]).tolist()
        about["statistics"] = distribution.statistics(warm["h"], about["mean_direction"])
        paths.write(r.workdir / FILE, json.dumps(about))
    distributed.barrier()
    found = {
        split: {
            "rows": sum(len(q.positions) for q in requests),
            "documents": len({q.doc_id for q in requests}),
            "norm": norm,
        }
        for split, requests in wanted.items()
    }
    return {"splits": found, "drops": drops, "corpus": corpus}


def is_unstored(r) -> bool:
    """Return whether a run has online activations and no store (`nla data extract` or `--from` give one)."""
    return r.config.activations == "online" and not store.is_complete(r.workdir / "data")


def columns_of(r, split: str) -> dict:
    """Return the rows of a split, from the store or captured now.

    The rows stay in memory. Of the large splits, "warm" and "rl", only the last one does.
    """
    if not is_unstored(r):
        if split not in r.held:
            kept = {s: columns for s, columns in r.held.items() if s in ("heldout", "ood")}
            r.held = kept | {split: store.load_columns(r.workdir / "data", split)}
        return r.held[split]
    if not r.held:
        wanted, _, _ = split_requests.requests(r.config.data, r.config.seed, r.tok, rl=False)
        r.held |= {
            s: _capture_in_memory(r, q, f"read {s}") for s, q in wanted.items() if s in ("heldout", "ood")
        }
    return r.held[split]


def evaluation_splits(r) -> list[str]:
    """Return the evaluation splits of a run: "heldout" and, if there is one, "ood"."""
    if not is_unstored(r):
        there = store.read_meta(r.workdir / "data")["splits"]
        return [s for s in ("heldout", "ood") if s in there]
    return ["heldout", "ood"] if r.config.data.ood else ["heldout"]


def norm_p75(r) -> float:
    """Return the 75th percentile of the norms of training activations."""
    path: Path = r.workdir / FILE
    if path.is_file():
        return json.loads(path.read_text("utf-8"))["norm"]["p75"]
    return store.read_meta(r.workdir / "data")["splits"]["warm"]["norm"]["p75"]


def mean_direction(r) -> np.ndarray:
    """Return `fve.mean_direction` of training activations, [D]."""
    path: Path = r.workdir / FILE
    if path.is_file():
        return np.array(json.loads(path.read_text("utf-8"))["mean_direction"])
    if r.mean_D is None:
        h_ND = columns_of(r, "warm")["h"]
        r.mean_D = fve.mean_direction(h_ND)
        r.statistics = distribution.statistics(h_ND, r.mean_D)
    return r.mean_D


def statistics(r) -> dict | None:
    """Return `distribution.statistics` of training activations; None for a run that an older version began
    without a store."""
    path: Path = r.workdir / FILE
    if path.is_file():
        return json.loads(path.read_text("utf-8")).get("statistics")
    mean_direction(r)
    return r.statistics
