"""Run the round trip h -> explanation -> ĥ through text: sample, decode, parse, tokenise, reconstruct."""

import copy
import dataclasses
import functools
import math
import re

import jax
import numpy as np

from nla_jax import reconstructor, specs, steps
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.prompts import CLOSE, OPEN
from nla_jax.rl import reading
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.util.batching import full_batches, map_rows, pad_rows, width_for
from nla_jax.util.progress import Progress

_TAG = re.compile(re.escape(OPEN.strip()) + r"(.*?)" + re.escape(CLOSE.strip()), re.DOTALL)


def read_tag(response: str) -> str | None:
    """Return the text between the first pair of tags, stripped; None if there is no pair or no text."""
    found = _TAG.search(response)
    return (found.group(1).strip() or None) if found else None


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """The round trip of N rows.

    responses: AV's answers, tags included. explanations: the texts between the tags, "" where AV failed.
    h_text: reconstruction through text [N, D]. h_token: reconstruction from the spliced sampled ids, as in
    training. ok: whether the text has an explanation. ok_token: the same by ids. retokenised: whether the
    text tokenises to other ids than the sampled ones, among rows that are ok both ways. length: tokens
    that AV wrote.
    """

    responses: list[str]
    explanations: list[str]
    h_text: np.ndarray
    h_token: np.ndarray
    ok: np.ndarray
    ok_token: np.ndarray
    retokenised: np.ndarray
    length: np.ndarray
    logp: np.ndarray  # mean log-probability of a written token, nats


def jit_programs(spec: specs.Spec, mesh) -> tuple:
    """Return the jitted functions of a `Runner`: write explanations, read texts, score answers."""

    def write(av, base, h_BD, rows_B, strength_B, key, temperature, max_new):
        return steps.rollout(
            av, base, spec, h_BD, rows_B, key, group=1, max_new=max_new, temperature=temperature,
            strength_B=strength_B,
        )

    def read(ar, base, ids_BT, valid_BT, last_B):
        params = reconstructor.weights(base, ar, spec.layer, spec.compute, spec.lm)
        return reconstructor.reconstruct(params, spec.lm, ids_BT, valid_BT, last_B, dtype=spec.compute,
                                         frozen=True)

    def score(ar, base, ids, start, end, h):
        return reading.score(ar, base, spec, ids, start, end, h)[1]

    # Outputs are replicated, so that every process of a pod can read them.
    whole = mesh_lib.replicated_sharding(mesh)
    jit = lambda f, **kw: jax.jit(placement.trace_under_mesh(mesh, f), out_shardings=whole, **kw)
    return jit(write, static_argnums=7), jit(read), jit(score)


class Runner:
    """Jit the functions of one AV and AR for batches of a fixed size, and run them on any number of rows.

    Args:
      spec: `specs.Spec`. base: the target's parameters. av, ar: trainable trees.
      tok: tokenizer. ar_template: the AR prompt with `{explanation}`.
      batch: the number of rows.

    The attribute `read_rows` is the number of rows that AR reads at once. It is `batch` at first, and may be
    changed where no mesh shards the rows.
    """

    def __init__(self, spec: specs.Spec, base, av, ar, tok, ar_template: str, batch: int = 32):
        self.spec, self.base, self.av, self.ar, self.tok = spec, base, av, ar, tok
        self.ar_template, self.batch, self.read_rows = ar_template, batch, batch
        mesh = mesh_lib.mesh_of(av)
        divides = mesh is not None and batch % mesh_lib.n_batch_shards(mesh) == 0
        self._rows = functools.partial(mesh_lib.shard_batch, mesh=mesh) if divides else lambda rows: rows
        self._write, self._read, self._score = jit_programs(spec, mesh)

    def with_trees(self, *, av=None, ar=None) -> "Runner":
        """Return a copy with another AV or AR tree of the same shapes. It shares the compiled functions."""
        other = copy.copy(self)
        other.av = self.av if av is None else av
        other.ar = self.ar if ar is None else ar  # {} is the frozen target
        return other

    def reconstruct(self, texts: list[str], label: str = "") -> np.ndarray:
        """Reconstruct h from texts with AR: [N, D] float32, of arbitrary scale.

        Raises UserError for a text that exceeds the target's context."""
        ids, valid, last = reconstructor.rows(self.tok, self.ar_template, texts, self.spec.ar.pad)
        self._check_fits(last + 1, "in AR's prompt")
        return self._reconstruct_ids(ids, valid, last, label)

    def _check_fits(self, n_tokens_N, where: str) -> None:
        for i, n in enumerate(n_tokens_N):
            self.spec.lm.check_fits(int(n), f"text {i} {where}")

    def read_frozen(self, texts: list[str], label: str = "") -> np.ndarray:
        """Return the frozen target's activations [N, D] after block K, at the last token of each text.

        The prompt is the text alone, after the tokens that the tokenizer puts before every text. Raises
        UserError for a text that exceeds the target's context."""
        lead, pad = self.spec.lead, self.spec.ar.pad
        ids = [[*lead, *words] or [pad] for words in tok_lib.batch_ids(self.tok, list(texts))]
        self._check_fits(map(len, ids), "alone")
        return self._reconstruct_ids(*pad_rows(ids, pad), label, reconstructor.FROZEN)

    def _reconstruct_ids(self, ids, valid, last, label="", ar=None):
        ar, n = self.ar if ar is None else ar, len(ids)
        out = np.zeros((n, self.spec.lm.d_model), np.float32)
        order = np.argsort(last, kind="stable")
        with Progress(label, n, unit="rows") as bar:
            for real, pick in full_batches(order, self.read_rows):
                width = min(ids.shape[1], width_for(int(last[pick].max() + 1)))
                rows = self._rows((ids[pick, :width], valid[pick, :width], last[pick]))
                out[pick] = self._read(ar, self.base, *rows)
                bar.advance(len(real))
        return out

    def write(self, h_ND, key, *, temperature: float, max_new: int, label: str = "explain", rows=None,
              strength=None):
        """Sample one explanation per row: (ids [N, T], length, closed, logp [N, T], start, end, ok).

        rows: the number [N] of each row, which is part of its key; 0 to N - 1 by default. strength: factors
        [N] of the injected vectors (`steps.rollout`).

        Raises UserError for an impossible temperature, and for answers that would exceed the context."""
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature {temperature}: must be 0 (greedy) or a number above 0")
        self.spec.check_answer_fits(max_new, "max_new")

        def sample(h_BD, rows_B, *strength_B):
            h_BD, rows_B, *strength_B = self._rows((np.asarray(h_BD, np.float32), rows_B, *strength_B))
            out, *rest = self._write(self.av, self.base, h_BD, rows_B, *(strength_B or [None]), key,
                                     np.float32(temperature), max_new)
            return out.ids_BT, out.length_B, out.closed_B, out.logp_BT, *rest

        arrays = (h_ND, np.arange(len(h_ND)) if rows is None else np.asarray(rows))
        return map_rows(sample, arrays if strength is None else (*arrays, strength), self.batch, label)

    def explain(self, h_ND, key, *, temperature: float, max_new: int, label: str = "", rows=None,
                strength=None) -> list[str]:
        """Sample one explanation per row of h; "" where AV's answer has none. Arguments as in `write`."""
        ids, length, *_ = self.write(h_ND, key, temperature=temperature, max_new=max_new, label=label,
                                     rows=rows, strength=strength)
        return [read_tag(t) or "" for t in self._decode(ids, length)]

    def _decode(self, ids, length) -> list[str]:
        return [self.tok.decode(r[:n], skip_special_tokens=True) for r, n in zip(ids, length, strict=True)]

    def round_trip(self, h_ND, key, *, temperature: float, max_new: int, label="explain") -> RoundTrip:
        """Explain N activations and reconstruct them by the text path and by the token path."""
        ids, length, _, logp, start, end, ok_token = self.write(
            h_ND, key, temperature=temperature, max_new=max_new, label=label
        )
        responses = self._decode(ids, length)
        texts = [read_tag(r) for r in responses]
        ok = np.array([t is not None for t in texts])
        explanations = [t or "" for t in texts]
        by_text = reconstructor.rows(self.tok, self.ar_template, explanations, self.spec.ar.pad)
        by_token = [np.asarray(a) for a in reconstructor.splice(self.spec.ar, ids, start, end)]
        differ = np.array(
            [
                not np.array_equal(a[: m + 1], b[: n + 1])
                for a, m, b, n in zip(by_text[0], by_text[2], by_token[0], by_token[2], strict=True)
            ]
        )
        h_text = self._reconstruct_ids(*by_text)
        # Only rows whose ids differ need a second forward pass.
        h_token = h_text.copy()
        if differ.any():
            h_token[differ] = self._reconstruct_ids(*(a[differ] for a in by_token))
        return RoundTrip(
            responses,
            explanations,
            h_text,
            h_token,
            ok,
            ok_token,
            differ & ok & ok_token,
            length,
            logp.sum(1) / np.maximum(length, 1),
        )
