"""Compare float32, bfloat16 and int8 weights of a bundle: FVE, agreement of texts, speed.

    python -m benchmarks.dtypes [--bundle DIR] [--store DIR] [--rows 100] [--json FILE]

The rows are held-out activations, evenly spaced. Explanations are greedy, so that they differ only if the
arithmetic does. A dtype is that of target, AV and AR. int8 has one scale for each output channel
(`nla_jax.util.int8`); its products are in bfloat16.
"""

import argparse
import json
import os
import time

import jax
import numpy as np

from nla_jax import api
from nla_jax.bundle import DTYPES
from nla_jax.data import store
from nla_jax.evaluate import fve
from nla_jax.interchange import find_bundle
from nla_jax.pipeline import grounding, held_out_rows
from nla_jax.util.keys import new_key

HEAD = ("weights", "MB", "seconds to load", "rows / s", "FVE", "the same texts as float32",
        "share of a text before the first other character", "cosine of ĥ with float32's, same texts",
        "cosine of h with float32's, least")


def measure(nla: api.NLA, columns: dict, first: dict, temperature: float) -> dict:
    """Return the figures of one dtype. first: those of float32; {} if these are they."""
    h, docs, n = columns["h"], columns["doc_id"], len(columns["h"])
    mean = 0.0 if nla.mean_direction is None else nla.mean_direction
    variance = np.sum((fve.normalise(h) - mean) ** 2, 1)
    run = dict(temperature=temperature, max_new=nla.meta["max_new_tokens"], label="")
    nla.runner.write(h[:1], new_key(0), **run)  # compiles
    began = time.monotonic()
    trip = nla.runner.round_trip(h, new_key(0), **run)
    found = {"rows_per_second": n / (time.monotonic() - began), "responses": trip.responses}
    error = fve.errors(trip.h_text, h, trip.ok)
    found["fve"] = [fve.fve(error, variance), *fve.interval(error, variance, docs)]
    found["explanations"] = trip.explanations
    found["read"] = nla.reconstruct((first or found)["explanations"])
    found["h"] = np.concatenate([nla.capture(t, rendered=True) for t in columns["text"][:8]])
    first = first or found
    pairs = list(zip(found["responses"], first["responses"], strict=True))
    found["same"] = float(np.mean([a == b for a, b in pairs]))
    found["before"] = float(np.mean([len(os.path.commonprefix(p)) / max(len(p[1]), 1) for p in pairs]))
    found["cos_read"] = float(_cos(found["read"], first["read"]).mean())
    found["cos_h"] = float(_cos(found["h"], first["h"]).min())
    return found


def _cos(a, b):
    return np.sum(fve.normalise(a) * fve.normalise(b), 1) / a.shape[1]


def bytes_of(*trees) -> int:
    """Return the bytes of the arrays of trees, each array once."""
    return sum({id(a): a.nbytes for a in jax.tree.leaves(trees)}.values())


def row(dtype: str, seconds: float, size: int, found: dict) -> tuple[str, ...]:
    """Return a row of the table."""
    value, low, high = found["fve"]
    shown = f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
    return (dtype, f"{size / 1e6:,.1f}", f"{seconds:.1f}", f"{found['rows_per_second']:.2f}", shown,
            f"{found['same']:.2f}", f"{found['before']:.2f}", f"{found['cos_read']:.5f}",
            f"{found['cos_h']:.5f}")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="")
    p.add_argument("--store", default="")
    p.add_argument("--target", default="")
    p.add_argument("--rows", type=int, default=100)
    p.add_argument("--batch", type=int, default=20)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--json", default="")
    args = p.parse_args(argv)
    directory = find_bundle.find(args.bundle, target=args.target)
    data = args.store or held_out_rows.store_of(directory, args.target or None)
    columns = grounding.spaced_rows(store.load_columns(data, "heldout"), args.rows)
    rows, first = [], {}
    for dtype in DTYPES:
        began = time.monotonic()
        nla = api.load(directory, args.target or None, args.batch, dtype=dtype)
        jax.block_until_ready((nla.base, nla.av, nla.ar))
        seconds = time.monotonic() - began
        found = measure(nla, columns, first, args.temperature)
        first = first or found
        rows.append(row(dtype, seconds, bytes_of(nla.base, nla.av, nla.ar), found))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
        del nla
    print("\n| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    print("\n".join("| " + " | ".join(r) + " |" for r in rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([dict(zip(HEAD, r, strict=True)) for r in rows], file, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()
