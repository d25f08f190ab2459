"""Measure explanations a second of `nla serve` and of `nla explain --file`, against the floor.

    python -m benchmarks.serving --json serving.json

By default with the NLA that the package ships; `--bundle` names another one. `nla serve` is asked by several
clients at once (`--clients`). Each sends the page's request for another sample, gets its answer with its
scores, and sends the next one. `nla explain --file` explains the last tokens of texts in a process of its
own, after the server has ended (`benchmarks.explain_file` says what its rates are).

The floor is AV's writing alone: `floors.writing` at the mean length of the answers, with as many rows
together as there are clients or slots. Reading texts and scores are not part of it.
"""

import argparse
import concurrent.futures
import importlib.metadata
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import explain_file, explorer, machine
from nla_jax import api, bundle
from nla_jax.prompts import CLOSE, OPEN
from nla_jax.util import path_kinds
from nla_jax.view.explorer.bundles import ELSEWHERE


def texts(n: int) -> list[str]:
    """Return n different texts of one sentence."""
    sentences = (explorer.TEXT.rstrip("."), *ELSEWHERE)
    return [f"{i}. {sentence}" for i, sentence in zip(range(n), itertools.cycle(sentences), strict=False)]


def ask(port: int, text: str, requests: int) -> list[str]:
    """Send requests one after another, each for a sample of a token; return the words of the answers."""
    with explorer.send_request(port, "read", text=text) as events:
        n = len([*events][-1]["done"]["tokens"])
    said = []
    for i in range(requests):
        with explorer.send_request(port, "explain", text=text, token=i % n, sample=1 + i % 63) as events:
            said.append([e for e in events if "done" in e][-1]["done"]["words"])
    return said


def serve_rates(where: str, port: int, clients: list[int], requests: int) -> dict[int, tuple[float, list]]:
    """Return {clients: (explanations a second, the words of all answers)} of `nla serve`."""
    out = {}
    with explorer.serve(where, port):
        for n in clients:
            given = texts(n)
            with concurrent.futures.ThreadPoolExecutor(n) as pool:
                list(pool.map(ask, [port] * n, given, [1] * n))  # the target reads the texts
                began = time.perf_counter()
                said = [*itertools.chain(*pool.map(ask, [port] * n, given, [requests] * n))]
                out[n] = n * requests / (time.perf_counter() - began), said
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="", help="default: the one that the package ships")
    p.add_argument("--clients", default="1,2,4,8", help="numbers of clients, with commas")
    p.add_argument("--requests", type=int, default=8, help="of each client")
    p.add_argument("--rows", type=int, default=256, help="texts of `nla explain --file`; 0: not measured")
    p.add_argument("--batch", type=int, default=64, help="rows that `nla explain --file` writes at once")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--port", type=int, default=8421)
    p.add_argument("--json", default="")
    args = p.parse_args()
    where = str(path_kinds.bundle_in(args.bundle) if args.bundle else bundle.shipped_bundle())
    served = serve_rates(where, args.port, [int(n) for n in args.clients.split(",")], args.requests)
    nla, best = api.load(where, batch=args.batch), machine.measure_jax()
    figures = {}

    def add(name: str, rate: float, slots: int, tokens: float) -> None:
        floor = explain_file.floor_of(nla.spec, slots, tokens, best)
        figures[name] = {"per_s": round(rate, 3), "floor_per_s": round(floor, 2),
                         "of_floor": round(rate / floor, 4), "tokens": round(tokens, 1)}
        print(f"{name:28} {rate:7.2f}/s  {100 * rate / floor:4.0f} % of the floor, {tokens:.0f} tokens each")

    for n, (rate, said) in served.items():
        ids = [nla.tokenizer(OPEN + words + CLOSE)["input_ids"] for words in said]
        add(f"serve {n}", rate, n, statistics.mean(map(len, ids)))
    if args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "texts.txt"
            path.write_text("\n".join(texts(args.rows)), "utf-8")
            found, tokens = explain_file.rates(nla, str(path), args.rows, args.repeats)
        for name, rate in found.items():
            add(f"file {name}", rate, args.batch, tokens)
    if args.json:
        out = {"figures": figures, "versions": f"jax {importlib.metadata.version('jax')}",
               "machine": machine.describe() | {"rates": best}, "bundle": args.bundle}
        Path(args.json).write_text(json.dumps(out, indent=1), "utf-8")


if __name__ == "__main__":
    main()
