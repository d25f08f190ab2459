"""Save and restore with Orbax: training states that resume exactly, and parameter trees for bundles."""

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
    """Return an asynchronous checkpoint manager for one stage. It keeps the newest `keep` checkpoints."""
    return ocp.CheckpointManager(
        _place(directory, makes=True),
        # A killed process may leave a partial checkpoint. Orbax deletes it before it reuses the name.
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True),
    )


def _place(directory: str | Path, makes: bool = False) -> Path:
    """Return the path to give to Orbax; with `makes`, its parent directory is made."""
    path = paths.absolute(directory)
    if makes and not paths.is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths.plain(path.parent) / path.name


def save(mgr: ocp.CheckpointManager, step: int, state) -> None:
    """Start saving `state` as the state after `step` steps; return before it is on disk.

    All processes of a pod must call this. Each process writes its own shards."""
    mgr.save(step, args=ocp.args.StandardSave(state))


def restore_latest(mgr: ocp.CheckpointManager, state):
    """Return (completed steps, state) from the newest complete checkpoint, or (0, `state`) if there is none.

    `state` gives shapes, dtypes and shardings; its leaves are arrays or `jax.ShapeDtypeStruct`s.
    Raises UserError when the checkpoint is damaged or has other shapes (another architecture or
    configuration).
    """
    step = mgr.latest_step()
    if step is None:
        return 0, state

    def read():
        _check_shapes(paths.path(mgr.directory) / str(step) / "default", state)
        return mgr.restore(step, args=ocp.args.StandardRestore(_abstract(state)))

    return step, _raise_as_user_error(read, paths.shown(mgr.directory / str(step)))


UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix for a tree that is still being written
CHUNK = 64 << 20  # bytes of a TensorStore chunk


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """An Orbax handler for `lazy_params.Array`. It writes one block at a time. On restore it opens the
    TensorStore arrays and reads nothing."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        # An exception raised here would be buried in Orbax's own tracebacks, so `save_tree` raises it later.
        self.failed: Exception | None = None

    async def _open_and_write(self, value: lazy_params.Array, tspec, ts_context) -> None:
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._turn:
            for i in value.blocks:
                try:
                    part = None if self.failed else value.read(i)
                except Exception as e:
                    self.failed = e
                if self.failed:  # Orbax requires that every array is written
                    await store[(0,) * store.rank].write(0)
                    return
                place = store if i is None else store[i]
                await place.write(part, can_reference_source_data_indefinitely=True)
                del part  # free this block before the next one is read

    async def deserialize(self, infos, args=None):
        specs = [ocp.type_handlers.get_json_tspec_read(i, use_ocdbt=i.is_ocdbt_checkpoint) for i in infos]
        return [
            await ts.open(ts.Spec(spec), open=True, context=i.ts_context)
            for spec, i in zip(specs, infos, strict=True)
        ]


def _checkpointer(handler: LazyArrayHandler) -> ocp.Checkpointer:
    arrays = (jax.Array, ocp.type_handlers.ArrayHandler())  # without it Orbax warns
    registry = ocp.type_handlers.create_type_handler_registry((lazy_params.Array, handler), arrays)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def save_tree(directory: str | Path, tree) -> None:
    """Write a tree of arrays atomically: `directory` exists only once the tree is complete.

    All processes of a pod must call this; each writes its own shards. If the leaves are
    `lazy_params.Array`s (all of them), one process reads and writes them block by block. An exception from
    such a read is raised again, and the partial tree is deleted.
    """
    path = _place(directory, makes=True)
    if distributed.is_first():
        paths.remove(path.with_name(f"{path.name}{UNFINISHED}"))  # a partial tree of a killed process
    lazy = isinstance(jax.tree.leaves(tree)[0], lazy_params.Array)

    def chunks_of(a):  # each block of a matrix has its own chunks, so that it can be read alone
        stacked = a.stacked if lazy else a.ndim == 3
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())

    chunks = jax.tree.map(chunks_of, tree)
    if not lazy:
        with ocp.StandardCheckpointer() as c:
            c.save(path, tree, save_args=chunks, force=True)
        return
    handler = LazyArrayHandler()
    with _checkpointer(handler) as c:
        c.save(path, args=ocp.args.PyTreeSave(tree, chunks), force=True)
    if handler.failed:
        paths.remove(path)
        raise handler.failed


def open_tree(directory: str | Path, like):
    """Open a tree written by `save_tree`: a tree of `lazy_params.Array` in the stored dtypes.

    Args:
      like: a tree of `params.Spec`.

    Raises UserError when the tree is missing, damaged or of other shapes; a read raises it later, too.
    """
    path = _place(directory)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=lazy_params.Array), like)

    def opened():
        _check_shapes(path, like)
        with _checkpointer(LazyArrayHandler()) as c:
            return c.restore(path, args=ocp.args.PyTreeRestore(like, arguments))

    def one(spec, store):
        def read(i):
            return _raise_as_user_error(
                lambda: np.asarray((store if i is None else store[i]).read().result()), paths.shown(path)
            )

        return lazy_params.Array(spec.shape, store.dtype.numpy_dtype, spec.axes[0] == "block", read)

    return jax.tree.map(one, like, _raise_as_user_error(opened, paths.shown(path)))


def load_tree(directory: str | Path, like):
    """Read a tree written by `save_tree` into the shapes, dtypes and shardings of `like`.

    Raises UserError when it is missing, damaged or of other shapes.
    """
    path = _place(directory)
    if not path.is_dir():
        raise UserError(
            f"{directory}: there are no saved parameters; check the directory, and that "
            "the stage that writes it has finished"
        )

    def read():
        _check_shapes(path, like)
        with ocp.StandardCheckpointer() as c:
            return c.restore(path, _abstract(like))

    return _raise_as_user_error(read, paths.shown(path))


def _abstract(tree):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        tree,
    )


def _check_shapes(path: Path, like) -> None:
    """Compare names and shapes before Orbax reads any data, because Orbax does not abort a read cleanly."""

    def shapes(tree):
        names = (("/".join(_name(k) for k in p), a) for p, a in jax.tree_util.tree_leaves_with_path(tree))
        return {name: tuple(a.shape) for name, a in names}

    # The checkpointers' own `metadata` would warn about a file that a manager stores in another directory.
    stored = shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(path)).tree)
    wanted = shapes(like)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {stored.get(name, 'absent')}, not {wanted.get(name, 'absent')}")


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _raise_as_user_error(read, where):
    try:
        return read()
    except Exception as e:  # Orbax wraps the cause in a bare Exception
        while e.__cause__:
            e = e.__cause__
        lines = str(e).strip().splitlines()
        first = lines[0][:300] if lines else type(e).__name__
    _collect_abandoned_reads()
    raise UserError(
        f"{where}: cannot be restored: it is damaged or belongs to another "
        f"configuration ({first}); delete it to start that stage again"
    )


def _collect_abandoned_reads() -> None:
    """Collect the reads that Orbax abandons after a failed one, because they would print tracebacks later."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
