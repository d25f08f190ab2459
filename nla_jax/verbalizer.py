"""The activation verbalizer (AV): h -> text. Prompt, injection, sampling, scoring.

A trainable AV is a tree with "params" (full fine-tuning) or "lora" (adapters on the shared base). It
also has "inject" if the learned affine map is on.
"""

import jax
import jax.numpy as jnp

from nla_jax.errors import UserError, one_line
from nla_jax.lm import kv_cache, lora
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.generate import Samples, decode_weights, sample
from nla_jax.lm.model import cast_tail, embed, forward, unembed
from nla_jax.lm.ops import dense
from nla_jax.lm.params import Spec, float32_copy
from nla_jax.prompts import AVPrompt
from nla_jax.sharding import placement
from nla_jax.util.choices import choose


def replace(v_BD, marker_D):
    """Replace the marker's embedding by h; alpha is the norm there."""
    return v_BD, None


def norm_matched(v_BD, marker_D):
    """Add h to the residual x at the marker after block 1: x + |x| * v. alpha is a fraction of |x|."""
    return jnp.broadcast_to(marker_D, v_BD.shape), v_BD


# An injection takes v_BD = alpha * h / |h| (`inject`) and the embedding of the marker. It returns two arrays
# [B, D]: the embedding at the marker, and `matched_BD` of `forward`, or None in place of the second.
INJECTIONS = {"replace": replace, "norm_matched": norm_matched}


def adds_to_stream(injection: str, d_model: int) -> bool:
    """Return whether an injection adds to the residual stream, so that alpha is a fraction of its norm.

    injection: a name of INJECTIONS, or "module:function" of your own (docs/howto/own.md).
    Raises UserError for an unknown one, and for a function that fails or returns other shapes.
    """
    function, named = choose(INJECTIONS, injection, "av.injection"), f"av.injection={injection!r}"
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, d_model), (d_model,))]
    try:
        x, added = jax.eval_shape(function, *given)
        shapes = [x.shape] if added is None else [x.shape, added.shape]
    except Exception as e:
        raise UserError(f"{named}: the function fails on arrays [B, D] and [D] ({one_line(e)})") from e
    if any(shape != (2, d_model) for shape in shapes):
        raise UserError(f"{named}: the function must return two arrays [B, D], or one and None")
    return added is not None


def weights(base: dict, av: dict, dtype=jnp.float32) -> dict:
    """Return the AV's model parameters in `dtype`: its own, or the base with its adapter attached.

    On a mesh of several devices the blocks keep their dtype; `forward` casts each block when it runs.
    """
    if "lora" in av:
        return lora.attach(cast_tail(base, dtype), cast_tail(av["lora"], dtype))
    return cast_tail(av["params"], dtype)


def inject(av: dict, h_BD, alpha: float):
    """Return the injected vector [B, D], float32: h * alpha / |h|. `INJECTIONS` say where it goes.

    With "inject" in `av`, a learned affine map is applied to h' = h scaled to norm sqrt(D):
    alpha * (W h' + b) / sqrt(D). W starts as the identity; the norm of the result is not rescaled.
    """
    h = h_BD.astype(jnp.float32)
    unit = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
    if "inject" in av:
        root = jnp.sqrt(jnp.float32(h.shape[-1]))
        unit = (dense(unit * root, av["inject"]["w"]) + av["inject"]["b"][None]) / root
    return jnp.float32(alpha) * unit


def prompt_kv(params, cfg: LMConfig, prompt: AVPrompt, dtype=None):
    """Return the keys and values of the prompt before the marker: a batch of one, shared by every h."""
    ids = jnp.array(prompt.before)[None]
    _, kv = forward(params, cfg, embed(params, cfg, ids), jnp.ones(ids.shape, bool),
                    keep_kv=True, dtype=dtype, frozen=True)
    return kv


def _marker_and_after(params, cfg: LMConfig, prompt: AVPrompt, e_BD):
    """Return (embeddings from the marker on, `matched_BD` of `forward` or None)."""
    marker, rest = (embed(params, cfg, jnp.array(ids)[None]) for ids in ((prompt.marker,), prompt.after))
    x_BD, added_BD = choose(INJECTIONS, prompt.injection, "av.injection")(e_BD, marker[0, 0])
    rest = jnp.broadcast_to(rest, (e_BD.shape[0], *rest.shape[1:]))
    return jnp.concatenate([x_BD[:, None], rest], 1), added_BD


def prefill(params, cfg: LMConfig, prompt: AVPrompt, e_BD, dtype=None, shared=None):
    """Run the whole prompt: ((KV of one row, KV of B rows), logits_BV of the next token).

    The cache has two levels: the prefix before the marker, computed once, and the rest, computed for each
    h. shared: the first level if the caller already has it (`prompt_kv`).
    """
    shared = prompt_kv(params, cfg, prompt, dtype=dtype) if shared is None else shared
    x, matched = _marker_and_after(params, cfg, prompt, e_BD)
    x, own = forward(params, cfg, x, jnp.ones(x.shape[:2], bool), past=shared, keep_kv=True, dtype=dtype,
                     matched_BD=matched, frozen=True)
    return (shared, own), unembed(params, cfg, x[:, -1])


def prefill_draft(params, cfg: LMConfig, prompt: AVPrompt, e_BD, draft: tuple[int, ...], dtype, shared):
    """Run the prompt from the marker on, and a guess of the answer's first n tokens, in one pass.

    Returns (KV of that part of the prompt, KV of the guess or None if n = 0, logits [B, 1 + n, V] of the
    tokens after the prompt and after each token of the guess). shared: as for `prefill`. A guess needs a
    cache without states (`LMConfig.kinds`).
    """
    x, matched = _marker_and_after(params, cfg, prompt, e_BD)
    n_prompt = x.shape[1]
    if draft:
        guess = embed(params, cfg, jnp.array(draft)[None])
        x = jnp.concatenate([x, jnp.broadcast_to(guess, (len(x), *guess.shape[1:]))], 1)
    x, kv = forward(params, cfg, x, jnp.ones(x.shape[:2], bool), past=shared, keep_kv=True, dtype=dtype,
                    matched_BD=matched, frozen=True)
    logits = unembed(params, cfg, x[:, n_prompt - 1 :])
    if not draft:
        return kv, None, logits
    return kv_cache.span(kv, 0, n_prompt), kv_cache.span(kv, n_prompt, x.shape[1]), logits


def write(params, cfg: LMConfig, prompt: AVPrompt, e_BD, keys_N, *, group: int, max_new: int,
          temperature=1.0, dtype=None) -> Samples:
    """Sample `group` explanations for each injected h: N = B * group rows, grouped by h.

    keys_N: one PRNG key per row. max_new: cap on new tokens. The rows share the prompt's two cache levels;
    each row stores only the keys and values of its own tokens.
    """
    dtype = dtype or params["blocks"]["wq"].dtype
    kv, logits_BV = prefill(params, cfg, prompt, e_BD, dtype)
    logits_NV = placement.shard_rows(jnp.repeat(logits_BV, group, 0))
    w = decode_weights(params, cfg, dtype)
    return sample(w, cfg, kv, logits_NV, keys_N, max_new=max_new, temperature=temperature,
                  stop_ids=prompt.close, eos_ids=prompt.eos, pad_id=prompt.pad)


def response_hidden(params, cfg: LMConfig, prompt: AVPrompt, e_BD, ids_BT, remat: bool = False, dtype=None,
                    summed=None, attention: str = "plain"):
    """Return the hidden states [B, T, D] that predict the T response tokens (token t from t-1).

    The prefix before the marker is computed once; its gradient flows through its keys and values.
    remat, dtype, summed, attention: as in `forward`.
    """
    prefix = embed(params, cfg, jnp.array(prompt.before)[None])[0]
    x, matched = _marker_and_after(params, cfg, prompt, e_BD)
    n_prompt = x.shape[1]
    x = jnp.concatenate([x, embed(params, cfg, ids_BT[:, :-1])], 1)
    x, _ = forward(params, cfg, x, jnp.ones(x.shape[:2], bool), prefix_PD=prefix, remat=remat, dtype=dtype,
                   summed=summed, matched_BD=matched, attention=attention)
    return x[:, n_prompt - 1 :]


def parse_ids(prompt: AVPrompt, ids_BT, length_B, closed_B):
    """Find the explanation in each row by token ids: (start, end, ok), all [B].

    ok: the row begins with the opening tag, was closed, and the explanation is not empty.
    """
    n_open, n_close = len(prompt.open), len(prompt.close)
    opened = (ids_BT[:, :n_open] == jnp.array(prompt.open)[None]).all(1)
    end = length_B - n_close
    # The line break before the closing tag is part of the tag, unless it merged with a word.
    if len(prompt.newline) == 1:
        last = jnp.take_along_axis(ids_BT, jnp.maximum(end - 1, 0)[:, None], 1)[:, 0]
        end = jnp.where(last == prompt.newline[0], end - 1, end)
    start = jnp.full_like(length_B, n_open)
    return start, end, opened & closed_B & (end > start)


def table(cfg: LMConfig, *, rank: int = 0, affine: bool = False) -> dict[str, Spec]:
    """Return {name: Spec} of a trainable AV's tree."""
    if rank:
        specs = {f"lora/{n}": s for n, s in lora.table(cfg, rank).items()}
    else:
        specs = {f"params/{n}": s for n, s in params_lib.table(cfg).items()}
    if affine:
        D = cfg.d_model
        specs["inject/w"] = Spec((D, D), ("norm", "model"), "eye")
        specs["inject/b"] = Spec((D,), ("norm",), "zeros")
    return specs


def init(base: dict, cfg: LMConfig, *, rank: int = 0, affine: bool = False, key=None) -> dict:
    """Return a trainable AV that computes what its base computes: a copy (rank 0) or adapters."""
    av = {"lora": lora.init(cfg, rank, key)} if rank else {"params": float32_copy(base)}
    if affine:
        D = cfg.d_model
        av["inject"] = {"w": jnp.eye(D, dtype=jnp.float32), "b": jnp.zeros(D, jnp.float32)}
    return av
