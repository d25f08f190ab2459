"""Write the explorer as a folder of files for any web host, or to open from disk (`nla export --static`).

    DIR/index.html, app.css, icon.svg    the page
    DIR/page.js                          its scripts in one: a page from disk may not load modules
    DIR/data/index.js                    facts of the bundles and the list of texts, written last
    DIR/data/text-N.js                   everything about one text, loaded when the text is chosen

Every link is relative, and nothing is loaded from elsewhere.
"""

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable
from pathlib import Path

import nla_jax
from nla_jax import bundle
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.util import paths, utf8, writable
from nla_jax.util.progress import Progress
from nla_jax.view.explorer import static_data
from nla_jax.view.explorer.api_schema import MOST_TEXT
from nla_jax.view.explorer.engine import Engine

MARK = "data/index.js"
HOLDS = {"index.html", "app.css", "icon.svg", "page.js", "data"}
# In the order of their imports; `given` takes the place of `api`.
MODULES = {"draw": "draw.js", "chat": "chat.js", "links": "links.js", "api": "given.js", "panel": "panel.js",
           "app": "app.js"}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; "
          "form-action 'none'")
_IMPORT = re.compile(r'^import (?:\* as (\w+)|(\{[^}]*\})) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|const) (\w+)", re.MULTILINE)


def read_inputs(texts: Iterable[str], file: str) -> list[str | list[dict]]:
    """Return the texts, then those of a file: .txt has one text a line; each line of .jsonl has "text", or
    the "messages" of a chat. Raises UserError for a file that is not so."""
    out: list[str | list[dict]] = list(texts)
    if not file:
        return out
    lines = [x for x in utf8.read_text(file).split("\n") if x.strip()]
    if not file.endswith(".jsonl"):
        return out + lines
    for n, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            value = found["text"] if "text" in found else found["messages"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{file}: line {n} is no {{"text": …}} and no {{"messages": […]}}') from None
        if not isinstance(value, str | list):
            raise UserError(f"{file}: line {n}: text must be a string, messages a list")
        out.append(value)
    return out


def heldout_texts(directory: str | Path, most: int) -> list[str]:
    """Return the texts of at most `most` held-out documents of the bundle's run; [] without its store."""
    place = paths.absolute(directory).parent / "data"
    if not most or not store.is_complete(place) or "heldout" not in store.read_meta(place)["splits"]:
        return []
    found = store.load_columns(place, "heldout", ["doc_id", "text"])
    longest: dict[str, str] = {}
    for doc, text in zip(found["doc_id"], found["text"], strict=True):
        longest[doc] = max(longest.get(doc, ""), text, key=len)
    return [t for t in longest.values() if t][:most]


def shorten(engine: Engine, text: str, most: int) -> str:
    """Return the first `most` tokens of a text. Their activations are those of the whole text."""
    _, spans = tok_lib.offsets(engine.sides["a"].nla.tokenizer, text)
    return text if len(spans) <= most else text[: spans[most - 1][1]]


def check_place(out: str | Path) -> Path:
    """Raise UserError unless `out` is new, empty, or a static copy, perhaps an unfinished one."""
    out = paths.path(out)
    writable.check_directory(out)
    if out.exists() and not {p.name.removesuffix(".part") for p in out.iterdir()} <= HOLDS:
        raise UserError(f"{out} has other files; choose another --static, or delete it")
    return out


def write(engine: Engine, inputs: list[str | list[dict]], out: str | Path, samples: int = 0) -> Path:
    """Write the copy and return its index.html. A text that a stopped run has written is kept.

    Args:
      inputs: texts, or messages of chats. samples: explanations at temperature 1 for each token.

    Raises UserError for a text or chat that the engine does not read, before any is explained, and as
    `check_place`."""
    out = check_place(out)
    read = [_read(engine, given) for given in inputs]
    read = list({text: (text, turns) for text, turns in read}.values())
    (out / "data").mkdir(parents=True, exist_ok=True)
    paths.write(out / "page.js", page_script())
    for name in ("app.css", "icon.svg"):
        paths.write(out / name, _file(name))
    paths.write(out / "index.html", page())
    total = len(engine.sides) * sum(len(engine.tokens(text)) for text, _ in read)
    with Progress("explain", total, unit="tokens") as bar:
        for n, (text, turns) in enumerate(read):
            place, key = out / "data" / f"text-{n}.js", _key(engine, text, turns, samples)
            if place.is_file() and place.read_text("utf-8").startswith(key):
                bar.advance(len(engine.sides) * len(engine.tokens(text)))
                continue
            found = static_data.explain_text(engine, text, turns, samples, lambda: bar.advance(1))
            paths.write(place, f"{key}\nnlaData.texts[{n}] = {json.dumps(found)};\n")
    for place in (out / "data").glob("text-*.js"):
        if int(re.sub(r"\D", "", place.name)) >= len(read):
            place.unlink()
    index = {**engine.about(), "chat": False, "samples": samples, "given": _note(len(read)),
             "texts": [{"text": text} for text, _ in read]}
    paths.write(out / MARK, f"window.nlaData = {json.dumps({'index': index, 'texts': {}})};\n")
    return out / "index.html"


def _read(engine: Engine, given: str | list[dict]) -> tuple[str, list[dict]]:
    """Return a text and the turns of a chat, checked. Raises UserError."""
    if isinstance(given, str):
        utf8.check(given, "a text")
        if len(given) > MOST_TEXT:
            raise UserError(f"a text has {len(given)} characters; at most {MOST_TEXT} are read here")
        engine.tokens(given)
        return given, []
    found = next(engine.chat(tuple(_message(m) for m in given)))["done"]
    return found["text"], found["turns"]


def _message(m) -> dict:
    if not isinstance(m, dict) or not all(isinstance(m.get(k), str) for k in ("role", "content")):
        raise UserError('a message of a chat must be {"role": …, "content": …}')
    return {k: m[k] for k in ("role", "content")}


def _note(n: int) -> str:
    texts = "This text was" if n == 1 else f"These {n} texts were"
    return (f"This page is a copy without a model, written by nla_jax {nla_jax.__version__}. {texts} "
            "explained in advance. New texts, other words and steering need `nla serve`.")


def _key(engine: Engine, text: str, turns: list[dict], samples: int) -> str:
    """Return a comment that names everything that a text's file depends on."""
    sides = [(s.name, s.nla.meta.get("created_at"), s.nla.meta.get("files")) for s in engine.sides.values()]
    made = json.dumps([nla_jax.__version__, text, turns, samples, sides, bundle.SCHEMA], sort_keys=True)
    return f"// {hashlib.sha256(made.encode()).hexdigest()}"


def page() -> str:
    """Return index.html: the explorer's own, with links to the folder's files."""
    text, charset = _file("index.html"), '<meta charset="utf-8">'
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    text = text.replace(charset, f"{charset}\n{policy}")
    scripts = "".join(f'<script src="{name}" defer></script>\n' for name in (MARK, "page.js")).rstrip()
    text = text.replace('<script type="module" src="?file=begin.js"></script>', scripts)
    return text.replace("?file=", "").replace("comes from this server", "is in its folder")


def page_script() -> str:
    """Return the page's modules as one script. Each is a function that returns its exports."""
    parts = ['"use strict";']
    for name, file in MODULES.items():
        code = _IMPORT.sub(lambda m: f"const {m[1] or m[2]} = nla_{m[3]};", _file(file))
        exports = ", ".join(m[2] for m in _EXPORT.finditer(code))
        code = _EXPORT.sub(r"\1 \2", code)
        parts.append(f"const nla_{name} = (() => {{\n{code}\nreturn {{ {exports} }};\n}})();")
    return "\n\n".join(parts) + "\n"


def _file(name: str) -> str:
    return (importlib.resources.files("nla_jax.view.explorer") / "static" / name).read_text("utf-8")
