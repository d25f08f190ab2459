"""The library interface: open a bundle, then capture, verbalize, reconstruct or run the round trip."""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from nla_jax import bundle, target
from nla_jax.errors import UserError, one_line
from nla_jax.evaluate import distribution, row_scores
from nla_jax.evaluate.row_scores import Comparison, Rows
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.trust import apply
from nla_jax.evaluate.trust import model as trust_model
from nla_jax.evaluate.trust.apply import TrustedClaim
from nla_jax.interchange import find_bundle
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.special_tokens import check_text
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.specs import Spec
from nla_jax.util import paths, utf8
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


def ids_of(spec: Spec, tok, text: str, rendered: bool = False) -> list[int]:
    """Return the ids of a text. Raises UserError as `NLA.capture`."""
    return offsets_of(spec, tok, text, rendered)[0]


def offsets_of(spec: Spec, tok, text: str, rendered: bool = False):
    """Return the ids of a text and their spans (`tokenizer.offsets`). Raises UserError as `NLA.capture`."""
    utf8.check(text)
    if not rendered:
        how = "say that it is a rendered chat, with --rendered (rendered=True)"
        check_text(tok, text, how)
    ids, spans = tok_lib.offsets(tok, text)
    if not ids:
        raise UserError("the text is empty: give at least one token")
    most = spec.lm.max_position - len(spec.lead)
    if len(ids) > most:
        raise UserError(f"the text has {len(ids)} tokens; this target reads at most {most}: shorten it")
    return ids, spans


def check_positions(positions: Iterable[int], n: int) -> None:
    """Raise UserError for a position outside a text of n tokens."""
    if bad := [p for p in positions if not -n <= p < n]:
        raise UserError(f"token {bad[0]} is outside the text, which has {n} tokens")


class NLA:
    """A loaded bundle: target, AV and AR on a mesh over all devices (`mesh`; None for a single device).

    `spec`, `base`, `av` and `ar` are the arguments of the pure functions in `nla_jax.verbalizer`,
    `reconstructor` and `target`: the static settings and the parameter trees. Use them under your own
    `jax.jit`.
    `dtype`: of the weights, one of `bundle.DTYPES`.
    `mean_direction` [D]: mean of normalised training activations, or None if the bundle has none.
    `activations`: statistics of the training activations (`nla_jax.evaluate.distribution`), or None.
    `trust`: the model behind `claims`, or None if the bundle has none.
    """

    def __repr__(self) -> str:
        lm, name = self.spec.lm, self.meta["base_checkpoint"]
        return f"NLA of block {self.spec.layer} of {name} ({lm.n_blocks} blocks, D={lm.d_model})"

    def __init__(self, opened: bundle.LoadedBundle, batch: int = 16, trust: trust_model.Trust | None = None):
        self.meta, self.spec, self.tokenizer = opened.meta, opened.spec, opened.tok
        self.base, self.av, self.ar = opened.base, opened.av, opened.ar
        mean = opened.meta["mean_direction"]
        self.trust = trust
        self.mean_direction = None if mean is None else np.asarray(mean, np.float32)
        self.activations = distribution.checked(opened.meta.get("activations"), bundle.SIDECAR)
        self.runner = Runner(
            self.spec,
            self.base,
            self.av,
            self.ar,
            self.tokenizer,
            self.meta["prompt_templates"]["ar"],
            batch,
        )
        self.mesh, self.dtype = mesh_lib.mesh_of(self.base), opened.dtype
        self._capture = jax.jit(
            placement.trace_under_mesh(self.mesh, target.capture), static_argnums=(1, 2),
            static_argnames="lead", out_shardings=mesh_lib.replicated_sharding(self.mesh),
        )

    def tokens(self, text: str) -> list[str]:
        """Return the tokens of a text as strings, split by the target's tokenizer."""
        utf8.check(text)
        _, spans = tok_lib.offsets(self.tokenizer, text)
        return [text[a:b] for a, b in spans]

    def capture(self, text: str, *, rendered: bool = False) -> np.ndarray:
        """Return h, the output of block K, at every token of `text`: [T, D] float32, not normalised.

        rendered: whether a chat template made the text, so that it has special tokens.

        Raises UserError for an empty text, for one that is longer than the target's context, for one that is
        not valid Unicode, and for one that spells a special token without being `rendered`.
        """
        return self.capture_ids(ids_of(self.spec, self.tokenizer, text, rendered))

    def capture_ids(self, ids: list[int]) -> np.ndarray:
        """Return h at every token of `ids` [T, D], as `capture`. The tokenizer's first ids are prepended."""
        ids_BT, valid, last = pad_rows([ids], self.spec.av.pad, 64)
        positions = np.minimum(np.arange(ids_BT.shape[1]), last)[None]
        h = self._capture(self.base, self.spec.lm, self.spec.layer, ids_BT, valid, positions,
                          lead=self.spec.lead)
        return np.asarray(h)[0, : len(ids)]

    def verbalize(self, h, *, key=None, temperature: float = 1.0, max_new: int | None = None,
                  scale: str | float = "mean") -> list[str]:
        """Write one explanation for each row of h [N, D]; "" where AV's answer could not be parsed.

        Args:
          h: activations of this target at block K, or other vectors of its residual stream there (`fit`
            says how unusual they are): a list, a numpy or jax array, or a torch tensor of any dtype and
            device.
          key: a `jax.random.key`; sample i depends on (key, i) only. Default: key 0.
          temperature: 0 samples greedily.
          max_new: cap on new tokens. Default: the bundle's `max_new_tokens`.
          scale: norm of the injected vectors: "mean" as in training, whatever the norm of h; a number times
            that; or "raw", in proportion to the norm of h.

        Raises UserError for a wrong shape or kind, for an activation that is zero or not finite, for an
        impossible temperature, and for a `max_new` that exceeds the target's context.
        """
        h = self.as_rows(h)
        if not len(h):
            return []
        key = new_key(0) if key is None else key
        return self.runner.explain(
            h, key, temperature=temperature,
            max_new=self.meta["max_new_tokens"] if max_new is None else max_new,
            strength=distribution.strengths(h, distribution.parse_scale(str(scale)), self.activations),
        )

    def fit(self, h) -> Rows:
        """Return for each row of h [N, D] how it compares with the training activations
        (`nla_jax.evaluate.distribution.Fit`). Raises UserError as `verbalize`."""
        return Rows(distribution.compare_rows(self.as_rows(h), self.mean_direction, self.activations))

    def score(self, h, texts: list[str]) -> Rows:
        """Return for each row of h [N, D] and its explanation the scores by AR and by the frozen target
        (`nla_jax.evaluate.row_scores.RowScore`). Raises UserError as `verbalize` and `reconstruct`."""
        h, texts = self.as_rows(h), self._texts(texts, "score")
        if len(h) != len(texts):
            raise UserError(f"score takes one text for each activation; got {len(h)} and {len(texts)}")
        return row_scores.score_rows(self.runner, self.mean_direction, h, texts) if texts else Rows()

    def compare(self, a, b) -> Comparison:
        """Return what a and b share. Each is an activation [D] or an explanation, which AR reads: the cosine
        of the vectors, both explanations, the FVE of each on its own and on the other vector, and the claims
        that recur (`nla_jax.evaluate.row_scores.Comparison`). Raises UserError as `score`."""
        sides = [(self.reconstruct([x]), [x]) if isinstance(x, str) else (self.as_rows(x[None]), None)
                 for x in (side if isinstance(side, str) else _host_array(side) for side in (a, b))]
        said = [text or self.verbalize(h, temperature=0.0) for h, text in sides]
        vectors = np.concatenate([h for h, _ in sides])
        return row_scores.compare_vectors(self.runner, self.mean_direction, vectors, [t[0] for t in said])

    def claims(
        self, text: str, positions, explanations: list[str], *, seed: int = 0, rendered: bool = False
    ) -> list[list[TrustedClaim]]:
        """Return the claims of explanations of a text's tokens, with the trust in each (`nla trust`).

        Trust is the estimated probability that a claim is true of the text. The estimate does not compare it
        with the text: AV explains the tokens around each position, and each position three times more.

        Args:
          positions: token indices, as in `round_trip`; one for each explanation.
          rendered: as in `capture`.

        Raises UserError if the bundle has no trust model, and as `round_trip`.
        """
        if self.trust is None:
            raise UserError("this bundle has no trust model: fit one with `nla trust --bundle DIR`")
        h_TD, positions = self.capture(text, rendered=rendered), list(positions)
        check_positions(positions, len(h_TD))
        where = [p % len(h_TD) for p in positions]
        mean_D = apply.mean_or_zero(self.mean_direction, self.spec.lm.d_model)
        return apply.trust_claims(self.runner, mean_D, self.trust, h_TD, where, list(explanations), seed=seed,
                                  max_new=self.meta["max_new_tokens"])

    def reconstruct(self, texts: list[str]) -> np.ndarray:
        """Reconstruct the activation from each explanation: [N, D] float32.

        Training determines the direction only; the norm has no meaning. Raises UserError for a string, and
        for a text that exceeds the target's context.
        """
        texts = self._texts(texts, "reconstruct")
        return self.runner.reconstruct(texts) if texts else np.zeros((0, self.spec.lm.d_model), np.float32)

    @staticmethod
    def _texts(texts, what: str) -> list[str]:
        if isinstance(texts, str):
            raise UserError(f"{what} takes a list of texts; got one string")
        for i, text in enumerate(texts := list(texts)):
            utf8.check(text, f"text {i}")
        return texts

    def round_trip(
        self, text: str, *, positions=None, key=None, temperature: float = 1.0, samples: int = 1,
        rendered: bool = False,
    ) -> Rows:
        """Explain tokens of a text and score each explanation by its reconstruction.

        Args:
          positions: token indices (negative ones count from the end); all by default.
          key, temperature: as in `verbalize`.
          samples: explanations per token; the reports of one token are adjacent.
          rendered: as in `capture`.

        Raises UserError for a position outside the text, and as `capture`.
        """
        if samples < 1:
            raise UserError(f"samples={samples}: must be at least 1")
        h_TD, names = self.capture(text, rendered=rendered), self.tokens(text)
        positions = range(len(h_TD)) if positions is None else list(positions)
        check_positions(positions, len(h_TD))
        where = np.repeat(np.array([p % len(h_TD) for p in positions], int), samples)
        h = h_TD[where]
        explanations = self.verbalize(h, key=key, temperature=temperature)
        ok = np.array([bool(e) for e in explanations])
        fve, cos = row_scores.fve_and_cos(self.reconstruct(explanations), h, self.mean_direction, ok)
        return Rows(
            TokenReport(int(p), names[p], e, float(f), float(c), bool(o))
            for p, e, f, c, o in zip(where, explanations, fve, cos, ok, strict=True)
        )

    def as_rows(self, h) -> np.ndarray:
        """Return activations as float32 [N, D] on the host. Raises UserError as `verbalize`."""
        h = _host_array(h)
        if h.ndim != 2 or h.shape[1] != self.spec.lm.d_model:
            raise UserError(f"activations have shape {h.shape}; expected [N, {self.spec.lm.d_model}]")
        norms = np.linalg.norm(h, axis=1)
        if bad := [i for i, n in enumerate(norms) if not np.isfinite(n) or n == 0]:
            raise UserError(f"activation {bad[0]} is zero or not finite")
        return h


def _host_array(h) -> np.ndarray:
    """Return activations as float32 on the host. Raises UserError if they are not numbers of one shape.

    numpy reads no torch tensor in bfloat16, on a GPU, or with a gradient, nor a list of such tensors.
    """
    if isinstance(h, list | tuple) and any(hasattr(row, "detach") for row in h):
        h = [_host_array(row) for row in h]
    if hasattr(h, "detach") and hasattr(h, "cpu"):
        h = h.detach().cpu().float()
    try:
        return np.asarray(h, np.float32)
    except (TypeError, ValueError, RuntimeError) as e:
        what = f"{type(h).__name__}: {one_line(e)}"
        raise UserError(f"these are no activations ({what}); give an array of numbers [N, D]") from e


def load(
    directory=None,
    target: str | None = None,
    batch: int = 16,
    check=lambda spec, tok: None,
    *,
    revision: str = "",
    dtype: str = "",
    mesh=None,
    whole_target: bool = True,
    announce: bool = False,
) -> NLA:
    """Open a bundle, a run's bundle or a released pair; by default the bundle that the package ships.

    Args:
      directory: as `where` of `nla_jax.interchange.find_bundle.find`: a directory, a Hub id, or AV and AR.
      batch: the number of activations or texts per call of a jitted function.
      revision: of Hub ids: a branch, tag or commit.
      dtype: of the weights: float32, bfloat16 or int8 (products are then in bfloat16). "": as in the sidecar,
        which for a released pair is bfloat16.
      mesh: a mesh of `nla_jax.sharding.mesh`. Default: all devices.

    `target`, `check`, `whole_target`, `announce` and the errors are described at `nla_jax.bundle.load`.
    """
    if directory is None:
        directory = bundle.shipped_bundle()
    directory = find_bundle.find(directory, target=target or "", revision=revision)
    trust = trust_model.read_trust(paths.path(directory) / bundle.TRUST)
    opened = bundle.load(directory, target, check, dtype=dtype, mesh=mesh, whole_target=whole_target,
                         announce=announce)
    return NLA(opened, batch, trust)
