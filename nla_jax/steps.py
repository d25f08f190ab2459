"""The training steps as pure functions: warm_start_av, warm_start_ar, and rl (`roll_out`, then `update`).

Each step takes and returns a `Learner` or an `RLState`. `nla_jax.training.jitted_steps` jits them and
donates the state.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax import objectives, target, verbalizer
from nla_jax.lm import loss_weights, optimize
from nla_jax.lm.generate import row_keys
from nla_jax.lm.optimize import Learner
from nla_jax.rl import reading, roles, scoring
from nla_jax.sharding import placement
from nla_jax.specs import Spec


@flax.struct.dataclass
class RLState:
    """The learners of AV and AR."""

    av: Learner
    ar: Learner


@dataclasses.dataclass(frozen=True)
class RLOptions:
    """Static options of the RL step. `nla_jax.configs` documents each of them."""

    group: int
    max_new: int
    reward: str
    advantage: str
    kl: float
    length_penalty: float
    train_ar: bool
    micro_av: int
    micro_ar: int
    length_free: int = 0
    update_group: int = 0
    ar_group: int = 0
    loss_mean: str = "tokens"
    policy: str = "reinforce"
    drop_equal: bool = False
    reader: str = "ar"
    patch_kl: float = 0.0
    false_claims: float = 0.0
    update_widths: int = 1


# --- warm start ---------------------------------------------------------------------------------

def warm_start_av(role: Learner, base, batch, *, spec: Spec, tx, micro: int = 1, loss_mean: str = "tokens"):
    """Update AV once by cross-entropy: (role, metrics). `micro` is the number of microbatches.

    batch: h_BD (or the texts for `target.add_activations`), ids_BT, mask_BT (True on response tokens).
    loss_mean: a name of `loss_weights.LOSS_MEANS`.
    """
    batch = target.add_activations(base, spec, batch)
    # The weights are those of the whole batch, so that microbatches do not change the mean.
    weight_BT, total = loss_weights.token_weights(batch["mask_BT"], loss_mean)
    tokens = jnp.maximum(batch["mask_BT"].sum().astype(jnp.float32), 1.0)

    def grad_fn(av, part, summed):
        def loss(av):
            value = roles.av_loss(av, base, spec, part["h_BD"], part["ids_BT"], part["weight_BT"], summed)
            return value / total

        value, grads = jax.value_and_grad(loss)(av)
        return grads, {"loss": value}, {}

    batch = {**batch, "weight_BT": weight_BT}
    grads, scalars, _ = optimize.accumulate(grad_fn, role.params, batch, micro, spec.remat)
    role, info = optimize.apply(role, grads, tx)
    return role, {**scalars, **info, "tokens": tokens}


def warm_start_ar(role: Learner, base, batch, *, spec: Spec, tx, micro: int = 1):
    """Update AR once by scaled MSE: (role, metrics). `micro` is the number of microbatches.

    batch: ids_BT, valid_BT, last_B, weight_B, and h_BD (or the texts for `target.add_activations`).
    """
    batch = target.add_activations(base, spec, batch)
    grads, scalars, rows = roles.ar_grads(role.params, base, spec, batch, micro)
    role, info = optimize.apply(role, grads, tx)
    return role, {**scalars, **info, "ar_norm": rows["norm_B"].mean()}


# --- reinforcement learning ---------------------------------------------------------------------

def rollout(av, base, spec: Spec, h_BD, rows_B, key, *, group: int, max_new: int, temperature=1.0,
            strength_B=None):
    """Sample `group` explanations for each h: (Samples of B * group rows, start, end, ok).

    rows_B: each activation's row in the global batch. Sample g of row r uses the key
    fold_in(key, r * group + g) on whichever device it is computed.
    strength_B: factors of the injected vectors; None: 1, as in training.
    """
    params = verbalizer.weights(base, av, spec.compute)
    e_BD = verbalizer.inject(av, h_BD, spec.alpha)
    if strength_B is not None:
        e_BD = e_BD * strength_B[:, None]
    rows_N = (rows_B[:, None] * group + jnp.arange(group, dtype=jnp.int32)[None]).reshape(-1)
    out = verbalizer.write(params, spec.lm, spec.av, e_BD, row_keys(key, rows_N), group=group,
                           max_new=max_new, temperature=temperature, dtype=spec.compute)
    return out, *verbalizer.parse_ids(spec.av, out.ids_BT, out.length_B, out.closed_B)


def roll_out(av, base, batch, key, *, spec: Spec, opts: RLOptions):
    """Sample the answers of an RL step: (batch with h_BD, answers).

    answers: ids_NT, logp_NT, length_N, closed_N, and start_N, end_N, ok_N of the explanation; N = B * group.
    """
    batch = target.add_activations(base, spec, batch)
    with jax.named_scope("prefill"):
        out, start, end, ok = rollout(av, base, spec, batch["h_BD"], batch["row_B"], key, group=opts.group,
                                      max_new=opts.max_new)
    return batch, {"ids_NT": out.ids_BT, "logp_NT": out.logp_BT, "length_N": out.length_B,
                   "closed_N": out.closed_B, "start_N": start, "end_N": end, "ok_N": ok}


def update(state: RLState, base, ref, batch, answers, reader=None, *, spec: Spec, opts: RLOptions, tx_av,
           tx_ar):
    """Read the answers of an RL step, and update both roles: (state, metrics), as `rl`.

    Args:
      batch, answers: of `roll_out`. answers may also have the edited words of `reading.read_words`, and
        claims_N, each answer's score of its claims.
      reader: the tree of the warm start's AR for opts.reader="warm_ar".
    """
    B, G, ok = batch["h_BD"].shape[0], opts.group, answers["ok_N"]
    h_ND, goal_ND = (jnp.repeat(a, G, 0) for a in (batch["h_BD"], batch.get("goal_BD", batch["h_BD"])))
    words = reading.read_words(spec, answers, batch, G)
    ar, own, of_ar = state.ar, None, {}
    if opts.train_ar:
        ar, own, of_ar = roles.ar_update(state.ar, base, spec, opts, tx_ar, batch, words, ok, goal_ND)
    reader = state.ar.params if opts.reader == "ar" else reader
    reward_N, mse, metrics = scoring.reward_answers(
        reader, own, base, spec, opts, batch, answers, words, goal_ND)
    reward_BG = reward_N.reshape(B, G)
    part = {"h_ND": h_ND, **{name: answers[name] for name in ("ids_NT", "logp_NT", "length_N")}}
    updated_BG = reward_BG
    if 0 < opts.update_group < G:
        pick_BK = objectives.most_different(reward_BG, opts.update_group)
        updated_BG = jnp.take_along_axis(reward_BG, pick_BK, 1)
        pick_N = (jnp.arange(B)[:, None] * G + pick_BK).reshape(-1)
        part = jax.tree.map(lambda a: placement.shard_rows(a[pick_N]), part)
    part["advantage_N"] = objectives.advantages(updated_BG, opts.advantage).reshape(-1)
    spread_B = objectives.has_spread(reward_BG)
    if opts.drop_equal:
        part["kept_N"] = jnp.repeat(spread_B, updated_BG.shape[1])
    with jax.named_scope("av"):
        av, of_av = roles.av_update(state.av, base, ref, spec, opts, tx_av, part)
    metrics |= of_ar | of_av | {
        "reward": reward_N.mean(),
        "reward_group_std": reward_BG.std(1).mean(),
        "equal_groups": 1.0 - spread_B.mean(dtype=jnp.float32),
        "mse": objectives.masked_mean(mse, ok),
        "ok": ok.mean(dtype=jnp.float32),
        "truncated": 1.0 - answers["closed_N"].mean(dtype=jnp.float32),
        "length": answers["length_N"].mean(dtype=jnp.float32),
        "ids_BGT": answers["ids_NT"].reshape(B, G, -1),
        "reward_BG": reward_BG,
    }
    return RLState(av, ar), metrics


def rl(state: RLState, base, ref, batch, key, reader=None, *, spec: Spec, opts: RLOptions, tx_av, tx_ar):
    """Run one RL step: `roll_out`, score (AR's gradient uses the same forward pass), both updates.

    Args:
      state: donated. ref: the warm-start AV's tree, frozen. base: the target's parameters.
      batch: h_BD float32 (or the texts for `target.add_activations`) and row_B int32 (each activation's row
        in the global batch). The shuffled control adds goal_BD, which AR must reconstruct instead of h_BD.
        With written_* (ids_BT, valid_BT, last_B, weight_B, h_BD), AR also trains on these written
        explanations. prefix_B: as in `reading.read_words`. opts.patch_kl needs text_ids_BT, text_valid_BT
        and text_at_B, the text of each row and the index of its last token.
      key: folded from (seed, purpose, step) by the caller. reader: as in `update`.

    Returns:
      (state, metrics): scalars, plus `ids_BGT` and `reward_BG` for the log's samples.
    """
    batch, answers = roll_out(state.av.params, base, batch, key, spec=spec, opts=opts)
    return update(state, base, ref, batch, answers, reader, spec=spec, opts=opts, tx_av=tx_av, tx_ar=tx_ar)
