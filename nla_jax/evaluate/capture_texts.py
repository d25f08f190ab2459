"""Capture h at the last tokens of texts that are not in a store."""

import jax
import numpy as np

from nla_jax import target
from nla_jax.evaluate.runner import Runner
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.util.batching import full_batches, pad_rows, width_for
from nla_jax.util.progress import Progress

_capture = jax.jit(target.capture, static_argnames=("cfg", "layer", "lead"))


def capture_last(runner: Runner, texts: list[str], *, back=(0,), base=None, label: str = "") -> np.ndarray:
    """Return h [N, len(back), D], float32, at the last token of each text minus each offset of `back`.

    Args:
      back: offsets in tokens before the last token.
      base: parameters of the target; None means those of `runner`.
    """
    spec, base = runner.spec, runner.base if base is None else base
    ids, valid, last_N = pad_rows([plain_ids(runner.tok, t) for t in texts], spec.av.pad)
    where_NP = last_N[:, None] - np.asarray(back, np.int32)
    out = np.zeros((*where_NP.shape, spec.lm.d_model), np.float32)
    order = np.argsort(last_N, kind="stable")
    with Progress(label, len(texts), unit="texts") as bar:
        for real, pick in full_batches(order, runner.batch):
            width = min(ids.shape[1], width_for(int(last_N[pick].max() + 1)))
            h_BPD = _capture(base, spec.lm, spec.layer, ids[pick, :width], valid[pick, :width],
                             where_NP[pick], spec.lead)
            out[real] = np.asarray(h_BPD)[: len(real)]
            bar.advance(len(real))
    return out
