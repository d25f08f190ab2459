"""A model as an assistant: batches of chat prompts -> answers."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.lm import thinking
from nla_jax.lm.config import LMConfig
from nla_jax.lm.generate import decode_weights, sample
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.util.batching import pad_left


def make_answer(
    params,
    cfg: LMConfig,
    tok,
    *,
    max_new: int,
    batch: int,
    eos: Sequence[int],
    dtype,
    temperature: float = 0.0,
    stop: Sequence[int] = (),
) -> Callable[[list[list[int]], jax.Array], list[str]]:
    """Return a function (prompts as ids, one key per prompt) -> answers, for at most `batch` prompts.

    An answer ends with `stop`, which it includes, before one of `eos`, or after `max_new` tokens. It
    depends on its prompt and key only. An answer with thinking (`thinking.split`) keeps its special tokens,
    because some of them are its marks. Prompts are padded on the left to a multiple of 64 tokens. The
    caller must check that prompt and answer fit into `cfg.max_position`.
    """
    fast = jax.jit(functools.partial(decode_weights, cfg=cfg, dtype=jnp.dtype(dtype)))(params)

    @jax.jit
    def write(params, fast, ids_BT, valid_BT, keys_B):
        x, kv = forward(params, cfg, embed(params, cfg, ids_BT), valid_BT, keep_kv=True)
        return sample(fast, cfg, kv, unembed(params, cfg, x[:, -1]), keys_B, max_new=max_new,
                      temperature=jnp.float32(temperature), stop_ids=tuple(stop), eos_ids=tuple(eos),
                      pad_id=eos[0])

    def answer(rows: list[list[int]], keys_B) -> list[str]:
        filler = [[eos[0]]] * (batch - len(rows))
        ids, valid = pad_left([*rows, *filler], eos[0], 64)  # few shapes to compile
        keys_B = keys_B[jnp.minimum(jnp.arange(batch), len(rows) - 1)]
        got = write(params, fast, ids, valid, keys_B)
        ids, length = np.asarray(got.ids_BT), np.asarray(got.length_B)
        return [_decode(tok, ids[b, : length[b]]) for b in range(len(rows))]

    return answer


def _decode(tok, ids) -> str:
    whole = tok.decode(ids)
    return whole if thinking.has_marks(whole) else tok.decode(ids, skip_special_tokens=True)
