"""The explorer as a folder: opened from disk and from a web host, with the network off."""

import functools
import http.server
import json
import threading

import pytest

from nla_jax.view import browser as browser_lib
from nla_jax.view.explorer import static_site
from tests.helpers import world
from tests.helpers.explorers import NASTY, TEXT, last
from tests.view.test_explorer_page import CHAT, LONGEST, WATCH, axe, number, settled, shown

SHORT = "by the sea"


@pytest.fixture(scope="module")
def site(engine, tmp_path_factory):
    """A copy of two bundles with three texts: one plain, one hostile, one chat."""
    out = tmp_path_factory.mktemp("static") / "copy"
    nasty = NASTY.replace("\x00", "")
    return static_site.write(engine, [SHORT, nasty, CHAT[:1]], out, samples=1).parent


@pytest.fixture(scope="module")
def hosted(site):
    """The folder under a path of a plain web host."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site.parent)))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/{site.name}/index.html"
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(scope="module")
def browser():
    with browser_lib.open_browser() as found:
        yield found


@pytest.fixture
def page(browser, site):
    """A function that opens the copy from disk in a browser that is offline. Nothing outside the folder is
    asked for, and nothing is broken."""
    contexts, wrong = [], []

    def open_page(hash="", width=1280, address=None, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        context.set_default_timeout(LONGEST)
        context.set_offline(address is None)
        context.add_init_script(WATCH)
        made = context.new_page()
        ours = address.rpartition("/")[0] if address else site.as_uri()
        made.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
        made.on("pageerror", lambda e: wrong.append(f"error: {e}"))
        made.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        made.on("request", lambda r: r.url.startswith((ours, "blob:")) or wrong.append(f"asked {r.url}"))
        made.goto((address or (site / "index.html").as_uri()) + hash)
        made.wait_for_selector("#t0")
        settled(made)
        return made

    yield open_page
    for context in contexts:
        for p in context.pages:
            wrong += p.evaluate("seen.broken")
        context.close()
    assert wrong == []


def same_as_engine(p, engine):
    """The first text is open; its third token is as the engine explains it, with two bundles and samples."""
    assert p.locator(".token.above, .token.below").count() == len(engine.tokens(SHORT))
    p.click("#t2")
    settled(p)
    for side, box in zip(engine.sides, p.locator(".side").all(), strict=True):
        done = last(engine.explain(SHORT, 2, side))
        assert number(box.locator(".figure b").first.inner_text()) == pytest.approx(done["fve"], abs=0.006)
        frozen = box.locator(".scores > p.frozen b").first.inner_text()
        assert number(frozen) == pytest.approx(done["frozen"]["fve"], abs=0.006)
    p.locator("[data-key=morea]").click()
    settled(p)
    first = p.locator(".side").first
    done = last(engine.explain(SHORT, 2, "a", 1))
    assert number(first.locator(".figure b").nth(1).inner_text()) == pytest.approx(done["fve"], abs=0.006)
    assert p.is_disabled("[data-key=morea]")  # there is no third
    if done["ok"]:
        said = last(engine.predict(SHORT, 2, done["words"]))
        assert f"{shown(said['kl'])} nats" in first.locator(".sample").nth(1).inner_text()
    p.click("#t4", modifiers=["Shift"])
    p.wait_for_selector("#compared table")
    settled(p)
    words = tuple(last(engine.explain(SHORT, i))["words"] for i in (2, 4))
    both = last(engine.compare(SHORT, (2, 4), words))
    assert f"activations {shown(both['cos_h'], 3)}" in p.inner_text("#compared")
    cells = [number(c) for c in p.locator("#compared td.n").all_inner_texts()]
    wanted = [both["own"][0], both["crossed"][1], both["crossed"][0], both["own"][1]]
    assert cells == pytest.approx([s["fve"] for s in wanted], abs=0.006)


def test_from_disk_with_the_network_off(page, engine):
    p = page()
    assert "copy without a model" in p.inner_text("#given-note")
    assert not p.is_visible("#text") and not p.is_visible("#kind-chat")
    assert p.locator("#texts option").count() == 3
    same_as_engine(p, engine)
    assert p.get_by_text("Edit the words").count() == 0
    other = page(p.url[p.url.index("#") :])
    other.wait_for_selector("#compared table")
    settled(other)
    for part in ("#chosen", "#compared", "#tokens"):
        assert other.inner_text(part) == p.inner_text(part)
    with p.expect_download() as download:
        p.click("#export")
    assert json.loads(download.value.path().read_text("utf-8"))["text"] == SHORT


def test_from_a_web_host(page, hosted, engine):
    same_as_engine(page(address=hosted), engine)


def test_other_texts(page, engine):
    p = page()
    p.select_option("#texts", "1")
    p.wait_for_function("() => document.querySelector('#tokens').textContent.includes('onerror')")
    settled(p)
    p.click("#t1")
    settled(p)
    assert p.locator("img, iframe, [onerror]").count() == 0
    p.select_option("#texts", "2")
    p.wait_for_selector(".turn")
    settled(p)
    turn = last(engine.chat(tuple(CHAT[:1])))["turns"][0]
    assert p.locator(".turn .token").count() == turn["end"] - turn["start"]
    p.evaluate("location.hash = '#text=another'")
    p.wait_for_selector("#status.bad")
    assert "choose one of its texts" in p.inner_text("#status") and not p.is_visible("#text")


def test_keyboard_and_phone(page):
    for width, scheme in ((360, "dark"), (1280, "light")):
        p = page(width=width, color_scheme=scheme, reduced_motion="reduce")
        for _ in range(20):
            p.keyboard.press("Tab")
            if p.evaluate("document.activeElement.id") == "tokens":
                break
        for key in ("Home", "ArrowRight", "Enter"):
            p.keyboard.press(key)
        p.wait_for_selector(".side .figure b")
        settled(p)
        assert "token 1 of" in p.inner_text("#chosen")
        p.keyboard.press("m")
        settled(p)
        assert p.locator(".side .sample").count() == 4
        p.click("#telling")
        settled(p)
        marked = p.locator(".token.telling")
        assert marked.count() == min(5, p.locator(".token").count())
        assert "nats" in marked.first.get_attribute("title")
        p.focus("#tokens")
        p.keyboard.press("e")  # nothing
        p.keyboard.press("ArrowRight")
        p.keyboard.press("Shift+Enter")
        p.wait_for_selector("#compared table")
        settled(p)
        assert p.evaluate("document.documentElement.scrollWidth") <= width
        assert axe(p, preload=False) == []
        p.click("#help-open")
        assert "edit the explanation" not in p.inner_text("#help")


def test_a_stopped_copy_goes_on(engine, tmp_path, monkeypatch):
    """Texts that were written are kept; other texts, settings or bundles are not taken for them."""
    out, asked = tmp_path / "copy", []
    whole = static_site.static_data.explain_text

    def watched(engine, text, *args):
        asked.append(text)
        if text == "b" and asked.count("b") == 1:
            raise KeyboardInterrupt
        return whole(engine, text, *args)

    monkeypatch.setattr(static_site.static_data, "explain_text", watched)
    with pytest.raises(KeyboardInterrupt):
        static_site.write(engine, ["a", "b"], out)
    assert not (out / static_site.MARK).exists()
    static_site.write(engine, ["a", "b"], out)
    assert asked == ["a", "b", "b"]
    before = {p.name: p.read_bytes() for p in out.rglob("*.js")}
    static_site.write(engine, ["a", "b"], out)
    assert asked == ["a", "b", "b"] and before == {p.name: p.read_bytes() for p in out.rglob("*.js")}
    static_site.write(engine, ["b"], out)
    assert asked == ["a", "b", "b", "b"] and not (out / "data" / "text-1.js").exists()


def test_texts_of_files_and_of_the_run(finished, engine, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n", "utf-8")
    assert static_site.read_inputs(["zero"], str(tmp_path / "a.txt")) == ["zero", "one", "two words"]
    lines = [{"text": "one"}, {"messages": CHAT}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert static_site.read_inputs([], str(tmp_path / "a.jsonl")) == ["one", CHAT]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": "one"}', "utf-8")
    with pytest.raises(static_site.UserError, match="line 2 is no"):
        static_site.read_inputs([], str(tmp_path / "b.jsonl"))
    found = static_site.heldout_texts(finished / "run" / "bundle", 3)
    assert len(set(found)) == 3
    assert static_site.heldout_texts(tmp_path, 3) == []
    assert engine.tokens(static_site.shorten(engine, found[0], 5)) == engine.tokens(found[0])[:5]


def test_the_command(finished, quick, tmp_path, capsys):
    bundle, out = finished / "run" / "bundle", tmp_path / "copy"
    assert world.nla("export", "--bundle", bundle) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert world.nla("export", "--bundle", bundle, "--out", out, "--text", "a") == 2
    assert world.nla("export", "--bundle", tmp_path, "--static", out) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("")
    assert world.nla("export", "--bundle", bundle, "--static", tmp_path / "other") == 2
    assert "has other files" in capsys.readouterr().err
    status = world.nla("export", "--bundle", bundle, "--static", out, "--text", TEXT, "--documents", 0)
    assert status == 0 and f"page: {out / 'index.html'}" in capsys.readouterr().out
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {"index.html", "app.css", "icon.svg", "page.js", "data/index.js", "data/text-0.js"}
    for name in names - {"data/text-0.js"}:
        text = (out / name).read_text("utf-8")
        assert not static_site.re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not static_site.re.search(r"^(import|export) ", text, static_site.re.M), name
