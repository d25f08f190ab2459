"""Rows padded to equal widths, and full batches of them."""

import numpy as np
import pytest

from nla_jax.util import batching, tables


def test_rows_are_padded_to_a_multiple():
    ids, valid, last = batching.pad_rows([[1, 2, 3], [4]], 9, 4)
    assert ids.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]] and ids.dtype == np.int32
    assert valid.sum(1).tolist() == [3, 1] and last.tolist() == [2, 0]
    ids, valid = batching.pad_left([[1, 2, 3], [4]], 9, 4)
    assert ids.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]] and valid.tolist() == (ids != 9).tolist()
    assert batching.pad_rows([[]], 9, 4)[0].tolist() == [[9] * 4]


def test_a_batch_is_full_and_its_filler_is_dropped():
    assert [c for c in batching.chunks("abcde", 2)] == ["ab", "cd", "e"]
    real, pick = zip(*batching.full_batches([5, 6, 7], 2), strict=True)
    assert [r.tolist() for r in real] == [[5, 6], [7]] and [p.tolist() for p in pick] == [[5, 6], [7, 7]]
    seen = []

    def double(rows, others):
        seen.append(len(rows))
        return 2 * rows, others

    doubled, others = batching.map_rows(double, (np.arange(5), np.ones((5, 2))), 3)
    assert doubled.tolist() == [0, 2, 4, 6, 8] and others.shape == (5, 2) and seen == [3, 3]


@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_rounding(n):
    assert batching.round_up(n, 16) == (16 if n < 17 else 32)


def test_a_cell_of_a_table_may_hold_a_bar():
    assert tables.markdown_table(["a", "b"], [["1", "x | y"]]) == [
        "| a | b |", "| --- | --- |", "| 1 | x \\| y |"]
