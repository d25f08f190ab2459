"""Proxies and certificates of the environment: what is wrong is named, and loopback needs neither."""

import asyncio
import os

import pytest

from nla_jax.errors import UserError
from nla_jax.providers import clients, scheduler
from nla_jax.util import distributed, network
from tests.helpers import http_models
from tests.helpers.llm_server import Server

FAR = "https://models.invalid/v1"
NAMES = [*network.PROXIES, *map(str.lower, network.PROXIES), *network.CERTIFICATES, "NO_PROXY", "no_proxy"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def ask(kind: str, url: str) -> str:
    """The text of an answer; one try."""
    e = clients.Endpoint(kind, "tiny", url, timeout=5.0)

    async def once():
        async with clients.open_asker(e) as asked:
            wanted = scheduler.Scheduler(None, scheduler.Settings(retries=0), e.model)
            return await wanted.patient(lambda: asked("<text>\nA ship sails.\n</text>"))

    return asyncio.run(once()).text


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "nonsense://x", "socks5://127.0.0.1:9"])
def test_loopback_is_asked_without_a_proxy(monkeypatch, kind, proxy):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with Server() as server:
        assert "begins with A" in ask(kind, server.url if kind == "openai" else server.root)


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("name,value,message", [
    ("HTTPS_PROXY", "nonsense://me:sesame@x", r"no request to .*HTTPS_PROXY=nonsense://\[password\]@x"),
    ("ALL_PROXY", "socks5://127.0.0.1:9", "ALL_PROXY=socks5://127.0.0.1:9"),
    ("SSL_CERT_FILE", "/no/such/file", r"SSL_CERT_FILE=/no/such/file \(which does not exist\)"),
    ("HTTPS_PROXY", "http://me:sesame@127.0.0.1:9",
     r"through HTTPS_PROXY=http://\[password\]@127.0.0.1:9 .*correct or unset the proxy"),
    ("all_proxy", "127.0.0.1:9", "through all_proxy=127.0.0.1:9 .*correct or unset the proxy"),
])
def test_a_wrong_variable_is_named(monkeypatch, kind, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        ask(kind, FAR)
    assert "sesame" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_certificates_that_holds_none(monkeypatch, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(UserError, match=f"no request to .*SSL_CERT_FILE={tmp_path}/ca.pem: correct or unset"):
        ask("openai", FAR)


def test_a_proxy_that_asks_for_a_password(monkeypatch):
    e = http_models.endpoint(type("There", (), {"url": "http://models.invalid/v1"}))
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    error = clients.error_of_status(e, 407, {}, "")
    assert "the proxy asks for a password; the environment sets http_proxy=http://proxy:3128" in str(error)


def test_hosts_that_are_this_machine():
    here = ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "a.localhost")
    elsewhere = ("10.0.0.1", "0.0.0.0", "localhost.example", "example.com", "")
    assert all(map(network.is_loopback, here)) and not any(map(network.is_loopback, elsewhere))


def test_the_proxy_of_an_address(monkeypatch):
    assert network.proxy_of(FAR) == network.hint() == ""
    assert network.hint("no such host", {"PIP_CERT": "/dev/null"}) == ""
    assert "sets PIP_CERT=/dev/null: correct" in network.hint("SSLError: bad", {"PIP_CERT": "/dev/null"})
    monkeypatch.setenv("HTTP_PROXY", "http://a:1")
    monkeypatch.setenv("ALL_PROXY", "http://b:2")
    assert network.proxy_of("http://models.invalid") == "HTTP_PROXY=http://a:1"
    assert network.proxy_of(FAR) == "ALL_PROXY=http://b:2"
    monkeypatch.setenv("NO_PROXY", "models.invalid")
    assert network.proxy_of(FAR) == network.proxy_of("http://localhost:8") == ""


def test_processes_of_one_machine_meet_without_a_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "inside.example")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    called = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **how: called.append(how))
    for name, value in zip(("COORDINATOR", "PROCESSES", "PROCESS"), ("far.example:1", "2", "0"), strict=True):
        monkeypatch.setenv(f"NLA_{name}", value)
    distributed.join()
    assert "no_grpc_proxy" not in os.environ
    monkeypatch.setenv("NLA_COORDINATOR", "127.0.0.1:1")
    distributed.join()
    assert "no_grpc_proxy" not in os.environ  # there is no proxy
    monkeypatch.setenv("http_proxy", "http://a:1")
    distributed.join()
    assert os.environ.pop("no_grpc_proxy") == "inside.example,127.0.0.1" and len(called) == 3
