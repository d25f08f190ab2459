"""The frozen target: text -> h, the residual stream after block K at given positions."""

import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import embed, forward


def capture(params, cfg: LMConfig, layer: int, ids_BT, valid_BT, positions_BP,
            lead: tuple[int, ...] = (), attention: str = "plain"):
    """Return h_BPD: the output of block K at the given positions, float32, not normalised.

    Args:
      params: the target's parameters (only the embedding and blocks 0..layer are read).
      layer: K, 0-based; h is the OUTPUT of block K (`hidden_states[K + 1]` in transformers).
      ids_BT, valid_BT: tokens, padded on either side; valid marks the real ones.
      positions_BP: indices into T. A negative index marks an unused slot, whose h is undefined.
      lead: ids that the tokenizer puts before every text (`nla_jax.lm.tokenizer.lead_ids`). They are
        prepended here; `positions_BP` does not count them.
      attention: as in `forward`. It is plain if the model has local blocks and there is a `lead`: windows of
        the kernels would count padding between `lead` and the text.
    """
    if lead and cfg.local:
        attention = "plain"
    if lead:
        ids_BT, valid_BT = _prepend_lead(ids_BT, valid_BT, lead)
    x = embed(params, cfg, ids_BT)
    x_BTD, _ = forward(params_lib.truncate(params, layer + 1, cfg), cfg, x, valid_BT, attention=attention)
    return jnp.take_along_axis(x_BTD, jnp.maximum(positions_BP, 0)[..., None] + len(lead), axis=1)


def _prepend_lead(ids_BT, valid_BT, lead: tuple[int, ...]):
    """Prepend `lead` to each row. Left padding may follow it, because positions count valid tokens only."""
    first_BT = jnp.broadcast_to(jnp.array(lead, jnp.int32), (ids_BT.shape[0], len(lead)))
    valid_BT = jnp.concatenate([jnp.ones(first_BT.shape, bool), valid_BT], 1)
    return jnp.concatenate([first_BT, ids_BT], 1), valid_BT


def capture_layers(params, cfg: LMConfig, layers: tuple[int, ...], ids_BT, valid_BT, positions_BP,
                   lead: tuple[int, ...] = ()):
    """Return h_BPLD: `capture` at several blocks in one forward pass; `layers` must ascend."""
    if lead:
        ids_BT, valid_BT = _prepend_lead(ids_BT, valid_BT, lead)
    at_BP1 = jnp.maximum(positions_BP, 0)[..., None] + len(lead)
    x_BTD, found, first = embed(params, cfg, ids_BT), [], 0
    for layer in layers:
        blocks = params_lib.slice_blocks(params["blocks"], cfg, first, layer + 1)
        part = cfg.of_blocks(first, layer + 1)
        x_BTD, _ = forward({"blocks": blocks}, part, x_BTD, valid_BT)
        found.append(jnp.take_along_axis(x_BTD, at_BP1, axis=1))
        first = layer + 1
    return jnp.stack(found, 2)
