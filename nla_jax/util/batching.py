"""Pad rows and cut them into full batches: equal shapes, so that few programs are compiled."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nla_jax.util.progress import Progress


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is not below n."""
    return -(-n // multiple) * multiple


def width_for(length: int) -> int:
    """Return the padded width for rows of this length: 8, 16, 32, 48, 64, 96, 128, 192, 256, 384 and so on.
    Few widths mean few compiled programs."""
    if length <= 8:
        return 8
    return round_up(length, 16 if length <= 64 else 2 ** (length - 1).bit_length() // 4)


def pad_rows(ids: Sequence[Sequence[int]], pad: int, multiple: int = 16):
    """Pad ragged rows on the right to a multiple: (ids_BT int32, valid_BT bool, last_B int32).

    Rows of at most `multiple` tokens are padded to that width.
    """
    length = np.array([len(r) for r in ids], np.int32)
    width = round_up(int(length.max(initial=1)), multiple)
    out = np.full((len(ids), width), pad, np.int32)
    for i, r in enumerate(ids):
        out[i, : len(r)] = r
    return out, np.arange(width)[None] < length[:, None], length - 1


def pad_left(ids: Sequence[Sequence[int]], pad: int, multiple: int):
    """Pad ragged rows on the left to a multiple: (ids_BT, valid_BT). Every row ends in the last column."""
    ids_BT, valid_BT, _ = pad_rows([r[::-1] for r in ids], pad, multiple)
    return ids_BT[:, ::-1], valid_BT[:, ::-1]


def chunks(items, size: int) -> Iterator:
    """Yield slices of at most `size` items, in their order."""
    return (items[at : at + size] for at in range(0, len(items), size))


def full_batches(order, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (real, pick) for each batch: at most `size` row numbers of `order`, and these repeated to `size`.
    The caller drops results of `pick` beyond `len(real)`."""
    return ((real, np.resize(real, size)) for real in chunks(np.asarray(order, int), size))


def map_rows(f: Callable, arrays: Sequence[np.ndarray], size: int, label: str = ""):
    """Apply f to all rows of `arrays`, `size` rows at a time. Returns f's outputs, with one row per row."""
    n, parts = len(arrays[0]), []
    with Progress(label, n, unit="rows") as bar:
        for real, pick in full_batches(range(n), size):
            parts.append([np.asarray(a)[: len(real)] for a in f(*(a[pick] for a in arrays))])
            bar.advance(len(real))
    return [np.concatenate(a) for a in zip(*parts, strict=True)]
