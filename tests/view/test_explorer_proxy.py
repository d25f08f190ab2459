"""The explorer behind a proxy: under another path and name, with TLS or without, and without a last slash."""

import contextlib
import http.client
import json
import re
import threading

import pytest
from starlette.testclient import TestClient

from nla_jax.errors import UserError
from nla_jax.view import browser as browser_lib
from nla_jax.view.explorer import server
from tests.helpers.explorers import Fake
from tests.helpers.reverse_proxy import serve_under

PREFIX, NAME, SECRET = "/user/jane.doe/proxy/8000", "nla.localhost", "a-token-of-some-length"
BOTH = pytest.mark.parametrize("strips", [True, False], ids=["strips", "keeps"])
SLASH = pytest.mark.parametrize("slash", ["", "/"], ids=["bare", "slash"])


class Known:
    """An engine whose explanations are known. `go` lets it go on after the first token."""

    def __init__(self):
        self.sides, self.go = {"a": None}, threading.Event()

    def about(self):
        facts = {"name": "bundle", "stage": "rl", "target": "a target", "layer": 1, "blocks": 3, "width": 8,
                 "ar_kind": "trained", "figures": {"fve": [0.25, None, None]}, "note": ""}
        return {"sides": {"a": facts}, "max_tokens": 64, "chat": False}

    def read(self, text):
        yield {"done": {"tokens": text.split()}}

    def heat(self, text, side, start):
        for i, word in enumerate(text.split()):
            while i and not self.go.wait(0.01):
                yield {}
            yield {"heat": [{"token": i, "words": f"about {word}", "fve": 0.5, "cos": 0.75, "ok": True}]}


@contextlib.contextmanager
def proxied(engine, strips: bool, prefix: str = PREFIX, **options):
    made = server.app(engine, hosts=(*server.LOOPBACK, NAME), **options)
    with (browser_lib.serve_app(made) as address,
          serve_under(address, prefix, strips=strips) as port):
        yield port


def ask(port: int, path: str, body: dict | None = None, host: str = NAME, **headers):
    """(status, headers, body) of an answer that came through the proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        given = {"host": host, **({} if body is None else {"content-type": "application/json"}), **headers}
        connection.request("POST" if data else "GET", path, data, given)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()


@pytest.mark.parametrize("path, local", [
    ("/", "/"), ("//", "/"), ("/nla", "/"), ("/nla/", "/"), (PREFIX, "/"), (f"{PREFIX}/", "/"),
    ("/v1.2", "/"), ("/static/", "/"), ("/api/", "/"),
    ("/static/app.js", "/static/app.js"), (f"{PREFIX}/static/app.js", "/static/app.js"),
    ("//static/app.js", "/static/app.js"), ("/static/static/app.js", "/static/app.js"),
    ("/api/explain", "/api/explain"), (f"{PREFIX}/api/explain", "/api/explain"),
    ("/api/api/about", "/api/about"), (f"{PREFIX}/openapi.json", "/openapi.json"),
    ("/favicon.ico", "/favicon.ico"), ("/static/../server.py", "/static/../server.py"),
])
def test_the_path_of_a_proxy_is_cut_off(path, local):
    assert server.local_path(path) == local


@pytest.mark.parametrize("given, name", [
    ("nla.example.org", "nla.example.org"), ("NLA.Example.ORG.", "nla.example.org"), ("my_host", "my_host"),
    ("10.0.0.7", "10.0.0.7"), ("[fe80::1]", "fe80::1"), ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
    *((bad, None) for bad in ("", "https://nla.example.org", "nla.example.org:443", "nla.example.org/nla",
                              "*", "a b", "münchen.de", ".org", "a..b")),
])
def test_a_host_is_named_without_scheme_port_and_path(given, name):
    if name:
        assert server.host_name(given) == name
    else:
        with pytest.raises(UserError, match="--allow-host .*a host's name alone"):
            server.host_name(given)


def test_a_refused_name_is_told_the_option_that_allows_it():
    with TestClient(server.app(Fake(), hosts=("localhost", NAME)), base_url="http://localhost") as client:
        for host in (NAME, NAME.upper(), f"{NAME}.", f"{NAME}:8443", "localhost"):
            assert client.get("/", headers={"host": host}).status_code == 200
        for host, shown in (("evil.test", "evil.test"), (f"x.{NAME}", f"x.{NAME}"), ("<b>", "NAME"),
                            ("a" * 300, "NAME"), ("evil.test:99999", "evil.test")):
            answer = client.get("/", headers={"host": host})
            assert answer.status_code == 421 and f"start it with --allow-host {shown} " in answer.text
            assert answer.headers["content-type"].startswith("text/plain")


@BOTH
def test_files_and_answers_come_through_a_proxy(strips):
    with proxied(Fake(), strips) as port:
        for path in (PREFIX, f"{PREFIX}/"):
            status, headers, page = ask(port, path)
            links = re.findall(r'(?:src|href)="([^"#]+)"', page)
            assert (status, len(links)) == (200, 3) and all(x.startswith("?file=") for x in links)
            assert all(ask(port, path + x)[0] == 200 for x in links)
            assert "set-cookie" not in headers
        for name in server.FILES:
            status, headers, text = ask(port, f"{PREFIX}/static/{name}")
            assert status == 200 and headers["content-type"].startswith(server.FILES[name])
            assert text == ask(port, f"{PREFIX}?file={name}")[2]
        assert ask(port, f"{PREFIX}?file=server.py")[0] == ask(port, f"{PREFIX}/static/x.js")[0] == 404
        status, headers, text = ask(port, f"{PREFIX}/api/read", {"text": "a"})
        assert (status, json.loads(text.splitlines()[-1])) == (200, {"done": "a"})
        assert headers["x-accel-buffering"] == "no"  # nginx streams it without a setting
        described = json.loads(ask(port, f"{PREFIX}/openapi.json")[2])
        assert described["servers"] == [{"url": "."}]
        assert ask(port, f"{PREFIX}/", host="evil.test")[0] == 421


@BOTH
@SLASH
def test_a_token_through_a_proxy_stays_on_its_own_path(strips, slash):
    """Other users' servers have the same host, and a proxy that asks for a password sends a header too."""
    with proxied(Fake(), strips, token=SECRET) as port:
        for path in (PREFIX, f"{PREFIX}/?token=wrong", f"{PREFIX}?file=app.css", f"{PREFIX}/static/app.js"):
            assert ask(port, path)[0] == 401
        status, headers, page = ask(port, f"{PREFIX}{slash}?token={SECRET}")
        cookie, *rest = headers["set-cookie"].split("; ")
        assert (status, "begin.js" in page, "location" in headers) == (200, True, False)
        assert {r.lower() for r in rest} == {"httponly", "samesite=strict", "secure"}
        name, value = cookie.split("=")
        assert name.startswith("nla_token_") and value == SECRET
        for header in ({}, {"authorization": "Basic eDp5"}):
            assert ask(port, f"{PREFIX}?file=app.css", cookie=cookie, **header)[0] == 200
            assert ask(port, f"{PREFIX}/api/read", {"text": "a"}, cookie=cookie, **header)[0] == 200
            assert ask(port, f"{PREFIX}/", cookie=f"{name}=wrong", **header)[0] == 401


def test_two_servers_of_one_host_have_cookies_of_their_own():
    cookies = []
    for token in (SECRET, SECRET[::-1]):
        with TestClient(server.app(Fake(), token=token), base_url="http://localhost") as client:
            cookies += client.get(f"/?token={token}").cookies.items()
    assert len(dict(cookies)) == 2
    with TestClient(server.app(Fake(), token=SECRET), base_url="http://localhost") as client:
        both = "; ".join(f"{k}={v}" for k, v in cookies)
        assert client.get("/", headers={"cookie": both}).status_code == 200
    assert "secure" not in client.get(f"/?token={SECRET}").headers["set-cookie"].lower()  # without TLS


@BOTH
@SLASH
def test_the_page_in_a_browser_under_a_path_of_a_proxy(browser, strips, slash):
    known, wrong, asked = Known(), [], []
    with proxied(known, strips, token=SECRET) as port:
        start = f"http://{NAME}:{port}{PREFIX}"
        context = browser.new_context()
        context.set_default_timeout(300_000)
        page = context.new_page()
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(f"{start}{slash}?who=me&token={SECRET}#text=an+old+town")
        page.wait_for_function("() => document.querySelector('#t0')?.title")  # while the answer is under way
        assert page.locator(".token").all_inner_texts() == ["an", "old", "town"]
        assert page.get_attribute("#t1", "title") == ""
        known.go.set()
        page.wait_for_function("() => document.querySelector('#t2')?.title")
        assert page.get_attribute("#t2", "title") == "FVE 0.50: about town"
        style = page.evaluate("getComputedStyle(document.querySelector('#tokens')).whiteSpace")
        assert style == "pre-wrap"
        assert page.url == f"{start}/?who=me#text=an+old+town"
        page.reload()
        page.wait_for_function("() => document.querySelector('#t2')?.title")
        page.goto("about:blank")
        context.close()
    assert wrong == [] and all(url.startswith(start) for url in asked)


def test_a_page_whose_scripts_do_not_arrive_is_not_blank(browser):
    with proxied(Known(), True) as port:
        context = browser.new_context()
        page = context.new_page()
        page.route("**/static/app.js", lambda route: route.abort())
        page.goto(f"http://{NAME}:{port}{PREFIX}")
        page.wait_for_function("() => document.body.classList.contains('known')")
        assert page.inner_text("#what").startswith("the page's scripts cannot be loaded")
        context.close()


@pytest.fixture(scope="module")
def browser():
    with browser_lib.open_browser() as found:
        yield found
