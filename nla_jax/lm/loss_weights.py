"""The weight of each token in a loss: of a mean, and of the policy gradient."""

import jax.numpy as jnp

# The factor of a sampled token's gradient from ratio, its probability now over that when it was sampled.
# reinforce: 1, as in a single update of fresh samples. cispo: the ratio, at most CISPO_MOST and without
# gradient (arXiv:2506.13585; the cap is that of ScaleRL, arXiv:2510.13786).
CISPO_MOST = 5.0
POLICY_LOSSES = {
    "reinforce": None,
    "cispo": lambda ratio: jnp.minimum(ratio, CISPO_MOST),
}
LOSS_MEANS = ("tokens", "sequences", "prompts")


def token_weights(mask_BT, mean: str, group: int = 1):
    """Return (weights [B, T], their sum): a loss is the weighted sum of the tokens' losses, divided by it.

    mean: a name of LOSS_MEANS. "tokens": the mean over the tokens of the batch where mask_BT is True.
    "sequences": the mean over its sequences of each sequence's mean, in which a token of a short sequence
    counts more. "prompts": the mean over the groups, of `group` rows in sequence, of the mean over each
    group's tokens. A sequence or group without tokens has no part in any.
    """
    weight_BT = mask_BT.astype(jnp.float32)
    if mean == "tokens":
        return weight_BT, jnp.maximum(weight_BT.sum(), 1.0)
    length_B1 = weight_BT.sum(1, keepdims=True)
    if mean == "prompts":
        length_P1 = length_B1.reshape(-1, group).sum(1, keepdims=True)
        total = jnp.sum(length_P1 > 0).astype(jnp.float32)
        length_B1 = jnp.repeat(length_P1, group, 0)
    else:
        total = jnp.sum(length_B1 > 0).astype(jnp.float32)
    return weight_BT / jnp.maximum(length_B1, 1.0), jnp.maximum(total, 1.0)
