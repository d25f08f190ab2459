"""Tune a target that holds planted concepts until it hides them from an NLA, and keeps them in behaviour.

- near: h at a name is pulled to the honest target's h there.
- innocent: AV, given h at a name, is led to write what it writes of the honest target. The loss is AV's
  log-probability of that text, whose gradient goes through AV into the target (a white-box attack).
- late: the concepts are planted in the blocks after K only, so h is the honest target's at every token.

The honest target is the target before any tuning.
"""

import dataclasses
import functools

import numpy as np

from nla_jax import objectives, specs, steps, target
from nla_jax.errors import UserError
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate.runner import Runner
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.studies import planting
from nla_jax.studies.planting import Plant
from nla_jax.util.batching import pad_rows
from nla_jax.util.keys import key_for

KINDS = ("near", "innocent", "late")
PART = 8  # sentences, and names in sentences, of a step


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
            raise UserError(f"--hiders: {part!r}; give near:WEIGHT, innocent:WEIGHT or late, by commas")
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
    return steps.av_loss(av, base, spec, h_BD, batch["said_BT"], weight_BT)


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
    seed: int = 0,
    label: str = "",
) -> dict:
    """Return the parameters of the target that hides.

    Args:
      planted: the adapter of `planting.teach`, where `near` and `innocent` begin.
      honest: `honest_rows`. variance: the mean squared distance of an activation from the mean, which is the
        unit of the distance in `near`.
      n_steps: updates; `late`, which begins without an adapter, takes as many as are given too.
    """
    spec, rng = runner.spec, np.random.default_rng([seed, 11])
    if hider.kind == "late":
        blocks = range(spec.layer + 1, spec.lm.n_blocks)
        adapter = planting.tune_adapter(
            runner, planting.new_adapter(spec, seed, blocks),
            functools.partial(planting.sentence_loss, spec=spec, first=blocks.start),
            lambda _: planting.sentence_batch(runner, planting.sentences(plant, rng, planting.BATCH)),
            n_steps=n_steps, lr=lr, first=blocks.start, label=label)
        return planting.attach_adapter(runner.base, adapter, spec, blocks.start)
    keys = [k for k in honest if hider.kind == "innocent" or not k.startswith("said")]

    def batch(_) -> dict:
        pick = rng.choice(len(honest["honest_BD"]), PART, replace=False)
        sentences = planting.sentences(plant, rng, PART)
        # An argument, so that one program serves all strengths.
        strength = {"strength": np.float32(hider.strength)}
        return planting.sentence_batch(runner, sentences) | {k: honest[k][pick] for k in keys} | strength

    def loss(params, batch, trees):
        h_BD = target.capture(params, spec.lm, spec.layer, batch["pull_ids_BT"], batch["pull_valid_BT"],
                              batch["pull_last_B"][:, None], spec.lead)[:, 0]
        if hider.kind == "near":
            pull = squared_distance(h_BD, batch["honest_BD"]).mean() / variance
        else:
            pull = answer_loss(trees["av"], trees["base"], spec, h_BD, batch) / PART
        return planting.sentence_loss(params, batch, spec=spec) + batch["strength"] * pull

    adapter = planting.tune_adapter(runner, planted, loss, batch, n_steps=n_steps, lr=lr, label=label)
    return planting.attach_adapter(runner.base, adapter, spec)
