"""The static settings of an NLA: its model, layer, injection and rendered prompts; and a bundle's sidecar."""

import dataclasses
import datetime
import hashlib
import math

import jax.numpy as jnp

from nla_jax import prompts, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import MATCHED_AFTER
from nla_jax.prompts import ARPrompt, AVPrompt

KIND, SCHEMA = "nla_bundle", 1  # of a bundle's sidecar


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static settings of one NLA. It is hashable, because jitted functions take it as static argument."""

    lm: LMConfig
    layer: int  # K
    alpha: float  # scale of the injected vector (`verbalizer.inject`)
    av: AVPrompt
    ar: ARPrompt
    dtype: str = "bfloat16"  # of matrix products; parameters and optimizer state are float32
    remat: bool = True
    vocab_chunk: int = 1024  # number of positions whose logits are in memory at once
    lead: tuple[int, ...] = ()  # ids that the tokenizer puts before every text
    attention: str = "plain"  # or a fused kernel for training and scoring: cudnn, splash

    @property
    def compute(self):
        return jnp.dtype(self.dtype)

    def check_answer_fits(self, max_new: int, what: str) -> None:
        """Raise UserError if an answer of `max_new` tokens exceeds the context, after AV's prompt or in AR's.

        what: the name of `max_new`, for the message.
        """
        prompt = max(len(self.av.before) + 1 + len(self.av.after), len(self.ar.before) + len(self.ar.after))
        most = self.lm.max_position - prompt
        if not 1 <= max_new <= most:
            raise UserError(
                f"{what}={max_new}: must be from 1 to {most}, because a prompt has {prompt} tokens and this "
                f"target reads at most {self.lm.max_position}"
            )


def prompts_digest(spec: Spec) -> str:
    """Return the SHA-256 of all ids of the rendered prompts."""
    av, ar = spec.av, spec.ar
    parts = (av.before, (av.marker,), av.after, av.open, av.close, ar.before, ar.after, spec.lead)
    return hashlib.sha256(" | ".join(" ".join(map(str, p)) for p in parts).encode()).hexdigest()


def first_difference(spec: Spec, tokens: dict) -> str:
    """Return where the prompts first differ from a sidecar's `tokens`: "KEY is ID, not ID", or ""."""
    rendered = {
        "injection_token_id": spec.av.marker,
        "injection_left_neighbor_id": spec.av.before[-1],
        "injection_right_neighbor_id": spec.av.after[0],
        "critic_suffix_ids": list(spec.ar.suffix),
    }
    wrong = [f"{k} is {ids}, not {tokens[k]}" for k, ids in rendered.items() if ids != tokens[k]]
    return wrong[0] if wrong else ""


def make_spec(
    cfg: LMConfig,
    tok,
    *,
    layer: int,
    dtype: str,
    alpha: float,
    marker: str = "",
    av_template: str = "",
    ar_template: str = "",
    n_suffix: int = 0,
    injection: str = "replace",
    ids: dict | None = None,
    **options,
) -> Spec:
    """Build a Spec from settings. For "" and layer -1 the default for this model is chosen.

    n_suffix: number of ids that AR prompts end with, from a sidecar (`prompts.ar_prompt`).
    ids: of prompts that were rendered earlier (`prompts.ids_of`), used instead of the role's template.
    options: further fields of Spec.

    Raises UserError if layer, alpha, vocabulary, injection, marker or templates do not fit the model.
    """
    if not 0 < alpha < math.inf:
        raise UserError(f"alpha {alpha}: the scale of the injected vector must be a number above 0")
    layer = cfg.default_layer() if layer == -1 else layer
    if not 0 <= layer < cfg.n_blocks:
        raise UserError(f"layer {layer}: this target has blocks 0 to {cfg.n_blocks - 1}")
    tok_lib.check_vocabulary(tok, cfg.vocab_size)
    if verbalizer.adds_to_stream(injection, cfg.d_model) and cfg.n_blocks <= MATCHED_AFTER + 1:
        raise UserError(
            f"av.injection={injection!r} adds h after block {MATCHED_AFTER}, where only later blocks can see "
            f"it, and this target has blocks 0 to {cfg.n_blocks - 1}; set av.injection=replace"
        )
    if ids and "av" in ids:
        av = prompts.av_of_ids(ids["av"], tok, injection)
    else:
        marker = marker or tok_lib.find_marker(tok)[0]
        av = prompts.av_prompt(tok, av_template or prompts.AV_TEMPLATE, marker, injection)
    if ids and "ar" in ids:
        ar = prompts.ar_of_ids(ids["ar"], tok)
    else:
        ar = prompts.ar_prompt(tok, ar_template or prompts.ar_template_for(tok), n_suffix)
    return Spec(
        lm=cfg,
        layer=layer,
        alpha=alpha,
        dtype=dtype,
        av=av,
        ar=ar,
        lead=tok_lib.lead_ids(tok),
        **options,
    )


def sidecar(
    spec: Spec,
    *,
    target: str,
    target_path,
    av_rank: int,
    ar_rank: int,
    affine: bool,
    ar_kind: str = "trained",
    marker: str,
    av_template: str,
    ar_template: str,
    stage: str,
    max_new: int,
    mean_D,
    training: dict,
) -> dict:
    """Return the contents of nla_meta.yaml. `mean_D`: mean of normalised training activations, or None."""
    import nla_jax

    return {
        "kind": KIND,
        "schema_version": SCHEMA,
        "stage": stage,
        "base_checkpoint": target,
        "base_fingerprint": weights.fingerprint(target_path),
        "base_digest": weights.digest(target_path),
        "d_model": spec.lm.d_model,
        "lm": dataclasses.asdict(spec.lm),
        "dtype": spec.dtype,
        "extraction": {
            "layer_index": spec.layer,
            "norm": "none",
            "injection": spec.av.injection,
            "injection_scale": float(spec.alpha),
            "mse_scale": "sqrt_d_model",
        },
        "tokens": {
            "injection_char": marker,
            "injection_token_id": spec.av.marker,
            "injection_left_neighbor_id": spec.av.before[-1],
            "injection_right_neighbor_id": spec.av.after[0],
            "critic_suffix_ids": list(spec.ar.suffix),
        },
        "prompt_templates": {"av": av_template, "ar": ar_template},
        "prompt_ids": prompts.ids_of(spec.av, spec.ar),
        "roles": {"av_rank": av_rank, "ar_rank": ar_rank, "affine": affine, "ar_kind": ar_kind},
        "max_new_tokens": max_new,
        "mean_direction": None if mean_D is None else [float(x) for x in mean_D],
        "training": training,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "created_by": f"nla_jax {nla_jax.__version__}",
    }
