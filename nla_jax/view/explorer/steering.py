"""Continue a text with the target after adding a direction to h at its last token (steering)."""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from nla_jax import specs
from nla_jax.lm import generate
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.sharding import placement
from nla_jax.util.batching import pad_left
from nla_jax.util.keys import new_key


@functools.partial(placement.jit_by_mesh, static_argnames=("spec", "max_new"))
def begin(base, ids_BT, valid_BT, add_BD, spec: specs.Spec, max_new: int) -> generate.DecodeState:
    """Decode the first token after left-padded texts, with |h| · `add_BD` added to h at each last token.

    Blocks up to K read the unchanged text. The blocks above read the changed h at that one position.
    """
    lm, K = spec.lm, spec.layer
    lower = params_lib.truncate(base, K + 1, lm)
    x, low = forward(lower, lm, embed(base, lm, ids_BT), valid_BT, keep_kv=True)
    size_B1 = jnp.linalg.norm(x[:, -1], axis=-1, keepdims=True)
    x = x.at[:, -1].add(size_B1 * add_BD)
    upper = {**base, "blocks": params_lib.slice_blocks(base["blocks"], lm, K + 1, lm.n_blocks)}
    x, high = forward(upper, lm.of_blocks(K + 1, lm.n_blocks), x, valid_BT, keep_kv=True)
    keys_B = generate.row_keys(new_key(0), jnp.arange(ids_BT.shape[0], dtype=jnp.int32))
    kv = low.above(high)
    return generate.begin(lm, kv, unembed(base, lm, x[:, -1]), keys_B, max_new=max_new, temperature=0.0,
                          dtype=spec.compute, eos_ids=spec.av.eos, pad_id=spec.av.pad)


@functools.partial(placement.jit_by_mesh, static_argnames="spec", donate_argnames="now")
def _continue(weights, now, until, spec):
    return generate.continue_decoding(weights, spec.lm, now, until, eos_ids=spec.av.eos, pad_id=spec.av.pad)


@functools.partial(placement.jit_by_mesh, static_argnames="spec")
def decode_weights(base, spec: specs.Spec) -> dict:
    """Return the target's weights in the layout of decoding."""
    return generate.decode_weights(base, spec.lm, spec.compute)


def continuations(base, weights: dict, spec: specs.Spec, tok, ids: list[int], add_BD, *, max_new: int = 24,
                  chunk: int = 4) -> Iterator[list[str]]:
    """Yield the greedy continuation so far for each added direction, every `chunk` tokens.

    Args:
      weights: `decode_weights(base, spec)`.
      ids: of the text up to and including the token whose h is changed, without `spec.lead`.
      add_BD: the additions to h, in units of its norm.
    """
    ids = [*spec.lead, *ids]
    ids_BT, valid_BT = pad_left([ids] * len(add_BD), spec.av.pad, 32)  # few shapes to compile
    now = begin(base, ids_BT, valid_BT, np.asarray(add_BD, np.float32), spec=spec, max_new=max_new)
    for until in range(chunk, max_new + chunk, chunk):
        now = _continue(weights, now, np.int32(min(until, max_new)), spec=spec)
        written, length, done = np.array(now.ids_BT), np.array(now.length_B), bool(now.done_B.all())
        yield [tok.decode(r[:n], skip_special_tokens=True) for r, n in zip(written, length, strict=True)]
        if done:
            return
