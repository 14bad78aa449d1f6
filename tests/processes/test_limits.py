"""A limit of open files that is too low: refused before anything is begun."""

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import COMMAND, Run
from rig.disks import Setup
from rig.machines import MIB, Content, make_chain

import qmpmerge
from qmpmerge.errors import TooFewFiles


def run(limit: str, *arguments: str) -> Run:
    """The command in a shell with this limit."""
    shell = ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", COMMAND, *arguments]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def looks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("limit", [5, 6, 8, 12, 16, 24, 40, 63])
def test_a_hard_limit_that_is_too_low_is_refused(limit: int, tmp_path: Path) -> None:
    active = str(make_chain(tmp_path)[3])
    before = looks(tmp_path)
    for arguments in (["commit", active], ["chain", active], ["vms"], ["recover", active], ["clean", str(tmp_path)]):
        refused = run(f"-n {limit}", *arguments, "--json")
        error = refused.document["error"]
        assert (refused.code, error["name"]) == (3, "too-few-files")
        assert error["facts"] == {"limit": limit, "needed": 64}
        assert "`ulimit -n 64`" in error["hint"]
    assert looks(tmp_path) == before
    assert run(f"-n {limit}", "--version").code == 0


def test_a_soft_limit_is_raised_by_ourselves(tmp_path: Path, images: list[Path], content: Content) -> None:
    assert run("-Sn 16", "commit", str(images[3]), "--json").document["verdict"] == "pivoted"
    content.check(images[0])


def test_a_live_merge_too(setup: Setup) -> None:
    refused = run("-n 60", "commit", setup.machine.target, "--json")
    assert (refused.code, refused.document["error"]["name"]) == (3, "too-few-files")
    assert run("-Sn 16", "commit", setup.machine.target).code == 0
    setup.check()


def test_what_is_said_to_be_enough_for_a_long_chain_is_enough(tmp_path: Path) -> None:
    names = ["base.raw", *(f"l{number}.qcow2" for number in range(39))]
    active = str(make_chain(tmp_path, names, MIB)[-1])
    refused = run("-n 100", "commit", active, "--json")
    assert refused.document["error"]["facts"] == {"limit": 100, "needed": 144}
    assert run("-n 144", "commit", active, "--verify", "--json").document["verdict"] == "pivoted"


@pytest.fixture
def low() -> Iterator[None]:
    """A limit that is enough for us, and not for the chain."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (70, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_the_library_refuses_and_changes_no_limit(images: list[Path], low: None) -> None:
    with pytest.raises(TooFewFiles) as refused:
        async with qmpmerge.offline(images[3]):
            pass
    assert json.loads(json.dumps(refused.value.facts)) == {"limit": 70, "needed": 72}
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 70
