"""Held-out rows for a packed bundle that is evaluated without its run, such as the shipped one.

The sidecar has the config of the run, which gives the same held-out documents. Their activations are captured
once and kept in the cache.
"""

import hashlib
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nla_jax import bundle, configs
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.lm import sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.files import packed
from nla_jax.pipeline import activations
from nla_jax.pipeline.context import RunContext
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import locks, paths, writable
from nla_jax.util.choices import refuse_code_beside
from nla_jax.util.paths import cache_dir

# Maximum numbers of training rows, with which some probes train their readers. RL's rows are not needed.
MOST = {"explained_rows": 512, "explained_positions": 2, "warm_windows": 256, "positions": 8, "rl_windows": 0}


def evaluation_dir(directory: str | Path) -> Path:
    """Return the directory of a bundle's store and readers: its parent directory. For a packed bundle without
    a store there, it is a directory in the cache."""
    directory = paths.absolute(directory)
    meta = bundle.read_sidecar(directory) if (directory / bundle.SIDECAR).is_file() else {}
    if not packed.is_packed(meta) or store.is_complete(directory.parent / "data"):
        return directory.parent
    digest = hashlib.sha256((directory / bundle.SIDECAR).read_bytes()).hexdigest()
    return cache_dir() / "evaluated" / digest[:16]


def store_of(directory: str | Path, target: str | None = None) -> Path:
    """Return the store of activations for the evaluation of a bundle.

    If `evaluation_dir` is in the cache, the store is made once. It has the held-out and out-of-domain rows of
    the sidecar's config, and some training rows.

    Raises UserError if the sidecar has no corpus, if the corpus cannot be read, and for a released pair.
    """
    place = evaluation_dir(directory)
    if pair := bundle.pair_of(bundle.read_sidecar(directory)):
        raise UserError(f"{pair[0].parent}: a released pair has no held-out rows; give a store of "
                        "activations with --store")
    if place != paths.absolute(directory).parent and not store.is_complete(place / "data"):
        writable.check_directory(place)
        meta = bundle.read_sidecar(directory)
        config = config_of(directory, meta)
        path = weights.resolve(target or meta["base_checkpoint"])
        bundle.check_target(directory, meta, path, weights.read_config(path))
        tok = tok_lib.load(bundle.tokenizer_dir(directory, meta) or path)
        print(f"capturing the held-out texts of {directory} once, into {place}", file=sys.stderr)
        mesh = mesh_lib.make(devices=jax.local_devices()[:1])
        with locks.hold_directory(place):
            lm, base = sharded_load.place(path, mesh, config.dtype)
            activations.write_store(RunContext(config, place, mesh, path, lm, tok, base, given={}))
    return place / "data"


def config_of(directory: str | Path, meta: dict) -> ConfigDict:
    """Return the config of a bundle's run, with at most MOST training rows. Raises UserError if the sidecar
    has none, or if its activations came from a store."""
    stored = meta["training"].get("config")
    if not stored or stored["data"].get("store"):
        raise UserError(
            f"{directory}: its sidecar does not say which texts it was trained on; give a store of "
            "activations with --store"
        )
    config = configs.default()
    for key in configs.keys(config):
        section, _, name = key.rpartition(".")
        ours, theirs = (config[section], stored.get(section, {})) if section else (config, stored)
        if name in theirs:
            ours[name] = theirs[name]
    for uri in (config.data.corpus, config.data.ood):
        refuse_code_beside(directory, uri if "reader:" in uri else "")
    config.layer = meta["extraction"]["layer_index"]
    config.activations = "stored"
    for name, most in MOST.items():
        ours = config.data[name]
        everything = name == "explained_rows" and not ours
        config.data[name] = most if everything else min(ours, most)
    return config
