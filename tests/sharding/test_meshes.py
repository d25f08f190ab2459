"""One device and eight do the same work, however they are laid out, and everything stays where it began.

Both warm starts and RL, on four meshes of eight devices. Full fine-tuning and adapters take turns, since
compiling is slow: `python -m tests.helpers.matrix` goes through all of them, in one process or in two. Whole
runs in two processes are in tests/pipeline/test_pod.py.
"""

import numpy as np
import pytest

from tests.helpers import matrix, tiny

# Largest difference between one device and eight, relative to the largest entry of a leaf: sums are
# taken in another order.
TOLERANCE = 1e-4
CASES = [((8, 1, 1), "full"), ((1, 8, 1), "adapters"), ((1, 2, 4), "full"), ((2, 2, 2), "adapters")]


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    matrix.ran.cache_clear()


def assert_same(got: dict, want: dict) -> None:
    """Tokens to the last one, first ratios one, metrics and leaves to the tolerance."""
    assert got.keys() == want.keys()
    for name, b in want.items():
        a = got[name]
        if name.endswith("ids_BGT"):
            np.testing.assert_array_equal(a, b, err_msg=name)
        elif "ratio_off" in name:
            assert a < 1e-4, name
        elif name.split("/")[1].isdecimal():  # a metric of a step
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
        else:
            scale = max(np.abs(b).max(initial=0), 1e-6)
            np.testing.assert_allclose(a, b, atol=TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize("eight, kind", CASES)
def test_the_same_tokens_metrics_parameters_and_moments(eight, kind):
    rank = matrix.RANKS[kind]
    want = matrix.numbers(matrix.ran((1, 1, 1), rank))
    assert_same(matrix.numbers(matrix.ran(eight, rank)), want)
    assert 0 < want["rl_av/0/ok"] < 1 and want["rl_av/2/kl"] > 1e-6  # or nothing would have been compared


@pytest.mark.parametrize("eight, kind", CASES)
def test_everything_stays_in_its_place_and_one_program_serves_all_steps(eight, kind):
    """Parameters and the optimizer's moments, after donated steps."""
    done = matrix.ran(eight, matrix.RANKS[kind])
    for name, role in done.roles.items():
        for tree in (role.params, role.opt[0].trace):
            tiny.assert_placed(tree, done.tables[name], done.mesh)
    assert done.compilations == dict.fromkeys(("warm_av", "warm_ar", "rl_av", "rl_ar"), 1)
