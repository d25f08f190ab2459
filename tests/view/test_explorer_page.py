"""The explorer's page in a browser: typed, clicked, by keyboard, on a phone, in the dark, and attacked."""

import dataclasses
import importlib.resources
import json
import re
import threading

import pytest

from nla_jax.view import browser as browser_lib
from nla_jax.view.explorer import engine as engine_lib
from nla_jax.view.explorer import server
from tests.helpers.explorers import NASTY, TEXT

LONGEST = 300_000  # ms until a step is given up: the machine may be busy with other things
WATCH = """
window.seen = { moved: [], broken: [] };
new PerformanceObserver((list) => {
  for (const { hadRecentInput, value, sources } of list.getEntries())
    if (!hadRecentInput) seen.moved.push([value, ...sources.map((s) => s.node?.className)]);
}).observe({ type: "layout-shift", buffered: true });
document.addEventListener("securitypolicyviolation", (e) => seen.broken.push(e.violatedDirective));
"""
PASTE = """(text) => {
  const clipboardData = new DataTransfer(), about = { clipboardData, cancelable: true };
  clipboardData.setData("text", text);
  document.querySelector("#text").dispatchEvent(new ClipboardEvent("paste", about));
}"""
CHAT = [{"role": "user", "content": "who is by the sea"}, {"role": "assistant", "content": "an old town"}]


class Staged(engine_lib.Engine):
    """The engine, with an AV whose words are known: two claims, of which the first is made at every token,
    and an ending line."""

    def __init__(self, sides):
        super().__init__(sides, max_tokens=96)
        self.go, self.nasty = threading.Event(), False
        self.go.set()

    def words(self, token: int, sample: int = 0) -> str:
        known = f"The harbour town\nFrom at{token}x{sample}\n… an old sea"
        return f"{NASTY}\n… {NASTY}" if self.nasty else known

    def explain(self, text, token, side="a", sample=0):
        words = self.words(token, sample)
        yield {"written": words.split()[0]}
        while not self.go.wait(0.01):
            yield {}
        yield {"written": words.rpartition(" ")[0]}
        yield {"done": self._judge(self._side(side), self._token(text, token), words)}

    def trust(self, text, token, words, side="a"):
        spans = [] if self.nasty else [("harbour", 4, 0.9), ("sea", len(words) - 3, 0.25)]
        yield {"done": {"claims": [{"kind": "word", "text": t, "start": at, "end": at + len(t), "trust": p}
                                   for t, at, p in spans]}}

    def _likeliest(self, side, text, pick):
        yield {}
        return [self.words(i) for i in pick]


@pytest.fixture(scope="module")
def staged(engine):
    known = {"trust": True, "figures": {"fve": [0.25, 0.2, 0.3], "fve_mean_direction": [-0.16, None, None]}}
    return Staged({k: dataclasses.replace(s, facts=s.facts | known) for k, s in engine.sides.items()})


@pytest.fixture(scope="module")
def app(staged):
    return server.app(staged, hosts=("127.0.0.1",), at_once=1)


@pytest.fixture(scope="module")
def address(app):
    with browser_lib.serve_app(app) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with browser_lib.open_browser() as found:
        yield found


@pytest.fixture
def page(browser, address, staged):
    """A function that opens a page. Whatever happens on it, it asks us alone; nothing is run or broken."""
    staged.go.set()
    staged.nasty = False
    contexts, wrong = [], []

    def open_page(hash="", width=1280, **more):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **more))
        contexts[-1].set_default_timeout(LONGEST)
        contexts[-1].add_init_script(WATCH)
        made = contexts[-1].new_page()
        made.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
        made.on("pageerror", lambda e: wrong.append(f"error: {e}"))
        made.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        made.on("request", lambda r: r.url.startswith((address, "blob:")) or wrong.append(f"asked {r.url}"))
        made.goto(f"{address}/{hash}")
        made.wait_for_function("() => document.querySelector('#banner-fve').textContent.trim()")
        return made

    yield open_page
    staged.go.set()
    for context in contexts:
        for p in context.pages:
            wrong += p.evaluate("seen.broken")
        context.close()
    assert wrong == []


def read(page, text=TEXT):
    page.fill("#text", text)
    page.click("#submit")
    page.wait_for_selector("#t0")


def chosen(page, token: int):
    """The first bundle's column, once the token is explained and its neighbours were looked at."""
    page.click(f"#t{token}")
    settled(page)
    assert f"token {token} of" in page.inner_text("#chosen") and page.locator(".side .said").count() >= 2
    return page.locator(".side").first


def edit(page, side, words: str):
    side.get_by_text("Edit the words").click()
    side.locator("textarea").fill(words)
    side.get_by_text("Reconstruct with AR").click()
    side.locator(".edit .figure").wait_for()
    settled(page)


def compare(page, token: int):
    page.click(f"#t{token}", modifiers=["Shift"])
    page.wait_for_selector("#compared table")
    settled(page)


def settled(page):
    page.wait_for_function("() => document.querySelector('#stop').classList.contains('off')")


def says(page, where: str, words: str):
    """Waits until it does."""
    check = "([place, words]) => document.querySelector(place)?.textContent.trim() === words"
    page.wait_for_function(check, arg=[where, words])


def number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def shown(x: float, digits: int = 2) -> str:
    return f"{x:.{digits}f}".replace("-", "\u2212")


def last(events):
    return [*events][-1]["done"]


def test_type_click_and_stream(page, staged):
    p = page()
    assert "can be wrong" in p.inner_text("#banner")
    assert "FVE is 0.25 (0.20 to 0.30); the mean direction scores \u22120.16" in p.inner_text("#banner")
    read(p)
    assert p.locator(".token").all_inner_texts()[3] == staged.tokens(TEXT)[3]
    settled(p)  # a short text is coloured at once
    assert p.locator(".token.above, .token.below").count() == len(staged.tokens(TEXT))
    assert p.locator("#map .up, #map .down").count() == 2 * len(staged.tokens(TEXT))
    staged.go.clear()
    p.click("#t5")
    says(p, ".side .said", "The")
    assert p.locator(".side .adds").first.inner_text() == "" and p.inner_text("#status") == "explaining"
    assert p.locator(".side .end, .side .next").count() == 0
    staged.go.set()
    side = chosen(p, 5)
    done = last(staged.explain(TEXT, 5))
    assert number(side.locator(".figure b").inner_text()) == pytest.approx(done["fve"], abs=0.006)
    adds = [number(x) for x in side.locator(".adds").all_inner_texts()]
    assert adds == pytest.approx([c["adds"] for c in [*done["claims"], done["end"]]], abs=0.006)
    assert side.locator(".end > p").inner_text() == "the text ends, as the model holds it"
    assert side.locator("blockquote").inner_text() == "an old sea"
    mean, others = done["controls"]["mean"], done["controls"]["shuffled"]
    assert f"mean direction {shown(mean)}" in side.locator(".controls").inner_text()
    assert f"other texts' words {shown(others)}" in side.locator(".controls").inner_text()
    assert side.locator(".trust").all_inner_texts() == ["harbour", "sea"]
    assert side.locator(".trust").first.get_attribute("title") == "true with probability 90 % (word)"
    marked = side.locator(".claim.recurs")
    assert "The harbour town" in marked.inner_text()
    assert marked.locator("[aria-hidden]").inner_text() == "\u21ba3"
    assert "recurs at 3 of 3 preceding tokens" in marked.locator(".again").get_attribute("title")
    side.get_by_text("Another sample").click()
    settled(p)
    assert p.locator(".side .claim").count() == 8
    assert "From at5x1" in side.inner_text()
    assert [s.inner_text().split()[0] for s in p.locator(".side h2").all()] == ["bundle", "bundle_warm"]


def listed(side, which: int) -> list[tuple[str, float]]:
    """The tokens of a list of what the target would say next, with their probabilities."""
    rows = side.locator(".next ol").nth(which).locator("li").all()
    cells = [row.locator("span").all_inner_texts() for row in rows]
    return [(json.loads(token), number(p)) for token, p in cells]


def test_what_the_frozen_target_makes_of_the_words(page, staged):
    """Its own figure heads the scores; what it would say next is shown after the text and after the words."""
    p = page()
    read(p)
    side = chosen(p, 5)
    frozen = last(staged.explain(TEXT, 5))["frozen"]
    head, note = side.locator(".scores > p").nth(0), side.locator(".scores > p").nth(1)
    assert number(head.locator("b").inner_text()) == pytest.approx(frozen["fve"], abs=0.006)
    assert f"FVE by the frozen target · cosine {shown(frozen['cos'])}" in head.inner_text()
    assert "The target was not trained to understand AV" in note.inner_text()
    assert f"Other texts' words score {shown(frozen['shuffled'])}." in note.inner_text()
    assert "FVE by AR" in side.locator(".scores > p").nth(2).inner_text()
    said = last(staged.predict(TEXT, 5, staged.words(5)))
    for n, name in enumerate(("after_text", "after_words")):
        tokens, p_N = zip(*listed(side, n), strict=True)
        assert list(tokens) == [x["token"] for x in said[name]] and len(tokens) == 5
        assert p_N == pytest.approx([x["p"] for x in said[name]], abs=0.006)
    assert f"KL from the first to the second: {shown(said['kl'])} nats" in side.locator(".next").inner_text()
    edit(p, side, "A quiet forest")
    said = last(staged.predict(TEXT, 5, "A quiet forest"))["after_words"]
    assert listed(side.locator(".edit"), 1) == [(x["token"], float(shown(x["p"]))) for x in said]
    side.locator("textarea").fill("")
    side.get_by_text("Reconstruct with AR").click()
    settled(p)
    assert side.locator(".edit .next").count() == 0 and side.locator(".next").count() == 1


def test_a_frozen_ar_is_named(page, staged, monkeypatch):
    a, b = staged.sides.values()
    b = dataclasses.replace(b, facts=b.facts | {"ar_kind": "frozen"})
    monkeypatch.setattr(staged, "sides", {"a": a, "b": b})
    p = page()
    assert "AR of bundle_warm is the frozen target, which was not trained." in p.inner_text("#banner")
    read(p)
    chosen(p, 1)
    assert ["AR: the frozen target" in h.inner_text() for h in p.locator(".side h2").all()] == [False, True]


def test_edit_steer_and_compare(page, staged):
    p = page()
    read(p)
    side = chosen(p, 4)
    edit(p, side, "A quiet forest")
    cosine = side.locator(".edit b").first.inner_text()
    done = last(staged.edit(TEXT, 4, "A quiet forest", staged.words(4)))
    assert cosine == shown(done["cos_before"], 3)
    assert number(side.locator(".edit .figure b").inner_text()) == pytest.approx(done["fve"], abs=0.006)
    side.locator("input[type=range]").fill("2.5")
    settled(p)
    wanted = last(staged.steer(TEXT, 4, "A quiet forest", staged.words(4), 2.5))["goes_on"]
    assert [d.text_content() for d in side.locator(".goes-on dd").all()] == wanted
    compare(p, 9)
    both = last(staged.compare(TEXT, (4, 9), (staged.words(4), staged.words(9))))
    assert f"activations {shown(both['cos_h'], 3)}, of AR's reconstructions" in p.inner_text("#compared")
    cells = [number(c) for c in p.locator("#compared td.n").all_inner_texts()]
    wanted = [both["own"][0], both["crossed"][1], both["crossed"][0], both["own"][1]]
    assert cells == pytest.approx([s["fve"] for s in wanted], abs=0.006)


def test_links_and_the_file(page):
    p = page()
    read(p)
    chosen(p, 3)
    compare(p, 6)
    hash = p.url[p.url.index("#") :]
    assert hash == "#text=an+old+town+by+the+sea&token=3&with=6"
    other = page(hash)
    other.wait_for_selector("#compared table")
    settled(other)
    for part in ("#chosen", "#sides", "#compared", "#tokens"):
        assert other.inner_text(part) == p.inner_text(part)
    with other.expect_download() as download:
        other.click("#export")
    saved = json.loads(download.value.path().read_text("utf-8"))
    assert saved["text"] == TEXT and len(saved["heat"]["a"]) == len(saved["tokens"])
    explained = saved["explanations"]["3"]["a"][0]
    assert explained["recurs"]["at"] == [[0, 1, 2], []] and explained["next"]["kl"] > 0
    assert explained["frozen"].keys() == {"fve", "cos", "shuffled"}
    assert explained["end"]["words"] == "an old sea"
    assert saved["compared"]["tokens"] == [3, 6]


def test_a_chat(page, staged, monkeypatch):
    p = page()
    p.check("#kind-chat")
    p.fill("#turns textarea", CHAT[0]["content"])
    p.click("#add-turn")
    p.locator("#turns textarea").nth(1).fill(CHAT[1]["content"])
    p.uncheck("#opens")
    p.click("#submit")
    p.wait_for_selector("#t0")
    settled(p)
    done = last(staged.chat(CHAT, False))
    assert p.locator(".token").count() == len(done["tokens"])
    for turn, place in zip(done["turns"], p.locator(".turn").all(), strict=True):
        assert place.get_attribute("aria-label") == turn["role"]
        assert place.locator(".token").count() == turn["end"] - turn["start"]
    chosen(p, done["turns"][1]["start"] + 1)
    assert re.search(r"2 of \d+ in turn 2 \(assistant\)", p.inner_text("#chosen"))
    chosen(p, 0)
    assert "written by the template" in p.inner_text("#chosen")
    other = page(p.url[p.url.index("#") :])
    other.wait_for_selector(".side")
    settled(other)
    assert other.inner_text("#tokens") == p.inner_text("#tokens") and not other.is_checked("#opens")
    monkeypatch.setattr(staged.sides["a"].nla.tokenizer, "chat_template", None)
    bare = page()
    bare.check("#kind-chat")
    assert "no chat template" in bare.inner_text("#no-chat") and bare.is_disabled("#submit")


def test_a_pasted_chat(page):
    p = page()
    p.evaluate(PASTE, json.dumps({"messages": CHAT}))
    assert p.is_checked("#kind-chat")
    fields = zip(p.locator("#turns select").all(), p.locator("#turns textarea").all(), strict=True)
    assert [{"role": a.input_value(), "content": b.input_value()} for a, b in fields] == CHAT


def test_keyboard_alone(page, staged):
    p = page()
    def focus(key):
        return key in p.evaluate("[document.activeElement.dataset.key, document.activeElement.id]")

    def tab_to(key):
        for _ in range(40):
            p.keyboard.press("Tab")
            if focus(key):
                return
        raise AssertionError(f"Tab does not reach {key}")

    tab_to("text")
    p.keyboard.type("by the sea")
    p.keyboard.press("Control+Enter")
    p.wait_for_selector("#t0")
    settled(p)
    tab_to("tokens")
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        p.keyboard.press(key)
    p.wait_for_selector(".side .figure b")
    settled(p)
    assert "token 2 of" in p.inner_text("#chosen") and focus("tokens")
    p.keyboard.press("m")
    settled(p)
    assert p.locator(".side .sample").count() == 4
    p.keyboard.press("ArrowRight")
    p.keyboard.press("Shift+Enter")
    p.wait_for_selector("#compared table")
    settled(p)
    p.keyboard.press("e")
    p.keyboard.press("Control+A")
    p.keyboard.type("A forest")
    p.keyboard.press("Control+Enter")
    p.wait_for_selector(".edit .figure")
    settled(p)
    telling = last(staged.telling("by the sea"))["tokens"]
    tab_to("tokens")
    for _ in range(2):
        at = int(re.search(r"token (\d+) of", p.inner_text("#chosen"))[1])
        p.keyboard.press("t")
        settled(p)
        after = next((t for t in telling if t > at), telling[0])
        assert f"token {after} of" in p.inner_text("#chosen") and focus("tokens")
    assert [int(t.get_attribute("id")[1:]) for t in p.locator(".token.telling").all()] == telling
    p.click("#t2")
    settled(p)
    tab_to("steera")
    p.keyboard.press("ArrowRight")
    settled(p)
    assert focus("steera") and "1.5" in p.inner_text(".steer label")
    wanted = last(staged.steer("by the sea", 2, "A forest", staged.words(2), 1.5))["goes_on"]
    assert [d.text_content() for d in p.locator(".goes-on dd").all()] == wanted


@pytest.mark.parametrize("where", ["text", "words", "chat", "link"])
def test_what_is_sent_or_said_is_never_run(page, staged, where):
    p = page()
    staged.nasty = True
    attack = NASTY.replace("\x00", "")
    if where == "chat":
        p = page("#chat=" + json.dumps([{"role": "user", "content": NASTY}]).replace("#", "%23"))
        p.wait_for_selector("#t0")
    elif where == "link":
        p = page("#text=" + "".join(f"%{b:02x}" for b in attack.encode()) + "&token=<img src=x>&with=2")
        p.wait_for_selector("#t0")
    else:
        read(p, attack if where == "text" else TEXT)
    side = chosen(p, 2)
    assert "<img src=x onerror=alert(1)>" in side.locator(".said .claim").first.inner_text()
    assert "<img src=x onerror=alert(1)>" in side.locator(".said blockquote").inner_text()
    if where == "words":
        edit(p, side, attack)
        assert side.locator("textarea").input_value() == attack
    compare(p, 1)
    assert p.locator("img, iframe, script:not([src='?file=begin.js']), [onerror]").count() == 0


def test_hostile_names_of_bundles(browser, staged, page, monkeypatch):
    named = {k: dataclasses.replace(s, name=NASTY, facts=s.facts | {"target": NASTY, "stage": NASTY})
             for k, s in staged.sides.items()}
    monkeypatch.setattr(staged, "sides", named)
    p = page()
    read(p)
    chosen(p, 1)
    assert "<img src=x" in p.inner_text("#what") and "<img src=x" in p.inner_text(".side h2")
    assert p.locator("img").count() == 0


def axe(page, preload: bool = True) -> list[str]:
    """What axe-core finds that is serious or worse. preload: it fetches the style sheet, which a page from
    disk may not."""
    if not page.evaluate("'axe' in window"):
        source = importlib.resources.files("axe_playwright_python") / "axe.min.js"
        page.evaluate(source.read_text("utf-8") + "; 0")
    asked = "(preload) => axe.run(document, { resultTypes: ['violations'], preload })"
    found = page.evaluate(asked, preload)["violations"]
    return [f"{v['id']}: {n['html']} {n['failureSummary']}" for v in found
            if v["impact"] in ("serious", "critical") for n in v["nodes"]]


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)])
def test_everybody_can_use_it(page, scheme, width):
    """axe-core on all that there is to see, wide, narrow, light, dark; nothing is wider than the screen."""
    p = page(width=width, color_scheme=scheme, reduced_motion="reduce")
    assert axe(p) == []
    read(p)
    settled(p)
    edit(p, chosen(p, 7), "A quiet forest")
    compare(p, 2)
    assert axe(p) == []
    assert p.evaluate("document.documentElement.scrollWidth") <= width
    p.click("#help-open")
    assert axe(p) == []
    p.keyboard.press("Escape")
    p.check("#kind-chat")
    p.fill("#turns textarea", "by the sea")
    p.click("#submit")
    p.wait_for_selector(".turn")
    settled(p)
    assert axe(p) == []
    assert p.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_jumps(page, staged, width):
    """Moves that no input explains, as the browser counts them, from an empty page to a second sample."""
    p = page(width=width)
    read(p)
    settled(p)
    for button in ("#t6", "[data-key=morea]"):
        staged.go.clear()
        p.click(button)
        p.wait_for_selector(".said.busy .claim")
        p.wait_for_timeout(600)  # half a second after an input the browser counts nothing
        staged.go.set()
        settled(p)
    moved = p.evaluate("seen.moved")
    assert sum(value for value, *_ in moved) < 0.02, moved


def test_a_line_to_wait_in_and_a_way_out(page, staged, app):
    p, other = page(), page()
    read(p)
    settled(p)
    read(other)
    settled(other)
    staged.go.clear()
    p.click("#t3")
    p.wait_for_selector(".said.busy .claim")
    third = page(f"#text={TEXT}&token=1")
    while not app.state.line._waiting:
        third.wait_for_timeout(10)
    other.click("#t2")
    says(other, "#status", "explaining: 2 before you")
    p.click("#stop")
    says(p, "#status", "stopped")
    says(other, "#status", "explaining")
    other.close()  # whoever goes away makes room
    staged.go.set()
    settled(third)
    assert "From at1x0" in third.inner_text("#sides")
    p.fill("#text", "a" * 97)
    p.click("#submit")
    p.wait_for_selector("#status.bad")
    assert "97 tokens; at most 96" in p.inner_text("#status")


def test_without_a_browser_the_line_says_what_to_do(monkeypatch):
    monkeypatch.setenv("NLA_CHROMIUM", "no-such-browser")
    with pytest.raises(browser_lib.UserError, match="no-such-browser not found; `apt-get"):
        browser_lib.chromium()
