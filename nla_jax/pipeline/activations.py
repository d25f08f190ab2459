"""What a run has of activations: a store (WORKDIR/data), or none where it reads its texts online.

Without a store, what the run must know of the training activations, alpha and the mean direction, is measured
on some of them and stands in WORKDIR/measured.json; rows that are evaluated are captured when they are asked
for, and kept in memory.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from nla_jax import target
from nla_jax.data import document_choice, extract, split_requests, splits, store, store_writer
from nla_jax.evaluate import fve
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.pipeline import foreign_store
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import distributed, paths

MEASURED = 4096  # training rows that alpha and the mean direction come from, where nothing is stored
FILE = "measured.json"


def layer_of(r) -> int:
    return r.lm.default_layer() if r.config.layer == -1 else r.config.layer


def capture_of(r, layers: tuple[int, ...] = ()):
    """capture(ids_BT, valid_BT, positions_BP) -> h_BPD of the target of a run, whole on every process; with
    `layers` h_BPLD of these blocks."""
    lead = tok_lib.lead_ids(r.tok)
    read = functools.partial(target.capture, layer=layer_of(r))
    if layers:
        read = functools.partial(target.capture_layers, layers=layers)
    jitted = jax.jit(
        functools.partial(read, cfg=r.lm, lead=lead), out_shardings=mesh_lib.everywhere(r.mesh)
    )

    def capture(ids_BT, valid_BT, positions_BP):
        texts = {"ids_BT": ids_BT, "valid_BT": valid_BT, "positions_BP": positions_BP}
        return jitted(r.base, **mesh_lib.batch(texts, r.mesh))

    return capture


def write_store(r, host: tuple[int, int] = (0, 1)) -> dict:
    """Take the store that the config names, or capture h for every split; the store's meta.

    With online activations RL's rows are left out, which nothing but RL reads.
    """
    c, directory = r.config, r.workdir / "data"
    if c.data.store and not distributed.agreed(store.is_complete(directory)):
        distributed.on_first(lambda: foreign_store.take(c.data.store, directory, weights.fingerprint(r.path)))
    if store.is_complete(directory):
        return store.read_meta(directory)
    wanted, drops, corpus = _requests(r)
    plan = {
        "target": weights.fingerprint(r.path),
        "layer": layer_of(r),
        "dtype": c.dtype,
        "seed": c.seed,
        "data": c.data.to_dict(),
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
        notes={"drops": drops, "corpus": corpus},
    )


def _requests(r):
    found = split_requests.requests(r.config.data, r.config.seed, r.tok, rl=r.config.activations == "stored")
    if distributed.is_first():
        print(document_choice.said(found[2]), file=sys.stderr)
    return found


def _in_memory(r, wanted: list, label: str) -> dict:
    pad_id = r.tok.eos_token_id or 0
    return extract.in_memory(wanted, capture_of(r), batch=r.config.data.batch, pad_id=pad_id, label=label)


def measure(r) -> dict:
    """Without a store: measure training activations, and the outcome of the stage, as of a store's meta."""
    wanted, drops, corpus = _requests(r)
    splits.check_disjoint({s: (q.doc_id for q in found) for s, found in wanted.items()})
    warm = _in_memory(r, split_requests.thinned(wanted["warm"], MEASURED), "measure")
    norm = store_writer.quantiles(np.linalg.norm(warm["h"].astype(np.float64), axis=1))
    if distributed.is_first():
        about = {"rows": len(warm["h"]), "norm": norm}
        about["mean_direction"] = fve.mean_direction(warm["h"]).tolist()
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


def unstored(r) -> bool:
    """Whether a run reads online and does not have a store all the same (`nla data extract`, `--from`)."""
    return r.config.activations == "online" and not store.is_complete(r.workdir / "data")


def columns_of(r, split: str) -> dict:
    """The rows of a split that are there to be looked at: of the store, or captured now. Those of the store
    stay in memory; of the large splits, "warm" and "rl", the one that was read last."""
    if not unstored(r):
        if split not in r.held:
            kept = {s: columns for s, columns in r.held.items() if s in ("heldout", "ood")}
            r.held = kept | {split: store.load_columns(r.workdir / "data", split)}
        return r.held[split]
    if not r.held:
        wanted, _, _ = split_requests.requests(r.config.data, r.config.seed, r.tok, rl=False)
        r.held |= {s: _in_memory(r, q, f"read {s}") for s, q in wanted.items() if s in ("heldout", "ood")}
    return r.held[split]


def evaluated(r) -> list[str]:
    """The splits that evaluations are made on."""
    if not unstored(r):
        there = store.read_meta(r.workdir / "data")["splits"]
        return [s for s in ("heldout", "ood") if s in there]
    return ["heldout", "ood"] if r.config.data.ood else ["heldout"]


def norm_p75(r) -> float:
    """The 75th percentile of the norms of training activations."""
    path: Path = r.workdir / FILE
    if path.is_file():
        return json.loads(path.read_text("utf-8"))["norm"]["p75"]
    return store.read_meta(r.workdir / "data")["splits"]["warm"]["norm"]["p75"]


def mean_direction(r) -> np.ndarray:
    """`fve.mean_direction` of training activations, [D]."""
    path: Path = r.workdir / FILE
    if path.is_file():
        return np.array(json.loads(path.read_text("utf-8"))["mean_direction"])
    if r.mean_D is None:
        r.mean_D = fve.mean_direction(columns_of(r, "warm")["h"])
    return r.mean_D
