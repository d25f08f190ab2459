"""The architecture as data: a family of models is a value of `LMConfig`, not a class."""

import dataclasses

from nla_jax.errors import UserError

ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = {"linear": 1, "llama3": 4}  # kind -> how many numbers follow it
MOST_BLOCKS = 4096  # more are damage: refused before anything is made for each of them
LARGEST = 2**31 - 1  # of any size


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e30


def check_blocks(n_blocks) -> int:
    """`n_blocks`, or UserError where no model has so many: before lists of that length are made."""
    if type(n_blocks) is not int or not 0 <= n_blocks <= MOST_BLOCKS:
        raise UserError(
            f"a model of {repr(n_blocks)[:60]} blocks is not possible: between 0 and {MOST_BLOCKS} are"
        )
    return n_blocks


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder-only transformer: pre-norm blocks of attention and a gated MLP.

    Hashable, so that it can be a static argument of a jitted function. The defaults are a Llama.
    """

    vocab_size: int
    d_model: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the unembedding is the transposed embedding
    max_position: int = 2048
    # ("linear", factor) or ("llama3", factor, low, high, original length)
    rope_scaling: tuple[str | float, ...] = ()
    window: int = 0  # local blocks see this many tokens, their own included
    local: tuple[bool, ...] = ()  # which blocks are local; () when none is
    local_rope_theta: float | None = None  # local blocks turn by this base, without scaling
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each head of q and k, before rotary embedding
    post_norms: bool = False  # an RMS norm after attention and after the MLP too
    activation: str = "silu"  # of the MLP's gate: one of ACTIVATIONS
    scale_embed: bool = False  # embeddings times sqrt(d_model)
    query_scalar: float | None = None  # scores over its square root; None: over that of head_dim
    attn_softcap: float | None = None  # scores become cap * tanh(score / cap)
    final_softcap: float | None = None  # the same for logits

    def __post_init__(self):
        self._check_types()
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary embedding needs pairs")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        kind, *numbers = self.rope_scaling or (None,)
        fits = len(numbers) == ROPE_SCALINGS.get(kind) and all(map(_positive, numbers))
        if kind is not None and not (fits and (kind != "llama3" or numbers[1] < numbers[2])):
            raise UserError(
                f"rope_scaling={self.rope_scaling}: give ('linear', factor) or "
                "('llama3', factor, low, high, original length), all above 0 and low below high"
            )
        if self.local and (len(self.local) != self.n_blocks or not any(self.local)):
            raise UserError(
                f"local={self.local} must say for each of {self.n_blocks} blocks whether it is "
                "local, or be empty when none is"
            )
        if bool(self.local) != (self.window > 0):
            raise UserError(f"window={self.window} and local={self.local} do not belong together")

    def _check_types(self):
        check_blocks(self.n_blocks)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is bool:
                fits, wanted = type(value) is bool, "true or false"
            elif field.type is int:
                least = 0 if name in ("n_blocks", "window") else 1
                fits = type(value) is int and least <= value <= LARGEST
                wanted = f"a whole number from {least} to {LARGEST}"
            elif field.type in (float, float | None):
                fits, wanted = _positive(value) or (value is None and field.default is None), "above 0"
            else:
                continue
            if not fits:
                raise UserError(f"{name} = {repr(value)[:60]} is not possible: it must be {wanted}")

    @classmethod
    def of_plain(cls, raw: dict) -> "LMConfig":
        """The config whose `dataclasses.asdict` went through YAML or JSON: lists become tuples.

        Fields that are missing have their defaults. Raises UserError for unknown or missing names.
        """
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
        except TypeError as err:
            raise UserError(f"this is not the configuration of a language model: {err}") from err

    def of_blocks(self, start: int, stop: int) -> "LMConfig":
        """The same model with blocks `start` to `stop` - 1 only (none when they are equal)."""
        local = self.local[start:stop]
        if not any(local):
            return dataclasses.replace(self, n_blocks=stop - start, local=(), window=0)
        return dataclasses.replace(self, n_blocks=stop - start, local=local)

    def truncated(self, n_blocks: int) -> "LMConfig":
        """The same model with only its first `n_blocks` blocks."""
        if not 0 < n_blocks <= self.n_blocks:
            raise UserError(f"cannot keep {n_blocks} blocks of a model that has {self.n_blocks}")
        return self.of_blocks(0, n_blocks)

    def default_layer(self) -> int:
        """K, the 0-based block whose output is h: two thirds of the depth (method: K = 2L/3)."""
        return 2 * self.n_blocks // 3


def configured(where, **values) -> LMConfig:
    """`LMConfig(**values)`; a UserError says that it is about the file `where`."""
    try:
        return LMConfig(**values)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
