"""Streams that are closed, full, or that nobody reads: the work goes on, its exit code stays, what matters is said."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import COMMAND, JOB, Begun, Run
from rig.disks import Setup
from rig.machines import Content, make_chain

from qmpmerge.cli.streams import Stream

BROKEN = {
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdin closed": "<&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "both full": ">/dev/full 2>/dev/full",
    "stdout unread": ">&3",
    "stderr unread": "2>&3",
    "stdout not writable": "1</dev/null",
}
"""As a shell makes them; descriptor 3 is a pipe whose reader has gone."""


def run(redirection: str, *arguments: str, cwd: Path | None = None) -> Run:
    """The command with its streams like that; those that are not mentioned are kept."""
    read, write = os.pipe()
    os.close(read)
    line = f'exec 3>&{write} {write}>&-; exec "$@" {redirection} 3>&-'
    shell = ["bash", "-c", line, "bash", COMMAND, *arguments]
    try:
        done = subprocess.run(shell, capture_output=True, text=True, cwd=cwd, pass_fds=[write], check=False)
    finally:
        os.close(write)
    assert "Traceback" not in done.stdout + done.stderr and "bash:" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def commands(folder: Path, half: int) -> Iterator[list[str]]:
    """Half of the kinds that work and that do not, on images that are there already; every other one with --json."""
    active = str(folder / "c.qcow2")
    plain = (["--version"], ["--help"], ["--nonsense"], ["completion", "bash"])
    shared = (["disks", active], ["chain", active], ["chain", active, "nope"], ["chain"], ["jobs", active], ["recover", "nope"],
              ["doctor", str(folder)], ["clean", str(folder)], ["commit", active])  # fmt: skip
    yield from plain[half::2]
    for number, command in enumerate(shared[half::2]):
        yield [*command, *(["--json"] if number % 2 else [])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Run]]:
    """What these come to with streams that nothing is wrong with."""
    runs = []
    for half in range(2):
        folder = tmp_path_factory.mktemp("whole")
        make_chain(folder)
        runs.append([run("", *arguments) for arguments in commands(folder, half)])
    return runs


@pytest.mark.parametrize("broken", BROKEN)
def test_the_exit_code_is_that_of_the_verdict(broken: str, whole: list[list[Run]], tmp_path: Path) -> None:
    """And what a stream did not take is said on the other one, but where the reader has gone."""
    make_chain(tmp_path)
    half = list(BROKEN).index(broken) % 2
    for expected, arguments in zip(whole[half], commands(tmp_path, half), strict=True):
        got = run(BROKEN[broken], *arguments)
        assert got.code == expected.code, (arguments, got)
        assert is_said(broken, "--json" in arguments, expected, got), (arguments, expected, got)


def is_said(broken: str, is_json: bool, expected: Run, got: Run) -> bool:
    stream, how = broken.split(" ", 1)
    if stream in ("both", "all") or how == "unread":
        return True  # nobody is there to be told
    if stream == "stdin":
        return (bool(got.out), bool(got.err)) == (bool(expected.out), bool(expected.err))
    if stream == "stdout":
        return not expected.out or ("not-written" if is_json else "stdout did not take the result") in got.err
    return is_json or expected.code == 0 or bool(got.out)  # a failure, which people find on stderr


def test_a_result_that_stdout_does_not_take_is_whole_on_stderr(tmp_path: Path) -> None:
    active = str(make_chain(tmp_path)[3])
    whole, full = run("", "chain", active), run(">/dev/full", "chain", active)
    assert full.err.splitlines()[1:] == whole.out.splitlines()
    assert "No space left on device" in full.err.splitlines()[0]
    told = json.loads(run(">&-", "chain", active, "--json").err)
    assert (told["event"], told["reason"]) == ("not-written", "Bad file descriptor")
    assert told["document"] == run("", "chain", active, "--json").document


def test_a_bug_is_said_on_stdout_where_stderr_is_closed() -> None:
    program = "from qmpmerge.cli import bug, streams; streams.take(); bug.show(ValueError('x\\x1b'), as_json=False)"
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program], capture_output=True)
    assert b"ValueError: x\\x1b" in done.stdout


# --- the work goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", ">/dev/full 2>/dev/full", ">&3 2>&3"])
@pytest.mark.parametrize("ending", ["--pivot", "--top=[3]"])
def test_a_merge_ends_well_whatever_becomes_of_what_it_says(
    redirection: str, ending: str, setup: Setup, images: list[Path]
) -> None:
    """With progress to tell, and the traffic too."""
    got = run(redirection, "commit", setup.machine.target, ending, "--json", "-v")
    assert (got.code, got.out, got.err) == (0, "", "")
    setup.check()
    setup.off()
    setup.content.check(images[3] if "--top" in ending else images[0])


def test_a_stderr_that_breaks_in_the_middle_of_a_merge(setup: Setup, images: list[Path]) -> None:
    begun = Begun("commit", setup.machine.target, "--speed", "1")
    assert begun.process.stderr is not None
    begun.process.stderr.close()
    setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
    assert begun.process.stdout is not None
    assert json.loads(begun.process.stdout.read())["verdict"] == "pivoted"
    begun.process.stdout.close()
    assert begun.process.wait(60) == 0
    setup.check()


def test_words_never_go_into_a_file_that_got_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Nor does a process that we start inherit one."""
    image = tmp_path / "image"
    program = f"""
import os, subprocess, sys
if "take" in sys.argv:
    from qmpmerge.cli import streams
    streams.take()
descriptor = os.open({str(image)!r}, os.O_RDWR)
print("words", flush=True) if "take" in sys.argv else os.write(1, b"words")
subprocess.run(["echo", "words"], check="take" in sys.argv)
"""
    for way, expected in (("plain", False), ("take", True)):
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program, way]
        image.write_bytes(b"precious")
        done = subprocess.run(shell, check=False)
        assert (image.read_bytes() == b"precious") is expected, (way, done)


# --- the stream itself ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        for descriptor in (read, write):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_stream_that_another_process_has_made_non_blocking_takes_all() -> None:
    with pipe() as (read, write):
        os.set_blocking(write, False)
        copier = subprocess.Popen(["cat"], stdin=read, stdout=subprocess.PIPE)
        os.close(read)
        data = bytes(itertools.islice(itertools.cycle(range(256)), 1 << 20))
        stream = Stream(write, None)
        reader = subprocess.Popen(["wc", "-c"], stdin=copier.stdout, stdout=subprocess.PIPE)
        assert copier.stdout is not None and reader.stdout is not None
        copier.stdout.close()
        assert stream.write(data) == len(data)
        os.close(write)
        assert int(reader.stdout.read()) == len(data)
        reader.stdout.close()
        assert (copier.wait(30), reader.wait(30), stream.problem) == (0, 0, None)


def test_a_reader_that_has_gone_is_a_problem_and_no_failure() -> None:
    with pipe() as (read, write):
        os.close(read)
        stream = Stream(write, None)
        assert stream.write(b"x") == 1
        assert stream.problem is not None and not stream.is_failing


# --- locales --------------------------------------------------------------------------------------------------------

LOCALES = {"utf8": {"LC_ALL": "C.UTF-8"}, "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}


@pytest.mark.parametrize("locale", LOCALES)
def test_an_image_whose_name_is_not_ascii_in_any_locale(locale: str, tmp_path: Path) -> None:
    folder = tmp_path / "größe-虚拟"
    folder.mkdir()
    images = make_chain(folder)
    content = Content()
    shown = subprocess.run(
        [COMMAND, "commit", str(images[3]), "--json"],
        capture_output=True,
        env={**os.environ, **LOCALES[locale]},
        check=False,
    )
    assert shown.returncode == 0, shown
    assert json.loads(shown.stdout)["after"] == [str(images[0])]
    content.check(images[0])
