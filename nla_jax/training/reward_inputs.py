"""Add to the batches of RL what the settings of its reward need, as pure functions of the step."""

from collections.abc import Callable

import numpy as np

from nla_jax.data.splits import keyed_hash
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.util.batching import chunks, pad_rows, width_for


def add_prefixes(batch_at: Callable, low: int, high: int, seed: int):
    """Return a function from i to the batch of RL step i with prefix_B, numbers of tokens from low to high.

    A number is drawn for each activation and not for each answer: answers of a group are compared with each
    other."""

    def batch(i: int) -> dict:
        found = batch_at(i)
        drawn = [keyed_hash("prefix", seed, i, row) % (high - low + 1) for row in range(len(found["row_B"]))]
        return {**found, "prefix_B": np.array(drawn, np.int32) + np.int32(low)}

    return batch


def longest(tok, texts: list[str]) -> int:
    """Return the padded width (`width_for`) of the longest text."""
    lengths = (len(ids) for part in chunks(texts, 1024) for ids in tok_lib.all_plain_ids(tok, part))
    return width_for(max(lengths))


def add_texts(batch_at: Callable, texts_at: Callable, tok, pad: int, width: int):
    """Return a function from i to the batch of RL step i with text_ids_BT, text_valid_BT and text_at_B.

    texts_at: i -> the texts whose last tokens the activations are from. width: of the padded texts."""

    def batch(i: int) -> dict:
        ids, valid, last = pad_rows(tok_lib.all_plain_ids(tok, texts_at(i)), pad, width)
        return {**batch_at(i), "text_ids_BT": ids, "text_valid_BT": valid, "text_at_B": last}

    return batch


def add_online_texts(batch_at: Callable):
    """Return `batch_at` with the fields of `add_texts`, from the texts that the target reads in the step."""

    def batch(i: int) -> dict:
        found = batch_at(i)
        ids, valid, at = (found[f"read_{name}"] for name in ("ids_BT", "valid_BT", "at_B"))
        upto = valid & (np.arange(ids.shape[1])[None] <= at[:, None])
        return {**found, "text_ids_BT": ids, "text_valid_BT": upto, "text_at_B": at}

    return batch
