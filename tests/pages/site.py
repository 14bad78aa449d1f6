"""
What mkdocs does not do by itself: the pages of the root and the examples are a part of the site, and links lead to them.

A page is written for whoever reads it in the repository: its links are relative to its file there. Here they are made relative
to where the file comes to lie in the site.
"""

import posixpath
import re
from html import escape, unescape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the root by their names in the repository, and in the site."""
OTHERS = ("examples",)
"""Folders of the root whose files are in the site as they are."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]*)(?=[)#])")

_BLOCK = re.compile(r'(<div class="highlight")>(.*?</pre>)', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_CODE = re.compile(r"(?<=<code>)[^<\n]+(?=</code>)")
_HYPHENED = re.compile(r"(?<!\S)\S{0,30}-\S{0,30}(?!\S)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that is not there is told by the server: none of ours would know where the site lies, and so its style."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies in the root."""
    for name, there in PAGES.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / name)))
    for folder in OTHERS:
        for file in sorted(file for file in (ROOT / folder).rglob("*") if file.is_file()):
            files.append(File.generated(config, str(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where things lie in the site."""
    there = {site: name for name, site in PAGES.items()}
    source = there.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda link: in_site(link[1], source, page.file.src_uri), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have no browser break a line within an option, which blocks stay as they are; and of a session copy what is typed."""
    html = _BLOCK.sub(_with_typed, html)
    return _CODE.sub(lambda code: _HYPHENED.sub(r'<span class="word">\g<0></span>', code[0]), html)


def _with_typed(block: re.Match[str]) -> str:
    """A block with what its button copies, where it has prompts: no prompts, no output, and not what happens elsewhere."""
    typed, is_typed = [], False
    for line in unescape(_TAG.sub("", block[2])).splitlines():
        is_typed = line.startswith("$ ") or (is_typed and line.startswith("> "))
        typed += [line[2:]] if is_typed else []
    return f'{block[1]} data-copy="{escape(chr(10).join(typed))}">{block[2]}' if typed else block[0]


def in_site(link: str, source: str, page: str) -> str:
    """A relative link of the file `source` of the repository, as the `page` of the site has it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return posixpath.relpath(PAGES.get(target, target.removeprefix("docs/")), posixpath.dirname(page) or ".")
