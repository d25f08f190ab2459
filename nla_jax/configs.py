"""Define every setting of a run, with its default, and compare configs.

An experiment file returns `default()` with a few values changed; see `experiments/`.
"""

import dataclasses

from ml_collections import ConfigDict

from nla_jax.lm.weights import DEFAULT_TARGET


def default() -> ConfigDict:
    """Return the default config; the comments document the settings. Lengths are in tokens.

    `nla_jax.pipeline.config_ranges` has the range of every number.
    """
    c = ConfigDict()
    c.seed = 0
    c.target = DEFAULT_TARGET  # or a directory, a .gguf file, a Hub id
    c.layer = -1  # K, 0-based; -1: at two thirds of the depth
    # Dtype of matrix products; parameters and optimizer are float32. float32 | bfloat16 | auto: float32 on a
    # CPU without products of bfloat16, else bfloat16. To resume on other hardware, give what config.json has.
    c.dtype = "bfloat16"
    c.mu_dtype = "float32"  # dtype of Adam's first moments; bfloat16 saves 2 bytes per trained parameter
    c.remat = True  # recompute each block in the backward pass
    # Attention in training, scoring and extraction: plain | cudnn (NVIDIA GPUs) | splash (TPUs) | auto: the
    # kernel of the devices if it supports the model, else plain | long: auto for passes over 1,024 tokens or
    # more, else plain (docs/performance.md).
    c.attention = "long"
    c.vocab_chunk = 1024  # positions whose logits are in memory at one time
    # Norm of the injected vector; 0: the 75th percentile of the activation norms. With
    # av.injection=norm_matched it is relative to the norm of the residual at the marker; 0: 1.
    c.alpha = 0.0
    # A bundle from which AV and AR start. It sets layer, alpha, marker, templates, ranks and affine, and the
    # warm-start stages may have 0 steps. "": AV and AR start from the target.
    c.init = ""
    c.marker = ""  # "": chosen for the tokenizer
    c.chat_template = ""  # Jinja; "": the tokenizer's template, which base models do not have
    c.av_template = ""  # "": nla_jax.prompts.AV_TEMPLATE
    c.ar_template = ""  # "": nla_jax.prompts.AR_TEMPLATE
    # -1: all remaining devices; tensor=0: as many as decode fastest (`nla_jax.pipeline.run_mesh`).
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    c.checkpoint_every = 50  # steps; 0: only at the end of a stage
    c.log_every = 1  # steps
    c.metrics_callback = ""  # module:function, called with (stage, step, numbers) for each row of the log
    c.wandb = ""  # PROJECT or ENTITY/PROJECT of Weights & Biases (needs the extra wandb); "": none
    # [STAGE:]FIRST:END: trace these steps of a training stage, or of every one, into RUN/profile; "": none
    c.profile_steps = ""

    c.activations = "stored"  # online: steps capture h from new documents in every pass, without a store

    c.data = ConfigDict(
        {
            "store": "",  # a store of activations to start from (`nla data import`); "": extract one
            "base_model": "",  # the target's name in an imported store, if it differs from `target`
            "corpus": "news",  # a URI: news, file:GLOB, tfds:, hf:, chat:, mix: (nla_jax/data/corpora.py)
            "documents": 0,  # number of documents, from the start of the corpus; 0: all
            # A training document is dropped if it shares this fraction of runs of 8 words (of the shorter
            # document) with a held-out or out-of-domain one, or one of RL with one of the warm start. 0: off.
            "near_duplicates": 0.2,
            "ood": "wikipedia",  # evaluation only; "": none
            "explanations": "shipped",  # shipped | a .jsonl file | "": reading lessons only
            "explanation_lines": "all",  # which lines: all | headline | first | last | first+last
            # An explanation ends with its text's last words, of at most this many tokens. 0: no ending line;
            # there is none either if AR's template has text after the explanation (the official ones).
            "ending_tokens": 6,
            "explained_rows": 0,  # explained texts; 0: all
            "cuts_per_text": 1,  # contexts that a written explanation is paired with
            # Captured tokens per explained text: its last one, and others of its second half with the first
            # lines of its explanation. More than 1 needs explanation_lines="first" or "headline".
            "explained_positions": 1,
            "warm_windows": 900,  # text windows captured for reading lessons
            "rl_windows": 300,  # text windows captured for RL
            "window_tokens": 128,
            "positions": 8,  # captured positions per window
            "min_position": 50,  # first position of a window that may be captured
            "warm_fraction": 0.75,  # share of training documents for the warm start; the others are for RL
            "ood_positions": 2,  # captured positions per window of the out-of-domain corpus
            "heldout_rows": 200,
            "ood_rows": 100,
            "batch": 16,  # windows per batch of capturing
            "storage": "float32",  # dtype of h on disk; bfloat16 halves the size, and its error is measured
        }
    )
    c.av = ConfigDict(
        {
            "rank": 0,  # 0: full fine-tuning
            # replace: h replaces the marker's embedding. norm_matched: h is added to the residual stream at
            # the marker after block 1. Or module:function (docs/howto/own.md).
            "injection": "replace",
            "affine": "none",  # identity: a learned affine map of h before injection, initialised to identity
        }
    )
    c.ar = ConfigDict(
        {
            "kind": "trained",  # frozen: AR is the frozen target, and is not trained
            "rank": 0,  # as av.rank
        }
    )

    # minutes: time limit of a stage, counted from the end of its first step, which compiles; 0: none.
    # clip: largest norm of a role's gradient; 0: no clipping. final_lr: share of lr at the last step.
    # micro: parts of a batch whose gradients are accumulated.
    def stage(**kw):
        return ConfigDict(
            {"minutes": 0.0, "warmup": 10, "clip": 1.0, "weight_decay": 0.0, "final_lr": 0.1, **kw}
        )

    # Reading lessons: the ending line of any row, without description. form "drill": AV's prompt ends after
    # the marker and the answer has no tags, which is several times as fast. form "full": both are complete.
    c.lessons_av = stage(steps=0, batch=32, micro=1, lr=2e-4, max_tokens=24, form="full")
    c.lessons_ar = stage(steps=0, batch=32, micro=1, lr=1e-4, max_tokens=24)
    # lessons: share of steps that are drill steps of lessons_av, because AV would otherwise forget them.
    # watch_every: steps between held-out figures in the log; 0: none.
    # loss_mean: the mean over the batch's tokens, or over its "sequences" the mean of each.
    c.warm_av = stage(steps=1000, batch=32, micro=1, lr=1e-4, max_tokens=160, lessons=0.0, watch_every=0,
                      loss_mean="tokens")
    c.warm_ar = stage(steps=1000, batch=32, micro=1, lr=1e-4, max_tokens=160)
    c.rl = ConfigDict(
        {
            "steps": 100,
            "minutes": 0.0,
            "batch": 8,  # activations per step
            "group": 8,  # explanations per activation
            "max_new": 128,  # maximal number of tokens of an answer
            "reward": "log_mse",  # mse | log_mse | module:function (docs/howto/own.md)
            "advantage": "zscore",  # mean | zscore | batch | module:function
            # Factor of a token's gradient: reinforce | cispo (`lm.loss_weights`).
            "policy": "reinforce",
            "drop_equal": False,  # leave groups whose rewards are all equal out of AV's loss
            # docs/howto/rewards.md has the settings from here to `ar_reset`, alone and combined.
            # Who reads the answers for the reward: ar, frozen_target (the target itself), or warm_ar (AR as
            # the warm start left it). AR is trained in any case, unless train_ar=False.
            "reader": "ar",
            # Readers get only the first tokens of an explanation: a number from prefix_min to prefix_max,
            # drawn for each group. prefix_min 0: the whole explanation. prefix_max 0: max_new.
            "prefix_min": 0,
            "prefix_max": 0,
            # Share of groups whose answers are read after a paraphrase.
            "paraphrase": 0.0,
            "paraphraser": "wordnet",  # or module:function, from texts to texts
            "patch_kl": 0.0,  # share of the reward that is from the target's next token with ĥ in place of h
            "false_claims": 0.0,  # weight of the score of claims, by rules against the source text
            "fewest_claims": 8,  # claims that an answer needs for the full score
            "ar_reset": 0,  # steps after which AR returns to the warm start; 0: never
            "kl": 0.01,  # weight of the exact KL to the warm-start AV
            "length_penalty": 0.0,  # reward lost by an answer of max_new tokens
            "length_free": 0,  # tokens without a penalty
            # tokens | sequences, as warm_av.loss_mean; prompts: over each group's tokens, then over groups.
            "loss_mean": "tokens",
            # AV is updated on this many answers of a group, half of them the worst and half the best. 0: all.
            "update_group": 0,
            "ar_group": 0,  # AR is updated on this many answers of a group, the best ones. 0: all.
            "written_ar": 0,  # written explanations added to each batch of AR's update
            "train_ar": True,  # no effect for ar.kind="frozen"
            "lr_av": 1e-5,
            "lr_ar": 3e-5,
            "warmup": 5,
            "final_lr": 1.0,
            "clip": 1.0,
            "weight_decay": 0.0,
            "micro_av": 1,
            "micro_ar": 1,
            # Widths of microbatches of short answers (docs/performance.md). Each is compiled. 1: max_new.
            "update_widths": 1,
            "max_skipped": 10,  # skipped updates in a row after which the run stops
            "shuffle_h": False,  # control: rewards compare ĥ with another row's h
            "watch_every": 50,  # steps between held-out figures in the log; 0: none
            "watch_rows": 48,  # rows of these figures
            # The step that becomes the bundle: last, frozen_target, claims, product, or module:function
            # (`pipeline.chosen_step`). Others than last need watch_every.
            "choose": "last",
            "choose_loss": 0.1,  # the largest share of the best held-out FVE that the chosen step may lose
        }
    )
    # RL on the drill's short answers, before RL on whole explanations. The frozen target reads the ending
    # line, so a sample costs about a sixth. Other settings are those of `rl`.
    c.rl_drill = ConfigDict(
        {
            "steps": 0,
            "minutes": 0.0,
            "batch": 16,
            "group": 8,
            "update_group": 0,
            "max_new": 16,
            "kl": 0.02,
            "lr_av": 1e-5,
            "micro_av": 1,
        }
    )
    # bootstrap: resamples of an interval; 0: no intervals. max_new: 0: rl.max_new. temperature: 0: greedy.
    # probes: as in `nla evaluate --probes`. They measure both bundles of the run on all evaluation rows.
    c.eval = ConfigDict(
        {"temperature": 1.0, "batch": 32, "bootstrap": 2000, "max_new": 0, "probes": "round_trip"})
    return c


# Settings that may be local paths; the corpora are URIs, which may contain some.
PATHS = ("target", "init", "data.store", "data.explanations")
# The stages of a run, in order. STAGES: those of the warm start; RL_STAGES: those of RL.
RUN_STAGES = ("extract", "lessons_ar", "lessons_av", "warm_ar", "warm_av", "bundle_warm", "eval_warm",
              "rl_drill", "rl", "eval_rl")
# Settings of "rl" that have no effect on "rl_drill", and their values there.
WHOLE_ANSWERS = {"reader": "ar", "prefix_min": 0, "paraphrase": 0.0, "patch_kl": 0.0, "false_claims": 0.0,
                 "ar_reset": 0}
STAGES, RL_STAGES = RUN_STAGES[1:5], RUN_STAGES[7:9]


def section(c: ConfigDict, name: str) -> dict:
    """Return the settings of a stage; those of "rl_drill" override those of "rl", and WHOLE_ANSWERS those."""
    if name != "rl_drill":
        return c[name].to_dict()
    return {**c.rl.to_dict(), **c.rl_drill.to_dict(), **WHOLE_ANSWERS}


def keys(c: ConfigDict, prefix: str = "") -> set[str]:
    """Return the dotted name of every setting, such as "rl.steps"."""
    out = set()
    for k in c:
        out |= keys(c[k], f"{prefix}{k}.") if isinstance(c[k], ConfigDict) else {prefix + k}
    return out


def flat(settings: dict, prefix: str = "") -> dict:
    """Return nested settings as {dotted name: value}."""
    out = {}
    for k, v in settings.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


@dataclasses.dataclass(frozen=True)
class Difference:
    """One config key whose value differs between a stored and a present config."""

    key: str
    stored: object
    present: object


def differences(stored: dict, present: ConfigDict | dict) -> list[Difference]:
    """Return the keys that differ between a stored config (plain dict) and the present one (or another dict).

    A key that a stored config lacks, because it is newer, has its default there.
    """

    known = flat(default().to_dict())
    a = known | flat(stored)
    b = known | flat(present.to_dict() if isinstance(present, ConfigDict) else present)
    return [Difference(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
