"""Compute the explorer's answers: activations of a text, explanations as they are written, scores of words.

The methods are generators of plain values. Only one thread may use an Engine at a time, but it may run
several generators in turns: their answers are then decoded together (`evaluate.writer`).
"""

import collections
import contextlib
from collections.abc import Generator, Iterator

import numpy as np

from nla_jax.data import chats, lessons
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.runner import read_tag
from nla_jax.evaluate.words import edits
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.special_tokens import check_text
from nla_jax.util.batching import chunks
from nla_jax.view.explorer import claim_parts, frozen_reader, steering
from nla_jax.view.explorer.api_schema import MOST_TEXT, ROLES, TELLING
from nla_jax.view.explorer.bundles import ELSEWHERE, Side, parse_unfinished, stream_answers
from nla_jax.view.explorer.cached_text import CachedText

KEPT = 8  # cached texts


class Engine:
    """One or two bundles over one target. Two threads must not call its methods at the same time."""

    def __init__(self, sides: dict[str, Side], max_tokens: int = 256):
        self.sides, self.max_tokens = sides, max_tokens
        self._texts: collections.OrderedDict[str, CachedText] = collections.OrderedDict()
        self._rendered: collections.deque[int] = collections.deque(maxlen=4096)  # hashes of rendered chats
        self._target: dict | None = None  # the target's decode weights, made by the first `steer`

    def warm_up(self) -> None:
        """Compile the programs that a first click needs."""
        for name, s in self.sides.items():
            for n in range(0, s.nla.meta["max_new_tokens"], 16):
                s.nla.reconstruct(["word " * n])
                s.bare.reconstruct(["word " * n])
                frozen_reader.next_logp(s.nla, [s.nla.spec.ar.pad] * (n + 1))
            for sample in (0, 1):
                for _ in self.explain(ELSEWHERE[0], 0, name, sample):
                    pass

    def about(self) -> dict:
        """Return facts of the open bundles, the longest text in tokens, and whether chats are possible."""
        return {"sides": {k: {"name": s.name, **s.facts} for k, s in self.sides.items()},
                "max_tokens": self.max_tokens, "chat": bool(self._tok.chat_template)}

    @property
    def _tok(self):
        return self.sides["a"].nla.tokenizer

    def tokens(self, text: str) -> list[str]:
        """Return the tokens of a text. Raises UserError for none, for more than `max_tokens`, or for special
        tokens outside a rendered chat."""
        nla = self.sides["a"].nla
        if hash(text) not in self._rendered:
            check_text(nla.tokenizer, text, "read it as a chat")
        if not (names := nla.tokens(text)):
            raise UserError("the text is empty: give at least one token")
        if len(names) > self.max_tokens:
            raise UserError(f"the text has {len(names)} tokens; at most {self.max_tokens} are read here")
        return names

    def _cached(self, text: str) -> CachedText:
        """Return the cached text, captured if it is new. The cache has the KEPT latest texts."""
        if text not in self._texts:
            self.tokens(text)
            self._texts[text] = CachedText(self.sides["a"].nla.capture(text, rendered=True))
        self._texts.move_to_end(text)
        while len(self._texts) > KEPT:
            self._texts.popitem(last=False)
        return self._texts[text]

    def _token(self, text: str, token: int) -> np.ndarray:
        """Return h [D] of a token. Raises UserError if the text has no such token."""
        h = self._cached(text).h_TD
        if not 0 <= token < len(h):
            raise UserError(f"token {token} is outside the text, which has {len(h)} tokens")
        return h[token]

    def read(self, text: str) -> Iterator[dict]:
        """Yield the tokens of a text, then capture h, which a click will need."""
        yield {"done": {"tokens": self.tokens(text)}}
        self._cached(text)

    def chat(self, messages: tuple[dict, ...], opens: bool = True) -> Iterator[dict]:
        """Yield a chat in the target's template, with the tokens of each turn's words. With `opens`, it ends
        where the assistant's next turn begins. Raises UserError if the template is missing or fails."""
        if not self._tok.chat_template:
            raise UserError("the target has no chat template: write the turns as a text")
        found = chats.render(list(messages), self._tok, ",".join(ROLES), "the chat", opens)
        if found.refused:
            raise UserError(f"the chat cannot be read: {found.refused}")
        if len(found.text) > MOST_TEXT:
            raise UserError(f"through its template the chat has {len(found.text)} characters; at most "
                            f"{MOST_TEXT} are read here")
        self._rendered.append(hash(found.text))
        names, (_, spans) = self.tokens(found.text), tok_lib.offsets(self._tok, found.text)
        spoken = [m["role"] for m in messages if m["content"].strip()]
        turns = []
        for role, (start, end) in zip(spoken, found.spans, strict=True):
            inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
            if inside:  # a tokenizer may drop unknown characters
                turns.append({"role": role, "start": inside[0], "end": inside[-1] + 1})
        yield {"done": {"text": found.text, "tokens": names, "turns": turns}}
        self._cached(found.text)

    def heat(self, text: str, side: str = "a", start: int = 0) -> Iterator[dict]:
        """Yield the greedy explanation of each token from `start` on, with scores, a batch at a time."""
        s, known = self._side(side), self._cached(text)
        tokens = range(start, len(known.h_TD))
        with contextlib.closing(known.explain(s.writer, side, tokens)) as ahead:
            next(ahead, None)  # all are submitted now, so that no slot waits for the next line
            for pick in chunks(list(tokens), s.nla.runner.batch):
                texts = yield from self._likeliest(side, text, pick)
                scores = self._scores(s, texts, known.h_TD[pick])
                yield {"heat": [{"token": i, "words": t, **score}
                                for i, t, score in zip(pick, texts, scores, strict=True)]}

    def telling(self, text: str, n: int = TELLING, by: str = "entropy") -> Iterator[dict]:
        """Yield the telling tokens of a text and their scores (`frozen_reader.telling`)."""
        self.tokens(text)
        yield {"done": frozen_reader.telling(self.sides["a"].nla, text, n, by)}

    def recur(self, text: str, token: int, words: str, side: str = "a") -> Iterator[dict]:
        """Yield for each claim the preceding tokens at which it recurs, as in `evaluate.probes.recurrence`.

        A claim without content words gives None. The ending line is not a claim."""
        self._side(side), self._token(text, token)
        before = list(range(max(0, token - recurrence.BACK), token))
        texts = yield from self._likeliest(side, text, before)
        bags = [recurrence.content_words(c) for c in edits.claims(lessons.split_end(words)[0])]
        near = list(zip(before, texts, strict=True))
        at = [[i for i, t in near if recurrence.is_recurring(bag, [t])] if bag else None for bag in bags]
        yield {"done": {"before": before, "at": at}}

    def _likeliest(self, side: str, text: str, pick: list[int]) -> Generator[dict, None, list[str]]:
        """Return the greedy explanations of tokens; yields {} while AV writes, so that the job queue can look
        after other jobs, and whether this one was cancelled."""
        known = self._cached(text)
        for _ in known.explain(self._side(side).writer, side, pick):
            yield {}
        return [known.said[side, i] for i in pick]

    def explain(self, text: str, token: int, side: str = "a", sample: int = 0) -> Iterator[dict]:
        """Yield one explanation as it is written, then its scores, claims and controls. With the greedy one,
        the preceding tokens are explained, too, for `recur`."""
        s, h_D = self._side(side), self._token(text, token)
        if sample:
            answer = ""
            for (answer,), _ in stream_answers(s, h_D[None], np.array([sample]), 1.0):
                yield {"written": parse_unfinished(answer)}
            yield {"done": self._judge(s, h_D, read_tag(answer) or "")}
            return
        known = self._cached(text)
        pick = [token, *range(max(0, token - recurrence.BACK), token)]
        pick = pick if (side, token) not in known.said else []
        with contextlib.closing(known.explain(s.writer, side, pick, token)) as coming:
            while (side, token) not in known.said:
                yield {"written": parse_unfinished(s.writer.text(next(coming)[token]))}
            yield {"written": known.said[side, token]}
            yield {"done": self._judge(s, h_D, known.said[side, token])}
            for _ in coming:
                yield {}

    def predict(self, text: str, token: int, words: str, side: str = "a") -> Iterator[dict]:
        """Yield the target's likeliest next tokens after the text up to a token, and after words alone."""
        s, _ = self._side(side), self._token(text, token)
        ids = tok_lib.plain_ids(s.nla.tokenizer, text)[: token + 1]
        for found in frozen_reader.predict(s.nla, ids, words):
            yield {"done": found} if found else {}

    def trust(self, text: str, token: int, words: str, side: str = "a") -> Iterator[dict]:
        """Yield the claims of words about a token, each with the trust in it (`nla trust`). Raises UserError
        if the bundle has no trust model."""
        s, _ = self._side(side), self._token(text, token)
        yield from claim_parts.trusted(s.nla, self._cached(text).h_TD, token, words)

    def edit(self, text: str, token: int, words: str, before: str = "", side: str = "a") -> Iterator[dict]:
        """Yield scores and claims of other words, and the cosine of AR's directions of them and `before`."""
        s, h_D = self._side(side), self._token(text, token)
        new, old = F.normalise(s.nla.reconstruct([words, before]))
        yield {"done": self._judge(s, h_D, words) | {"cos_before": float(new @ old / len(new))}}

    def compare(
        self, text: str, tokens: tuple[int, int], words: tuple[str, str], side: str = "a"
    ) -> Iterator[dict]:
        """Yield cosines of two tokens' h and of AR's directions, and both explanations' scores on both h."""
        s = self._side(side)
        h = np.stack([self._token(text, t) for t in tokens])
        h_hat = F.normalise(s.nla.reconstruct(list(words)))
        unit = F.normalise(h)
        crossed = self._scores(s, list(words[::-1]), h)
        yield {"done": {"cos_h": float(unit[0] @ unit[1] / len(unit[0])),
                        "cos_words": float(h_hat[0] @ h_hat[1] / len(unit[0])),
                        "own": self._scores(s, list(words), h), "crossed": crossed}}

    def steer(
        self, text: str, token: int, words: str, before: str, strength: float, side: str = "a"
    ) -> Iterator[dict]:
        """Yield the target's continuations after a token: plain, and with an addition to h. The addition is
        |h| times `strength` times the difference of AR's unit vectors of `words` and `before`."""
        s, _ = self._side(side), self._token(text, token)
        spec = s.nla.spec
        new, old = F.normalise(s.nla.reconstruct([words, before])) / np.sqrt(spec.lm.d_model)
        self._target = self._target or steering.decode_weights(s.nla.base, spec)
        ids = tok_lib.plain_ids(s.nla.tokenizer, text)[: token + 1]
        add_BD = np.stack([0 * new, strength * (new - old)])
        written = ["", ""]
        for written in steering.continuations(s.nla.base, self._target, spec, s.nla.tokenizer, ids, add_BD):
            yield {"goes_on": written}
        yield {"done": {"goes_on": written, "strength": strength}}

    def _side(self, side: str) -> Side:
        if side not in self.sides:
            raise UserError(f"no bundle {side!r} is open here")
        return self.sides[side]

    def _judge(self, s: Side, h_D: np.ndarray, words: str) -> dict:
        """Return scores by the frozen target and by AR, and the controls on the same h. Each claim and the
        ending line have their contribution to AR's FVE."""
        claims, end, left = claim_parts.split_parts(words, s.nla.runner.batch - 1)
        # A single claim is compared with an empty text.
        whole, *without = self._scores(s, [words, *left], np.repeat(h_D[None], 1 + len(left), 0), bool(words))
        adds = [whole["fve"] - w["fve"] for w in without]
        return {
            "words": words, "frozen": self._frozen(s, h_D, words), **whole,
            "claims": [{"words": c, "adds": a} for c, a in zip(claims, adds, strict=False)],
            "end": {"words": lessons.split_end(end)[1], "adds": adds[-1]} if end else None,
            "controls": self._controls(s, h_D),
        }

    def _frozen(self, s: Side, h_D: np.ndarray, words: str) -> dict:
        """Return the frozen target's scores when it reads the words alone, and the FVE of other texts' words.
        Without words, the scores are as in `_scores`."""
        h_hat = frozen_reader.read_words(s.bare, [words])
        (score,) = self._near(s, h_hat, h_D[None], np.array([bool(words)]))
        others = self._mean_fve_of_others(s, h_D, s.others_bare_ND)
        return {"fve": score["fve"], "cos": score["cos"], "shuffled": others}

    def _controls(self, s: Side, h_D: np.ndarray) -> dict:
        out = {"shuffled": self._mean_fve_of_others(s, h_D, s.others_ND)}
        if s.nla.mean_direction is not None:
            error = F.errors(s.nla.mean_direction[None], h_D[None])[0]
            out["mean"] = float(1 - error / self.variance(s, h_D[None])[0])
        return out

    def _mean_fve_of_others(self, s: Side, h_D: np.ndarray, others_ND: np.ndarray) -> float:
        """Return the mean FVE on h of reconstructions from other texts' explanations."""
        errors = F.errors(others_ND, np.repeat(h_D[None], len(others_ND), 0), s.others_ok)
        return float(1 - errors.mean() / self.variance(s, h_D[None])[0])

    def _scores(self, s: Side, texts: list[str], h_ND: np.ndarray, read: bool = False) -> list[dict]:
        """Return FVE and cosine of each text's reconstruction. An empty text scores as an orthogonal vector,
        unless `read` is true."""
        ok = np.array([read or bool(t) for t in texts])
        return self._near(s, s.nla.reconstruct(texts), h_ND, ok)

    def _near(self, s: Side, h_hat_ND: np.ndarray, h_ND: np.ndarray, ok: np.ndarray) -> list[dict]:
        """Return FVE and cosine of reconstructions; where not ok, those of an orthogonal vector."""
        error, variance = F.errors(h_hat_ND, h_ND, ok), self.variance(s, h_ND)
        cos = np.where(ok, np.sum(F.normalise(h_ND) * F.normalise(h_hat_ND), 1) / h_ND.shape[1], 0.0)
        return [{"fve": float(1 - e / v), "cos": float(c), "ok": bool(o)}
                for e, v, c, o in zip(error, variance, cos, ok, strict=True)]

    @staticmethod
    def variance(s: Side, h_ND: np.ndarray) -> np.ndarray:
        """Return the squared distance [N] of each normalised h from the mean direction."""
        mean = 0.0 if s.nla.mean_direction is None else s.nla.mean_direction
        return np.sum((F.normalise(h_ND) - mean) ** 2, 1)
