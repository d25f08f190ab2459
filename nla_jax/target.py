"""The frozen target: text -> h, the residual stream after block K at one position."""

import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import embed, forward


def capture(params, cfg: LMConfig, layer: int, ids_BT, valid_BT, positions_BP):
    """h_BPD: raw activations, float32.

    Args:
      params: the target's parameters (only the embedding and blocks 0..layer are read).
      layer: K, 0-based; h is the OUTPUT of block K (`hidden_states[K + 1]` in transformers).
      ids_BT, valid_BT: tokens, padded on either side; valid marks the real ones.
      positions_BP: indices into T; a negative index marks an unused slot and gives garbage there.
    """
    x_BTD, _ = forward(params_lib.truncate(params, layer + 1), cfg, embed(params, ids_BT), valid_BT)
    return jnp.take_along_axis(x_BTD, jnp.maximum(positions_BP, 0)[..., None], axis=1)
