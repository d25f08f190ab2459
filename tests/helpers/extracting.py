"""An extraction whose target is arithmetic: what its rows must be is known without a model.

    python -m tests.helpers.extracting DIR HOST HOSTS [SECONDS]      one host of several, SECONDS for each
    batch
"""

import sys
import time

import numpy as np

from nla_jax.data import capture_requests, extract, splits
from nla_jax.data.capture_requests import Request
from nla_jax.data.corpora import Document
from nla_jax.util import distributed
from tests.helpers import tiny

D = 8


def capture(ids_BT, valid_BT, positions_BP):
    """h of a position: a function of the tokens up to it."""
    weights_T = 1 + np.arange(ids_BT.shape[1])
    sums_BT = np.cumsum(np.where(valid_BT, ids_BT, 0) * weights_T, 1) % 1009
    at_BP = np.take_along_axis(sums_BT, np.maximum(positions_BP, 0), 1)
    return (1.5 + np.sin(at_BP[..., None] * (1 + np.arange(D)))).astype(np.float32)


def wanted(n_docs: int = 16) -> dict[str, list[Request]]:
    """Windows of documents of many lengths, by split."""
    rng, tok, home = np.random.default_rng(0), tiny.tokenizer(), {}
    for i in range(n_docs):
        text = " ".join(f"w{w}" for w in rng.integers(0, 999, 20 + 5 * i))
        doc = Document(f"d{i}", text, "train")
        home.setdefault(splits.split_of(doc), []).append(doc)
    return {s: capture_requests.window_requests(docs, tok, window_tokens=90, positions=3, min_position=9)
            for s, docs in home.items()}


def run(directory, host=(0, 1), *, capture=capture, requests=None, **options):
    options = {"batch": 4, "rows_per_shard": 16, **options}
    return extract.extract(directory, requests or wanted(), D, capture, plan={"seed": 0}, pad_id=0, notes={},
                           host=host, **options)


def main(directory, host, hosts, seconds=0.0) -> None:
    def slow(*args):
        time.sleep(float(seconds))
        return capture(*args)

    try:
        run(directory, (int(host), int(hosts)), capture=slow)
    except distributed.Stopped as e:
        print(e)


if __name__ == "__main__":
    main(*sys.argv[1:])
