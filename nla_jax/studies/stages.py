"""Run the stages of a study once: each result is a file, so that the same command continues."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax import api
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import jacobian_lens
from nla_jax.evaluate.probe_types import Figure
from nla_jax.pipeline import held_out_rows
from nla_jax.util import hardware, paths, writable
from nla_jax.util.progress import format_seconds


class Stages:
    """Run named stages once: each writes its result into a directory, from where it is read again."""

    def __init__(self, out: Path, names: list[str]):
        self.out, self.names, self.began, self.done = out, names, time.monotonic(), 0

    def run(self, name: str, work: Callable[[], dict], read: Callable, write: Callable, suffix: str):
        """Return what `work` returns, or what its file holds, and print the time that is left."""
        path = self.out / f"{name.replace(' ', '_')}{suffix}"
        if path.is_file():
            self.names.remove(name)
            return read(path)
        found = work()
        with paths.whole(path) as part:
            write(part, found)
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (len(self.names) - self.done)
        print(f"{name}: done, {self.done} of {len(self.names)} stages, about {format_seconds(left)} left",
              file=sys.stderr, flush=True)
        return found

    def rows(self, name: str, work: Callable[[], dict]) -> dict:
        """Run a stage whose result is a dict of lists."""
        def write(path, found):
            path.write_text(json.dumps(found, default=_plain), "utf-8")

        return self.run(name, work, lambda p: json.loads(p.read_text("utf-8")), write, ".json")

    def tree(self, name: str, work: Callable[[], dict]) -> dict:
        """Run a stage whose result is a tree of arrays, two levels deep."""
        def write(path, found):
            flat = {f"{a}/{b}": np.asarray(x) for a, ab in found.items() for b, x in ab.items()}
            with open(path, "wb") as file:
                np.savez(file, **flat)

        def read(path):
            out: dict = {}
            with np.load(path) as found:
                for key in found:
                    a, b = key.split("/")
                    out.setdefault(a, {})[b] = found[key]
            return out

        return self.run(name, work, read, write, ".npz")


def _plain(value):
    """Return a NumPy scalar as a JSON value."""
    return value.item()


def open_stages(out: Path, settings, dtype: str, names: list[str]) -> Stages:
    """Return the stages of these names in a directory. settings: a dataclass. dtype: of the products.

    Raises UserError if the directory holds a study with other settings, or in another dtype."""
    out.mkdir(parents=True, exist_ok=True)
    writable.check_directory(out)
    record = json.loads(json.dumps(dataclasses.asdict(settings) | {"dtype": dtype}))
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text("utf-8")) != record:
        raise UserError(f"{out}: it has a study with other settings or in another dtype; give another --out, "
                        "or delete it")
    paths.write(path, json.dumps(record, indent=1))
    return Stages(out, names)


def open_nla(directory) -> tuple[api.NLA, dict, np.ndarray]:
    """Return a bundle's NLA, its held-out rows, and the Jacobian lens of its target, which is kept.

    Compiled programs are kept, too."""
    jax.config.update("jax_compilation_cache_dir", paths.programs_dir())
    nla = api.load(directory, batch=32, dtype=hardware.product_dtype())
    data = held_out_rows.store_of(directory)
    natural = store.load_columns(data, "heldout", ["h", "text"])
    # The probe `lens` fits it on the same texts.
    texts = store.load_columns(data, "warm", ["text"])["text"]
    readers = held_out_rows.evaluation_dir(directory) / "readers"
    return nla, natural, jacobian_lens.fit_or_read(nla.runner, texts, readers, "Jacobian lens")


def write_results(out: Path, name: str, figures: dict[str, dict[str, list[Figure]]], lines: list[str]):
    """Write NAME.json and NAME.md into a directory, and print the second."""
    record = {k: {n: [dataclasses.asdict(f) for f in fs] for n, fs in v.items()} for k, v in figures.items()}
    paths.write(out / f"{name}.json", json.dumps(record, indent=1))
    paths.write(out / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
