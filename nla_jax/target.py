"""The frozen target: text -> h, the residual stream after block K at given positions; and its predictions
with another vector in the place of h."""

import jax
import jax.numpy as jnp

from nla_jax.lm import lora
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.sharding import placement


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
    short = params_lib.truncate(params, layer + 1, cfg, whole=True)
    frozen = not lora.is_attached(params)  # studies train adapters of the target
    x_BTD, _ = forward(short, cfg, x, valid_BT, attention=attention, frozen=frozen)
    return jnp.take_along_axis(x_BTD, jnp.maximum(positions_BP, 0)[..., None] + len(lead), axis=1)


def add_activations(params, spec, batch: dict) -> dict:
    """Return `batch` with h_BD. If it contains texts instead, the target computes h from read_ids_BT,
    read_valid_BT and read_at_B (the index of the token)."""
    if "h_BD" in batch:
        return batch
    rest = {name: value for name, value in batch.items() if not name.startswith("read_")}
    h_B1D = capture(params, spec.lm, spec.layer, batch["read_ids_BT"], batch["read_valid_BT"],
                    batch["read_at_B"][:, None], spec.lead, spec.attention)
    return {**rest, "h_BD": placement.shard_rows(h_B1D[:, 0])}


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


def put_vector(x_BTD, here_BT, v_BD):
    """Return the residual stream with v, rescaled to the norm that it replaces, where `here_BT` is True.

    `here_BT` marks one position in each row."""
    old_BD = jnp.sum(jnp.where(here_BT[..., None], x_BTD, 0.0), 1)
    norm_B1 = jnp.linalg.norm(old_BD, axis=-1, keepdims=True)
    size_B1 = jnp.maximum(jnp.linalg.norm(v_BD, axis=-1, keepdims=True), 1e-12)
    return jnp.where(here_BT[..., None], (v_BD / size_B1 * norm_B1)[:, None], x_BTD)


def patched_kl(params, cfg: LMConfig, layer: int, ids_BT, valid_BT, at_B, vectors_BGD,
               lead: tuple[int, ...] = (), attention: str = "plain"):
    """Return KL(unpatched || patched) [B, G] of the next token after `at_B`, in nats.

    Patched: each vector, rescaled to the norm of h, replaces h, the output of block `layer` at `at_B`. The
    blocks above compute that one position again; the positions before it come from the unpatched pass.

    Args:
      ids_BT, valid_BT, at_B, lead: right-padded texts and an index, as in `capture`.
      attention: of the unpatched pass, as in `capture`.
    """
    if lead:
        attention = "plain" if cfg.local else attention
        ids_BT, valid_BT = _prepend_lead(ids_BT, valid_BT, lead)
        at_B = at_B + len(lead)
    x_BTD, _ = forward(params_lib.truncate(params, layer + 1, cfg), cfg, embed(params, cfg, ids_BT), valid_BT,
                       attention=attention)
    x_B1D, here_B1 = jnp.take_along_axis(x_BTD, at_B[:, None, None], 1), jnp.ones((ids_BT.shape[0], 1), bool)
    y_B1D, above = x_B1D, lambda x: x  # if K is the last block
    if layer + 1 < cfg.n_blocks:
        y_B1D, above = _blocks_above(params, cfg, layer, x_BTD, valid_BT, at_B, attention)

    def predict(y_B1D):
        return jax.nn.log_softmax(unembed(params, cfg, placement.shard_rows(y_B1D[:, 0])))

    clean_BV = predict(y_B1D)

    def one(v_BD):
        patched = above(put_vector(x_B1D, here_B1, v_BD))
        return jnp.sum(jnp.exp(clean_BV) * (clean_BV - predict(patched)), -1)

    vectors_GBD = placement.shard_rows(vectors_BGD.swapaxes(0, 1), 1)
    return jax.lax.map(one, vectors_GBD).T


def _blocks_above(params, cfg: LMConfig, layer: int, x_BTD, valid_BT, at_B, attention: str):
    """Return (y, above): the last residual at `at_B`, [B, 1, D], and the function of block K's output there
    that gives it. x_BTD: the output of block K."""
    upper = {"blocks": params_lib.slice_blocks(params["blocks"], cfg, layer + 1, cfg.n_blocks)}
    upper_cfg = cfg.of_blocks(layer + 1, cfg.n_blocks)
    slot_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1])[None], valid_BT.shape)
    earlier_BT = valid_BT & (slot_BT < at_B[:, None])
    # A recurrent state is that after the last valid token, so linear attention reads earlier tokens only.
    read_BT = earlier_BT if upper_cfg.linear else valid_BT
    y_BTD, kv = forward(upper, upper_cfg, x_BTD, read_BT, keep_kv=True, attention=attention)
    before, here_B1 = kv.replace(valid_BS=earlier_BT), jnp.ones((len(x_BTD), 1), bool)
    above = lambda x_B1D: forward(upper, upper_cfg, x_B1D, here_B1, past=before)[0]
    x_B1D, y_B1D = (jnp.take_along_axis(a, at_B[:, None, None], 1) for a in (x_BTD, y_BTD))
    return above(x_B1D) if upper_cfg.linear else y_B1D, above
