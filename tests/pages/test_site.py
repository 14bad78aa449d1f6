"""The site: built strictly, so that a link that leads nowhere is an error; and nothing in it is loaded from elsewhere."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from pages import sessions
from pages.site import PAGES, ROOT, in_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(root: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """As `scripts/site` does."""
    (line,) = re.findall(r"\.venv/bin/(mkdocs .*) \"\$@\"$", (ROOT / "scripts/site").read_text(), re.MULTILINE)
    words = [sys.executable, "-m", *line.split(), "--site-dir", folder]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    for name in ("docs", "examples", "tests/pages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in (ROOT / "mkdocs.yml", *ROOT.glob("*.md")):
        shutil.copy(file, tmp_path)
    with (tmp_path / "docs/json.md").open("a") as page:
        page.write("[a page](nowhere.md) [a part](errors.md#nothing) [a folder](../tests)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert [link for link in ("nowhere.md", "#nothing", "tests") if f"'{link}'" not in done.stderr] == []


def test_every_page_is_there(site: Path) -> None:
    written = {*PAGES.values(), *(file.name for file in (ROOT / "docs").glob("*.md"))}
    assert {file.stem for file in site.glob("*.html")} == {name.removesuffix(".md") for name in written}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """What a browser fetches by itself: scripts, styles, fonts, pictures, frames. Links are for readers to follow."""
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
    )
    pages = [*site.rglob("*.html")]
    assert pages
    assert [(page.name, found[0]) for page in pages for found in [loads.search(page.read_text())] if found] == []
    styles = re.compile(r"url\([\"']?(?:https?:)?//|@import")
    assert [file.name for file in site.rglob("*.css") if styles.search(file.read_text())] == []


@pytest.mark.parametrize("name", sessions.pages())
def test_what_is_typed_is_what_a_button_copies(name: str, site: Path) -> None:
    steps = sessions.steps(name, sessions.read(name))
    typed = [line for one in steps if not one.is_event and not one.is_unseen for line in one.typed]
    page = (site / PAGES.get(name, name)).with_suffix(".html").read_text()
    copied = re.findall(r'<div class="highlight" data-copy="([^"]*)">', page)
    assert [line for block in copied for line in unescape(block).split("\n")] == typed


@pytest.mark.parametrize(
    ("link", "source", "page", "leads_to"),
    [
        ("docs/speed.md", "README.md", "index.md", "speed.md"),
        ("../README.md", "docs/json.md", "json.md", "index.md"),
        ("../examples/a.timer", "docs/tidy.md", "tidy.md", "examples/a.timer"),
        ("SECURITY.md", "README.md", "index.md", "security.md"),
        ("json.md", "docs/library.md", "library.md", "json.md"),
    ],
)
def test_a_link_of_the_repository_leads_to_the_same_in_the_site(
    link: str, source: str, page: str, leads_to: str
) -> None:
    assert in_site(link, source, page) == leads_to
