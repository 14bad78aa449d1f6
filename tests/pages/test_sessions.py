"""Every line of the pages is typed by a newcomer, who sees what stands there."""

import re

import pytest

from pages import sessions

PLAYED = sessions.pages()

SHOWN = """\
$ qmpmerge vms
NAME   PID  USER  MONITOR
vm1   4711  root  /home/me/vm1.sock
...
hint: in use by VM vm2 (qemu-system-x86,
      pid 17), 196 KiB free
"""


def test_the_pages_that_show_sessions_are_played() -> None:
    assert {"walkthrough.md", "golden-image.md", "recipes.md", "phrasebook.md"} <= set(PLAYED)


@pytest.mark.timeout(600)  # some fifty commands
@pytest.mark.parametrize("name", PLAYED)
def test_what_the_page_shows_is_what_is_seen(name: str) -> None:
    played = sessions.play(name)
    different = [sessions.difference(*one) for one in played if not sessions.is_as_shown(*one[1:])]
    assert not different, "\n\n".join(different)


def test_what_is_volatile_is_the_same() -> None:
    lines = SHOWN.splitlines()
    seen = (
        SHOWN.replace("...\n", "").replace("4711  root", "12  ann").replace(",\n      pid 17), 196", ", pid 1234), 200")
    )
    assert sessions.is_as_shown(lines, seen.splitlines())
    assert sessions.is_as_shown(lines, seen.replace("hint", "one line\nand another\nhint").splitlines())


@pytest.mark.parametrize("word", ["vm1 ", "/home/me", "vm2", "free", "hint"])
def test_another_word_is_found(word: str) -> None:
    seen = re.sub(word, "other", SHOWN.replace("...\n", ""), count=1)
    assert not sessions.is_as_shown(SHOWN.splitlines(), seen.splitlines())


@pytest.mark.parametrize("more", ["more\n", "$ qmpmerge vms\n"])
def test_a_line_too_many_is_found(more: str) -> None:
    assert not sessions.is_as_shown(SHOWN.splitlines(), (SHOWN.replace("...\n", "") + more).splitlines())
