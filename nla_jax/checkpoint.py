"""Orbax: everything that training needs to go on exactly, and whole trees for bundles."""

import gc
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from nla_jax import paths, pod
from nla_jax.errors import UserError


def manager(directory: str | Path, keep: int = 1) -> ocp.CheckpointManager:
    """Asynchronous checkpoints of one training stage under `directory`, newest `keep` kept."""
    return ocp.CheckpointManager(
        paths.absolute(directory),
        # A kill may leave a checkpoint half written: it goes before another takes its name.
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True),
    )


def save(mgr: ocp.CheckpointManager, step: int, state) -> None:
    """Start saving `state` as the state after `step` steps; returns before it is on disk. All processes
    of a pod call this, and each writes what it holds."""
    mgr.save(step, args=ocp.args.StandardSave(state))


def restore_latest(mgr: ocp.CheckpointManager, state):
    """(steps done, state) of the newest whole checkpoint, or (0, the given state) when there is none.

    `state` gives shapes, dtypes and shardings; it may hold arrays or `jax.ShapeDtypeStruct`s.
    Raises UserError when the checkpoint does not fit (another architecture or configuration) or is
    damaged.
    """
    step = mgr.latest_step()
    if step is None:
        return 0, state

    def read():
        _check_shapes(paths.path(mgr.directory) / str(step) / "default", state)
        return mgr.restore(step, args=ocp.args.StandardRestore(_abstract(state)))

    return step, _guarded(read, f"{mgr.directory}/{step}")


def save_tree(directory: str | Path, tree) -> None:
    """Write a tree of arrays whole: it appears under its name only when complete. All processes of a pod
    call this, and each writes what it holds."""
    path = paths.absolute(directory)
    if pod.is_first():
        paths.remove(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))  # half written, before a kill
    with ocp.StandardCheckpointer() as c:
        c.save(path, tree, force=True)


def load_tree(directory: str | Path, like):
    """Read a tree written by `save_tree` into the shapes, dtypes and shardings of `like`.

    Raises UserError when it is missing, damaged or of other shapes.
    """
    path = paths.absolute(directory)
    if not path.is_dir():
        raise UserError(
            f"{path}: no saved parameters there; is this the right directory, and did "
            "the stage that writes it finish?"
        )

    def read():
        _check_shapes(path, like)
        with ocp.StandardCheckpointer() as c:
            return c.restore(path, _abstract(like))

    return _guarded(read, path)


def _abstract(tree):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        tree,
    )


def _check_shapes(path: Path, like) -> None:
    """Before Orbax reads anything: it does not stop cleanly halfway."""

    def shapes(tree):
        names = (("/".join(_name(k) for k in p), a) for p, a in jax.tree_util.tree_leaves_with_path(tree))
        return {name: tuple(a.shape) for name, a in names}

    # The checkpointers' own `metadata` warns about a file that a managed checkpoint keeps elsewhere.
    stored = shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(path)).tree)
    wanted = shapes(like)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {stored.get(name, 'absent')}, not {wanted.get(name, 'absent')}")


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _guarded(read, where):
    try:
        return read()
    except Exception as e:  # Orbax wraps what went wrong in a bare Exception
        while e.__cause__:
            e = e.__cause__
        lines = str(e).strip().splitlines()
        first = lines[0][:300] if lines else type(e).__name__
    _collect_quietly()
    raise UserError(
        f"{where}: cannot be restored, it is damaged or belongs to another "
        f"configuration ({first}); delete it to start that stage again"
    )


def _collect_quietly() -> None:
    """Drop the reads that Orbax leaves unfinished beside a failed one: later they would print tracebacks."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
