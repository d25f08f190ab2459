"""Padded batches of capture requests in few shapes, and rows from the captured activations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nla_jax.data.capture_requests import Request
from nla_jax.util.batching import chunks, pad_rows, round_up

BUCKETS = (64, 96, 128, 160, 192, 256, 384, 512)


class Batch(NamedTuple):
    """Requests of one length bucket, and their arrays for the device.

    The batch is always full: filler rows from `len(requests)` on have one valid padding token and no
    position.
    """

    ids_BT: np.ndarray  # int32, right padded
    valid_BT: np.ndarray  # bool
    positions_BP: np.ndarray  # int32, -1 in unused slots
    requests: tuple[Request, ...]


def width_of(n: int, buckets: Sequence[int] = BUCKETS) -> int:
    """Return the bucket of a text of n tokens. Longer texts get a multiple of the largest bucket."""
    return next((b for b in sorted(buckets) if n <= b), round_up(n, max(buckets)))


def batches(
    requests: Sequence[Request],
    batch_size: int,
    *,
    pad_id: int = 0,
    buckets: Sequence[int] = BUCKETS,
) -> Iterator[Batch]:
    """Yield full batches of texts of similar length in a fixed order, with one shape per bucket.

    The rest of a bucket joins the next bucket if that has enough filler rows. The order differs from that of
    `requests`; `Batch.requests` has it.
    """
    n_positions = max((len(r.positions) for r in requests), default=0)
    by_bucket: dict[int, list[Request]] = {}
    for request in requests:
        by_bucket.setdefault(width_of(len(request.ids), buckets), []).append(request)
    for width in sorted(by_bucket):
        group = by_bucket[width]
        left, wider = len(group) % batch_size, next((w for w in sorted(by_bucket) if w > width), None)
        if left and wider and 0 < len(by_bucket[wider]) % batch_size <= batch_size - left:
            by_bucket[wider] += group[len(group) - left :]
            group = group[: len(group) - left]
        for chunk in chunks(tuple(group), batch_size):
            filler = [[pad_id]] * (batch_size - len(chunk))  # each row needs a valid token
            ids_BT, valid_BT, _ = pad_rows([*(r.ids for r in chunk), *filler], pad_id, width)
            positions_BP = np.full((batch_size, n_positions), -1, np.int32)
            for b, request in enumerate(chunk):
                positions_BP[b, : len(request.positions)] = request.positions
            yield Batch(ids_BT, valid_BT, positions_BP, chunk)


def rows_of_batch(batch: Batch, h_BPD: np.ndarray) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a batch for `store_writer.Writer.write_shard`, without filler."""
    h_BPD = np.asarray(h_BPD, np.float32)
    for request, h_PD in zip(batch.requests, h_BPD, strict=False):
        for i, position in enumerate(request.positions):
            yield {
                "doc_id": request.doc_id,
                "position": position,
                "n_tokens": len(request.ids),
                "text": request.texts[i],
                "next_text": request.next_texts[i],
                "explanation": request.explanations[i],
                "h": h_PD[i],
            }


def stored_order(requests: Sequence[Request], rows_per_shard: int, batch_size: int) -> list[Request]:
    """Return the requests in the order of their rows in a store."""
    groups = shard(requests, rows_per_shard)
    return [r for group in groups for b in batches(group, batch_size) for r in b.requests]


def columns(requests: Sequence[Request]) -> dict[str, Any]:
    """Return a store's columns (`store.load_columns`) for the rows of these requests, in their order.

    They have "ids", the tokens of each row's text, instead of h.
    """
    rows = [(r, i) for r in requests for i in range(len(r.positions))]
    return {
        "doc_id": [r.doc_id for r, _ in rows],
        "position": np.array([r.positions[i] for r, i in rows], np.int64),
        "n_tokens": np.array([len(r.ids) for r, _ in rows], np.int64),
        "text": [r.texts[i] for r, i in rows],
        "next_text": [r.next_texts[i] for r, i in rows],
        "explanation": [r.explanations[i] for r, i in rows],
        "ids": [r.ids for r, _ in rows],
    }


def shard(requests: Sequence[Request], rows_per_shard: int) -> list[list[Request]]:
    """Split requests into consecutive shards of about `rows_per_shard` rows, the units of a restart."""
    groups: list[list[Request]] = [[]]
    count = 0
    for request in requests:
        if groups[-1] and count + len(request.positions) > rows_per_shard:
            groups.append([])
            count = 0
        groups[-1].append(request)
        count += len(request.positions)
    return groups if groups[-1] else []
