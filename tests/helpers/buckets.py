"""A stand-in for gs://: buckets are directories under one root, with the habits of object storage.

There are no directories but those that objects make, and nothing can be appended to. etils.epath comes
here through fsspec, as it comes to Google's storage; Orbax's own reader and writer of buckets is pointed to
the same files.
"""

import contextlib
import os
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

from nla_jax.util import paths


@contextlib.contextmanager
def stand_in(root: Path):
    """Inside, gs://BUCKET/NAME is ROOT/BUCKET/NAME; gives ROOT."""

    class Buckets(DirFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **_):
            super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True, skip_instance_cache=True))

        def _join(self, path):
            if isinstance(path, (str, os.PathLike)):
                return super()._join(os.fspath(path).removeprefix("gs://"))
            return super()._join(path)

        def mkdir(self, path, *_, **__):
            pass

        def makedirs(self, path, *_, **__):
            pass

        def isdir(self, path):
            place = Path(self._join(path))
            return any(p.is_file() for p in place.rglob("*"))

        def exists(self, path):
            return Path(self._join(path)).is_file() or self.isdir(path)

        def open(self, path, mode="rb", *args, **kw):
            if "a" in mode or "+" in mode:
                raise NotImplementedError(f"{path}: objects cannot be appended to")
            return super().open(path, mode, *args, **kw)

    def kvstore(path):
        return {"driver": "file", "path": f"{root}/{str(path).removeprefix('gs://')}"}

    with pytest.MonkeyPatch.context() as patch:
        for name in Buckets.protocol:
            patch.setitem(_registry, name, Buckets)
        patch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        forget()
        yield root
    forget()


def forget() -> None:
    """What was found out about gs:// is found out again."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    paths._check_backend.cache_clear()
