"""Places that do not exist or cannot be written, and a user without a home: one line, before any work."""

import io
import os
import pwd
import sys

import pytest

from nla_jax import cli
from nla_jax.cli import results
from nla_jax.errors import UserError
from nla_jax.lm import weights
from nla_jax.util import paths, utf8, writable
from tests.helpers import world

CLOSED = "/proc/nla/run"  # nobody can make a file there, root neither


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user id without an entry in the list of users, and without HOME, in an empty directory."""
    for name in ("HOME", "NLA_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_home(nobody, monkeypatch):
    for work in (paths.cache_dir, paths.programs_dir, lambda: weights.resolve("~/model")):
        with pytest.raises(UserError, match="there is no home directory .*set HOME.*NLA_CACHE") as caught:
            work()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no home directory.*or set HF_HOME"):
        weights.resolve("some/model")
    assert os.listdir(nobody) == []  # no directory called ~
    monkeypatch.setenv("NLA_CACHE", str(nobody))
    assert paths.cache_dir() == nobody
    monkeypatch.setenv("HOME", "/there/me")
    paths.require_home("HF_HOME")
    assert paths.path("~/x").as_posix() == "/there/me/x"


def test_a_command_without_a_home_does_its_work(nobody, capsys):
    (nobody / "empty.md").write_text("")
    assert world.nla("results", nobody, "--out", nobody / "empty.md") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("compiled programs are not kept for the next start: ~/.cache: there is no home")
    assert "no summary.json" in second


@pytest.mark.parametrize("cache", [CLOSED, "FILE"])
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, capsys, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NLA_CACHE", cache.replace("FILE", str(tmp_path / "file")))
    cli._use_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept for the next start: cannot write")


def test_a_directory_that_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    writable.check_directory(tmp_path / "a" / "b")
    writable.check_directory("gs://bucket/run")
    writable.check_outputs("", tmp_path / "out.json", tmp_path / "file")
    writable.check_output(tmp_path / "a" / "out.json", makes_directory=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (CLOSED, tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"cannot write {place} .*choose another place"):
            writable.check_directory(place)
    with pytest.raises(UserError, match="there is no directory .*create it first"):
        writable.check_output(tmp_path / "a" / "out.json")
    with pytest.raises(UserError, match="is a directory; name a file"):
        writable.check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write whatever its permissions are
    with pytest.raises(UserError, match="file; choose another name, or change its permissions"):
        writable.check_output(tmp_path / "file")


OUTPUTS = [
    ("evaluate", "--bundle", "none", "--json", f"{CLOSED}/x.json"),
    ("explain", "--bundle", "none", "--text", "x", "--svg", f"{CLOSED}/x.svg"),
    ("results", "none", "--out", f"{CLOSED}/x.md"),
    ("results", "none", "none", "--out", f"{CLOSED}/x.md"),
    ("report", "none", "--out", f"{CLOSED}/x.html"),
    ("data", "stats", "--store", "none", "--json", f"{CLOSED}/x.json"),
    ("data", "explain", "--corpus", "file:none", "--out", f"{CLOSED}/x.jsonl"),
    ("data", "export", "--store", "none", "--split", "warm", "--stage", "base", "--out", "/proc/x.parquet"),
    ("data", "import", "none", "--out", CLOSED),
    ("import", "--av", "none", "--ar", "none", "--out", CLOSED),
    ("export", "--bundle", "none", "--out", CLOSED),
    ("pack", "--bundle", "none", "--out", CLOSED),
]


@pytest.mark.parametrize("argv", OUTPUTS, ids=lambda argv: " ".join(argv[:2]))
def test_an_output_is_checked_before_the_work(monkeypatch, capsys, argv):
    """Nothing that these commands read exists: the output is looked at first."""
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    assert world.nla(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nla: ") and "/proc" in line
    assert "cannot write" in line or "there is no directory" in line


def test_a_terminal_that_is_not_utf8(monkeypatch, tmp_path):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(results, "_results", lambda *_: print("… é \udcff"))
    assert world.nla("results", tmp_path, "--out", tmp_path / "x.md") == 0
    shown.flush()
    assert shown.buffer.getvalue() == rb"\u2026 \xe9 \udcff" + b"\n"


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "card.md"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"card\.md: not UTF-8 text \(byte 2\): convert it first, .*iconv"):
        utf8.read_text(path)
    path.write_bytes("\ufeffnaïve".encode())
    assert utf8.read_text(path) == "naïve"


@pytest.mark.parametrize("text,at", [
    (b"", None), ("é€😀".encode(), None), (b"ab\xe9cd", 2), ("é".encode() + b"\xff", 2),
    (b"ab\xf0\x9f\x98", 2), ("😀".encode() + b"\xf0\x9fa", 4),
])
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_the_first_byte_that_is_not_utf8(text, at, step):
    assert utf8.first_bad_byte(text[i : i + step] for i in range(0, len(text), step)) == at


@pytest.mark.parametrize("text,message", [
    ("a\udcffb", r"not valid Unicode \(character 1\)"), (b"ab", "must be a string; got bytes"),
    (None, "must be a string; got NoneType"),
])
def test_text_that_no_tokenizer_reads(text, message):
    with pytest.raises(UserError, match=message):
        utf8.check(text)
