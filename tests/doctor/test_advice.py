"""
The doctor's commands, typed as they are printed, in the state in which they are printed: each is accepted, and helps.

What has a test of its own elsewhere is named here, and a finding without any such test is found.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig import advice
from rig.command import JOB, invoke
from rig.disks import Setup, blockdev, drive
from rig.faults import injecting
from rig.left import record
from rig.machines import Content, machine, make_chain, run

import qmpmerge
from qmpmerge.doctor import target
from qmpmerge.doctor.catalogue import MEANINGS
from qmpmerge.journal import store

TESTS = Path(__file__).parents[1]

Setting = Iterator[tuple[str | Path, Callable[[], None]]]
"""What to ask the doctor about, and what its reader does before he types the command."""


def nothing() -> None:
    pass


def corrupt(folder: Path, images: list[Path]) -> Setting:
    with images[2].open("r+b") as image:
        image.seek(79)  # the lowest byte of the incompatible features
        image.write(b"\x02")
    yield images[3], nothing


def bitmap(folder: Path, images: list[Path]) -> Setting:
    with blockdev(folder, images, Content()) as setup:
        setup.machine.session.execute("block-dirty-bitmap-add", node="c", name="bits", persistent=True)
        setup.off()
    with blockdev(folder, images, Content()) as setup:
        setup.machine.kill()
    yield images[3], nothing


def no_format(folder: Path, images: list[Path]) -> Setting:
    data = images[3].read_bytes()
    images[3].write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))  # the backing format's extension
    with drive(folder, images, Content()) as setup:
        yield setup.machine.target, setup.off


def unsettled(folder: Path, images: list[Path]) -> Setting:
    store.write(record(images, 4))
    yield folder, nothing


def in_use(folder: Path, images: list[Path]) -> Setting:
    with drive(folder, images, Content()):
        yield images[3], nothing


def job_ready(folder: Path, images: list[Path]) -> Setting:
    with drive(folder, images, Content()) as setup:
        setup.machine.session.execute("block-commit", job_id="j", device="vda", auto_dismiss=False)
        setup.machine.wait_for_job("ready")
        yield setup.machine.target, nothing


def job_running(folder: Path, images: list[Path]) -> Setting:
    run("qemu-io", "-f", "qcow2", "-c", "write 0 4M", images[2])
    with drive(folder, images, Content()) as setup:
        assert invoke("commit", setup.machine.target, "--speed", "1", "--detach").code == 7
        yield setup.machine.target, lambda: lift(setup)


def lift(setup: Setup) -> None:
    """A copy that goes on is as fast as it can be."""
    setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)


def job_no_space(folder: Path, images: list[Path]) -> Setting:
    full = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on"
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", images[2])
    with machine(folder, *injecting(images, "base", full)) as vm:
        vm.session.execute(
            "block-commit", job_id="j", device="c", top_node="b", base_node="base", backing_file="base.raw",
            auto_dismiss=False, on_error="enospc",
        )  # fmt: skip
        vm.wait_for_job("paused")
        yield vm.target, nothing


HERE: dict[str, Callable[[Path, list[Path]], Setting]] = {
    "corrupt": corrupt,
    "bitmap-inconsistent": bitmap,
    "no-format": no_format,
    "unsettled": unsettled,
    "in-use": in_use,
    "job-ready": job_ready,
    "job-running": job_running,
    "job-no-space": job_no_space,
}

ELSEWHERE = {
    "disagrees": "doctor/test_target.py::test_a_header_that_disagrees_is_mended_with_the_vm_off",
    "part-of-file": "operations/test_slices.py::test_the_doctor_mends_a_header_that_names_the_whole_file",
    "deep-chain": "doctor/test_advice.py::test_a_deep_chain_is_merged",
    "guest-paused": "doctor/test_target.py::test_a_paused_guest",
    "guest-io-error": "doctor/test_target.py::test_a_guest_that_was_stopped_at_an_error",
    "throttle-left": "doctor/test_target.py::test_a_limit_of_a_killed_qmpmerge",
    "stream-concluded": "doctor/test_target.py::test_a_stream_that_was_not_dismissed_is_all_that_is_said",
    "job-pending": "doctor/test_target.py::test_jobs_of_types_that_we_do_not_follow",
    "job-paused": "doctor/test_target.py::test_an_intermediate_job_in_each_state",
    "job-standby": "doctor/test_target.py::test_an_active_job_in_each_state",
    "job-concluded": "doctor/test_target.py::test_an_intermediate_job_in_each_state",
    "not-looked-at": "doctor/test_folders.py::test_another_filesystem_is_not_entered_and_told_with_the_command_that_does",
    "stale-image": "doctor/test_launch.py::test_what_is_kept_goes_out_of_reach_time_and_again",
    "not-active": "doctor/test_launch.py::test_an_image_that_is_not_the_active_one",
    "empty-overlay": "doctor/test_launch.py::test_an_overlay_that_holds_nothing_may_go",
    "unused-node": "doctor/test_target.py::test_nodes_that_nobody_needs_are_closed_top_down",
    "launch-path": "doctor/test_launch.py::test_a_launch_path_that_was_merged_away",
    "old-lock": "doctor/test_target.py::test_what_lies_about_beside_a_running_chain",
    "stashed": "doctor/test_target.py::test_what_lies_about_beside_a_running_chain",
}

BY_HAND = {
    *("started-stale", "replaced", "unreadable", "image-unreadable", "backing-loop", "too-deep", "other-overlay"),
    *("dependent", "used-below", "shared-image", "odd-note", "no-active", "several-active", "active-unknown"),
    *(
        "not-seen",
        "disguised",
        "foreign-name",
        "filter-left",
        "unfinished",
        "out-of-reach",
        "unsupported-format",
        "doubtful",
    ),
}
"""No command of ours decides about these."""

LOOKING = {"in-use"}
"""Whose command only tells more."""


@pytest.mark.parametrize("name", HERE)
def test_the_command_is_accepted_and_helps(name: str, tmp_path: Path) -> None:
    with contextmanager(HERE[name])(tmp_path, make_chain(tmp_path)) as (place, prepare):
        (command,) = {one["fix"] for one in advice.findings(place) if one["name"] == name}
        prepare()
        done = advice.typed(command)
        assert done.returncode == 0, done.stderr
        if prepare is nothing and name not in LOOKING:
            assert name not in advice.names(place)


async def test_a_deep_chain_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "DEEP", 12)
    images = make_chain(tmp_path, ["base.qcow2", *(f"{number}.qcow2" for number in range(11))])
    (found,) = await qmpmerge.examine(images[-1])
    assert found.name == "deep-chain"
    assert advice.typed(found.fix or "").returncode == 0
    assert not [one for one in await qmpmerge.examine(images[-1]) if one.name == "deep-chain"]


async def test_of_too_deep_a_chain_a_part_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "DEEP", 6)
    monkeypatch.setattr(target, "DEEPEST", 8)
    images = make_chain(tmp_path, ["base.qcow2", *(f"{number}.qcow2" for number in range(11))])
    (found,) = await qmpmerge.examine(images[-1])
    assert (found.severity, found.fix) == ("harm", f"qmpmerge commit {images[-1]} --base 7 --top 11")
    assert advice.typed(found.fix or "").returncode == 0


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_tests_elsewhere_are_there_and_type_the_command(name: str) -> None:
    file, _, function = ELSEWHERE[name].partition("::")
    source = (TESTS / file).read_text()
    functions = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    (test,) = [one for one in functions if one.name == function]
    text = ast.get_source_segment(source, test) or ""
    assert any(
        word in text
        for word in ("mend", "carry_out", "typed(", "(*shlex.split(", "run(shlex.split(", "run(found[0].fix")
    )


def test_every_finding_has_such_a_test() -> None:
    assert HERE.keys() | ELSEWHERE.keys() | BY_HAND == MEANINGS.keys()
    assert not BY_HAND & (HERE.keys() | ELSEWHERE.keys())
