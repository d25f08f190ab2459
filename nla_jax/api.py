"""The library interface: open a bundle, then capture, verbalize, reconstruct or run the round trip."""

import dataclasses

import jax
import numpy as np

from nla_jax import bundle, target
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.special_tokens import check_text
from nla_jax.util.batching import pad_rows
from nla_jax.util.keys import new_key


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """The explanation of one token's activation, and its scores.

    fve: 1 - squared error / squared distance of h from the training mean, with all vectors normalised. It
    is the value of a single activation, so it may be far below 0. An imported bundle has no training
    mean; the distance is then measured from zero, and fve equals 2 cos - 1, which is higher.
    cos: cosine of the reconstruction and h.
    ok: whether AV's answer could be parsed. An answer that could not be parsed scores as an orthogonal
    reconstruction.
    """

    position: int
    token: str
    explanation: str
    fve: float
    cos: float
    ok: bool


class NLA:
    """A loaded bundle: target, AV and AR on the default device.

    `spec`, `base`, `av` and `ar` are the arguments of the pure functions in `nla_jax.verbalizer`,
    `reconstructor` and `target`: the static settings and the parameter trees. Use them under your own
    `jax.jit`.
    `mean_direction` [D]: mean of normalised training activations, or None if the bundle has none.
    """

    def __init__(self, opened: bundle.LoadedBundle, batch: int = 16):
        self.meta, self.spec, self.tokenizer = opened.meta, opened.spec, opened.tok
        self.base, self.av, self.ar = opened.base, opened.av, opened.ar
        mean = opened.meta["mean_direction"]
        self.mean_direction = None if mean is None else np.asarray(mean, np.float32)
        self.runner = Runner(
            self.spec,
            self.base,
            self.av,
            self.ar,
            self.tokenizer,
            self.meta["prompt_templates"]["ar"],
            batch,
        )
        self._capture = jax.jit(target.capture, static_argnums=(1, 2), static_argnames="lead")

    def tokens(self, text: str) -> list[str]:
        """Return the tokens of a text as strings, split by the target's tokenizer."""
        _, spans = tok_lib.offsets(self.tokenizer, text)
        return [text[a:b] for a, b in spans]

    def capture(self, text: str, *, rendered: bool = False) -> np.ndarray:
        """Return h, the output of block K, at every token of `text`: [T, D] float32, not normalised.

        rendered: whether a chat template made the text, so that it has special tokens.

        Raises UserError for an empty text, for one that is longer than the target's context, and for one that
        spells a special token without being `rendered`.
        """
        if not rendered:
            how = "say that it is a rendered chat, with --rendered (rendered=True)"
            check_text(self.tokenizer, text, how)
        ids = tok_lib.plain_ids(self.tokenizer, text)
        if not ids:
            raise UserError("the text is empty: give at least one token")
        most = self.spec.lm.max_position - len(self.spec.lead)
        if len(ids) > most:
            raise UserError(
                f"the text has {len(ids)} tokens; this target reads at most {most}: shorten it"
            )
        ids_BT, valid, last = pad_rows([ids], self.spec.av.pad, 64)
        positions = np.minimum(np.arange(ids_BT.shape[1]), last)[None]
        h = self._capture(self.base, self.spec.lm, self.spec.layer, ids_BT, valid, positions,
                          lead=self.spec.lead)
        return np.asarray(h)[0, : len(ids)]

    def verbalize(self, h, *, key=None, temperature: float = 1.0, max_new: int | None = None) -> list[str]:
        """Write one explanation for each row of h [N, D]; "" where AV's answer could not be parsed.

        Args:
          h: raw activations of this target at block K.
          key: a `jax.random.key`; sample i depends on (key, i) only. Default: key 0.
          temperature: 0 samples greedily.
          max_new: cap on new tokens. Default: the bundle's `max_new_tokens`.

        Raises UserError for a wrong shape, for an activation that is zero or not finite, for an impossible
        temperature, and for a `max_new` that exceeds the target's context.
        """
        h = self._checked(h)
        if not len(h):
            return []
        key = new_key(0) if key is None else key
        return self.runner.explain(
            h, key, temperature=temperature,
            max_new=self.meta["max_new_tokens"] if max_new is None else max_new,
        )

    def reconstruct(self, texts: list[str]) -> np.ndarray:
        """Reconstruct the activation from each explanation: [N, D] float32.

        Training determines the direction only; the norm has no meaning. Raises UserError for a string, and
        for a text that exceeds the target's context.
        """
        if isinstance(texts, str):
            raise UserError("reconstruct takes a list of texts; got one string")
        return self.runner.reconstruct(list(texts)) if texts else self._no_rows()

    def _no_rows(self) -> np.ndarray:
        return np.zeros((0, self.spec.lm.d_model), np.float32)

    def round_trip(
        self, text: str, *, positions=None, key=None, temperature: float = 1.0, samples: int = 1,
        rendered: bool = False,
    ) -> list[TokenReport]:
        """Explain tokens of a text and score each explanation by its reconstruction.

        Args:
          positions: token indices (negative ones count from the end); all by default.
          key, temperature: as in `verbalize`.
          samples: explanations per token; the reports of one token are adjacent.
          rendered: as in `capture`.

        Raises UserError for a position outside the text, and as `capture`.
        """
        h_TD, names = self.capture(text, rendered=rendered), self.tokens(text)
        positions = range(len(h_TD)) if positions is None else list(positions)
        bad = [p for p in positions if not -len(h_TD) <= p < len(h_TD)]
        if bad:
            raise UserError(f"token {bad[0]} is outside the text, which has {len(h_TD)} tokens")
        where = np.repeat(np.array([p % len(h_TD) for p in positions], int), samples)
        h = h_TD[where]
        explanations = self.verbalize(h, key=key, temperature=temperature)
        ok = np.array([bool(e) for e in explanations])
        h_hat = self.reconstruct(explanations)
        error = F.errors(h_hat, h, ok)
        mean = 0.0 if self.mean_direction is None else self.mean_direction
        distance = np.sum((F.normalise(h) - mean) ** 2, 1)
        cos = np.where(ok, np.sum(F.normalise(h) * F.normalise(h_hat), 1) / h.shape[1], 0.0)
        return [
            TokenReport(int(p), names[p], e, float(1 - err / var), float(c), bool(o))
            for p, e, err, var, c, o in zip(where, explanations, error, distance, cos, ok, strict=True)
        ]

    def _checked(self, h) -> np.ndarray:
        h = np.asarray(h, np.float32)
        if h.ndim != 2 or h.shape[1] != self.spec.lm.d_model:
            raise UserError(f"activations have shape {h.shape}; expected [N, {self.spec.lm.d_model}]")
        norms = np.linalg.norm(h, axis=1)
        if bad := [i for i, n in enumerate(norms) if not np.isfinite(n) or n == 0]:
            raise UserError(f"activation {bad[0]} is zero or not finite")
        return h


def load(directory=None, target: str | None = None, batch: int = 16) -> NLA:
    """Open a bundle directory, by default the one that the package ships (`nla_jax.bundle.SHIPPED`).

    `batch` is the number of activations or texts per call of a jitted function. `target` and the errors
    are described at `nla_jax.bundle.load`.
    """
    return NLA(bundle.load(bundle.shipped_bundle() if directory is None else directory, target), batch)
