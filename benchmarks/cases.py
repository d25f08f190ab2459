"""Define the benchmark cases: the model's shape, full or LoRA training, and the sizes of every phase."""

import dataclasses

from nla_jax.errors import UserError
from nla_jax.lm.config import LMConfig

PHASES = ("step", "rollout", "score", "av_update", "ar_update", "capture", "warm_av", "warm_ar", "evaluate")
OF_LENGTHS = ("score", "av_update", "ar_update")  # the phases of a case with `lengths`

TINY = LMConfig(
    vocab_size=304, d_model=32, n_blocks=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, max_position=1024
)
SMOLLM2_135M = LMConfig(
    vocab_size=49152, d_model=576, n_blocks=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536,
    rope_theta=100_000.0, max_position=8192,
)
GEMMA3_270M = LMConfig(
    vocab_size=262144, d_model=640, n_blocks=18, n_heads=4, n_kv_heads=1, head_dim=256, d_ff=2048,
    rope_theta=1_000_000.0, norm_eps=1e-6, max_position=32768, window=512,
    local=tuple((i + 1) % 6 != 0 for i in range(18)), local_rope_theta=10_000.0, qk_norm=True,
    post_norms=True, activation="gelu_tanh", scale_embed=True, query_scalar=256,
)
QWEN2_5_7B = LMConfig(
    vocab_size=152064, d_model=3584, n_blocks=28, n_heads=28, n_kv_heads=4, head_dim=128, d_ff=18944,
    rope_theta=1_000_000.0, norm_eps=1e-6, tied=False, max_position=32768, qkv_bias=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case. Lengths are in tokens; `rows` are sequences.

    The prompts have the lengths of nla_jax's own templates in SmolLM2's tokenizer. AV's has 60 tokens, the
    marker and 9 more; AR's has 4 before and 7 after the explanation. The ids do not affect the time.
    """

    name: str
    lm: LMConfig
    rank: int = 0  # of LoRA; 0: full fine-tuning
    batch: int = 8  # activations per step (B)
    group: int = 8  # explanations per activation (G)
    max_new: int = 64  # tokens of every explanation (T); no row stops earlier on either side
    # Mean, least and most tokens of an explanation in scores and updates, if not max_new; nla_jax alone.
    lengths: tuple[int, ...] = ()
    before: int = 60
    after: int = 9
    ar_before: int = 4
    ar_after: int = 7
    weights: str = "random"  # random (made on the host, equal on both sides) | default (the GGUF) | device
    capture: tuple[int, int] = (16, 128)  # rows and tokens of one batch of text
    warm: tuple[int, int] = (16, 96)  # rows and tokens of a warm-start batch of answers
    evaluate: int = 32  # rows of a round trip
    micro: int = 1  # nla_jax: microbatches of an update
    widths: int = 1  # nla_jax: widths of these microbatches (`rl.update_widths`)
    torch_micro: int = 4  # reference: microbatches of an update
    remat: bool = True  # nla_jax: recompute blocks in the backward pass
    attention: str = "plain"  # nla_jax: as in the config
    vocab_chunk: int = 1024  # positions whose logits are in memory at one time, on both sides
    peer: bool = False  # as another program has it: no injection, the reference is the policy (`peer.py`)
    together: bool = True  # both processes run at the same time and alternate; else one after the other
    phases: tuple[str, ...] = PHASES
    seed: int = 0

    @property
    def layer(self) -> int:
        return self.lm.default_layer()

    @property
    def rows(self) -> int:
        """Return the explanations of one step (N)."""
        return self.batch * self.group

    @property
    def prompt(self) -> int:
        return self.before + 1 + self.after

    @property
    def ar_tokens(self) -> int:
        """Return the tokens of an AR prompt with an explanation of `max_new` tokens."""
        return self.ar_before + self.max_new + self.ar_after


_STEP = ("step", "rollout", "av_update", "ar_update")
_CPU = Case("", SMOLLM2_135M, weights="default", vocab_chunk=256)
_GPU = Case(
    "", SMOLLM2_135M, batch=128, max_new=150, capture=(128, 256), warm=(256, 128), evaluate=1024,
    micro=4, torch_micro=8, vocab_chunk=8192,
)
_7B = Case(
    "", QWEN2_5_7B, rank=64, batch=32, max_new=150, weights="device", capture=(32, 512), warm=(32, 192),
    evaluate=128, micro=16, torch_micro=16, vocab_chunk=2048, together=False,
    phases=_STEP,
)
_TINY = Case(
    "", TINY, batch=2, group=4, max_new=8, before=6, after=3, capture=(2, 16), warm=(4, 12), evaluate=4,
    torch_micro=2, vocab_chunk=16,
)


def _named(name: str, base: Case, **changes) -> Case:
    return dataclasses.replace(base, name=name, **changes)


CASES = {
    c.name: c
    for c in (
        _named("tiny", _TINY),
        _named("tiny_lora", _TINY, rank=4),
        _named("tiny_gemma3", _TINY, lm=dataclasses.replace(
            GEMMA3_270M, vocab_size=304, d_model=32, n_blocks=4, head_dim=8, d_ff=64, window=7,
            local=(True, True, False, True), query_scalar=24)),
        _named("tiny_qwen2_5", _TINY, rank=4, lm=dataclasses.replace(
            QWEN2_5_7B, vocab_size=304, d_model=32, n_blocks=4, n_heads=4, n_kv_heads=2, head_dim=8,
            d_ff=64)),
        _named("tiny_device", _TINY, rank=4, weights="device", together=False),
        _named("cpu_full", _CPU, phases=tuple(p for p in PHASES if p != "evaluate")),
        _named("cpu_evaluate", _CPU, phases=("evaluate",)),
        _named("cpu_lora", _CPU, rank=32, phases=_STEP),
        _named("smollm2_135m_full", _GPU),
        _named("smollm2_135m_lora", _GPU, rank=32),
        _named("gemma3_270m_full", _GPU, lm=GEMMA3_270M, vocab_chunk=2048, torch_micro=16),
        _named("gemma3_270m_lora", _GPU, lm=GEMMA3_270M, rank=32, vocab_chunk=2048,
               torch_micro=16),
        _named("qwen2_5_7b_lora", _7B),
    )
}
PRESETS = {
    "cpu": ("cpu_full", "cpu_lora"),
    "gpu": ("smollm2_135m_full", "smollm2_135m_lora", "gemma3_270m_full", "gemma3_270m_lora",
            "qwen2_5_7b_lora"),
}


def choose(names: list[str], settings: list[str], phases: str = "") -> list[Case]:
    """Return the named cases with `KEY=VALUE` changes of their fields.

    Raises UserError for an unknown case, field or phase, and for lengths that other phases cannot have."""
    out = []
    for name in names:
        if name not in CASES:
            raise UserError(f"no case {name!r}; known cases are {', '.join(CASES)}")
        case = CASES[name]
        for setting in settings:
            case = _with_setting(case, *setting.partition("=")[::2])
        if phases:
            chosen = tuple(phases.split(","))
            if unknown := [p for p in chosen if p not in PHASES]:
                raise UserError(f"--phases {unknown[0]}: unknown phase; known are {', '.join(PHASES)}")
            case = dataclasses.replace(case, phases=chosen)
        if case.lengths:
            _check_lengths(case)
        out.append(case)
    return out


def _check_lengths(case: Case) -> None:
    if not set(case.phases) <= set(OF_LENGTHS):
        raise UserError(f"--set lengths: only for --phases {','.join(OF_LENGTHS)}")
    mean, least, most = case.lengths if len(case.lengths) == 3 else (0, 0, 0)
    if not 1 <= least < mean < most <= case.max_new:
        raise UserError("--set lengths: must be MEAN,LEAST,MOST with 1 <= LEAST < MEAN < MOST <= "
                        f"{case.max_new}")


def _with_setting(case: Case, key: str, value: str) -> Case:
    """Return the case with one field set to `value`; the model's fields begin with `lm.`."""
    inside = key.startswith("lm.")
    of, name = (case.lm, key[3:]) if inside else (case, key)
    if name not in {f.name for f in dataclasses.fields(of)} - {"name", "lm", "phases", "local"}:
        raise UserError(f"--set {key}={value}: a case has no setting {key!r} that can be changed")
    of = dataclasses.replace(of, **{name: _read(getattr(of, name), value)})
    return dataclasses.replace(case, lm=of) if inside else of


def _read(like, text: str):
    if isinstance(like, bool):
        return text.lower() in ("1", "true", "yes")
    if isinstance(like, tuple):
        return tuple(int(x) for x in text.split(","))
    return type(like)(text)
