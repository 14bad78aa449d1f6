"""
The plugin itself: its option and fixtures, and nothing else, since pytest loads it for every project of an environment that
has qmpmerge. All that the fixtures stand on is imported when a test uses one.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qmpmerge.testing.jobs import FreezeJob
    from qmpmerge.testing.kills import KillAt
    from qmpmerge.testing.layers import MakeChain
    from qmpmerge.testing.programs import Programs
    from qmpmerge.testing.vms import GuestReads, GuestWrites, StartVm


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--qemu-path``."""
    parser.getgroup("qmpmerge").addoption(
        "--qemu-path",
        action="append",
        default=[],
        metavar="PATH",
        help="a QEMU to test with, the program or its folder, instead of that on PATH; of several each test is run with each",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a QEMU with each of several."""
    paths = metafunc.config.getoption("qemu_path")
    if len(paths) > 1 and "qemu_programs" in metafunc.fixturenames:
        names = [f"qemu-{_at(path).version}" for path in paths]
        metafunc.parametrize("qemu_programs", paths, ids=names, indirect=True)


def _at(path: str) -> "Programs":
    from qmpmerge.testing.programs import NoQemu, Programs

    try:
        return Programs.at(path)
    except NoQemu as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def qemu_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "Programs":
    """
    The QEMU of this test (`qmpmerge.testing.Programs`). Where it was named by ``--qemu-path``, its folder is the first of PATH
    while the test runs, so that the tool under test finds the same ``qemu-img``.
    """
    from qmpmerge.testing.programs import Programs

    paths = request.config.getoption("qemu_path")
    if not paths:
        return Programs.found()
    programs = _at(getattr(request, "param", paths[0]))
    monkeypatch.setenv("PATH", programs.path)
    return programs


@pytest.fixture
def qcow2_chain(qemu_programs: "Programs", tmp_path: Path) -> "MakeChain":
    """Makes chains of images of any layout: see `qmpmerge.testing.MakeChain`. Skips without ``qemu-img``."""
    import shutil

    from qmpmerge.testing.layers import MakeChain

    for program in ("qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on PATH: it comes with qemu-utils")
    return MakeChain(tmp_path)


@pytest.fixture
def qemu_vm(qemu_programs: "Programs", tmp_path: Path) -> "Iterator[StartVm]":
    """Starts VMs that end with the test, however it ends: see `qmpmerge.testing.StartVm`. Skips without QEMU."""
    from qmpmerge.testing.programs import NoQemu
    from qmpmerge.testing.vms import StartVm

    try:
        _ = qemu_programs.emulator
    except NoQemu as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        yield StartVm(tmp_path, qemu_programs, stack)


@pytest.fixture
def guest_writes(qemu_vm: "StartVm") -> "GuestWrites":
    """Writes as the guest of the test's VM does: see `qmpmerge.testing.GuestWrites`."""
    from qmpmerge.testing.vms import GuestWrites

    return GuestWrites(qemu_vm)


@pytest.fixture
def guest_reads(qemu_vm: "StartVm") -> "GuestReads":
    """Reads as the guest of the test's VM does: see `qmpmerge.testing.GuestReads`."""
    from qmpmerge.testing.vms import GuestReads

    return GuestReads(qemu_vm)


@pytest.fixture
def frozen_job(qemu_vm: "StartVm") -> "FreezeJob":
    """A block job held at a given status: see `qmpmerge.testing.FreezeJob`."""
    from qmpmerge.testing.jobs import FreezeJob

    return FreezeJob(qemu_vm)


@pytest.fixture
def kill_at(qemu_vm: "StartVm") -> "Iterator[KillAt]":
    """Kills the tool, or QEMU, when a QMP command goes over the wire: see `qmpmerge.testing.KillAt`."""
    from qmpmerge.testing.kills import KillAt

    with contextlib.ExitStack() as stack:
        killing = KillAt(qemu_vm, stack)
        yield killing
    killing.close()
