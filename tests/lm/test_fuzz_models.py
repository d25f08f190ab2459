"""Damaged and hostile files of models: an error that a person can act on, or a correct load.

Never another exception, a crash below Python, a hang, or a gigabyte. Hypothesis makes the cases, the
same ones every time.
"""

import copy
import dataclasses
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import gguf, gguf_tokenizer
from tests.helpers import family_pairs, gguf_models, tiny, vocabularies

GIB = 2**30

FAMILY_NAMES = (
    "llama llama3", "mistral", "qwen2 window untied", "qwen3", "gemma2", "gemma3_text", "gemma3", "olmo2",
    "olmo3", "phi3", "qwen3_moe", "qwen3_5_text", "qwen3_5", "qwen3_5_moe_text",
    "gemma4_text", "gemma4",
)
GGUF_NAMES = ("llama", "qwen2", "gemma3_text", "gemma4_text")


def fuzz(cases: int):
    return settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Whoever asks for a gigabyte here does not get it."""
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(read, *args):
    """What `read` gives, or None where it refuses in one line that does not run on for ever."""
    try:
        return read(*args)
    except UserError as err:
        said = str(err)
        assert "\n" not in said and len(said) < 5000, said
        assert "MemoryError" not in said and "allocate" not in said.lower(), said
        return None


def check_config(cfg: LMConfig) -> None:
    """A configuration that was let through can be computed with."""
    whole = ("vocab_size", "d_model", "n_blocks", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_position")
    assert all(type(getattr(cfg, name)) is int and 0 < getattr(cfg, name) < 2**31 for name in whole), cfg
    assert np.isfinite([cfg.rope_theta, cfg.norm_eps]).all() and cfg.rope_theta > 0 and cfg.norm_eps >= 0
    assert type(cfg.tied) is bool and type(cfg.window) is int
    for name in ("local_rope_theta", "query_scalar", "attn_softcap", "final_softcap"):
        value = getattr(cfg, name)
        assert value is None or (np.isfinite(value) and value > 0), cfg
    assert len(params_lib.table(cfg)) >= 10
    assert 0 <= cfg.rotary_dim <= cfg.head_dim
    assert bool(cfg.linear) == bool(cfg.delta) and len(cfg.linear) in (0, cfg.n_blocks)
    assert len(cfg.kinds) in (0, cfg.n_blocks) and (cfg.global_heads or not cfg.global_k_is_v)


def check_load(loaded) -> None:
    if loaded is not None:
        cfg, params = loaded
        check_config(cfg)
        want = {name: spec.shape for name, spec in params_lib.table(cfg).items()}
        flat = tiny.flat(params)
        assert {name: a.shape for name, a in flat.items()} == want
        assert all(np.isfinite(a).all() for a in flat.values())


EDGES = [0, 1, 2, 3, 7, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -1.0, 0.5, 1e-30, 1e308, float("nan"), float("inf")]
numbers = st.sampled_from([*EDGES, -1, -(2**31), 10**30, 10**400, *FLOATS])
NAMES = ["", "32", "silu", "default", "llama3", "linear", "yarn", "full_attention", "\n", "é\x00"]
words = st.sampled_from(NAMES)
plain = numbers | words | st.booleans() | st.none() | st.integers(-5, 70)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fresh(path: Path, content: bytes) -> Path:
    """A new file, so that one which is still mapped to memory keeps its pages."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


# config.json


@pytest.fixture(scope="module")
def raw_configs():
    raw = [json.loads(family_pairs.torch_config(name).to_json_string()) for name in FAMILY_NAMES]
    return [{**r, "model_type": name.split()[0]} for r, name in zip(raw, FAMILY_NAMES, strict=True)]


def places(raw: dict, prefix=()) -> list[tuple]:
    """The paths of every value in nested objects."""
    out = []
    for key, value in raw.items():
        out.append((*prefix, key))
        if isinstance(value, dict):
            out += places(value, (*prefix, key))
    return out


def put(raw: dict, path: tuple, value, drop: bool) -> None:
    *before, last = path
    for key in before:
        raw = raw.get(key) if isinstance(raw, dict) else None
    if isinstance(raw, dict):
        raw.pop(last, None) if drop else raw.update({last: value})


@fuzz(450)
@given(data=st.data())
def test_configurations(folder, raw_configs, data):
    raw = copy.deepcopy(data.draw(st.sampled_from(raw_configs)))
    for _ in range(data.draw(st.integers(1, 3))):
        known = st.sampled_from(places(raw) + [("rope_scaling",), ("layer_types",), ("never_heard_of",)])
        put(raw, data.draw(known), data.draw(values), data.draw(st.integers(0, 4)) == 0)
    fresh(folder / "config.json", json.dumps(raw).encode())
    if cfg := attempt(weights.read_config, folder):
        check_config(cfg)


@fuzz(100)
@given(content=st.binary(max_size=40) | st.sampled_from([
    b"[" * 100_000, b'{"a":' * 100_000, b"5", b"null", b'"x"', b"[]", b"{}", b"\xff\xfe{}",
    b'{"model_type": [1]}', b'{"model_type": "__class__"}',
    b'{"model_type": {"a": 1}}', b'{"model_type": "llama"}', b'{"model_type": "gemma3", "text_config": []}',
    b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
]))
def test_configurations_that_are_hardly_json(folder, content):
    fresh(folder / "config.json", content)
    assert attempt(weights.read_config, folder) is None


# Safetensors


@dataclasses.dataclass(frozen=True)
class Saved:
    """A tiny model in Hugging Face layout, its tensors' header and their bytes."""

    config: bytes
    header: dict
    body: bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    family_pairs.torch_model("llama", num_hidden_layers=2, vocab_size=20).save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", whole)
    return Saved((folder / "config.json").read_bytes(), json.loads(whole[8 : 8 + size]), whole[8 + size :])


def safetensors_bytes(header: bytes, body: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + body


def load_safetensors(folder: Path, saved: Saved, content: bytes):
    fresh(folder / "config.json", saved.config)
    fresh(folder / "model.safetensors", content)
    return attempt(weights.load, folder)


def test_the_untouched_file_loads(folder, saved):
    content = safetensors_bytes(json.dumps(saved.header).encode(), saved.body)
    assert load_safetensors(folder, saved, content) is not None


shapes = st.lists(st.sampled_from([0, 1, 2, 32, 48, 2**20, 2**31, 2**32, 2**63, 2**64 - 1, -1]), max_size=5)
offsets = st.lists(st.sampled_from([0, 1, 4, 1000, 2**31, 2**40, 2**63, 2**64 - 1, -1]), max_size=3)
DTYPES = ["F64", "F16", "BF16", "F32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 5, None]
dtypes = st.sampled_from(DTYPES)
SIZES = [("I32", 4), ("U32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("F8_E5M2", 1), ("BOOL", 1)]
OTHER_NAMES = ["", "x", "__metadata__", "lm_head.bias", "a\nb", "y" * 3000]


@fuzz(250)
@given(data=st.data())
def test_safetensors_headers(folder, saved, data):
    header = copy.deepcopy(saved.header)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        entry = header.setdefault(name, {})
        match data.draw(st.integers(0, 7)):
            case 0:
                entry["shape"] = data.draw(shapes | values)
            case 1:
                entry["dtype"] = data.draw(dtypes)
            case 2:
                entry["data_offsets"] = data.draw(offsets | values)
            case 3:
                header.pop(name)
            case 4:
                header[data.draw(st.sampled_from(OTHER_NAMES))] = entry
            case 5:
                header[name] = data.draw(values)
            case 6:
                other = header.get(data.draw(st.sampled_from(names)), {})
                entry["data_offsets"] = other.get("data_offsets") if isinstance(other, dict) else other
            case _:
                entry.pop(data.draw(st.sampled_from(["shape", "dtype", "data_offsets"])), None)
        if not isinstance(header.get(name), dict):
            header.pop(name, None) if data.draw(st.booleans()) else None
            break
    check_load(load_safetensors(folder, saved, safetensors_bytes(json.dumps(header).encode(), saved.body)))


@fuzz(150)
@given(data=st.data())
def test_safetensors_bytes(folder, saved, data):
    """Cut, lengthened, flipped; a wrong length of the header; keys that stand there twice."""
    header = json.dumps(saved.header).encode()
    content = bytearray(safetensors_bytes(header, saved.body))
    match data.draw(st.integers(0, 5)):
        case 0:
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case 1:
            content += data.draw(st.binary(min_size=1, max_size=20))
        case 2:
            for _ in range(data.draw(st.integers(1, 6))):
                content[data.draw(st.integers(0, len(header) + 40))] = data.draw(st.integers(0, 255))
        case 3:
            content[:8] = struct.pack("<Q", data.draw(st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)))
        case 4:
            twice = header[:-1] + b"," + header[1:]
            content = safetensors_bytes(twice, saved.body)
        case _:
            other = data.draw(st.sampled_from([b'"F16"', b"[]", b'"f32"', b"{", b"\x00"]))
            content = safetensors_bytes(header.replace(b'"F32"', other), saved.body)
    check_load(load_safetensors(folder, saved, bytes(content)))


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    dtype: str
    shape: list[int]
    data: bytes


def coherent(entries: list[Entry]) -> bytes:
    """A file whose header and bytes agree."""
    header, at = {}, 0
    for e in entries:
        header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [at, at + len(e.data)]}
        at += len(e.data)
    return safetensors_bytes(json.dumps(header).encode(), b"".join(e.data for e in entries))


@fuzz(200)
@given(data=st.data())
def test_whole_safetensors_of_another_model(folder, saved, data):
    """Files in order, whose tensors have other names, types, shapes or values than the model's."""
    entries = [
        Entry(name, one["dtype"], one["shape"], saved.body[slice(*one["data_offsets"])])
        for name, one in saved.header.items()
        if name != "__metadata__"
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(entries) - 1))
        old = entries[at]
        match data.draw(st.integers(0, 6)):
            case 0:
                other = data.draw(st.sampled_from(OTHER_NAMES + [e.name for e in entries]))
                entries[at] = dataclasses.replace(old, name=other.replace("__metadata__", "z"))
            case 1:
                kind, size = data.draw(st.sampled_from(SIZES))
                count = len(old.data) // size
                body = old.data[: count * size]
                entries[at] = dataclasses.replace(old, dtype=kind, shape=[count], data=body)
            case 2:
                entries[at] = dataclasses.replace(old, shape=data.draw(st.permutations([*old.shape, 1])))
            case 3:
                entries[at] = dataclasses.replace(old, shape=old.shape[::-1])
            case 4:
                entries[at] = dataclasses.replace(old, shape=[0], data=b"")
            case 5:
                bad = data.draw(st.sampled_from([np.nan, np.inf, 1e38, -0.0]))
                entries[at] = dataclasses.replace(old, data=np.float32(bad).tobytes() + old.data[4:])
            case _ if len(entries) > 1:
                entries.pop(at)
    check_load(load_safetensors(folder, saved, coherent(entries)))


shard_names = st.sampled_from([
    "model-1.safetensors", "model-2.safetensors", "../model-1.safetensors", "/etc/hostname", "", ".",
    "a\x00b", "config.json", "x" * 5000, "\n", "none.safetensors",
])


@fuzz(150)
@given(data=st.data())
def test_index_files(tmp_path_factory, saved, data):
    folder = tmp_path_factory.mktemp("index", numbered=True)
    content = safetensors_bytes(json.dumps(saved.header).encode(), saved.body)
    fresh(folder / "config.json", saved.config)
    fresh(folder / "model-1.safetensors", content)
    names = [name for name in saved.header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    for _ in range(data.draw(st.integers(1, 2))):
        match data.draw(st.integers(0, 3)):
            case 0:
                index["weight_map"] = data.draw(values)
            case 1:
                index.pop("weight_map", None)
            case _ if isinstance(index.get("weight_map"), dict):
                index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(shard_names | values)
    fresh(folder / "model.safetensors.index.json", json.dumps(index).encode())
    check_load(attempt(weights.load, folder))


# GGUF


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    """Small whole files: (content, where in it the header's numbers stand and how long they are)."""
    folder, out = tmp_path_factory.mktemp("gguf"), []
    for name in GGUF_NAMES:
        arch, changes = gguf_models.CASES[name]
        net = family_pairs.torch_model(name, **{**changes, "num_hidden_layers": 2, "vocab_size": 20})
        gguf_models.write_gguf(folder / name, arch, net)
        out.append(((folder / name).read_bytes(), fields(folder / name)))
    for kind in ("llama2", "qwen2"):
        vocabularies.write_gguf(folder / kind, kind)
        out.append(((folder / kind).read_bytes(), fields(folder / kind)))
    return out


def fields(path: Path) -> list[tuple[int, int]]:
    """(place, bytes) of every count, length, type, offset and number that is read of a header."""
    found = []

    class Noting(gguf._Cursor):
        def scalars(self, code, count):
            found.append((self.at, struct.calcsize(f"<{code}")))
            return super().scalars(code, count)

        def string(self):
            found.append((self.at, 8))
            return super().string()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_Cursor", Noting)
        gguf.open_gguf(path)
    # Of thousands of tokens, a few stand for all.
    step = max(1, len(found) // 200)
    return found[:40] + found[40:-40:step] + found[-40:]


def read_gguf(path: Path) -> None:
    check_load(attempt(weights.load, path))
    tok = attempt(tok_lib.load, path)
    if tok is not None:
        assert tok.decode(tok_lib.plain_ids(tok, "a")) in ("a", " a", "")


def test_untouched_ggufs_load(folder, ggufs):
    for content, places in ggufs:
        path = fresh(folder / "m.gguf", content)
        assert len(places) > 30
        assert (attempt(weights.load, path) or attempt(tok_lib.load, path)) is not None


@fuzz(250)
@given(data=st.data())
def test_gguf_numbers(folder, ggufs, data):
    """Counts, lengths, types, shapes and offsets at their edges."""
    content, places = data.draw(st.sampled_from(ggufs))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 2))):
        at, size = data.draw(st.sampled_from(places))
        value = data.draw(st.sampled_from(EDGES) | st.integers(0, 40))
        content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    read_gguf(fresh(folder / "m.gguf", bytes(content)))


@fuzz(100)
@given(data=st.data())
def test_gguf_bytes(folder, ggufs, data):
    """Cut, lengthened, flipped, or with a piece of the header moved."""
    content, places = data.draw(st.sampled_from(ggufs))
    content, end = bytearray(content), places[-1][0]
    match data.draw(st.integers(0, 3)):
        case 0:
            content = content[: data.draw(st.integers(0, len(content)))]
        case 1:
            at = data.draw(st.integers(0, end))
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        case 2:
            for _ in range(data.draw(st.integers(1, 8))):
                content[data.draw(st.integers(0, end))] ^= 1 << data.draw(st.integers(0, 7))
        case _:
            a, b = data.draw(st.integers(0, end)), data.draw(st.integers(0, end))
            content[a : a + 24] = content[b : b + 24]
    read_gguf(fresh(folder / "m.gguf", bytes(content)))


@fuzz(250)
@given(data=st.data())
def test_gguf_metadata(folder, ggufs, data):
    """Values of any type and size under the keys that are read."""
    path = fresh(folder / "m.gguf", data.draw(st.sampled_from(ggufs[: len(GGUF_NAMES)]))[0])
    file = gguf.open_gguf(path)
    arch = file.meta["general.architecture"]
    known = [f"{arch}.{key}" for key in (*gguf.READ, "attention.sliding_window", "rope.freq_base_swa")]
    known += ["general.architecture", f"{arch}.attention.sliding_window_pattern", f"{arch}.unheard_of"]
    meta = dict(file.meta)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(known))
        if data.draw(st.integers(0, 4)):
            meta[key] = data.draw(values)
        else:
            meta.pop(key, None)
    found = attempt(gguf.read_config, dataclasses.replace(file, meta=meta))
    if found is not None:
        check_config(found[1])


@fuzz(150)
@given(data=st.data())
def test_gguf_tokenizer_metadata(folder, ggufs, data):
    path = fresh(folder / "m.gguf", data.draw(st.sampled_from(ggufs[len(GGUF_NAMES) :]))[0])
    meta = dict(gguf.open_gguf(path).meta)
    keys = [key for key in meta if key.startswith("tokenizer.")] + ["tokenizer.ggml.bos_token_id"]
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(keys))
        listed = meta.get(key)
        if isinstance(listed, list) and listed and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(listed) - 1))
            meta[key] = [*listed[:at], data.draw(plain), *listed[at + 1 :]]
        else:
            meta[key] = data.draw(values)
    built = attempt(gguf_tokenizer.build, meta, path)
    if built is not None:
        core, special = built
        core.decode(core.encode("a  b\n").ids)
        assert all(isinstance(token, str) for token in special.values())
