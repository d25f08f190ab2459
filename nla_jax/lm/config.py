"""The architecture as data: a family of models is a value of `LMConfig`, not a class."""

import dataclasses

from nla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder-only transformer: pre-norm blocks of attention and a gated MLP.

    Hashable, so that it can be a static argument of a jitted function.
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

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary embedding needs pairs")

    def truncated(self, n_blocks: int) -> "LMConfig":
        """The same model with only its first `n_blocks` blocks."""
        if not 0 < n_blocks <= self.n_blocks:
            raise UserError(f"cannot keep {n_blocks} blocks of a model that has {self.n_blocks}")
        return dataclasses.replace(self, n_blocks=n_blocks)

    def default_layer(self) -> int:
        """K, the 0-based block whose output is h: two thirds of the depth (method: K = 2L/3)."""
        return 2 * self.n_blocks // 3
