"""What people see: real runs on a terminal of 80 columns."""

import re
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import Setup
from rig.machines import make_chain
from rig.terminal import on_terminal, plain

from qmpmerge.cli.render.width import width

LONG = "a folder with a long name, as they come about where people sort what they have"


def shown(*arguments: str, **more: str | int | dict[str, str]) -> str:
    with on_terminal(*arguments, **more) as seen:  # type: ignore[arg-type]
        return seen.end().out


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """The active image of a chain in a folder of a long name, with names of two columns a character in it."""
    (tmp_path / LONG).mkdir()
    return make_chain(tmp_path / LONG, ("base.raw", "虚拟机磁盘.qcow2", "c.qcow2"))[-1]


# --- tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["disks", "chain"])
def test_a_table_is_no_wider_than_the_terminal(command: str, deep: Path) -> None:
    table = shown(command, str(deep)).splitlines()
    assert all(width(line) <= 80 for line in table)
    assert any("…/c.qcow2" in line for line in table)
    wide = shown(command, str(deep), columns=300)
    assert str(deep) in wide and "…" not in wide


def test_columns_stand_below_each_other_whatever_the_names_are_in(deep: Path) -> None:
    title, *rows = shown("chain", str(deep)).splitlines()[1:]
    column = title.index("BACKING")
    places = [width(row[: row.rindex("  ") + 2]) for row in rows if row.rstrip().endswith((".raw", ".qcow2"))][1:]
    assert places == [column, column]


@pytest.mark.parametrize("command", ["disks", "chain"])
def test_a_pipe_gets_everything(command: str, deep: Path) -> None:
    out = invoke(command, str(deep), env={"COLUMNS": "40"}).out
    assert str(deep) in out and "…" not in out


# --- colours ------------------------------------------------------------------------------------------------------------


def test_a_verdict_and_a_hint_have_a_colour(setup: Setup) -> None:
    done = shown("commit", setup.machine.target, "--top", "3")
    assert done.startswith("vda: \x1b[32mmerged\x1b[0m in ") and "\n\x1b[36mhint\x1b[0m: " in done
    refused = shown("commit", setup.machine.target, "--base", "/nowhere")
    assert refused.startswith("\x1b[31mrefused\x1b[0m: no image /nowhere ")
    assert plain(refused).splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_who_wants_no_colours_gets_none(name: str, setup: Setup) -> None:
    refused = shown("commit", setup.machine.target, "--base", "/nowhere", env={name: "dumb"})
    assert refused.startswith("refused: ") and "\x1b" not in refused


def test_an_empty_no_color_is_none(setup: Setup) -> None:
    assert "\x1b[31m" in shown("commit", setup.machine.target, "--base", "/nowhere", env={"NO_COLOR": ""})


def test_a_stream_that_is_no_terminal_gets_no_colours_though_the_other_one_is(setup: Setup, tmp_path: Path) -> None:
    with on_terminal("commit", setup.machine.target, "--top", "3", elsewhere=f"> {tmp_path}/out") as seen:
        errors = seen.end().out
    assert errors.startswith("\x1b[36mhint\x1b[0m: ")
    assert (tmp_path / "out").read_text().startswith("vda: merged in ")


# --- what a pivot comes to -----------------------------------------------------------------------------------------------


def test_a_pivot_is_told_in_six_lines(setup: Setup, tmp_path: Path) -> None:
    told = plain(shown("commit", setup.machine.target, "--yes", columns=400)).splitlines()
    assert [line.split()[0] for line in told] == ["vda:", "before", "after", "files", "hint:", "hint:"]
    assert told[3] == f"  files   a.qcow2, b.qcow2, c.qcow2: renamed to NAME.merged in {tmp_path}"
    assert told[4].startswith(f"hint: start the VM from {tmp_path}/base.raw from now on")
    assert told[5].startswith(f"hint: `qmpmerge clean {tmp_path}`")


def test_quiet_says_what_happened_and_of_a_refusal_what_to_do(setup: Setup) -> None:
    assert "hint" not in shown("commit", setup.machine.target, "--top", "3", "-q")
    assert "hint" in shown("commit", setup.machine.target, "--base", "/nowhere", "-q")


# --- long lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["--top", "3", "--dry-run"], ["--base", "/nowhere"], ["--nonsense"]], ids=str)
def test_a_long_line_is_broken_between_words_and_only_on_a_terminal(given: list[str], setup: Setup) -> None:
    piped = invoke("commit", setup.machine.target, *given)
    seen = plain(shown("commit", setup.machine.target, *given))
    assert re.sub(r"\d+ \w+ free", "", seen).split() == re.sub(r"\d+ \w+ free", "", piped.out + piped.err).split()
    for line in seen.splitlines():
        words = re.findall(r"[^\s`]*`[^`]*`\S*|\S+", line)
        assert width(line) <= 80 or max(map(width, words)) > 60, "only what is that long by itself is wider"
