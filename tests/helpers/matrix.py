"""Both warm starts and RL, a few steps of each, on one device and on eight, however they are laid out.

    python -m tests.helpers.matrix OUT.npz
    bash launch/local_pod.sh --processes 2 --devices 4 -- python -m tests.helpers.matrix OUT.npz

The first prints how far eight devices in one process are from one device, whose numbers it writes to OUT.npz,
for full fine-tuning and for adapters; the second does the same for two processes of four.
"""

import os

if not os.environ.get("NLA_COORDINATOR"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import dataclasses
import functools
import sys

import jax
import numpy as np
import optax

from nla_jax import reconstructor, steps, verbalizer
from nla_jax.lm import params as params_lib
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from nla_jax.util import distributed
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=1), layer=0)
# With adapters, what else AV can have: a learned affine map, and norm-matched injection (after block 1).
MATCHED = dataclasses.replace(SPEC, lm=tiny.lm(tied=False, n_blocks=3), alpha=1.0,
                              av=dataclasses.replace(SPEC.av, injection="norm_matched"))
B, G, T = 8, 2, 8
# Gradient descent with momentum: differences stay as small as rounding makes them, where Adam
# divides a gradient near zero by its own size.
TX = optax.sgd(0.1, momentum=0.9)
OPTS = tiny.rl_options(G, T, reward="mse", kl=0.1)
RANKS = {"full": 0, "adapters": 4}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


@dataclasses.dataclass
class Ran:
    """What a mesh made of the same beginning: every role with its table, metrics by step, compilations."""

    mesh: object
    roles: dict
    tables: dict
    logs: dict
    compilations: dict


def warm_batches():
    """Of AV and of AR, some AR rows without weight."""
    rng = np.random.default_rng(0)
    ids = tiny.random_ids(rng, (16, 16))
    length = rng.integers(4, 17, 16)
    valid = np.arange(16)[None] < length[:, None]
    h = tiny.activations(16)
    return {
        "av": {"h_BD": h, "ids_BT": ids, "mask_BT": valid},
        "ar": {"h_BD": h, "ids_BT": ids, "valid_BT": valid, "last_B": (length - 1).astype(np.int32),
               "weight_B": np.float32([1, 1, 1, 0, 1, 1, 0, 1] * 2)},
    }


@functools.cache
def ran(sizes, rank: int) -> Ran:
    """Two steps of each warm start, AV's in two microbatches, and three of RL, all from one beginning."""
    spec = MATCHED if rank else SPEC
    mesh, params = tiny.mesh(*sizes), tiny.talker_params(spec.lm)
    base = mesh_lib.shard_params(params, params_lib.table(spec.lm), mesh)
    key = jax.random.key
    tables = {
        "av": verbalizer.table(spec.lm, rank=rank, affine=rank > 0),
        "ar": reconstructor.table(spec.lm, spec.layer, rank=rank),
    }
    trees = {
        "av": verbalizer.init(params, spec.lm, rank=rank, affine=rank > 0, key=key(0)),
        "ar": reconstructor.init(params, spec.lm, spec.layer, rank=rank, key=key(1)),
    }
    trees = jax.tree.map(np.array, trees)  # state is donated: on one device it would be these very arrays
    out = Ran(mesh, {}, {}, {}, {})
    by_sequence = functools.partial(steps.warm_start_av, loss_mean="sequences")
    warm = {"av": (by_sequence, 2), "ar": (steps.warm_start_ar, 1)}
    for role, (step, micro) in warm.items():
        state = jitted_steps.learner(mesh_lib.shard_params(trees[role], tables[role], mesh), TX, mesh)
        run = jitted_steps.jit_step(functools.partial(step, spec=spec, tx=TX, micro=micro), state)
        batch = mesh_lib.shard_batch(warm_batches()[role], mesh)
        keep(out, f"warm_{role}", tables[role], *looped(run, state, lambda _, b=batch: (base, b), 2))
    ref, av, ar = (mesh_lib.shard_params(trees[r], tables[r], mesh) for r in ("av", "av", "ar"))
    state = steps.RLState(jitted_steps.learner(av, TX, mesh), jitted_steps.learner(ar, TX, mesh))
    run = jitted_steps.jit_step(functools.partial(steps.rl, spec=spec, opts=OPTS, tx_av=TX, tx_ar=TX), state)
    rows = {"h_BD": tiny.activations(B), "row_B": np.arange(B, dtype=np.int32)}
    batch = mesh_lib.shard_batch(rows, mesh)
    state, logs, compiled = looped(run, state, lambda i: (base, ref, batch, key(i)), 3)
    keep(out, "rl_av", tables["av"], state.av, logs, compiled)
    keep(out, "rl_ar", tables["ar"], state.ar, logs, compiled)
    return out


def whole(tree, mesh):
    """On the host, whatever part of it this process holds."""
    everywhere = jax.jit(lambda t: t, out_shardings=mesh_lib.replicated_sharding(mesh))
    return jax.tree.map(np.asarray, everywhere(tree))


def numbers(done: Ran) -> dict[str, np.ndarray]:
    """Every metric of every step, and every leaf of every role, by name."""
    out = {f"{name}/{i}/{k}": np.asarray(v) for name, logs in done.logs.items()
           for i, log in enumerate(logs) for k, v in log.items()}
    roles = whole(done.roles, done.mesh)
    return out | {f"{name}/{leaf}": a for name, role in roles.items() for leaf, a in tiny.flat(role).items()}


def looped(run, state, arguments, n: int):
    """(state, metrics of each step, compilations)."""
    logs = []
    for i in range(n):
        state, metrics = run(state, *arguments(i))
        logs.append(jax.tree.map(np.asarray, metrics))
    return state, logs, run._cache_size()


def keep(out: Ran, name: str, table, role, logs, compiled) -> None:
    out.roles[name], out.tables[name], out.logs[name], out.compilations[name] = role, table, logs, compiled


def apart(got: dict, want: dict) -> dict[str, float]:
    """The largest difference of each sort: sampled tokens (of those that differ, the share), metrics over
    their size, parameters and moments over the largest entry of their leaf."""
    out = {"tokens": 0.0, "metrics": 0.0, "leaves": 0.0}
    for name, b in want.items():
        a, sort = got[name], "metrics" if name.split("/")[1].isdecimal() else "leaves"
        if name.endswith("ids_BGT"):
            out["tokens"] = max(out["tokens"], float(np.mean(a != b)))
            continue
        if "ratio_off" in name or "/kl" in name:  # differences themselves
            a, b = a + 1.0, b + 1.0
        size = np.abs(b) if sort == "metrics" else np.abs(b).max(initial=0)
        out[sort] = max(out[sort], float(np.max(np.abs(a - b) / np.maximum(size, 1e-5), initial=0)))
    return out


def main() -> None:
    if os.environ.get("NLA_COORDINATOR"):
        distributed.join()
        stored, meshes = np.load(sys.argv[1]), [(2, 2, 2)]
        want = {k: {n[len(k) + 1 :]: a for n, a in stored.items() if n.startswith(f"{k}/")} for k in RANKS}
    else:
        want, meshes = {kind: numbers(ran((1, 1, 1), rank)) for kind, rank in RANKS.items()}, MESHES
        np.savez(sys.argv[1], **{f"{k}/{n}": a for k, ns in want.items() for n, a in ns.items()})
    for kind, rank in RANKS.items():
        for sizes in meshes:
            far = apart(numbers(ran(sizes, rank)), want[kind])
            if distributed.is_first():
                print(f"{kind:>9} {sizes!s:>10}", *(f"{k} {v:.1e}" for k, v in far.items()), flush=True)


if __name__ == "__main__":
    main()
