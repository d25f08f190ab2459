"""What the explorer keeps of a text: its activations, and the greedy explanations of its tokens."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from nla_jax.evaluate.runner import read_tag
from nla_jax.evaluate.writer import Answer, Writer


@dataclasses.dataclass
class CachedText:
    """A cached text: h [T, D], and by (side, token) its greedy explanations, and the answers under way."""

    h_TD: np.ndarray
    said: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    answers: dict[tuple[str, int], Answer] = dataclasses.field(default_factory=dict)

    def explain(self, writer: Writer, side: str, pick: Sequence[int],
                urgent: int | None = None) -> Iterator[dict[int, Answer]]:
        """Yield unfinished greedy answers as they are written, until the explanations of `pick` are in
        `said`.

        Several requests may share an answer. The first tokens of `pick` are written first, and the token
        `urgent` before those of all other requests."""
        coming: dict[int, Answer] = {}
        for rank, i in enumerate(pick):
            if (side, i) in self.said:
                continue
            answer = self.answers.get((side, i))
            if answer is None or answer.dropped:
                answer = self.answers[side, i] = writer.submit(self.h_TD[i], rank=rank)
            answer.urgent = answer.urgent or i == urgent
            coming[i] = answer
        self._keep(writer, side, coming)
        for _ in writer.follow(list(coming.values())):
            self._keep(writer, side, coming)
            yield coming

    def _keep(self, writer: Writer, side: str, coming: dict[int, Answer]) -> None:
        for i, answer in coming.items():
            if answer.done and self.answers.pop((side, i), None):
                self.said[side, i] = read_tag(writer.text(answer)) or ""
