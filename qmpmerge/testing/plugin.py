"""
The plugin itself: its options and fixtures, and nothing else, since pytest loads it for every project of an environment that
has qmpmerge. All that the fixtures stand on is imported when a test uses one.
"""

from __future__ import annotations  # old versions of pytest lack some of its classes

import contextlib
import itertools
import os
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


OPTION = "--qemu-path"
ENVIRONMENT = "QMPMERGE_QEMU"
SETTING = "qmpmerge_qemu"
"""Where the QEMUs are named: the first that has any counts."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting."""
    parser.addini(SETTING, f"QEMUs to test with, as {OPTION}", "args", [])


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Iterator[None]:
    """Add ``--qemu-path``, if neither another plugin nor the project's own conftest.py has an option of that name."""
    known = early_config.known_args_namespace
    for word, value in itertools.pairwise(args):
        if word == OPTION and value in known.file_or_dir:
            known.file_or_dir.remove(value)
    yield
    if _is_free(parser):
        parser.getgroup("qmpmerge").addoption(
            OPTION,
            action="append",
            default=[],
            dest=SETTING,
            metavar="PATH",
            help="a QEMU to test with, the program or its folder, instead of that on PATH (environment: "
            f"{ENVIRONMENT}); of several each test is run with each",
        )


def _is_free(parser: pytest.Parser) -> bool:
    word = f"{OPTION}=."
    try:
        return word in parser.parse_known_and_unknown_args([word])[1]
    except pytest.UsageError:
        return False


def _paths(config: pytest.Config) -> list[str]:
    if named := config.getoption(SETTING, []):
        return list(named)
    if named := os.environ.get(ENVIRONMENT):
        return named.split(os.pathsep)
    return [str(config.rootpath / path) for path in config.getini(SETTING)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a QEMU with each of several."""
    if "qemu_programs" in metafunc.fixturenames and len(paths := _paths(metafunc.config)) > 1:
        names = [f"qemu-{_at(path).version}" for path in paths]
        metafunc.parametrize("qemu_programs", paths, ids=names, indirect=True)


def _at(path: str) -> Programs:
    from qmpmerge.testing.programs import NoQemu, Programs

    try:
        return Programs.at(path)
    except NoQemu as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def qemu_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """
    The QEMU of this test (`qmpmerge.testing.Programs`). Where it was named, as by ``--qemu-path``, its folder is the first
    of PATH while the test runs, so that the tool under test finds the same ``qemu-img``.
    """
    from qmpmerge.testing.programs import Programs

    paths = _paths(request.config)
    if not paths:
        return Programs.found()
    programs = _at(getattr(request, "param", paths[0]))
    monkeypatch.setenv("PATH", programs.path)
    return programs


@pytest.fixture
def qcow2_chain(qemu_programs: Programs, tmp_path: Path) -> MakeChain:
    """Makes chains of images of any layout: see `qmpmerge.testing.MakeChain`. Skips without ``qemu-img``."""
    import shutil

    from qmpmerge.testing.layers import MakeChain

    for program in ("qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on PATH: it comes with qemu-utils")
    return MakeChain(tmp_path)


@pytest.fixture
def qemu_vm(qemu_programs: Programs, tmp_path: Path) -> Iterator[StartVm]:
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
def guest_writes(qemu_vm: StartVm) -> GuestWrites:
    """Writes as the guest of the test's VM does: see `qmpmerge.testing.GuestWrites`."""
    from qmpmerge.testing.vms import GuestWrites

    return GuestWrites(qemu_vm)


@pytest.fixture
def guest_reads(qemu_vm: StartVm) -> GuestReads:
    """Reads as the guest of the test's VM does: see `qmpmerge.testing.GuestReads`."""
    from qmpmerge.testing.vms import GuestReads

    return GuestReads(qemu_vm)


@pytest.fixture
def frozen_job(qemu_vm: StartVm) -> FreezeJob:
    """A block job held at a given status: see `qmpmerge.testing.FreezeJob`."""
    from qmpmerge.testing.jobs import FreezeJob

    return FreezeJob(qemu_vm)


@pytest.fixture
def kill_at(qemu_vm: StartVm) -> Iterator[KillAt]:
    """Kills the tool, or QEMU, when a QMP command goes over the wire: see `qmpmerge.testing.KillAt`."""
    from qmpmerge.testing.kills import KillAt

    with contextlib.ExitStack() as stack:
        killing = KillAt(qemu_vm, stack)
        yield killing
    killing.close()
