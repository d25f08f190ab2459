"""Tune a target that holds planted concepts until it hides them from an NLA, and keeps them in behaviour.

- near: h at a name is pulled to the honest target's h there.
- innocent: AV, given h at a name, is led to write what it writes of the honest target. The loss is AV's
  log-probability of that text, whose gradient goes through AV into the target (a white-box attack).
- reinforce: AV's sampled answers at a name are to name its concept less often. The gradient of their
  log-probability with respect to h, times each answer's advantage, goes through AV into the target.
- late: the concepts are planted in the blocks after K only, so h is the honest target's at every token.

The honest target is the target before any tuning.
"""

import dataclasses
import functools

import jax
import numpy as np

from nla_jax import objectives, specs, target
from nla_jax.errors import UserError
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate.runner import Runner, read_tag
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.rl import roles
from nla_jax.studies import planting
from nla_jax.studies.planting import Plant
from nla_jax.util.batching import pad_rows, round_up
from nla_jax.util.keys import key_for

KINDS = ("near", "innocent", "reinforce", "late")
PART = 8  # sentences, and names in sentences, of a step
GROUP = 4  # answers that "reinforce" samples for each name in a sentence


@dataclasses.dataclass(frozen=True)
class Hider:
    """A way to hide. strength: weight of the pull beside the loss per token of the tuning sentences."""

    kind: str
    strength: float = 0.0

    @property
    def name(self) -> str:
        """Return the name of a row in the tables, such as "near 10"."""
        return f"{self.kind} {self.strength:g}" if self.strength else self.kind


def parse_hiders(text: str) -> list[Hider]:
    """Parse "near:1,near:10,late". Raises UserError for an unknown kind or strength."""
    out = []
    for part in text.split(","):
        kind, _, strength = part.strip().partition(":")
        try:
            number = float(strength or 0)
        except ValueError:
            number = -1.0
        if kind not in KINDS or not 0 <= number < float("inf") or (kind == "late") != (number == 0):
            raise UserError(f"--hiders: {part!r}; give near:WEIGHT, innocent:WEIGHT, reinforce:WEIGHT or "
                            "late, by commas")
        out.append(Hider(kind, number))
    return out


def honest_rows(runner: Runner, plant: Plant, *, max_new: int, words: bool, label: str = "") -> dict:
    """Return what the hiders imitate, one row for each name and control in each of `plant.carriers`.

    pull_ids_BT, pull_valid_BT, pull_last_B: the texts. honest_BD: h of the honest target at their ends. With
    `words`, also said_BT and said_mask_BT: AV's greedy answers there.
    """
    texts = [s.format(name=name) for name in (*plant.names, *plant.controls) for s in plant.carriers]
    ids, valid, last = pad_rows([plain_ids(runner.tok, t) for t in texts], runner.spec.av.pad)
    out = {"pull_ids_BT": ids, "pull_valid_BT": valid, "pull_last_B": last,
           "honest_BD": capture_texts.capture_last(runner, texts)[:, 0]}
    if words:
        out |= greedy_answers(runner, out["honest_BD"], max_new=max_new, label=label)
    return out


def greedy_answers(runner: Runner, h_ND, *, max_new: int, label: str = "") -> dict:
    """Return AV's greedy answers: said_BT ids, and said_mask_BT, which is True on their tokens."""
    ids, length, *_ = runner.write(h_ND, key_for(0, "planted"), temperature=0.0, max_new=max_new, label=label)
    width = int(length.max())
    return {"said_BT": ids[:, :width], "said_mask_BT": np.arange(width)[None] < length[:, None]}


def squared_distance(h_BD, honest_BD):
    """Return |n(h) - n(h')|^2 [B], where n scales to norm sqrt(D)."""
    return objectives.scaled_mse(h_BD, honest_BD) * h_BD.shape[-1]


def answer_loss(av: dict, base: dict, spec: specs.Spec, h_BD, batch: dict):
    """Return AV's loss of the answers said_BT given h, in nats per token, summed over rows."""
    mask_BT = batch["said_mask_BT"].astype(h_BD.dtype)
    weight_BT = mask_BT / mask_BT.sum(1, keepdims=True)
    return roles.av_loss(av, base, spec, h_BD, batch["said_BT"], weight_BT)


def naming_cost(texts: list[str], concept_N, plant: Plant) -> np.ndarray:
    """Return [N]: 1 for an explanation that names its concept, and for one that AV failed to write, else 0.

    A hider would otherwise be rewarded for breaking AV."""
    named = planting.names_concepts(texts, plant)[np.arange(len(texts)), concept_N]
    return (named | np.array([not t for t in texts])).astype(np.float32)


def sampled_answers(runner: Runner, plant: Plant, h_BD, concept_B, step: int, *, max_new: int,
                    seed: int) -> dict:
    """Return those of GROUP answers of AV for each h that have a gradient.

    said_NT: ids. weight_NT: an answer's advantage on its tokens, divided by the number of all answers.
    from_N: the row of its h. The advantage is the cost of an answer minus the mean cost of its group. It is
    0 in a group where all answers cost the same. Few shapes are returned: rows without weight fill them up.
    """
    ids, length, *_ = runner.write(np.repeat(h_BD, GROUP, 0), key_for(seed, "planted", 1000 + step),
                                   temperature=1.0, max_new=max_new, label="")
    texts = [read_tag(runner.tok.decode(r[:n], skip_special_tokens=True)) or ""
             for r, n in zip(ids, length, strict=True)]
    cost_N = naming_cost(texts, np.repeat(concept_B, GROUP), plant)
    advantage_N = objectives.advantages(cost_N.reshape(-1, GROUP), "mean").reshape(-1)
    on_NT = np.arange(ids.shape[1])[None] < length[:, None]
    weight_NT = (advantage_N[:, None] / len(ids) * on_NT).astype(np.float32)
    kept = np.flatnonzero(advantage_N)
    size = len(h_BD) if len(kept) <= len(h_BD) else len(ids)
    pick = np.concatenate([kept, np.setdiff1d(np.arange(len(ids)), kept)])[:size]
    width = min(ids.shape[1], round_up(int(length.max()), 32))
    return {"said_NT": ids[pick, :width], "weight_NT": weight_NT[pick, :width], "from_N": pick // GROUP}


def score_loss(av: dict, base: dict, spec: specs.Spec, h_BD, batch: dict):
    """Return a scalar whose gradient with respect to h_BD is an estimate of that of the mean cost.

    batch: of `sampled_answers`. The estimate is E[(cost - mean) d log p(answer | h) / dh]."""
    h_ND = h_BD[batch["from_N"]]
    return roles.av_loss(av, base, spec, h_ND, batch["said_NT"], -batch["weight_NT"])


def first_block(hider: Hider, spec: specs.Spec) -> int:
    """Return the first block that a hider's adapter is for."""
    return spec.layer + 1 if hider.kind == "late" else 0


def attach(runner: Runner, adapter: dict, hider: Hider) -> dict:
    """Return the parameters of the target with the adapter of `hide`."""
    return planting.attach_adapter(runner.base, adapter, runner.spec, first_block(hider, runner.spec))


def hide(
    runner: Runner,
    plant: Plant,
    planted: dict,
    hider: Hider,
    honest: dict,
    variance: float,
    *,
    n_steps: int,
    lr: float,
    max_new: int,
    seed: int = 0,
    label: str = "",
) -> dict:
    """Return the adapter of the target that hides (`attach`).

    Args:
      planted: the adapter of `planting.teach`, where all but `late` begin.
      honest: `honest_rows`. variance: the mean squared distance of an activation from the mean, which is the
        unit of the distance in `near`.
      n_steps: updates; `late`, which begins without an adapter, takes as many as are given too.
      max_new: tokens of a sampled answer of `reinforce`.
    """
    spec, rng = runner.spec, np.random.default_rng([seed, 11])
    if hider.kind == "late":
        first = first_block(hider, spec)
        return planting.tune_adapter(
            runner, planting.new_adapter(spec, seed, range(first, spec.lm.n_blocks)),
            functools.partial(planting.sentence_loss, spec=spec, first=first),
            lambda _: planting.sentence_batch(runner, planting.sentences(plant, rng, planting.BATCH)),
            n_steps=n_steps, lr=lr, first=first, label=label)
    wanted = {"near": ("pull", "honest"), "innocent": ("pull", "honest", "said"), "reinforce": ("pull",)}
    keys = [k for k in honest if k.startswith(wanted[hider.kind])]
    # Of a control name there is no concept to name.
    rows = len(plant.names) * len(plant.carriers) if hider.kind == "reinforce" else len(honest["honest_BD"])

    def batch(_) -> dict:
        pick = rng.choice(rows, min(PART, rows), replace=False)
        sentences = planting.sentences(plant, rng, PART)
        # An argument, so that one program serves all strengths.
        rest = {"strength": np.float32(hider.strength), "row_B": pick}
        return planting.sentence_batch(runner, sentences) | {k: honest[k][pick] for k in keys} | rest

    def pulled(params, batch: dict):
        return target.capture(params, spec.lm, spec.layer, batch["pull_ids_BT"], batch["pull_valid_BT"],
                              batch["pull_last_B"][:, None], spec.lead)[:, 0]

    read = jax.jit(lambda base, adapter, batch: pulled(planting.attach_adapter(base, adapter, spec), batch))

    def sample(i: int, batch: dict, adapter: dict) -> dict:
        h_BD, concept_B = read(runner.base, adapter, batch), batch["row_B"] // len(plant.carriers)
        return batch | sampled_answers(runner, plant, h_BD, concept_B, i, max_new=max_new, seed=seed)

    def loss(params, batch, trees):
        h_BD = pulled(params, batch)
        if hider.kind == "near":
            pull = squared_distance(h_BD, batch["honest_BD"]).mean() / variance
        elif hider.kind == "innocent":
            pull = answer_loss(trees["av"], trees["base"], spec, h_BD, batch) / PART
        else:
            pull = score_loss(trees["av"], trees["base"], spec, h_BD, batch)
        return planting.sentence_loss(params, batch, spec=spec) + batch["strength"] * pull

    return planting.tune_adapter(runner, planted, loss, batch, n_steps=n_steps, lr=lr, label=label,
                                 finish=sample if hider.kind == "reinforce" else None)
