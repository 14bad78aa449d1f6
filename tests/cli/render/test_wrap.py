"""Lines that are wider than a terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.cli.render.page import Page, Painted
from qmpmerge.cli.render.width import width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(*parts: str, columns: int, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None = None) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    page = Page(stream or Terminal())
    page.line(*parts)
    written = page.stream.getvalue()  # type: ignore[attr-defined]
    assert written.endswith("\n")
    return str(written)[:-1].split("\n")


CASES = {
    "hint: name a base further down, once nobody needs it": [
        "hint: name a base further",
        "      down, once nobody",
        "      needs it",
    ],
    "  space   base.raw grows by up to 2 MiB": ["  space   base.raw grows", "          by up to 2 MiB"],
    "  not checked  that nobody else uses it": ["  not checked  that nobody", "    else uses it"],
    "        no other image is built on them": ["        no other image is", "          built on them"],
    "run `qmpmerge active /vm/c.qcow2`, then ask": ["run", "  `qmpmerge active /vm/c.qcow2`,", "  then ask"],
    "exactly twenty-seven of them": ["exactly twenty-seven of", "  them"],
    "as wide as it is allowed..": ["as wide as it is allowed.."],
    "虚拟机磁盘 虚拟机磁盘 虚拟机磁盘": ["虚拟机磁盘 虚拟机磁盘", "  虚拟机磁盘"],
    "": [""],
}


@pytest.mark.parametrize("text", CASES)
def test_a_line_is_broken_between_words_and_stands_under_its_label(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(text, columns=26, monkeypatch=monkeypatch) == CASES[text]


@pytest.mark.parametrize("text", CASES)
def test_a_pipe_gets_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(text, columns=26, monkeypatch=monkeypatch, stream=io.StringIO()) == [text]


def test_a_colour_goes_on_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["job j: ", Painted("paused (no space)", "yellow"), ", 3 MiB"]
    assert shown(*parts, columns=16, monkeypatch=monkeypatch) == [
        "job j: \x1b[33mpaused",
        "       (no",
        "       space)\x1b[0m, 3",
        "       MiB",
    ]


WORDS = st.lists(st.text("ab磁`-:", min_size=1, max_size=9), min_size=1, max_size=12)


@given(words=WORDS, columns=st.integers(1, 40))
def test_no_word_is_lost_and_no_line_is_too_wide_but_for_one_word(words: list[str], columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines = shown(" ".join(words), columns=columns, monkeypatch=patch)
    assert " ".join(lines).split() == words
    for line in lines:
        assert width(line) <= columns or len(line.split()) == 1 or "`" in line
