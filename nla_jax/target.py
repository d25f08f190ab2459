"""The frozen target: text -> h, the residual stream after block K at one position."""

import jax
import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import embed, forward


def capture(params, cfg: LMConfig, layer: int, ids_BT, valid_BT, positions_BP,
            lead: tuple[int, ...] = (), attention: str = "plain"):
    """h_BPD: raw activations, float32.

    Args:
      params: the target's parameters (only the embedding and blocks 0..layer are read).
      layer: K, 0-based; h is the OUTPUT of block K (`hidden_states[K + 1]` in transformers).
      ids_BT, valid_BT: tokens, padded on either side; valid marks the real ones.
      positions_BP: indices into T; a negative index marks an unused slot and gives garbage there.
      lead: what the tokenizer puts before every text (`nla_jax.lm.tokenizer.lead_ids`); it is read
        first and not counted in `positions_BP`.
      attention: as in `forward`; plain where padding may stand between `lead` and a text that windows count.
    """
    if lead and cfg.local:
        attention = "plain"
    if lead:
        ids_BT, valid_BT = _led(ids_BT, valid_BT, lead)
    x = embed(params, cfg, ids_BT)
    x_BTD, _ = forward(params_lib.truncate(params, layer + 1), cfg, x, valid_BT, attention=attention)
    return jnp.take_along_axis(x_BTD, jnp.maximum(positions_BP, 0)[..., None] + len(lead), axis=1)


def _led(ids_BT, valid_BT, lead: tuple[int, ...]):
    """Tokens that begin with `lead`. Positions count valid tokens only, so that padding may stand between it
    and the text."""
    first_BT = jnp.broadcast_to(jnp.array(lead, jnp.int32), (ids_BT.shape[0], len(lead)))
    valid_BT = jnp.concatenate([jnp.ones(first_BT.shape, bool), valid_BT], 1)
    return jnp.concatenate([first_BT, ids_BT], 1), valid_BT


def capture_layers(params, cfg: LMConfig, layers: tuple[int, ...], ids_BT, valid_BT, positions_BP,
                   lead: tuple[int, ...] = ()):
    """h_BPLD: `capture` of several blocks, `layers` ascending, from one forward pass."""
    if lead:
        ids_BT, valid_BT = _led(ids_BT, valid_BT, lead)
    at_BP1 = jnp.maximum(positions_BP, 0)[..., None] + len(lead)
    x_BTD, found, first = embed(params, cfg, ids_BT), [], 0
    for layer in layers:
        blocks = jax.tree.map(lambda a, i=first, j=layer + 1: a[i:j], params["blocks"])
        part = cfg.of_blocks(first, layer + 1)
        x_BTD, _ = forward({"blocks": blocks}, part, x_BTD, valid_BT)
        found.append(jnp.take_along_axis(x_BTD, at_BP1, axis=1))
        first = layer + 1
    return jnp.stack(found, 2)
