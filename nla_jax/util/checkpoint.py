"""Orbax: everything that training needs to go on exactly, and whole trees for bundles."""

import asyncio
import gc
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from nla_jax.errors import UserError
from nla_jax.util import distributed, lazy_params, paths


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


UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's ending for a tree that it is writing
CHUNK = 64 << 20  # bytes that are read together, of what is written block by block


class _Lazily(ocp.type_handlers.NumpyHandler):
    """Orbax's way with numpy arrays, for `lazy_params.Array`: written part by part, one at a time, and not
    read but opened."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        self.failed: Exception | None = None  # raised here it would come out under pages of Orbax's own

    async def _open_and_write(self, value: lazy_params.Array, tspec, ts_context) -> None:
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._turn:
            for i in value.blocks:
                try:
                    part = None if self.failed else value.read(i)
                except Exception as e:
                    self.failed = e
                if self.failed:  # Orbax wants something of every array
                    await store[(0,) * store.rank].write(0)
                    return
                place = store if i is None else store[i]
                await place.write(part, can_reference_source_data_indefinitely=True)
                del part  # before the next is read

    async def deserialize(self, infos, args=None):
        specs = [ocp.type_handlers.get_json_tspec_read(i, use_ocdbt=i.is_ocdbt_checkpoint) for i in infos]
        return [
            await ts.open(ts.Spec(spec), open=True, context=i.ts_context)
            for spec, i in zip(specs, infos, strict=True)
        ]


def _checkpointer(handler: _Lazily) -> ocp.Checkpointer:
    arrays = (jax.Array, ocp.type_handlers.ArrayHandler())  # without it Orbax warns
    registry = ocp.type_handlers.create_type_handler_registry((lazy_params.Array, handler), arrays)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def save_tree(directory: str | Path, tree) -> None:
    """Write a tree of arrays whole: it appears under its name only when complete. All processes of a pod
    call this, and each writes what it holds.

    A tree of `lazy_params.Array`, nothing else in it, is read part by part as it is written (by one process).
    What reading raises is raised, and nothing is left.
    """
    path = paths.absolute(directory)
    if distributed.is_first():
        paths.remove(path.with_name(f"{path.name}{UNFINISHED}"))  # half written, before a kill
    if not isinstance(jax.tree.leaves(tree)[0], lazy_params.Array):
        with ocp.StandardCheckpointer() as c:
            c.save(path, tree, force=True)
        return
    chunks = jax.tree.map(
        lambda a: ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if a.stacked else ()), tree
    )
    handler = _Lazily()
    with _checkpointer(handler) as c:
        c.save(path, args=ocp.args.PyTreeSave(tree, chunks), force=True)
    if handler.failed:
        paths.remove(path)
        raise handler.failed


def open_tree(directory: str | Path, like):
    """What `load_tree` reads, as a tree of `lazy_params.Array` in the dtypes of the files.

    Args:
      like: a tree of `params.Spec`.
    """
    path = paths.absolute(directory)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=lazy_params.Array), like)

    def opened():
        _check_shapes(path, like)
        with _checkpointer(_Lazily()) as c:
            return c.restore(path, args=ocp.args.PyTreeRestore(like, arguments))

    def one(spec, store):
        def read(i):
            return _guarded(lambda: np.asarray((store if i is None else store[i]).read().result()), path)

        return lazy_params.Array(spec.shape, store.dtype.numpy_dtype, spec.axes[0] == "block", read)

    return jax.tree.map(one, like, _guarded(opened, path))


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
