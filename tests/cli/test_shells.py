"""What the shells insert at TAB, in the real shells: one word with the value that was offered, whatever stands in it."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.disks import device
from rig.impostors import impostor
from rig.machines import Machine, machine, make_chain
from rig.nobody import public
from rig.terminal import Terminal, shell

from qmpmerge.cli import shells

ODD = [
    "1 a b",
    "2it's",
    '3"quoted"',
    "4$(touch pwned)",
    "5`touch pwned`",
    "6;touch pwned;&|<>",
    "7#{x}[1]*?~",
    "8back\\slash",
    "9!exclamation!!",
    "0$HOME $'x'",
    "üé = +@%^",
    "x,y=z",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_chain(tmp_path_factory.mktemp("odd"), [f"{name}.qcow2" for name in ODD])


@pytest.fixture(scope="module")
def vm(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    file = str(images[-1]).replace(",", ",,")
    folder = tmp_path_factory.mktemp("vm")
    with machine(folder, "-drive", f"file={file},if=none,id=vda", *device("vda")) as vm:
        yield vm


@pytest.fixture(params=["bash", "zsh", "fish"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    with shell(request.param, tmp_path) as terminal:
        yield terminal
    assert not (tmp_path / "pwned").exists()


def test_layers_of_any_name(terminal: Terminal, vm: Machine, images: list[Path]) -> None:
    for image in images:
        words = ["commit", vm.target, "vda", "--top"]
        typed = f"{image.parent}/{image.name[0]}"
        assert terminal.type(f"qmpmerge {shlex.join(words)} {typed}\t") == [*words, str(image)]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_within_quotes(terminal: Terminal, vm: Machine, images: list[Path], quote: str) -> None:
    for image in images:
        typed = f"{quote}{image.parent}/{image.name[0]}"
        assert terminal.type(f"qmpmerge commit {vm.target} vda --top {typed}\t")[-1] == str(image)


def test_in_the_middle_of_a_word(terminal: Terminal, vm: Machine, images: list[Path]) -> None:
    folder, image = images[0].parent, images[0]
    for typed in (f"{folder}/1\\ a", f"--top={folder}/1", f"--top={folder}/1\\ "):
        words = terminal.type(f"qmpmerge commit {vm.target} vda --base 1 {'' if '=' in typed else '--top '}{typed}\t")
        assert words[-1].removeprefix("--top=") == str(image)


def test_disks_indices_jobs_and_commands(terminal: Terminal, vm: Machine, tmp_path: Path) -> None:
    assert terminal.type(f"qmpmerge chain {vm.target} v\t") == ["chain", vm.target, "vda"]
    assert terminal.type(f"qmpmerge commit {vm.target} vda --top 11\t")[-1] == "11"
    assert terminal.type(f"qmpmerge snapshot {vm.target} v\tx y")[2:] == ["vda=x", "y"]
    assert terminal.type("qmpmerge snap\t")[0] == "snapshot"


def test_vms_are_offered_by_plain_names_only(terminal: Terminal, tmp_path: Path) -> None:
    """And only those whose monitors we may use; of others by pid."""
    with public() as folder, machine(folder, "-name", f"plain-{os.getpid()}"):
        assert terminal.type(f"qmpmerge chain plain-{os.getpid()}\t") == ["chain", f"plain-{os.getpid()}"]
    monitor = ["-qmp", f"unix:{tmp_path}/rc,server=on,wait=off"]
    (tmp_path / "rc").touch()
    with impostor(tmp_path, "-name", f"x-{os.getpid()};$(touch pwned)", *monitor) as pid:
        assert terminal.type(f"qmpmerge chain x-{os.getpid()}\t") == ["chain", f"x-{os.getpid()}"]
        assert terminal.type(f"qmpmerge chain pid:{pid}\t") == ["chain", f"pid:{pid}"]
        assert terminal.type(f"qmpmerge chain pid:{str(pid)[:-1]}\t\x15qmpmerge end") == ["end"]


def test_files_are_completed_by_the_shell(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "an image").touch()
    assert terminal.type("qmpmerge chain ./an\t") == ["chain", "./an image"]


# --- words of bash --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", [""]),
        ("qmpmerge ", ["qmpmerge", ""]),
        ("a  'b c'd \"e f\"", ["a", "b cd", "e f"]),
        ("a\\ b", ["a b"]),
        ("'a b", ["a b"]),
        ('"a\\$ \\x', ["a$ \\x"]),
        ("'a\\", ["a\\"]),
        ("a\\", ["a"]),
        ("pid:4 x=y", ["pid:4", "x=y"]),
    ],
)
def test_words(line: str, words: list[str]) -> None:
    assert [shells.value_of(raw) for raw in shells.raw_words(line)] == words


@pytest.mark.parametrize(
    ("raw", "kept", "quote"),
    [
        ("", "", ""),
        ("abc", "", ""),
        ("pid:4", "pid:", ""),
        ("x=y:z", "x=y:", ""),
        ("a\\:b", "", ""),
        ("'a:b'c", "", ""),
        ("x:'a:b", "x:", "'"),
        ('x"y', "x", '"'),
        ("$'y", "$", "$'"),
    ],
)
def test_what_bash_leaves_alone(raw: str, kept: str, quote: str) -> None:
    assert shells.left_alone(raw, " \t\n\"'><=;|&(:") == (kept, quote)
