"""Batches of an RL step out of the corpus itself (config.activations="online"): the target reads inside the
step, nothing is stored, and every pass over the windows draws new documents, windows and positions.
"""

import numpy as np

from nla_jax.data import batching, extract, order
from nla_jax.data.splits import keyed_hash


class Fresh:
    """The batch of a step as a function of its number: a run that goes on needs nothing else.

    A pass has `data.rl_windows` windows of `data.positions` positions; the first one is what a store would
    hold, in its order. At the beginning of a pass the corpus is read once.

    Raises:
        UserError: as `extract.rl_requests`.
    """

    def __init__(self, data, seed: int, tok, batch: int):
        self.data, self.seed, self.tok, self.batch = data, seed, tok, batch
        self.steps_per_pass = max(data.rl_windows * data.positions // batch, 1)
        self._width = batching.width_of(data.window_tokens)
        self._pass = -1

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Texts of a step: read_ids_BT int32 and read_valid_BT, right padded to one width, read_at_B (the
        position whose h is wanted), and row_B."""
        number, i = divmod(step, self.steps_per_pass)
        if number != self._pass:
            self._begin(number)
        ids_BT = np.full((self.batch, self._width), self.tok.eos_token_id or 0, np.int32)
        valid_BT, at_B = np.zeros(ids_BT.shape, bool), np.zeros(self.batch, np.int32)
        for b, row in enumerate(np.asarray(self._order[i])):
            request, at_B[b] = self._rows[row]
            ids_BT[b, : len(request.ids)] = request.ids
            valid_BT[b, : len(request.ids)] = True
        row_B = np.arange(self.batch, dtype=np.int32)
        return {"read_ids_BT": ids_BT, "read_valid_BT": valid_BT, "read_at_B": at_B, "row_B": row_B}

    def _begin(self, number: int) -> None:
        seed = keyed_hash("pass", self.seed, number) % 2**32 if number else self.seed
        requests = extract.rl_requests(self.data, self.seed, self.tok, seed)
        groups = batching.shard(requests, extract.ROWS_PER_SHARD)
        stored = (r for g in groups for b in batching.batches(g, self.data.batch) for r in b.requests)
        self._rows = [(r, position) for r in stored for position in r.positions]
        purpose = f"rl/{number}" if number else "rl"
        self._order, self._pass = order.epoch_indices(len(self._rows), self.batch, self.seed, purpose), number
