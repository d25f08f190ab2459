"""Adapt Markdown that is written for GitHub to MkDocs (hooks of mkdocs.yml).

- A link to a file outside docs/ points to the repository if mkdocs.yml has a `repo_url`; else only its text
  is kept.
- Nested lists are indented by two spaces; Python-Markdown expects four.
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
    """Parse lists with an indent of two spaces, as GitHub does."""

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
    """Rewrite links out of docs/ and pipes in the code of tables."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def linked(found):
        text, to, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
        if to.startswith("docs/") or not (ROOT / to).exists():
            return found[0]  # inside the site, or broken, which the build reports
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{to}{anchor})" if config.repo_url else text

    lines = LINK.sub(linked, markdown).split("\n")
    bare = [CODE.sub(lambda m: m[0].replace("\\|", "|"), x) if x.startswith("|") else x for x in lines]
    return "\n".join(bare)
