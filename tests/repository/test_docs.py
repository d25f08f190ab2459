"""The documentation site builds strictly, without a network, and nothing in it is loaded from elsewhere."""

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


class Seen(html.parser.HTMLParser):
    """What a page loads, its text by tag, and where its links go."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded, self.links, self.texts, self._open = [], [], [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loaded += [found["src"]] if found.get("src") else []
        if "href" in found:
            (self.links if tag == "a" else self.loaded).append(found["href"])
        if tag in ("p", "td"):
            self._open.append(tag)
            self.texts.append((tag, ""))

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    # A proxy that nobody listens at: whoever wants the network fails.
    nowhere = "http://127.0.0.1:9"
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": nowhere, "http_proxy": nowhere}
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return {p.relative_to(out).as_posix().removesuffix("index.html"): Seen(p) for p in out.rglob("*.html")}


def test_every_page_is_there(site):
    sources = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    pages = {re.sub(r"(^|/)index/$", r"\1", f"{s.as_posix()}/") for s in sources}
    assert pages == set(site) - {"404.html"}


def test_nothing_is_loaded_from_elsewhere(site):
    for name, page in site.items():
        assert [x for x in page.loaded if "//" in x] == [], name


def test_markdown_is_read_as_on_github(site):
    texts = [(name, text) for name, page in site.items() for _, text in page.texts if name != "api/configs/"]
    odd = [(name, text) for name, text in texts
           if re.search(r"^([-*|] |\d+\. |    )|\\\||\]\(|```", text, re.M)]
    assert odd == []


def test_links_out_of_docs_do_not_dangle(site):
    """While mkdocs.yml names no repository they are text."""
    assert "repo_url:" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [x for page in site.values() for x in page.links if ".py" in x and "://" not in x] == []
    assert any("verdict.py" in text for _, text in site["grounding/"].texts)


@pytest.mark.parametrize(
    "page, names",
    [
        ("api/library/", "nla_jax.api.load nla_jax.api.NLA round_trip nla_jax.pipeline.stages.run"),
        ("api/models/", "nla_jax.target nla_jax.verbalizer nla_jax.reconstructor write reconstruct capture"),
        ("api/steps/", "nla_jax.steps rl rollout warm_start_av warm_start_ar Spec RLState"),
        ("api/data/", "nla_jax.data.store nla_jax.data.corpora open_corpus"),
        ("api/evaluate/", "nla_jax.pipeline.grounding evaluate_bundle"),
        ("api/lm/", "nla_jax.lm.model forward LMConfig"),
    ],
)
def test_the_reference_is_made_from_docstrings(site, page, names):
    anchors = {x.rpartition("#")[2].rpartition(".")[2] for x in site[page].links if "#" in x}
    assert {n.rpartition(".")[2] for n in names.split()} <= anchors
