"""Whatever is typed, a command ends with a verdict and in words that a terminal can show."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import nasty
from rig.command import attempt, complaints
from rig.machines import make_chain

from qmpmerge.cli.commands.group import FILES

WORDS_A_TEST = 12


def furnish(folder: Path) -> Path:
    """A chain, and what else the words may name."""
    make_chain(folder)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    os.symlink("loop", folder / "loop")
    return folder


@pytest.mark.parametrize("first", range(0, len(nasty.WORDS), WORDS_A_TEST))
def test_a_word_that_makes_no_sense_is_refused_in_words(first: int, tmp_path: Path) -> None:
    """A seeded few of all places for each word; `scripts/faults FN` takes all of them, in three locales."""
    folder, chance = furnish(tmp_path), random.Random(first)
    for word in nasty.WORDS[first : first + WORDS_A_TEST]:
        for arguments in chance.sample([*nasty.command_lines(word)], 3):
            run = attempt(*arguments, *chance.choice([[], ["--json"]]), cwd=folder)
            assert complaints(run) == [], (arguments, run)


def _left_out(word: str) -> Iterator[list[str]]:
    """Lines in which a shell has put this in the place of TARGET, DISK, LAYER ...."""
    yield from (
        [name, word] for name in ("disks", "chain", "active", "commit", "pull", "jobs", "doctor", "recover", "clean")
    )
    yield from ([name, "vm1", word] for name in ("chain", "commit", "pull", "snapshot"))
    yield from (["snapshot", word, "vda=/x"], ["job", word, "vda", "follow"], ["job", "vm1", word, "follow"])
    yield from (["job", "vm1", "vda", word], ["job", "vm1", "vda", "speed", word], ["completion", word])


OPTIONS = [
    "--base",
    "--top",
    "--speed",
    "--timeout",
    "--force",
    "--merged-files",
    "--search",
    "--allow",
    "--secret",
    "--format",
    "--record",
]


@pytest.mark.parametrize("line", [*_left_out(""), *(["commit", "vm1", option, ""] for option in OPTIONS)], ids=" ".join)
def test_an_empty_word_is_said_to_be_empty(line: list[str], tmp_path: Path) -> None:
    """As of a variable of a script that is not set."""
    run = attempt(*line, "--json", cwd=tmp_path)
    assert (run.code, run.document["verdict"]) == (2, "usage")
    assert re.fullmatch(r"(--)?[A-Za-z=-]+ is empty", run.document["error"]["message"]), run


@pytest.mark.parametrize("option", OPTIONS)
def test_a_value_that_was_forgotten(option: str, tmp_path: Path) -> None:
    """What follows is an option, and no value: that of a variable that is not set, and has no quotes."""
    for form in ([option, "--json"], ["--json", f"{option}=--dry-run"]):
        run = attempt("commit", "vm1", "vda", *form, cwd=tmp_path)
        assert (run.code, run.document["verdict"]) == (2, "usage")
        assert run.document["error"]["message"].startswith(f"{option} has no value")
    assert attempt("commit", "vm1", option, "--help", cwd=tmp_path).code == 2


@pytest.mark.parametrize(
    "target",
    [
        "pid:²",
        "tcp:localhost:²",
        "tcp:a..b:5",
        f"tcp:{'h' * 300}:5",
        "tcp:\udcff:5",
        "tcp:localhost:99999",
        "pid:" + "9" * 30,
    ],
)
def test_a_target_that_can_be_none_is_not_there(target: str, tmp_path: Path) -> None:
    for arguments in (["disks", target], ["commit", target], ["job", target, "x", "follow"], ["doctor", target]):
        run = attempt(*arguments, "--json", cwd=tmp_path)
        assert (run.code, run.document["error"]["name"]) == (4, "no-such-target"), run


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e400", "²"])
@pytest.mark.parametrize("option", ["--timeout", "--converge-pause"])
def test_a_time_that_is_none_is_a_usage_error(option: str, value: str, tmp_path: Path) -> None:
    run = attempt("commit", "nope", option, value, cwd=tmp_path)
    assert (run.code, f"Invalid value for '{option}'" in run.err) == (2, True)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "1." + "9" * 400 + "T", "9223372036854775808", "١٢", "²", "-1", "8388608T"]
)
def test_a_size_that_is_none_is_a_usage_error(value: str, tmp_path: Path) -> None:
    run = attempt("commit", "nope", "--speed", value, cwd=tmp_path)
    assert (run.code, "Invalid value for '--speed'" in run.err) == (2, True)


@pytest.mark.parametrize("value", ["nan", "inf", "9" * 5000, "99999999999d", "²d"])
def test_an_age_that_is_none_is_a_usage_error(value: str, tmp_path: Path) -> None:
    assert attempt("clean", ".", "--older-than", value, cwd=tmp_path).code == 2


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/full", "nope", ".", "/proc/self/mem"])
def test_a_secret_that_is_none_is_refused(file: str, tmp_path: Path) -> None:
    """/dev/zero took all memory."""
    active = make_chain(tmp_path)[3]
    run = attempt("chain", str(active), "--secret", file, "--json", cwd=tmp_path)
    assert (run.code, run.document["error"]["name"]) == (3, "secret-unreadable")


def test_the_places_are_all_that_there_are() -> None:
    """A new command, or a new option with a value, belongs into `nasty.command_lines`."""
    from qmpmerge.cli.commands.group import cli

    lines = [*nasty.command_lines("WORD")]
    assert set(FILES) - {"vms"} <= {line[0] for line in lines}
    words = {word for line in lines for word in line}
    for name in FILES:
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        for parameter in command.params:
            if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
                assert not words.isdisjoint(parameter.opts), (name, parameter.opts)
