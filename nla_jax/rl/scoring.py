"""The reward of an answer: a reader's error, the target's predictions, its claims, and its length."""

import jax
import jax.numpy as jnp

from nla_jax import objectives, reconstructor, target
from nla_jax.rl import reading
from nla_jax.specs import Spec

LEAST_KL = 1e-3  # nats; smaller differences of predictions earn nothing more


def reward_answers(reader, own, base, spec: Spec, opts, batch, answers, words, goal_ND):
    """Return (reward [N], the reader's MSE [N], metrics) of a step's answers.

    Args:
      reader: the tree that reads; not used for opts.reader="frozen_target", nor if AR reads and has `own`.
      own: (MSE [N], reconstruction [N, D]) by AR if it has read the words, else None.
      opts: `steps.RLOptions`. batch, answers: as of `steps.update`. words: of `reading.read_words`.
      goal_ND: the activations that the answers must give back.
    """
    ok_N, metrics = answers["ok_N"], {}
    cut = (opts.update_widths, opts.micro_ar)
    if opts.reader == "ar":
        mse_N, h_hat_ND = own or reading.score(reader, base, spec, *words, goal_ND, *cut)
    else:
        frozen = opts.reader == "frozen_target"
        with jax.named_scope("reader"):
            mse_N, h_hat_ND = reading.score(reconstructor.FROZEN if frozen else reader, base,
                                            reading.bare_prompt(spec) if frozen else spec, *words, goal_ND,
                                            *cut)
        metrics["reader_fve"] = reading.batch_fve(mse_N, ok_N, goal_ND[:: opts.group])
        if own:
            metrics["ar_mse"] = objectives.masked_mean(own[0], ok_N)
    if "prefix_B" in batch:
        metrics["prefix"] = objectives.masked_mean((words[2] - words[1]).astype(jnp.float32), ok_N)
    if "edited_N" in answers:
        metrics["paraphrased"] = objectives.masked_mean(answers["edited_N"].astype(jnp.float32), ok_N)
    kl_N = None
    if opts.patch_kl:
        with jax.named_scope("patched"):
            kl_N = _patched_kl(base, spec, batch, h_hat_ND, ok_N, opts.group)
        metrics["patch_kl"] = objectives.masked_mean(kl_N, ok_N)
    claims_N = answers.get("claims_N") if opts.false_claims else None
    reward_N = combine(mse_N, ok_N, opts.reward, kl_N=kl_N, patch_kl=opts.patch_kl, claims_N=claims_N,
                       false_claims=opts.false_claims)
    reward_N = reward_N - opts.length_penalty * objectives.length_cost(
        answers["length_N"], opts.max_new, opts.length_free)
    return reward_N, mse_N, metrics


def combine(mse_N, ok_N, kind: str, *, kl_N=None, patch_kl: float = 0.0, claims_N=None,
            false_claims: float = 0.0):
    """Return the reward [N] of answers from its parts, without the length penalty.

    Args:
      mse_N: scaled MSE of the reader. ok_N, kind: as in `objectives.reward`.
      kl_N: KL of the patched target, in nats. Its reward has the same form as that of an MSE; `patch_kl` is
        its share of the reward.
      claims_N: score of the claims, from -1 to 1 (`evaluate.words.claim_score`), with weight `false_claims`.
    """
    reward_N = objectives.reward(mse_N, ok_N, kind)
    if kl_N is not None:
        of_kl_N = objectives.reward(jnp.maximum(kl_N, LEAST_KL), True, kind)
        reward_N = (1.0 - patch_kl) * reward_N + patch_kl * of_kl_N
    if claims_N is not None:
        reward_N = reward_N + false_claims * claims_N
    return reward_N


def failed_kl(kl_BG, ok_BG):
    """Return KL [B, G] in which a failed answer has twice the largest KL of its group.

    kl_BG: of failed answers, the KL of the zero vector. A failed answer thus scores worse than every readable
    one."""
    return jnp.where(ok_BG, kl_BG, 2.0 * kl_BG.max(1, keepdims=True))


def _patched_kl(base, spec: Spec, batch, h_hat_ND, ok_N, group: int):
    """Return KL [N] of the target's next token with each reconstruction in the place of h, in nats."""
    h_hat_BGD = jnp.where(ok_N[:, None], h_hat_ND, 0.0).reshape(-1, group, h_hat_ND.shape[1])
    text = (batch["text_ids_BT"], batch["text_valid_BT"], batch["text_at_B"])
    kl_BG = target.patched_kl(base, spec.lm, spec.layer, *text, h_hat_BGD, spec.lead, spec.attention)
    return failed_kl(kl_BG, ok_N.reshape(-1, group)).reshape(-1)
