"""The plugin in projects of others, each with a run of pytest: what is left behind, and that it does nothing unasked."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest_plugins = ["pytester"]

VM = """
import os, signal
import pytest

def vm(qcow2_chain, qemu_vm):
    return qemu_vm(qcow2_chain("base.raw", "a.qcow2"))

"""


def qemus(folder: Path) -> list[psutil.Process]:
    """Those that have something of this folder on their command lines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("qemu-") and str(folder) in " ".join(process.cmdline()):
                found.append(process)
    return found


def gone(folder: Path) -> bool:
    """Whether none is left; those that the kernel has killed may take a moment."""
    return not psutil.wait_procs(qemus(folder), timeout=60)[1]


@pytest.fixture(autouse=True)
def quiet(pytester: pytest.Pytester) -> None:
    """No word of pytest-asyncio's, which is there too."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of a short name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_whatever_happens_to_a_test_no_qemu_is_left(pytester: pytest.Pytester, place: Path) -> None:
    pytester.makepyfile(
        VM
        + """
def test_passes(qcow2_chain, qemu_vm): vm(qcow2_chain, qemu_vm).check()
def test_fails(qcow2_chain, qemu_vm): assert vm(qcow2_chain, qemu_vm).session.execute("query-status") == "on fire"
@pytest.mark.timeout(3)
def test_times_out(qcow2_chain, qemu_vm): vm(qcow2_chain, qemu_vm).process.wait()
def test_stops(qcow2_chain, qemu_vm): vm(qcow2_chain, qemu_vm).process.send_signal(signal.SIGSTOP)
def test_wants_what_qemu_has_not(qemu_vm): qemu_vm(arguments=["-device", "flux-capacitor"])
def test_starts_a_second_that_does_not(qcow2_chain, qemu_vm):
    vm(qcow2_chain, qemu_vm)
    qemu_vm(arguments=["-device", "flux-capacitor"])
def test_kills_its_worker(qcow2_chain, qemu_vm):
    vm(qcow2_chain, qemu_vm)
    os.kill(os.getpid(), signal.SIGKILL)
def test_passes_too(qcow2_chain, qemu_vm): vm(qcow2_chain, qemu_vm).check()
"""
    )
    done = pytester.runpytest_subprocess("-n", "2", f"--basetemp={place / 'run'}", "-q")
    outcomes = done.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) == (3, 5)
    done.stdout.fnmatch_lines(["*'flux-capacitor' is not a valid device model name*"])
    assert gone(place)
    left = [path for path in place.rglob("*") if path.is_socket()]
    assert {path.parent.parent.name for path in left} == {"test_kills_its_worker0"}  # nobody was there to remove it
    assert {path.suffix for path in place.rglob("*.*") if path.is_file()} == {".raw", ".qcow2"}


def test_a_run_that_is_cut_short_leaves_none(pytester: pytest.Pytester, place: Path) -> None:
    pytester.makepyfile(VM + "def test_it(qcow2_chain, qemu_vm):\n    vm(qcow2_chain, qemu_vm).process.wait()\n")
    pytester.runpytest_subprocess("--timeout=3", "--timeout-method=thread", f"--basetemp={place / 'run'}")
    assert gone(place)


def fake(folder: Path, version: str) -> Path:
    """A folder with this machine's QEMU, by another version, and a qemu-img."""
    folder.mkdir()
    for name in ("qemu-system-x86_64", "qemu-img"):
        real = shutil.which(name)
        (folder / name).write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exec echo "QEMU version {version}"\nexec {real} "$@"\n'
        )
        (folder / name).chmod(0o755)
    return folder


def test_a_test_is_run_with_each_qemu_that_is_named(pytester: pytest.Pytester) -> None:
    one, other = fake(pytester.path / "one", "98.1.0"), fake(pytester.path / "other", "99.2.0")
    pytester.makepyfile(
        """
import shutil

def test_it(qcow2_chain, qemu_vm, qemu_programs):
    vm = qemu_vm(qcow2_chain("a.qcow2"))
    vm.check()
    assert qemu_programs.system in vm.process.args
    print("ran", qemu_programs.version, shutil.which("qemu-img"))
def test_of_an_image(qcow2_chain): qcow2_chain("a.qcow2").check()
def test_without(): pass
"""
    )
    done = pytester.runpytest_inprocess("-v", "-s", f"--qemu-path={one}", f"--qemu-path={other}/qemu-system-x86_64")
    done.assert_outcomes(passed=5)
    done.stdout.fnmatch_lines(
        [
            f"*test_it[[]qemu-98.1.0[]]*ran 98.1.0 {one}/qemu-img",
            f"*test_it[[]qemu-99.2.0[]]*ran 99.2.0 {other}/qemu-img",
        ]
    )
    done = pytester.runpytest_inprocess("-v", "-s", "--qemu-path", other)
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines([f"*::test_it *ran 99.2.0 {other}/qemu-img"])


@pytest.mark.parametrize("has", ["conftest", "plugin"])
def test_an_option_of_that_name_is_left_to_the_project(
    has: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = fake(pytester.path / "one", "98.1.0"), fake(pytester.path / "other", "99.2.0")
    option = "def pytest_addoption(parser): parser.addoption('--qemu-path', type=int)"
    pytester.makepyfile(**{"conftest" if has == "conftest" else "theirs": option})
    pytester.makepyfile(
        """
def test_it(qemu_programs, pytestconfig):
    print("ran", qemu_programs.version, pytestconfig.getoption("qemu_path"), pytestconfig.getoption("--qemu-path"))
"""
    )
    words = ["-s", "--qemu-path=7", *(["-p", "theirs"] if has == "plugin" else [])]
    pytester.syspathinsert()
    pytester.runpytest_subprocess(*words).stdout.fnmatch_lines(["*ran * 7 7*"])
    pytester.makeini(f"[pytest]\nasyncio_default_fixture_loop_scope = function\nqmpmerge_qemu = {one.name}")
    pytester.runpytest_subprocess(*words).stdout.fnmatch_lines(["*ran 98.1.0 7 7*"])
    monkeypatch.setenv("QMPMERGE_QEMU", f"{one}:{other}")
    done = pytester.runpytest_subprocess(*words)
    done.stdout.fnmatch_lines(["*ran 98.1.0 7 7*", "*ran 99.2.0 7 7*"])


@pytest.mark.parametrize("paths", [["/nowhere"], ["/nowhere", "/etc"]])
def test_a_qemu_that_is_named_and_not_there_is_an_error(paths: list[str], pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(qemu_vm): pass")
    done = pytester.runpytest_inprocess(*(f"--qemu-path={path}" for path in paths))
    assert done.ret != 0
    done.stdout.fnmatch_lines(["*/nowhere: no QEMU, and no folder with qemu-system-x86_64 or qemu-kvm in it*"])
    assert "Traceback" not in done.stdout.str() + done.stderr.str()


def test_without_qemu_tests_are_skipped_and_say_why(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile("def test_vm(qemu_vm): pass\ndef test_chain(qcow2_chain): pass\ndef test_without(): pass")
    monkeypatch.setenv("PATH", str(pytester.path))
    done = pytester.runpytest_inprocess("-rs")
    done.stdout.fnmatch_lines("SKIPPED * no setpriv on PATH, by which QEMU is started: it comes with util-linux")
    for name in ("setpriv", "stdbuf"):
        (pytester.path / name).touch(0o755)
    done = pytester.runpytest_inprocess("-rs")
    done.assert_outcomes(passed=1, skipped=2)
    done.stdout.fnmatch_lines(
        [
            "SKIPPED * no QEMU: none of qemu-system-x86_64, * is there; install one, or name it by --qemu-path",
            "SKIPPED * no qemu-img on PATH: it comes with qemu-utils",
        ]
    )


def test_a_project_that_does_not_use_it_has_no_more_than_the_plugins_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import json, pathlib, sys

def test_it(pytestconfig):
    seen = [sorted(sys.modules), sorted(pytestconfig.getini("markers")), str(sorted(pytestconfig.inicfg))]
    pathlib.Path(f"seen-{pytestconfig.pluginmanager.has_plugin('qmpmerge')}").write_text(json.dumps(seen))
"""
    )
    for arguments in ([], ["-p", "no:qmpmerge"]):
        pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)
    with_it, without = (json.loads((pytester.path / f"seen-{has}").read_text()) for has in (True, False))
    more = set(with_it[0]) - set(without[0])
    assert more == {"qmpmerge", "qmpmerge.testing", "qmpmerge.testing.plugin"}
    assert with_it[1:] == without[1:]
