"""Arrays of different dtypes may not meet in the method: in steps, objectives, prompts, verbalizer,
reconstructor, and in the model below them.

This does not hold in optax, whose schedules and moments multiply int32 counts with floats: the update is
exempt. It does not hold outside of the method: probes, the sweep and the toy target multiply masks with
floats.
"""

import jax
import pytest

from nla_jax.lm import optimize


@pytest.fixture(scope="module", autouse=True)
def strict_dtypes(request):
    """jax refuses to promote dtypes in a module's tests, except in `test_shapes`, which runs whole stages."""
    if request.module.__name__.endswith("test_shapes"):
        yield
        return
    apply = optimize.apply

    def exempt(*args):
        with jax.numpy_dtype_promotion("standard"):
            return apply(*args)

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("strict"):
        patch.setattr(optimize, "apply", exempt)
        yield
