"""Make the inputs that both sides share, as numpy: weights, adapters, prompts, activations, token ids."""

import dataclasses

import jax
import ml_dtypes
import numpy as np

from benchmarks.cases import Case
from nla_jax.lm import lora, weights
from nla_jax.lm.params import Spec, nest, table
from nla_jax.prompts import ARPrompt, AVPrompt

LR, B2, CLIP, KL = 1e-5, 0.99, 1.0, 0.01  # of every update, on both sides
ALPHA = 250.0
MARKER = 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All random inputs of a case, determined by its seed."""

    prompt: AVPrompt
    ar_prompt: ARPrompt
    h_BD: np.ndarray
    capture_BT: np.ndarray  # token ids
    warm_h_BD: np.ndarray
    warm_BT: np.ndarray
    warm_ar_BT: np.ndarray
    evaluate_ND: np.ndarray
    answers_NT: np.ndarray  # for the checks
    advantage_N: np.ndarray
    alpha: float = ALPHA
    lengths_N: np.ndarray | None = None  # tokens of each explanation in scores and updates


def _normal(rng, spec: Spec) -> np.ndarray:
    if spec.init == "ones":
        return (1 + 0.1 * rng.standard_normal(spec.shape, np.float32)).astype(np.float32)
    # Biases and the zero factor of adapters get small numbers, because a check at zero would miss errors.
    scale = 0.02 if spec.init == "zeros" else (spec.fan_in or spec.shape[-2]) ** -0.5
    return rng.standard_normal(spec.shape, np.float32) * np.float32(scale)


def params(case: Case) -> dict:
    """Return the target's parameters in float32 and nla_jax's layout."""
    if case.weights == "default":
        found, tree = weights.load(weights.resolve(weights.DEFAULT_TARGET))
        if found != case.lm:
            raise SystemExit(f"{weights.DEFAULT_TARGET} is not the model of case {case.name}")
    else:
        rng = np.random.default_rng(case.seed)
        tree = nest({name: _normal(rng, spec) for name, spec in table(case.lm).items()})
    # Norms and biases are rounded to bfloat16, because only one side keeps them in float32.
    return jax.tree.map_with_path(lambda path, a: _round_to_bfloat16(a) if _small(path) else a, tree)


def _round_to_bfloat16(a):
    return a.astype(ml_dtypes.bfloat16).astype(np.float32)


def _small(path) -> bool:
    return any(word in str(path[-1]) for word in ("norm", "bias"))


def adapters(case: Case, role: str) -> dict:
    """Return the LoRA of "av", "ref" or "ar" in float32, with both factors nonzero."""
    lm = case.lm.first_blocks(case.layer + 1) if role == "ar" else case.lm
    rng = np.random.default_rng([case.seed, *role.encode()])
    return nest({name: _normal(rng, spec) for name, spec in lora.table(lm, case.rank).items()})


def other_reference(case: Case, tree: dict) -> dict:
    """Return the reference AV of full fine-tuning, which differs from AV so that the KL is not zero. Beside a
    peer, whose KL is an estimate, it is AV."""
    if case.peer:
        return tree
    return {**tree, "final_norm": tree["final_norm"] * np.float32(1.125)}


def lengths(case: Case) -> np.ndarray:
    """Return the tokens of each explanation [N]: `max_new`, or drawn from a beta distribution."""
    if not case.lengths:
        return np.full(case.rows, case.max_new, np.int32)
    mean, least, most = case.lengths
    share = (mean - least) / (most - least)
    drawn = np.random.default_rng([case.seed, 2]).beta(8 * share, 8 * (1 - share), case.rows)
    return np.round(least + (most - least) * drawn).astype(np.int32)


def inputs(case: Case) -> Inputs:
    rng = np.random.default_rng([case.seed, 1])
    D, V = case.lm.d_model, case.lm.vocab_size

    def ids(*shape):
        return rng.integers(0, V, shape, dtype=np.int32)

    def h(rows):
        found = rng.standard_normal((rows, D), np.float32) * 10
        # The injected vector is then the marker's own embedding, as for a program without injection.
        return np.tile(marker, (rows, 1)) if case.peer else found

    def some(n):
        return tuple(int(i) for i in ids(n))

    marker = params(case)["embed"][MARKER].astype(np.float32) if case.peer else None
    alpha = float(np.linalg.norm(marker)) if case.peer else ALPHA
    # Stop ids outside the vocabulary: the sampler compares with them at every token, but no row stops early.
    never = V + 1
    return Inputs(
        prompt=AVPrompt(
            before=some(case.before), marker=MARKER, after=some(case.after), open=(), close=(never,) * 4,
            newline=(), end_of_turn=0, eos=(never, never + 1), pad=0,
        ),
        ar_prompt=ARPrompt(before=some(case.ar_before), after=some(case.ar_after), pad=0),
        h_BD=h(case.batch),
        capture_BT=ids(*case.capture),
        warm_h_BD=h(case.warm[0]),
        warm_BT=ids(*case.warm),
        warm_ar_BT=ids(*case.warm),
        evaluate_ND=h(case.evaluate),
        answers_NT=ids(case.rows, case.max_new),
        advantage_N=rng.standard_normal(case.rows).astype(np.float32),
        alpha=alpha,
        lengths_N=lengths(case),
    )
