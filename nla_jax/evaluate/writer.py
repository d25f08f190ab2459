"""Write explanations by continuous batching: an answer enters one of a few slots as soon as another ends.

One thread uses a `Writer`. A caller submits answers and follows them. A follower whose answers have no news
runs the next piece of decoding, which gives all answers more tokens. An answer depends on its activation, its
number and the settings. It does not depend on the other answers or on the time.

In bfloat16 the answers may differ from those of `Runner.explain` with the same key, and with another number
of slots. Programs of other shapes round differently, and one token that differs changes the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import specs, verbalizer
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import decode_tp, generate, kv_cache, slots
from nla_jax.sharding import placement

PIECE = 4  # tokens between two looks at the answers
EARLY = 3  # tokens after the opening tag that are looked at one by one, so that the first word comes early


@dataclasses.dataclass(eq=False)
class Answer:
    """An answer of AV. number: of its random key. urgent: whether a client waits for each word. rank: its
    place among those that are not urgent. ids: its tokens so far. slot: where it is decoded, if it is."""

    h_D: np.ndarray
    number: int
    temperature: float
    most: int
    strength: float
    urgent: bool
    rank: int
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    done: bool = False
    dropped: bool = False
    slot: int | None = None
    followers: int = 0


class Writer:
    """Decode answers in `n_slots` slots.

    Args:
      runner: has AV, the target and the tokenizer. key: answer `number` has this key folded with its number.
      max_new: the largest number of tokens of an answer. together: how many answers are prefilled at once.
    """

    def __init__(self, runner: Runner, key, *, n_slots: int, max_new: int, together: int = 2):
        self.spec, self.tok, self.max_new, self.together = runner.spec, runner.tok, max_new, together
        self.spec.check_answer_fits(max_new, "max_new")
        n_slots = max(2, n_slots)  # the two parts of the prompt must have different batch sizes
        self.pieces = 0  # of decoding, so far
        self._av, self._base, self._key = runner.av, runner.base, key
        self._weights = _weights(self._base, self._av, spec=self.spec)
        self._prompt = _prompt(self._base, self._av, spec=self.spec)
        self._shared = _shared(self._prompt, spec=self.spec, n=n_slots)
        self._now: slots.Slots | None = None
        self._slots: list[Answer | None] = [None] * n_slots
        self._waiting: list[Answer] = []

    def submit(self, h_D, number: int = 0, *, temperature: float = 0.0, most: int | None = None,
               strength: float = 1.0, urgent: bool = False, rank: int = 0) -> Answer:
        """Return a new answer, which waits for a slot.

        most: its largest number of tokens, by default and at most `max_new`. strength: factor of the injected
        vector. urgent: it enters before others, and if all slots are in use one of them makes room. rank:
        answers of a low rank enter before others.

        Raises UserError for an impossible temperature."""
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature {temperature}: must be 0 (greedy) or a number above 0")
        most = min(most or self.max_new, self.max_new)
        answer = Answer(np.asarray(h_D, np.float32), number, temperature, most, strength, urgent, rank)
        self._waiting.append(answer)
        return answer

    def follow(self, answers: Sequence[Answer]) -> Iterator[None]:
        """Yield after each piece of decoding until all the answers have ended. An answer without a
        follower is dropped."""
        for answer in answers:
            answer.followers += 1
        try:
            seen, ended = self.pieces, all(answer.done for answer in answers)
            while not ended:
                if self.pieces == seen:
                    self.step()
                seen, ended = self.pieces, all(answer.done for answer in answers)
                yield
        finally:
            for answer in answers:
                answer.followers -= 1
                if not (answer.followers or answer.done):
                    self._drop(answer)

    def text(self, answer: Answer) -> str:
        """Return what is written of an answer, tags included."""
        return self.tok.decode(answer.ids, skip_special_tokens=True)

    def step(self) -> None:
        """Let waiting answers enter free slots, and decode the next piece of all answers."""
        try:
            self._let_enter()
            self._now, found = _advance(self._weights, self._shared, self._now, np.int32(self._piece()),
                                        spec=self.spec)
            # Copied, because the next call donates the arrays.
            ids_NT, length_N, done_N = map(np.array, found)
        except BaseException:
            self._reset()
            raise
        for i, answer in enumerate(self._slots):
            if answer is not None:
                answer.ids, answer.done = ids_NT[i, : length_N[i]], bool(done_N[i])
                if answer.done:
                    self._slots[i], answer.slot = None, None
        self.pieces += 1

    def _drop(self, answer: Answer) -> None:
        answer.dropped = True
        if answer.slot is None:
            self._waiting.remove(answer)
        else:
            self._slots[answer.slot] = None  # it is decoded there, unread, until another one enters

    def _reset(self) -> None:
        """Begin all answers again: a step that failed has used up the state."""
        self._now = None
        for answer in filter(None, self._slots):
            self._requeue(answer)

    def _requeue(self, answer: Answer) -> None:
        self._slots[answer.slot] = None
        answer.slot, answer.ids = None, np.zeros(0, np.int32)
        self._waiting.append(answer)

    def _let_enter(self) -> None:
        if self._now is None:
            self._now = _empty(self._av, self._base, self._prompt, spec=self.spec, n=len(self._slots),
                               max_new=self.max_new)
        self._waiting.sort(key=lambda a: (not a.urgent, a.rank))
        urgent = [a for a in self._waiting if a.urgent]
        self._make_room(len(urgent))
        while urgent and (group := urgent[: min(self.together, self._slots.count(None))]):
            self._enter(group)
            urgent = urgent[len(group) :]
        if any(map(self._is_early, self._slots)):
            return  # others would delay the first word
        while (group := self._waiting[: self.together]) and len(group) <= self._slots.count(None):
            self._enter(group)
            if any(a and a.urgent for a in self._slots):
                return  # one group at a time, so that words keep coming

    def _make_room(self, n: int) -> None:
        """Take the slots of answers that are not urgent, of those with the fewest tokens first, until n slots
        are free."""
        others = sorted((a for a in self._slots if a and not a.urgent), key=lambda a: len(a.ids))
        for answer in others[: max(0, n - self._slots.count(None))]:
            self._requeue(answer)

    def _enter(self, group: list[Answer]) -> None:
        """Prefill the prompts of at most `together` answers, and put them into free slots."""
        free = [i for i, a in enumerate(self._slots) if a is None][: len(group)]
        nowhere = range(len(self._slots), len(self._slots) + self.together - len(group))
        full = [group[i % len(group)] for i in range(self.together)]
        self._now = _enter(
            self._av, self._base, self._prompt, self._now, self._key, np.array([*free, *nowhere], np.int32),
            np.stack([a.h_D for a in full]), np.array([a.strength for a in full], np.float32),
            np.array([a.number for a in full], np.int32), np.array([a.temperature for a in full], np.float32),
            np.array([a.most for a in full], np.int32), spec=self.spec)
        for answer, slot in zip(group, free, strict=True):
            self._waiting.remove(answer)
            self._slots[slot], answer.slot = answer, slot

    def _is_early(self, answer: Answer | None) -> bool:
        """Return whether an urgent answer may not have its first word yet."""
        return answer is not None and answer.urgent and len(answer.ids) < len(self.spec.av.open) + EARLY

    def _piece(self) -> int:
        """Return the number of tokens to decode next: few, until each urgent answer may have a word.

        An answer that has just entered may have one: its first tokens were sampled with its prompt."""
        early = [len(a.ids) for a in self._slots if self._is_early(a)]
        if 0 in early:
            return 0
        return max(1, len(self.spec.av.open) + 1 - max(early)) if early else PIECE


# --- programs -------------------------------------------------------------------------------------


@functools.partial(placement.jit_by_mesh, static_argnames="spec")
def _weights(base, av, spec: specs.Spec) -> dict:
    return generate.decode_weights(verbalizer.weights(base, av, spec.compute), spec.lm, spec.compute)


@functools.partial(placement.jit_by_mesh, static_argnames="spec")
def _prompt(base, av, spec: specs.Spec):
    """Return the keys and values of the prompt before the marker, which all answers share."""
    params = verbalizer.weights(base, av, spec.compute)
    return verbalizer.prompt_kv(params, spec.lm, spec.av, dtype=spec.compute)


@functools.partial(placement.jit_by_mesh, static_argnames=("spec", "n"))
def _shared(prompt, spec: specs.Spec, n: int) -> kv_cache.Level:
    (level,) = kv_cache.make_levels(prompt, n, spec.compute, decode_tp.is_scanned(spec.lm))
    return level


def _draft(spec: specs.Spec, max_new: int) -> tuple[int, ...]:
    """Return the guess of an answer's first tokens: the opening tag, which a trained AV nearly always writes.

    A wrong guess costs time and changes nothing. There is none for models with states or several kinds of
    heads."""
    return () if spec.lm.kinds else spec.av.open[: max_new - 1]


def _prefill(av, base, prompt, h_AD, strength_A, spec: specs.Spec, draft: tuple[int, ...]):
    """Return what `verbalizer.prefill_draft` does."""
    params = verbalizer.weights(base, av, spec.compute)
    e_AD = verbalizer.inject(av, h_AD, spec.alpha) * strength_A[:, None]
    return verbalizer.prefill_draft(params, spec.lm, spec.av, e_AD, draft, spec.compute, prompt)


@functools.partial(placement.jit_by_mesh, static_argnames=("spec", "n", "max_new"))
def _empty(av, base, prompt, spec: specs.Spec, n: int, max_new: int) -> slots.Slots:
    h_ND = jax.ShapeDtypeStruct((n, spec.lm.d_model), jnp.float32)
    strength_N = jax.ShapeDtypeStruct((n,), jnp.float32)
    prefill = functools.partial(_prefill, spec=spec, draft=())
    own, *_ = jax.eval_shape(prefill, av, base, prompt, h_ND, strength_N)
    own = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), own)
    return slots.empty(spec.lm, own, n, max_new, spec.compute, spec.av.pad)


@functools.partial(placement.jit_by_mesh, static_argnames="spec", donate_argnames="now")
def _enter(av, base, prompt, now, key, slot_A, h_AD, strength_A, number_A, temperature_A, most_A,
           spec: specs.Spec) -> slots.Slots:
    draft = _draft(spec, now.ids_NT.shape[1])
    own, begun, logits_AXV = _prefill(av, base, prompt, h_AD, strength_A, spec, draft)
    return slots.enter(
        spec.lm, now, slot_A, own, logits_AXV, generate.row_keys(key, number_A), temperature_A, most_A,
        dtype=spec.compute, draft=draft, begun=begun, stop_ids=spec.av.close, eos_ids=spec.av.eos,
        pad_id=spec.av.pad)


@functools.partial(placement.jit_by_mesh, static_argnames="spec", donate_argnames="now")
def _advance(weights, shared, now, n, spec: specs.Spec):
    """Return (the state, (ids_NT, length_N, done_N) on every device)."""
    now = slots.advance(weights, spec.lm, shared, now, n, stop_ids=spec.av.close, eos_ids=spec.av.eos)
    return now, tuple(map(placement.constrain, (now.ids_NT, now.length_N, now.done_N)))
