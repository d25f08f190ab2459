"""Training rows with online activations (config.activations="online"): the step runs the target itself.

Nothing is stored. Every pass over the windows draws new documents, windows and positions.
"""

import numpy as np

from nla_jax.data import extract, request_batches, shuffle, split_requests
from nla_jax.data.splits import keyed_hash
from nla_jax.util.batching import pad_rows

SPARE = 8  # a later pass's cut of an explained text may have this many tokens more than the first pass's


class Passes:
    """The rows of each pass over a split. The first pass has the rows of a store, in its order.

    Each pass reads the corpus once.

    Args:
        data: the `data` part of a config. seed: of the first pass, and of the other splits.
        tok: the target's tokenizer. split: "warm" or "rl".

    Raises:
        UserError: as `split_requests.fresh_requests`.
    """

    def __init__(self, data, seed: int, tok, split: str):
        self.data, self.seed, self.tok, self.split = data, seed, tok, split
        self._at, self._columns = -1, {}

    def columns(self, number: int) -> dict:
        """Return `request_batches.columns` of pass `number`, from 0."""
        if number != self._at:
            seed = keyed_hash("pass", self.seed, number) % 2**32 if number else self.seed
            found = split_requests.fresh_requests(self.data, self.seed, self.tok, self.split, seed)
            ordered = request_batches.stored_order(found, extract.ROWS_PER_SHARD, self.data.batch)
            self._at, self._columns = number, request_batches.columns(ordered)
        return self._columns

    def width(self) -> int:
        """Return the padded length for the texts of every pass: of windows, or of longer explained texts.

        Explained texts are the same in every pass except for their cuts.
        """
        longest = self.data.window_tokens
        if self.split == "warm" and self.data.explanations:
            said = self.columns(0)
            explained = [int(n) for n, e in zip(said["n_tokens"], said["explanation"], strict=True) if e]
            longest = max(longest, max(explained, default=0) + SPARE * (self.data.cuts_per_text > 1))
        return request_batches.width_of(longest)


def capture_inputs(columns: dict, pick, width: int) -> dict[str, np.ndarray]:
    """Return the inputs of `target.add_activations` for the rows `pick` of `Passes.columns`.

    They are read_ids_BT int32 and read_valid_BT, right padded to `width`, and read_at_B, the token's index.
    """
    ids_BT, valid_BT, _ = pad_rows([columns["ids"][row] for row in pick], 0, width)
    at_B = np.int32(columns["position"][pick])
    return {"read_ids_BT": ids_BT, "read_valid_BT": valid_BT, "read_at_B": at_B}


class OnlineBatches:
    """The batches of RL with online activations, as a function of the step, so a resumed run needs only it.

    A pass has `data.rl_windows` windows of `data.positions` positions.
    """

    def __init__(self, data, seed: int, tok, batch: int):
        self._passes, self.seed, self.batch = Passes(data, seed, tok, "rl"), seed, batch
        self.steps_per_pass = max(data.rl_windows * data.positions // batch, 1)
        self._width, self._pass = self._passes.width(), -1

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Return `capture_inputs` of a step, and row_B."""
        number, i = divmod(step, self.steps_per_pass)
        columns = self._passes.columns(number)
        if number != self._pass:
            purpose, n = f"rl/{number}" if number else "rl", len(columns["ids"])
            self._order, self._pass = shuffle.epoch_indices(n, self.batch, self.seed, purpose), number
        read = capture_inputs(columns, np.asarray(self._order[i]), self._width)
        return read | {"row_B": np.arange(self.batch, dtype=np.int32)}
