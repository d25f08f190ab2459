"""Every setting of a run, with its default, and the checks that are made before any work.

An experiment file returns `default()` with a few values changed; see `experiments/`.
"""

import dataclasses

from ml_collections import ConfigDict

from nla_jax.lm.weights import DEFAULT_TARGET


def default() -> ConfigDict:
    """The defaults, documented. Rates are per step, lengths in tokens."""
    c = ConfigDict()
    c.seed = 0
    c.target = DEFAULT_TARGET  # also: a directory, a .gguf file, a Hub id
    c.layer = -1  # K, 0-based; -1: two thirds of the depth
    c.dtype = "bfloat16"  # of matrix products; parameters and optimizer are float32
    c.mu_dtype = "float32"  # of Adam's first moments; bfloat16 saves 2 bytes a trained parameter
    c.remat = True
    # In training and scoring: plain | cudnn (NVIDIA GPUs) | splash (TPUs) | auto: the kernel of the devices
    # where it can do it, else plain (docs/performance.md).
    c.attention = "plain"
    c.vocab_chunk = 1024  # positions whose logits exist at one time
    # Norm of the injected vector; 0: 75th percentile of the activation norms. With av.injection=norm_matched:
    # that norm as a share of the marker's own; 0: 1.
    c.alpha = 0.0
    # A bundle, such as an imported one, from which AV and AR begin: it decides layer, alpha, marker,
    # templates, ranks and affine, and the warm-start stages may have 0 steps. "": from the target.
    c.init = ""
    c.marker = ""  # "": chosen for the tokenizer
    c.chat_template = ""  # Jinja; "": the tokenizer's own, which base models do not have
    c.av_template = ""  # "": nla_jax.prompts.AV_TEMPLATE
    c.ar_template = ""
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
    c.checkpoint_every = 50  # steps; 0: only at the end of a stage
    c.log_every = 1

    c.activations = "stored"  # online: steps read documents, new ones in every pass, and nothing is stored

    c.data = ConfigDict(
        {
            "store": "",  # a store of activations to start from (`nla data import`); "": extract one
            "base_model": "",  # what an imported store calls the target, where the names differ
            "corpus": "news",  # a URI: news, file:GLOB, tfds:, hf:, chat:, mix: (nla_jax/data/corpora.py)
            "documents": 0,  # of the corpus, from its start; 0: all
            # A training document is dropped when it and a held-out or out-of-domain one, or one of RL and
            # one of the warm start, share this share of the shorter one's runs of 8 words; 0: none is.
            "near_duplicates": 0.2,
            "ood": "wikipedia",  # evaluation only; "": none
            "explanations": "shipped",  # shipped | a .jsonl file | "": reading lessons only
            "explanation_lines": "all",  # of the description: all | headline | first | last | first+last
            # An explanation ends with the last words of its text: as many as have this many tokens. 0: none,
            # as where AR's template does not end with the explanation (the official ones).
            "ending_tokens": 6,
            "explained_rows": 0,  # texts; 0: all
            "cuts_per_text": 1,  # contexts a written explanation is shown with
            # Tokens of an explained text that are captured: its last one, and others of its second half, with
            # the first lines of its explanation. More than 1 needs explanation_lines="first" or "headline".
            "explained_positions": 1,
            "warm_windows": 900,  # text windows captured for reading lessons
            "rl_windows": 300,
            "window_tokens": 128,
            "positions": 8,  # a window
            "min_position": 50,
            "warm_fraction": 0.75,  # of training documents; the rest is for RL
            "ood_positions": 2,  # a window of the out-of-domain corpus
            "heldout_rows": 200,
            "ood_rows": 100,
            "batch": 16,
            "storage": "float32",  # of h on the disk; bfloat16: half the size, an error that is measured
        }
    )
    c.av = ConfigDict(
        {
            "rank": 0,  # 0: full fine-tuning
            # replace: h stands in place of the marker's embedding. norm_matched: after block 1 it is added to
            # what stands at the marker.
            "injection": "replace",
            "affine": "none",  # identity: a learned affine map of h before injection, which begins as that
        }
    )
    c.ar = ConfigDict(
        {
            "kind": "trained",  # frozen: the target itself reads the words, and nothing of AR is trained
            "rank": 0,
        }
    )

    # minutes: a stage ends at its last step, or when so many minutes are over since its first step, which
    # compiles; 0: no limit.
    def stage(**kw):
        return ConfigDict(
            {"minutes": 0.0, "warmup": 10, "clip": 1.0, "weight_decay": 0.0, "final_lr": 0.1, **kw}
        )

    # Reading lessons: the ending line of any row, without description. "drill": AV's prompt is cut behind the
    # marker and the answer has no tags, which is several times as fast; "full": prompt and answer are whole.
    c.lessons_av = stage(steps=0, batch=32, micro=1, lr=2e-4, max_tokens=24, form="full")
    c.lessons_ar = stage(steps=0, batch=32, micro=1, lr=1e-4, max_tokens=24)
    # lessons: share of the steps that are drill steps of lessons_av, so that reading is not unlearned.
    # watch_every: steps between held-out figures in the log, as of rl; 0: none.
    c.warm_av = stage(steps=1000, batch=32, micro=1, lr=1e-4, max_tokens=160, lessons=0.0, watch_every=0)
    c.warm_ar = stage(steps=1000, batch=32, micro=1, lr=1e-4, max_tokens=160)
    c.rl = ConfigDict(
        {
            "steps": 100,
            "minutes": 0.0,
            "batch": 8,  # activations a step
            "group": 8,  # explanations an activation
            "max_new": 128,  # the cap
            "reward": "log_mse",  # mse | log_mse | module:function (docs/howto/own.md)
            "advantage": "zscore",  # mean | zscore | module:function
            "kl": 0.01,  # weight of the exact KL to the warm-start AV
            "length_penalty": 0.0,  # reward lost by an answer as long as the cap
            "length_free": 0,  # tokens that cost nothing of it
            # Answers of a group that AV is updated on: the worst and the best half of so many. 0: all.
            "update_group": 0,
            "ar_group": 0,  # answers of a group that AR is updated on: the best so many. 0: all.
            "written_ar": 0,  # written explanations that AR's update has beside those of a step
            "train_ar": True,  # without effect for ar.kind="frozen"
            "lr_av": 1e-5,
            "lr_ar": 3e-5,
            "warmup": 5,
            "final_lr": 1.0,
            "clip": 1.0,
            "weight_decay": 0.0,
            "micro_av": 1,
            "micro_ar": 1,
            "max_skipped": 10,  # refused updates in a row before the run stops
            "shuffle_h": False,  # control: explanations are rewarded against another row's h
            "watch_every": 50,  # steps between held-out figures in the log; 0: none
            "watch_rows": 48,
        }
    )
    # RL of the drill's short answers, before the RL of whole explanations: the frozen target reads the ending
    # line, so a sample costs about a sixth. What is not said here is as in `rl`.
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
    c.eval = ConfigDict({"temperature": 1.0, "batch": 32, "bootstrap": 2000, "max_new": 0})
    return c


STAGES = ("lessons_av", "lessons_ar", "warm_av", "warm_ar")
RL_STAGES = ("rl_drill", "rl")


def section(c: ConfigDict, name: str) -> dict:
    """The settings of a stage; those of "rl_drill" over those of "rl"."""
    return {**c.rl.to_dict(), **c.rl_drill.to_dict()} if name == "rl_drill" else c[name].to_dict()


def keys(c: ConfigDict, prefix: str = "") -> set[str]:
    """Every setting by its dotted name, such as "rl.steps"."""
    out = set()
    for k in c:
        out |= keys(c[k], f"{prefix}{k}.") if isinstance(c[k], ConfigDict) else {prefix + k}
    return out


@dataclasses.dataclass(frozen=True)
class Difference:
    """One config key whose value differs between a stored and a present config."""

    key: str
    stored: object
    present: object


def differences(stored: dict, present: ConfigDict | dict) -> list[Difference]:
    """Keys that differ between a stored config (plain dict) and the present one (or another stored).

    A key that is younger than a stored config has its default there.
    """

    def flat(d, prefix=""):
        out = {}
        for k, v in d.items():
            out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
        return out

    known = flat(default().to_dict())
    a = known | flat(stored)
    b = known | flat(present.to_dict() if isinstance(present, ConfigDict) else present)
    return [Difference(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
