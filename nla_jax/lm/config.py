"""The architecture as data: a model family is a value of `LMConfig`, not a class."""

import dataclasses

from nla_jax.errors import UserError

ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = {"linear": 1, "llama3": 4, "yarn": 5, "proportional": 1}  # kind -> how many numbers follow it
MOST_BLOCKS = 4096  # a larger number comes from a damaged file
MOST_EXPERTS, MOST_WIDE = 4096, 64
LARGEST = 2**31 - 1  # upper bound of every integer field


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e30


def _counts(values, n: int) -> bool:
    """Return whether these are n whole numbers above 0."""
    return len(values) == n and all(type(v) is int and 0 < v <= LARGEST for v in values)


def _is_delta(delta) -> bool:
    return _counts(delta, 5) and delta[1] % delta[0] == 0 and delta[4] <= MOST_WIDE


def check_blocks(n_blocks) -> int:
    """Return `n_blocks`. Raises UserError for an impossible number, before lists of that length are made."""
    if type(n_blocks) is not int or not 0 <= n_blocks <= MOST_BLOCKS:
        raise UserError(
            f"a model of {repr(n_blocks)[:60]} blocks is not possible: it must have 0 to {MOST_BLOCKS}"
        )
    return n_blocks


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder-only transformer: blocks of attention and a gated MLP.

    It is hashable, because jitted functions take it as static argument. The defaults describe a Llama.
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
    # ("linear", factor), ("llama3", factor, low, high, original length),
    # ("yarn", factor, fast, slow, original length, factor of cos and sin) or ("proportional", share of pairs)
    rope_scaling: tuple[str | float, ...] = ()
    window: int = 0  # number of tokens that a query sees in a local block, its own included
    local: tuple[bool, ...] = ()  # whether each block is local; () if none is
    local_rope_theta: float | None = None  # RoPE base of local blocks, used without scaling
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each head of q and k, before rotary embedding
    post_norms: bool = False  # an RMS norm after attention and after the MLP too
    activation: str = "silu"  # of the MLP's gate: one of ACTIVATIONS
    scale_embed: bool = False  # multiply embeddings by sqrt(d_model)
    query_scalar: float | None = None  # scores are divided by its square root; None means head_dim
    attn_softcap: float | None = None  # scores become cap * tanh(score / cap)
    final_softcap: float | None = None  # logits become cap * tanh(logit / cap)
    rotary_dim: int = 0  # entries of a head that are rotated, from the first on; 0 means all
    pre_norms: bool = True  # an RMS norm before attention and before the MLP
    qk_norm_whole: bool = False  # the norms of q and k are over all heads together
    # (number of experts, experts of a token, d_ff of an expert); () if the MLP is one
    experts: tuple[int, ...] = ()
    experts_normed: bool = False  # the weights of a token's experts sum to 1
    attn_gate: bool = False  # wq also makes a gate, by whose sigmoid the outputs of heads are multiplied
    linear: tuple[bool, ...] = ()  # whether each block has linear attention (Gated DeltaNet); () if none has
    # of linear attention: (key heads, value heads, sizes of a key and of a value, width of the convolution)
    delta: tuple[int, ...] = ()
    # (key/value heads, size of a head) of blocks that are not local; () if they are those of local blocks
    global_heads: tuple[int, ...] = ()
    global_k_is_v: bool = False  # blocks that are not local have no wv: their values are their keys
    v_norm: bool = False  # an RMS norm without weights over each head of v
    block_scale: bool = False  # the output of each block is multiplied by a parameter
    shared_expert: bool = False  # the MLP is an expert of every token, with a gate, beside the mixture
    experts_beside: bool = False  # the mixture of experts is beside the MLP, with norms of its own

    def __post_init__(self):
        self._check_types()
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary embedding needs pairs")
        self._check_global()
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UserError(f"rotary_dim={self.rotary_dim} must be even, and at most {self.head_dim}")
        if not (self.pre_norms or self.post_norms):
            raise UserError("pre_norms and post_norms are both false: a block needs norms")
        fits = not self.experts or _counts(self.experts, 3)
        if not fits or self.experts and not self.experts[1] <= self.experts[0] <= MOST_EXPERTS:
            raise UserError(f"experts={repr(self.experts)[:60]} must be (number of experts, at most "
                            f"{MOST_EXPERTS}; experts of a token; d_ff of one), all above 0")
        if self.linear and (len(self.linear) != self.n_blocks or not any(self.linear) or self.local):
            raise UserError(
                f"linear={repr(self.linear)[:60]} must say for each of {self.n_blocks} blocks whether its "
                "attention is linear, or be empty if none is; none may be local then"
            )
        if bool(self.linear) != bool(self.delta) or self.delta and not _is_delta(self.delta):
            raise UserError(
                f"delta={repr(self.delta)[:60]} must be (key heads, value heads, which are a multiple; sizes "
                f"of a key and a value; width of the convolution, at most {MOST_WIDE}), if blocks are linear"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        kind, *numbers = self.rope_scaling or (None,)
        fits = len(numbers) == ROPE_SCALINGS.get(kind) and all(map(_positive, numbers))
        ordered = {"llama3": lambda: numbers[1] < numbers[2], "yarn": lambda: numbers[1] > numbers[2],
                   "proportional": lambda: numbers[0] <= 1}
        if kind is not None and not (fits and ordered.get(kind, lambda: True)()):
            raise UserError(
                f"rope_scaling={self.rope_scaling}: give ('linear', factor), ('llama3', factor, low, high, "
                "original length) with low below high, ('yarn', factor, fast, slow, original length, "
                "factor of cos and sin) with slow below fast, or ('proportional', share) with a share up to "
                "1; all above 0"
            )
        if kind == "yarn" and self.rope_theta <= 1:
            raise UserError(f"rope_theta={self.rope_theta} must be above 1 with rope_scaling 'yarn'")
        if self.local and (len(self.local) != self.n_blocks or not any(self.local)):
            raise UserError(
                f"local={self.local} must say for each of {self.n_blocks} blocks whether it is "
                "local, or be empty if none is"
            )
        if bool(self.local) != (self.window > 0):
            raise UserError(f"window={self.window} and local={self.local} contradict each other: local "
                            "blocks need a window above 0, and a window needs local blocks")

    def _check_global(self):
        heads = self.global_heads
        if heads and not (_counts(heads, 2) and self.n_heads % heads[0] == 0 and heads[1] % 2 == 0):
            raise UserError(f"global_heads={repr(heads)[:60]} must be (key/value heads, a divisor of n_heads="
                            f"{self.n_heads}; the size of a head, which is even), or be empty")
        odd = self.linear or self.qkv_bias or self.qk_norm_whole or self.attn_gate
        if heads and (odd or self.local and all(self.local)):
            raise UserError("global_heads need blocks that are not local, and go neither with linear "
                            "attention, qkv_bias, qk_norm_whole nor attn_gate")
        if self.global_k_is_v and not heads:
            raise UserError("global_k_is_v needs global_heads")
        if self.experts_beside and not (self.experts and self.post_norms):
            raise UserError("experts_beside needs experts and post_norms")
        if self.shared_expert and (self.experts_beside or not self.experts):
            raise UserError("shared_expert needs experts, and not experts_beside")

    def _check_types(self):
        check_blocks(self.n_blocks)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is bool:
                fits, wanted = type(value) is bool, "true or false"
            elif field.type is int:
                least = 0 if name in ("n_blocks", "window", "rotary_dim") else 1
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
        """Return the config of a `dataclasses.asdict` that was read from YAML or JSON (lists become tuples).

        Missing fields get their defaults. Raises UserError for unknown names and missing required ones.
        """
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
        except TypeError as err:
            raise UserError(f"this is not the configuration of a language model: {err}") from err

    def of_blocks(self, start: int, stop: int) -> "LMConfig":
        """Return the model with blocks `start` to `stop` - 1 only (none if they are equal)."""
        local, linear = self.local[start:stop], self.linear[start:stop]
        changes = dict(n_blocks=stop - start, local=local, linear=linear)
        if stop == start or local and all(local):
            changes |= dict(global_heads=(), global_k_is_v=False)
        if not any(local):
            changes |= dict(local=(), window=0)
        if not any(linear):
            changes |= dict(linear=(), delta=())
        return dataclasses.replace(self, **changes)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Return of which of two kinds each block is, if blocks differ in their parameters: whether it is
        linear, or local. () if they do not differ."""
        local = self.local or (False,) * self.n_blocks
        return self.linear or (local if self.global_heads else ())

    def kv_heads(self, local: bool) -> tuple[int, int]:
        """Return (key/value heads, size of a head) of softmax attention in a block that is `local` or not."""
        own = (self.n_kv_heads, self.head_dim)
        return own if local else self.global_heads or own

    def first_blocks(self, n_blocks: int) -> "LMConfig":
        """Return the model with its first `n_blocks` blocks only. Raises UserError if it has fewer."""
        if not 0 < n_blocks <= self.n_blocks:
            raise UserError(f"cannot keep {n_blocks} blocks of a model that has {self.n_blocks}")
        return self.of_blocks(0, n_blocks)

    def check_fits(self, n_tokens: int, what: str) -> None:
        """Raise UserError if `what`, which has this number of tokens, exceeds the model's context."""
        if n_tokens > self.max_position:
            raise UserError(
                f"{what} has {n_tokens} tokens; this target reads at most {self.max_position}: shorten it"
            )

    def default_layer(self) -> int:
        """Return K, the 0-based block whose output is h: two thirds of the depth (method: K = 2L/3)."""
        return 2 * self.n_blocks // 3


def make_config(where, **values) -> LMConfig:
    """Return `LMConfig(**values)`. The message of a UserError begins with the file `where`."""
    try:
        return LMConfig(**values)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
