"""Patch ĥ into the target's forward pass in the place of h, and compare its predictions.

After block K, at the position of h, the residual stream is replaced by ĥ, rescaled to the norm of h. The
blocks above run, and their predictions are compared with the unpatched ones. Controls patch the mean
direction, another document's ĥ, and zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import specs, target
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.lm.tokenizer import inner_ids, plain_ids
from nla_jax.util.batching import full_batches, pad_rows
from nla_jax.util.progress import Progress

AHEAD = 32  # tokens after the position that are scored, at most
SHOWN = ("words", "shuffled", "mean", "zero")


def run_patched(base, spec: specs.Spec, ids_BT, valid_BT, at_B, n_B, vectors_CBD):
    """Run the target with each replacement of the residual stream at (`at_B`, block K).

    Args:
      ids_BT, valid_BT: right-padded texts, each with the tokens that follow position `at_B`.
      n_B: number of those tokens that are scored, at most AHEAD.
      vectors_CBD: C replacements; each is rescaled to the norm of the h that it replaces.

    Returns:
      (kl_CBA, ce_CBA, ce_BA, mask_BA) in nats, A = AHEAD: KL(unpatched || patched) and cross-entropy of the
      true token at each position ahead, the unpatched cross-entropy, and which positions are scored.
    """
    lm, K = spec.lm, spec.layer
    x, _ = forward(params_lib.truncate(base, K + 1, lm), lm, embed(base, lm, ids_BT), valid_BT)
    upper = {**base, "blocks": params_lib.slice_blocks(base["blocks"], lm, K + 1, lm.n_blocks)}
    upper_lm = lm.of_blocks(K + 1, lm.n_blocks)
    here_BT = jnp.arange(ids_BT.shape[1])[None] == at_B[:, None]
    place = jnp.minimum(at_B[:, None] + jnp.arange(AHEAD + 1)[None], ids_BT.shape[1] - 1)
    true_BA = jnp.take_along_axis(ids_BT, place[:, 1:], 1)

    def predict(x_BTD):
        y, _ = forward(upper, upper_lm, x_BTD, valid_BT)
        y = jnp.take_along_axis(y, place[:, :-1, None], 1)
        return jax.nn.log_softmax(unembed(base, lm, y))

    def loss(logp):
        return -jnp.take_along_axis(logp, true_BA[..., None], -1)[..., 0]

    clean = predict(x)

    def one(v_BD):
        logp = predict(target.put_vector(x, here_BT, v_BD))
        return jnp.sum(jnp.exp(clean) * (clean - logp), -1), loss(logp)

    kl_CBA, ce_CBA = jax.lax.map(one, vectors_CBD)
    return kl_CBA, ce_CBA, loss(clean), jnp.arange(AHEAD)[None] < n_B[:, None]


def patch(ev: Evidence, label: str = "") -> list[Figure]:
    """Return KL of the target's next tokens with ĥ in the place of h, and the recovered KL and loss."""
    trip, cols = ev.trip, ev.columns
    tok, spec = ev.runner.tok, ev.runner.spec
    before = [ids and [*spec.lead, *ids] for ids in (plain_ids(tok, t) for t in cols["text"])]
    after = [inner_ids(tok, t)[:AHEAD] for t in cols["next_text"]]
    rows = np.array([i for i in range(len(ev)) if before[i] and after[i]], int)
    if not len(rows):
        ev.left_out.append("patch: no row of this store has its text and the text that follows (next_text)")
        return []
    mean_ND = np.broadcast_to(ev.mean_D, cols["h"].shape)
    # A failed answer gives the mean direction, the best guess without an explanation.
    words = np.where(trip.ok[:, None], trip.h_text, mean_ND)
    vectors = np.stack(
        [words, words[rows_of_other_documents(cols["doc_id"])], mean_ND, np.zeros_like(words)]
    ).astype(np.float32)
    jitted = jax.jit(functools.partial(run_patched, spec=spec))
    first = {n: np.zeros(len(ev)) for n in (*SHOWN, "clean")}
    total = {n: np.zeros(len(ev)) for n in (*SHOWN, "clean")}
    kl_first, kl_total = ({n: np.zeros(len(ev)) for n in SHOWN} for _ in range(2))
    order = rows[np.argsort([len(before[i]) + len(after[i]) for i in rows], kind="stable")]
    with Progress(label and f"{label} patch", len(order), unit="rows") as bar:
        for real, pick in full_batches(order, ev.runner.batch):
            ids_BT, valid, _ = pad_rows([before[i] + after[i] for i in pick], spec.av.pad, 32)
            where = np.array([len(before[i]) - 1 for i in pick], np.int32)
            n = np.array([len(after[i]) for i in pick], np.int32)
            kl, ce, clean, mask = (
                np.asarray(a, np.float64)[..., : len(real), :]
                for a in jitted(ev.runner.base, ids_BT=ids_BT, valid_BT=valid, at_B=where, n_B=n,
                                vectors_CBD=vectors[:, pick])
            )
            for c, name in enumerate(SHOWN):
                first[name][real], kl_first[name][real] = ce[c, :, 0], kl[c, :, 0]
                total[name][real], kl_total[name][real] = (ce[c] * mask).sum(1), (kl[c] * mask).sum(1)
            first["clean"][real], total["clean"][real] = clean[:, 0], (clean * mask).sum(1)
            bar.advance(len(real))
    lengths = np.array([len(a) for a in after], float)
    told = {"words": "ĥ from the words", "shuffled": "another document's ĥ", "mean": "the mean direction",
            "zero": "nothing"}

    def kept(values):
        return values[rows]

    out = [
        ev.mean(f"kl_next_{n}", kept(kl_first[n]), f"nats: KL of the target's next token, {told[n]} for h",
                rows=rows) for n in SHOWN
    ]
    out += [
        ev.ratio(f"kl_ahead_{n}", kept(kl_total[n]), kept(lengths), f"the same a token, next {AHEAD}",
                 rows=rows) for n in SHOWN[:3]
    ]
    return out + [
        ev.ratio("kl_recovered", kept(kl_first["mean"] - kl_first["words"]), kept(kl_first["mean"]),
                 "share of the mean direction's KL (next token) that the words save", rows=rows),
        ev.ratio("loss_recovered", kept(first["zero"] - first["words"]), kept(first["zero"] - first["clean"]),
                 "share of the next token's loss between zero and h that the words save", rows=rows,
                 reference="published: .987"),
        ev.ratio("loss_recovered_mean", kept(first["zero"] - first["mean"]),
                 kept(first["zero"] - first["clean"]), "the same for the mean direction: what it is worth",
                 rows=rows),
        ev.ratio("loss_recovered_ahead", kept(total["zero"] - total["words"]),
                 kept(total["zero"] - total["clean"]), f"the same over the next {AHEAD} tokens", rows=rows),
    ]
