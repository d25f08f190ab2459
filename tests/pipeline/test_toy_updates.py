"""No accepted number gives NaN, a frozen role or a traceback in a toy update.

Each case is a config with numbers from all over their ranges. Gradients come from the real steps, which are
compiled once for each stage: what a number changes inside of them is an argument. The optimizer is made from
the config in each case and runs without jit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from nla_jax import configs, reconstructor, steps, verbalizer
from nla_jax.lm import optimize
from nla_jax.pipeline import config_checks, config_ranges
from nla_jax.training import jitted_steps
from nla_jax.util.keys import key_for, new_key
from tests.helpers import tiny

CASES = 1000
B, G, T = 2, 4, 6
COMMON = ("seed", "alpha", "eval.temperature")
STAGE = ("steps", "warmup", "lr", "lr_av", "lr_ar", "final_lr", "clip", "weight_decay", "kl",
         "length_penalty")
# Two kinds of pairs: full fine-tuning, and adapters with all that RL can leave out or add.
KINDS = {
    "full": (0, dict(reward="log_mse", advantage="zscore")),
    "adapters": (2, dict(reward="mse", advantage="mean", update_group=2, ar_group=1, length_free=2)),
}


class Argument:
    """A traced number in the place of a static option: true, and a factor."""

    def __init__(self, value):
        self.value = value

    def __mul__(self, other):
        return self.value * other


# A step with this optimizer returns its gradients as the state of the optimizer.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (state, grads))


@functools.cache
def pair(kind: str):
    """(Spec, base, {role: its tree}) at the start."""
    rank, _ = KINDS[kind]
    spec = tiny.talker(lm=tiny.smallest(2 + bool(rank)), layer=0)
    if rank:
        spec = dataclasses.replace(spec, av=dataclasses.replace(spec.av, injection="norm_matched"))
    base = tiny.talker_params(spec.lm)
    return spec, base, {
        "av": verbalizer.init(base, spec.lm, rank=rank, affine=bool(rank), key=new_key(1)),
        "ar": reconstructor.init(base, spec.lm, spec.layer, rank=rank, key=new_key(2)),
    }


def learners(kind: str, vectors):
    """Both roles from flat vectors, with the optimizer that keeps gradients."""
    starts = pair(kind)[2].items()
    return {role: optimize.learner(ravel_pytree(tree)[1](vector), KEEP)
            for (role, tree), vector in zip(starts, vectors, strict=True)}


def finite(metrics) -> jax.Array:
    return jnp.stack([jnp.isfinite(m).all() for m in jax.tree.leaves(metrics)]).all()


@functools.cache
def rl_gradients(kind: str, with_kl: bool):
    """Jitted (AV, AR, numbers, key) -> ({role: gradient}, whether all metrics are finite).

    Roles and gradients are vectors."""
    spec, base, trees = pair(kind)
    batch = {"h_BD": jnp.asarray(tiny.activations(B, 8)), "row_B": jnp.arange(B)}

    @jax.jit
    def run(av_N, ar_N, numbers, key):
        roles = learners(kind, (av_N, ar_N))
        opts = steps.RLOptions(
            group=G, max_new=T, kl=Argument(numbers["kl"]) if with_kl else 0.0, train_ar=True, micro_av=1,
            micro_ar=1, length_penalty=numbers["length_penalty"], **KINDS[kind][1])
        own = dataclasses.replace(spec, alpha=numbers["alpha"])
        state, metrics = steps.rl(steps.RLState(**roles), base, trees["av"], batch, key, spec=own, opts=opts,
                                  tx_av=KEEP, tx_ar=KEEP)
        out, *_ = steps.rollout(roles["av"].params, base, own, batch["h_BD"], batch["row_B"], key, group=G,
                                max_new=T, temperature=numbers["temperature"])
        grads = {role: ravel_pytree(getattr(state, role).opt)[0] for role in trees}
        return grads, finite((metrics, out.logp_BT)) & (out.ids_BT >= 0).all()

    return run


@functools.cache
def warm_gradients(kind: str, role: str):
    """The same for a warm start of one role."""
    spec, base, _ = pair(kind)
    rng, n = np.random.default_rng(0), 4
    batch = {"h_BD": jnp.asarray(tiny.activations(n, 8)), "ids_BT": jnp.asarray(tiny.random_ids(rng, (n, T)))}
    valid = jnp.arange(T)[None] < jnp.array([[T], [3], [2], [T]])
    if role == "av":
        batch["mask_BT"] = valid
    else:
        batch |= {"valid_BT": valid, "last_B": valid.sum(1) - 1, "weight_B": jnp.ones(n)}
    step = steps.warm_start_av if role == "av" else steps.warm_start_ar

    @jax.jit
    def run(av_N, ar_N, numbers, key):
        own = dataclasses.replace(spec, alpha=numbers["alpha"])
        state, metrics = step(learners(kind, (av_N, ar_N))[role], base, batch, spec=own, tx=KEEP)
        return {role: ravel_pytree(state.opt)[0]}, finite(metrics)

    return run


def numbers_of(key: str) -> st.SearchStrategy:
    """Numbers from all over a range, its ends more often."""
    within, kind = config_ranges.range_of(key), config_ranges.numbers()[key]
    low, high = kind(within.low), kind(within.high)
    ends = [low, high] + ([] if within.also is None else [kind(within.also)])
    if kind is int:
        return st.sampled_from(ends) | st.integers(low, high) | st.integers(low, 100)
    sizes = st.floats(-7, 8).map(lambda e: min(max(10.0**e, low), high))
    return st.sampled_from(ends) | sizes | st.floats(low, high)


@pytest.fixture(scope="module")
def default():
    c = configs.default()
    c.lessons_av.form = "drill"  # as RL of the drill needs it
    return c


@st.composite
def settings_of(draw, stage: str) -> dict:
    sections = ("rl", "rl_drill") if stage == "rl_drill" else (stage,)
    keys = [*COMMON, *(f"{s}.{name}" for s in sections for name in STAGE)]
    return {k: draw(numbers_of(k)) for k in keys if k in config_ranges.numbers()} | {
        f"{stage}.steps": draw(st.integers(1, config_ranges.MOST) | st.integers(1, 20))}


def check(c, stage: str, kind: str) -> None:
    """Two updates with the settings of a stage: at the peak of its learning rate, then at any step."""
    s, is_rl = configs.section(c, stage), stage in configs.RL_STAGES
    numbers = {"alpha": c.alpha or 1.0, "temperature": c.eval.temperature, "kl": s.get("kl", 0.0),
               "length_penalty": s.get("length_penalty", 0.0)}
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    gradients = rl_gradients(kind, s["kl"] > 0) if is_rl else warm_gradients(kind, stage[-2:])
    vectors = {role: ravel_pytree(tree)[0] for role, tree in pair(kind)[2].items()}
    peak = min(s["warmup"], max(s["steps"] // 4, 1))
    roles = {}
    for at in (peak, s["steps"] - 1):
        grads, is_finite = gradients(*vectors.values(), numbers, key_for(c.seed, "rl", at))
        assert is_finite
        for role, grad_N in grads.items():
            tx = jitted_steps.optimizer(c, stage, f"lr_{role}" if is_rl else "lr")
            now = roles.get(role) or optimize.learner(vectors[role], tx)
            now = now.replace(opt=optax.tree.set(now.opt, count=jnp.int32(at)))
            new, info = optimize.apply(now, grad_N, tx)
            assert int(info["skipped"]) == 0 and bool(jnp.isfinite(new.params).all())
            norm = float(info["grad_norm"])
            kept = s["clip"] / norm if 0 < s["clip"] < norm else 1.0
            seen_N, moved_N = np.abs(grad_N) * kept > 1e-6, np.asarray(new.params != now.params)
            if at == peak and seen_N.any():
                assert moved_N[seen_N].mean() > 0.5, f"{role} is frozen"
            roles[role], vectors[role] = new, new.params


@pytest.mark.parametrize("stage", [*configs.STAGES, *configs.RL_STAGES])
def test_no_accepted_number_breaks_an_update(default, stage):
    cases = []

    @settings(max_examples=-(-CASES // 6), deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(settings_of(stage), st.sampled_from(sorted(KINDS)))
    def run(values, kind):
        c = default.copy_and_resolve_references()
        c.update_from_flattened_dict(values)
        config_checks.validate(c)
        check(c, stage, kind)
        cases.append(values)

    run()
    assert len(cases) >= CASES // 6
