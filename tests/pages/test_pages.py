"""What the documents and the help leave out is found here."""

import re
from pathlib import Path

import click
import pytest
from rig import exits

from pages import DOCS, PAGES, PARTS, filled, graph, parts, pictures
from pages.commands import command
from qmpmerge.chain.state import NEXT, State
from qmpmerge.cli.commands.group import FILES
from qmpmerge.doctor import findings
from qmpmerge.errors import EXIT_CODES

ROOT = DOCS.parent

HABITS = {
    "--active": "`virsh blockcommit --active`: so it is where the top is the active image, and it is refused where not",
    "--wait": "`virsh blockcommit --wait`: we always wait",
    "--verbose": "`virsh blockcommit --verbose`: progress is always shown",
    "--json": "of `completion`, which is text, as help and version are",
}
"""Options that no help shows: what people type from habit, and what becomes of it."""


def options() -> list[tuple[str, click.Option]]:
    return [(name, one) for name in FILES for one in command(name).params if isinstance(one, click.Option)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), f"docs/{name} is not what the code says: run scripts/docs"


def test_the_picture_of_a_graph_shows_what_was_recorded() -> None:
    assert graph.on_picture(graph.PICTURE.read_text()) == graph.told(), "run scripts/docs, where graphviz is installed"


def test_every_option_has_a_text() -> None:
    assert [(name, one.opts) for name, one in options() if not one.hidden and not one.help] == []


def test_only_habits_are_hidden() -> None:
    assert {option for _, one in options() if one.hidden for option in one.opts} == set(HABITS)


def test_every_option_and_command_is_on_the_page() -> None:
    page = PAGES["commands.md"]()
    for name in FILES:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        shown = [option for of, one in options() if of == name and not one.hidden for option in one.opts]
        assert [option for option in shown if f"{option}" not in section] == []
        assert all(f"\n{code} " in section for code in exits.of(name))


def test_every_exit_code_is_in_some_help() -> None:
    told = exits.of_all().union(*map(exits.of, FILES))
    assert told == {*EXIT_CODES.values(), *findings.EXIT_CODES.values(), 1, 2}


def test_a_code_that_help_does_not_name_is_found() -> None:
    exits.see_that_it_is_told(["commit", "vm1"], 5)
    exits.see_that_it_is_told(["vms"], 130)
    with pytest.raises(AssertionError, match="vms --help"):
        exits.see_that_it_is_told(["vms"], 5)


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name}" not in readme] == []


def test_every_part_is_on_one_page() -> None:
    placed = [part for name in PAGES if name.endswith(".md") and name != "commands.md" for part in parts(name)]
    assert sorted(placed) == sorted(PARTS)


def test_a_part_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- made by scripts/docs: nonsense -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="nonsense"):
        filled(str(tmp_path / "page.md"))


def test_the_way_of_a_merge_has_all_states_that_are_no_way_out() -> None:
    assert set(State) - {*pictures.CHAIN} == {state for state in State if not NEXT[state]} - {State.DONE}


def in_sentences(page: Path) -> list[tuple[str, str]]:
    """The commands of a page's text, that of its blocks left out: the name of each, and what follows it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    codes = [code for paragraph in text.split("\n\n") for code in re.findall(r"`([^`]+)`", paragraph)]
    return [found for code in codes for found in re.findall(r"\bqmpmerge ([a-z]+)\b([^|]*)", code)]


def test_commands_in_sentences_are_such_as_there_are() -> None:
    """Those with an option that is none, too; what is shown in blocks is run (tests/cli/test_commands.py, sessions)."""
    wrong: list[tuple[str, str]] = []
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for name, rest in in_sentences(page):
            known = {option for of, one in options() if of == name for option in one.opts}
            words = re.findall(r"(?<!\S)--[a-z-]+", rest)
            wrong += [(page.name, f"{name} {word}") for word in words if word not in known]
            wrong += [(page.name, name)] if name not in FILES else []
    assert wrong == []
    assert len(in_sentences(ROOT / "README.md")) > 10
