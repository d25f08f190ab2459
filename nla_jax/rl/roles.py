"""The losses of AV and AR, their gradients, and the update of each role in an RL step."""

import math

import jax
import jax.numpy as jnp

from nla_jax import objectives, reconstructor, verbalizer
from nla_jax.lm import loss_weights, optimize
from nla_jax.lm.optimize import Learner
from nla_jax.rl import reading, widths
from nla_jax.sharding import placement
from nla_jax.specs import Spec


def _answer_hidden(av, base, spec: Spec, h_BD, ids_BT, summed=None):
    """Return (AV's parameters, the hidden states [B T, D] that predict the tokens of given answers)."""
    params = verbalizer.weights(base, av, spec.compute)
    e_BD = verbalizer.inject(av, h_BD, spec.alpha)
    hidden = verbalizer.response_hidden(params, spec.lm, spec.av, e_BD, ids_BT, spec.remat, spec.compute,
                                        summed, spec.attention)
    return params, hidden.reshape(-1, hidden.shape[-1])


def answer_logp(av, base, spec: Spec, h_BD, ids_BT):
    """Return the log-probability [B, T], in nats, of each token of given answers under AV with h."""
    params, hidden_ND = _answer_hidden(av, base, spec, h_BD, ids_BT)
    logp, _, _ = objectives.token_scores(
        params, spec.lm, hidden_ND, ids_BT.reshape(-1), chunk=spec.vocab_chunk, stats=False)
    return logp.reshape(ids_BT.shape)


def av_loss(av, base, spec: Spec, h_BD, ids_BT, weight_BT, summed=None):
    """Return the sum of the response tokens' cross-entropies given h, in nats, times their weights."""
    params, hidden_ND = _answer_hidden(av, base, spec, h_BD, ids_BT, summed)
    value, _ = objectives.weighted_scores(
        params, spec.lm, hidden_ND, ids_BT.reshape(-1), -weight_BT.reshape(-1), chunk=spec.vocab_chunk,
        stats=False)
    return value


def ar_grads(ar, base, spec: Spec, batch, micro: int, keep: bool = False, n_widths: int = 1):
    """Return (gradients of the weighted mean scaled MSE, scalars, each row's MSE and norm).

    batch: ids_BT, valid_BT, last_B (whole AR prompts), h_BD, weight_B (weight 0 excludes a row).
    keep: also return each row's reconstruction. n_widths: as for `widths.accumulate`.
    """
    total = jnp.maximum(batch["weight_B"].sum(), 1.0)

    def grad_fn(ar, part, summed):
        def loss(ar):
            params = reconstructor.weights(base, ar, spec.layer, spec.compute, spec.lm)
            h_hat = reconstructor.reconstruct(
                params, spec.lm, part["ids_BT"], part["valid_BT"], part["last_B"], spec.remat, spec.compute,
                summed, spec.attention)
            mse = objectives.scaled_mse(h_hat, part["h_BD"])
            rows = {"mse_B": mse, "norm_B": jnp.linalg.norm(h_hat, axis=-1)}
            return jnp.sum(mse * part["weight_B"]) / total, rows | ({"h_hat_BD": h_hat} if keep else {})

        (value, rows), grads = jax.value_and_grad(loss, has_aux=True)(ar)
        return grads, {"loss": value}, rows

    return widths.accumulate(grad_fn, ar, batch, batch["last_B"] + 1, n_widths, micro, spec.remat)


def av_update(role: Learner, base, ref, spec: Spec, opts, tx, batch):
    """Update AV once by policy gradient with exact KL to the reference AV, over response tokens only.

    opts: `steps.RLOptions`. batch: h_ND, ids_NT, logp_NT (of the rollout), length_N, advantage_N, and with
      opts.drop_equal kept_N, the rows of the loss. Returns (role, metrics).
    """
    mask_NT = jnp.arange(batch["ids_NT"].shape[1])[None] < batch["length_N"][:, None]
    total = jnp.maximum(mask_NT.sum().astype(jnp.float32), 1.0)
    counted_NT = mask_NT & batch["kept_N"][:, None] if opts.drop_equal else mask_NT
    weight_NT, weights = loss_weights.token_weights(
        counted_NT, opts.loss_mean, opts.update_group or opts.group)

    def grad_fn(av, part, summed):
        weight = part["weight_NT"].reshape(-1) / weights
        mask = part["mask_NT"].reshape(-1).astype(jnp.float32)
        ids = part["ids_NT"]

        reference = None
        if opts.kl:
            with jax.named_scope("reference"):
                reference = jax.lax.stop_gradient(_answer_hidden(ref, base, spec, part["h_ND"], ids))

        def loss(av):
            params, x = _answer_hidden(av, base, spec, part["h_ND"], ids, summed)
            adv = jnp.repeat(part["advantage_N"], ids.shape[1])
            value, (logp, entropy, kl) = objectives.weighted_scores(
                params, spec.lm, x, ids.reshape(-1), -adv * weight, opts.kl * weight,
                reference, spec.vocab_chunk, policy=opts.policy, sampled_logp_N=part["logp_NT"].reshape(-1))
            off = jnp.abs(jnp.exp(logp - part["logp_NT"].reshape(-1)) - 1.0) * mask
            scalars = {"kl": jnp.sum(kl * mask) / total, "entropy": jnp.sum(entropy * mask) / total,
                       "ratio_off_mean": jnp.sum(off) / total}
            return value, (scalars, {"off": off.reshape(ids.shape).max(1)})

        grads, (scalars, rows) = jax.grad(loss, has_aux=True)(av)
        return grads, scalars, rows

    batch = {**batch, "mask_NT": mask_NT, "weight_NT": weight_NT}
    grads, scalars, rows = widths.accumulate(
        grad_fn, role.params, batch, batch["length_N"], opts.update_widths, opts.micro_av, spec.remat)
    role, info = optimize.apply(role, grads, tx)
    return role, {**scalars, "ratio_off_max": rows["off"].max(), "av_grad_norm": info["grad_norm"],
                  "av_skipped": info["skipped"], "av_skipped_run": info["skipped_run"]}


def _append_written(part: dict, batch: dict) -> dict:
    """Append the written explanations of `batch`, if it has any, to AR's rows of a step."""
    written = {k: batch[f"written_{k}"] for k in part if f"written_{k}" in batch}
    if not written:
        return part
    width = part["ids_BT"].shape[1]
    fill = lambda a: jnp.pad(a, ((0, 0), (0, width - a.shape[1]))) if a.ndim == 2 else a
    written = {k: a if k == "h_BD" else fill(a) for k, a in written.items()}
    return {k: jnp.concatenate([a, written[k].astype(a.dtype)]) for k, a in part.items()}


def ar_update(role: Learner, base, spec: Spec, opts, tx, batch, words, ok, goal_ND):
    """Update AR once on the words of a step: (role, (each row's MSE, reconstruction or None), metrics)."""
    N, G = ok.shape[0], opts.group
    ids, valid, last = reconstructor.splice(spec.ar, *words)
    part = {"ids_BT": ids, "valid_BT": valid, "last_B": last, "h_BD": goal_ND,
            "weight_B": ok.astype(jnp.float32)}
    read, micro = None, opts.micro_ar
    with jax.named_scope("ar"):
        if 0 < opts.ar_group < G:  # read all, learn the best of each group
            read = reading.score(
                role.params, base, spec, *words, goal_ND, opts.update_widths, opts.micro_ar)
            mse_BG = jnp.where(ok, read[0], jnp.inf).reshape(-1, G)
            pick_BK = jnp.argsort(mse_BG, 1)[:, : opts.ar_group] + jnp.arange(0, N, G)[:, None]
            part = jax.tree.map(lambda a: placement.shard_rows(a[pick_BK.reshape(-1)]), part)
            micro = max(1, opts.micro_ar * opts.ar_group // G)  # microbatches of about as many rows
        part = _append_written(part, batch)
        micro = math.gcd(micro, part["last_B"].shape[0])
        grads, _, rows = ar_grads(role.params, base, spec, part, micro, opts.patch_kl > 0, opts.update_widths)
        role, info = optimize.apply(role, grads, tx)
    mse, h_hat, norm = rows["mse_B"][:N], rows.get("h_hat_BD"), rows["norm_B"]
    if read:
        mse, h_hat, norm = *read, jnp.linalg.norm(read[1], axis=-1)
    # AV's update waits for AR's, because the gradients of both would otherwise be in memory at once.
    mse, role = jax.lax.optimization_barrier((mse, role))
    return role, (mse, h_hat[:N] if opts.patch_kl else None), {
        "ar_grad_norm": info["grad_norm"], "ar_skipped": info["skipped"],
        "ar_skipped_run": info["skipped_run"], "ar_norm": norm.mean()}
