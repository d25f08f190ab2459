"""How mkdocs.yml reads Markdown that is written for GitHub.

- A link to a file outside docs/ goes to the repository if mkdocs.yml names one (`repo_url`); else its text
  stays.
- A list is nested, or goes on, from two spaces on; Python-Markdown wants four.
- A pipe in the code of a table is written `\\|`; Python-Markdown would show the backslash.
"""

import posixpath
import re
from pathlib import Path

from markdown.blockprocessors import ListIndentProcessor, OListProcessor, UListProcessor
from markdown.extensions import Extension

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"`[^`\n]*`")


class TwoSpaces(Extension):
    """Lists as GitHub reads them."""

    def extendMarkdown(self, md):
        before, md.tab_length = md.tab_length, 2
        processors = md.parser.blockprocessors
        for name, made, rank in (("indent", ListIndentProcessor, 90), ("olist", OListProcessor, 40),
                                 ("ulist", UListProcessor, 30)):
            processors.register(made(md.parser), name, rank)
        md.tab_length = before


def on_config(config):
    config.markdown_extensions.append(TwoSpaces())
    return config


def on_page_markdown(markdown, page, config, files):
    """`markdown` with links out of docs/ and code in tables as the site needs them."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def linked(found):
        text, to, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
        if to.startswith("docs/") or not (ROOT / to).exists():
            return found[0]  # inside the site, or wrong: the build says so
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{to}{anchor})" if config.repo_url else text

    lines = LINK.sub(linked, markdown).split("\n")
    bare = [CODE.sub(lambda m: m[0].replace("\\|", "|"), x) if x.startswith("|") else x for x in lines]
    return "\n".join(bare)
