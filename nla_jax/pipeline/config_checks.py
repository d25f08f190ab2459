"""Checks of a config before any work."""

from ml_collections import ConfigDict

from nla_jax import configs, objectives, verbalizer
from nla_jax.configs import RL_STAGES, STAGES
from nla_jax.data import corpora, explanations
from nla_jax.errors import UserError
from nla_jax.evaluate import probe_table
from nla_jax.lm import loss_weights
from nla_jax.lm.attention_kernels import CHOICES
from nla_jax.pipeline import chosen_step, config_ranges, reward_checks
from nla_jax.reconstructor import KINDS
from nla_jax.training import step_trace
from nla_jax.util import hardware, wandb_log
from nla_jax.util.choices import choose, find_function


def lock(c: ConfigDict) -> ConfigDict:
    """Check the config, replace dtype="auto", and lock it against unknown keys. Raises UserError."""
    validate(c)
    if c.dtype == "auto":
        c.dtype = hardware.product_dtype()
    return c.lock()


def _choose(name: str, value, allowed):
    if value not in allowed:
        raise UserError(f"config {name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def _check_profile(c: ConfigDict) -> None:
    """Raise UserError if no step of the run is one that config.profile_steps names."""
    if not c.profile_steps:
        return
    stage, first, _ = step_trace.parse(c.profile_steps)
    stages = (*STAGES, *RL_STAGES)
    if stage:
        _choose("profile_steps: stage", stage, stages)
    most = max(c[name].steps for name in ([stage] if stage else stages))
    if first >= most:
        raise UserError(f"config profile_steps={c.profile_steps!r}: there are only {most} steps, from 0 on")


def validate(c: ConfigDict) -> None:
    """Raise UserError for unknown or missing keys, and for impossible values and combinations."""
    known, given = configs.keys(configs.default()), configs.keys(c)
    if extra := sorted(given - known):
        raise UserError(f"unknown config key {extra[0]!r}; nla_jax/configs.py lists the keys")
    if gone := sorted(known - given):
        raise UserError(f"config key {gone[0]!r} is missing; start from nla_jax.configs.default()")
    config_ranges.check(c)
    _choose("dtype", c.dtype, ("float32", "bfloat16", "auto"))
    _choose("activations", c.activations, ("stored", "online"))
    if c.activations == "online" and (c.data.store or c.rl.shuffle_h):
        named = "data.store" if c.data.store else "rl.shuffle_h"
        raise UserError(f"config activations='online' reads the corpus inside the step: unset {named}")
    _choose("data.storage", c.data.storage, ("float32", "bfloat16"))
    _choose("attention", c.attention, CHOICES)
    _choose("mu_dtype", c.mu_dtype, ("float32", "bfloat16"))
    _choose("av.affine", c.av.affine, ("none", "identity"))
    _choose("ar.kind", c.ar.kind, KINDS)
    _choose("lessons_av.form", c.lessons_av.form, ("drill", "full"))
    _choose("warm_av.loss_mean", c.warm_av.loss_mean, ("tokens", "sequences"))
    _choose("rl.policy", c.rl.policy, loss_weights.POLICY_LOSSES)
    _choose("rl.loss_mean", c.rl.loss_mean, loss_weights.LOSS_MEANS)
    choose(verbalizer.INJECTIONS, c.av.injection, "config av.injection")
    choose(objectives.REWARDS, c.rl.reward, "config rl.reward")
    choose(objectives.ADVANTAGES, c.rl.advantage, "config rl.advantage")
    if c.metrics_callback:
        find_function(c.metrics_callback, "config metrics_callback")
    if c.wandb:
        wandb_log.check(c.wandb)
    _check_profile(c)
    _choose("data.explanation_lines", c.data.explanation_lines, explanations.LINES)
    for name in RL_STAGES:
        group, updated = c[name].group, c[name].update_group
        if updated > group:
            raise UserError(f"config {name}.update_group={updated}: must be 0 (all) or from 2 to {group}")
        if c[name].steps and not (c.data.rl_windows or c.data.store):
            raise UserError(f"config data.rl_windows=0: {name} reads windows; set it, or {name}.steps=0")
    if c.rl.ar_group > c.rl.group:
        raise UserError(f"config rl.ar_group={c.rl.ar_group}: must be 0 (all) or at most {c.rl.group}")
    if c.rl_drill.steps and c.lessons_av.form != "drill":
        raise UserError(
            'config rl_drill.steps: AV must know the drill; set lessons_av.form="drill", or rl_drill.steps=0'
        )
    if c.rl_drill.steps and (c.activations == "online" or c.rl.shuffle_h):
        raise UserError(
            "config rl_drill.steps: RL of the drill needs stored, unshuffled activations; set "
            "rl_drill.steps=0 with activations='online' or rl.shuffle_h"
        )
    if c.rl.length_free >= c.rl.max_new:
        raise UserError(
            f"config rl.length_free={c.rl.length_free}: must be from 0 to below rl.max_new={c.rl.max_new}"
        )
    if c.rl.written_ar and (not c.data.explanations or c.activations == "online"):
        raise UserError(
            f"config rl.written_ar={c.rl.written_ar}: needs written explanations in a store of activations "
            "(data.explanations, activations='stored'); set rl.written_ar=0"
        )
    for name, rows, micro in [
        *((f"{s}.micro_av", c[s].batch * (c[s].update_group or c[s].group), c[s].micro_av)
          for s in RL_STAGES),
        ("rl.micro_ar", c.rl.batch * c.rl.group + c.rl.written_ar, c.rl.micro_ar),
        *((f"{s}.micro", c[s].batch, c[s].micro) for s in STAGES),
        *([("warm_av.micro", c.lessons_av.batch, c.warm_av.micro)] if c.warm_av.lessons else ()),
    ]:
        if rows % micro:
            raise UserError(f"config {name}={micro} does not divide the {rows} rows of a step")
    if c.data.min_position >= c.data.window_tokens:
        raise UserError(
            f"config data.min_position={c.data.min_position} leaves no position in windows of "
            f"data.window_tokens={c.data.window_tokens}"
        )
    if c.data.positions > c.data.window_tokens - c.data.min_position:
        raise UserError(
            f"config data.positions={c.data.positions}: a window has only "
            f"{c.data.window_tokens - c.data.min_position} positions to draw from"
        )
    for uri in filter(None, (c.data.corpus, c.data.ood)):
        corpora.check(uri)
    if not c.data.explanations and (c.warm_av.steps or c.warm_ar.steps):
        raise UserError(
            "config data.explanations is empty but warm_av/warm_ar have steps; write "
            "explanations with `nla data explain`, or set the steps to 0"
        )
    if c.data.explained_positions > 1 and c.data.explanation_lines not in ("first", "headline"):
        raise UserError(
            f"config data.explained_positions={c.data.explained_positions}: the last line of an explanation "
            'is only about the end of its text; set data.explanation_lines="first" or "headline"'
        )
    if not c.data.ending_tokens and c.lessons_av.steps + c.lessons_ar.steps + c.warm_av.lessons:
        raise UserError(
            "config data.ending_tokens=0: reading lessons are ending lines; set it to 6, or "
            "lessons_av.steps, lessons_ar.steps and warm_av.lessons to 0"
        )
    if c.lessons_av.form == "drill" and c.lessons_av.steps and not c.warm_av.steps:
        raise UserError(
            'config lessons_av.form="drill" does not teach AV its whole answer: give warm_av some steps, or '
            'set lessons_av.form="full"'
        )
    ar_starts = c.ar.kind == "frozen" or c.warm_ar.steps + c.lessons_ar.steps
    if not c.init and not (c.warm_av.steps + c.lessons_av.steps and ar_starts):
        raise UserError("AV and AR both need a warm start: give lessons_* or warm_* some steps")
    reward_checks.check(c)
    try:
        found = probe_table.find_probes(c.eval.probes.split(","))
    except UserError as e:
        raise UserError(f"config eval.probes={c.eval.probes!r}: {e}") from None
    if "round_trip" not in found:
        raise UserError(f"config eval.probes={c.eval.probes!r}: a run's summary needs round_trip; add it")
    if c.rl.choose != "last" and c.rl.steps and not c.rl.watch_every:
        raise UserError(f"config rl.choose={c.rl.choose!r} needs held-out figures: set rl.watch_every, such "
                        f"as {max(c.rl.steps // 10, 1)}")
    choose(chosen_step.RULES, c.rl.choose, "config rl.choose")
