"""
The doctor: each finding is made to happen on a real QEMU, and found; its command mends it; a healthy VM has none.

Every examination here is also a proof that it changes nothing.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig.disks import KINDS, blockdev, device, drive, nodes
from rig.faults import digests, injecting
from rig.left import note_stashed
from rig.machines import MIB, Content, Machine, machine, make_chain, run

import qmpmerge
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.state import State
from qmpmerge.doctor import leftovers, target
from qmpmerge.doctor.findings import Finding
from qmpmerge.journal import locks, store
from qmpmerge.journal.record import Record
from qmpmerge.qemu import flush, mutex

DEAD = 2**22 + 1
"""No process has this pid: it is past what the kernel gives."""


@pytest.fixture
def content() -> Content:
    return Content()


async def examined(vm: Machine) -> dict[str, Finding]:
    """The findings by name; everything is as it was before."""
    before = state(vm)
    async with qmpmerge.live(vm.target) as target:
        found = await qmpmerge.examine(target)
    assert state(vm) == before
    assert len({finding.name for finding in found}) == len(found), found
    return {finding.name: finding for finding in found}


def state(vm: Machine) -> Any:
    """Graph, jobs, exports and files, as far as asking for them is safe."""
    asked = ("query-jobs", "x-debug-query-block-graph", "query-block-exports", "query-status")
    answers = [vm.session.ask(command).get("return") for command in asked]
    return answers, digests(vm.folder), sorted(os.listdir(vm.folder))


def mend(vm: Machine, finding: Finding) -> None:
    """Do what the finding's command does: QMP lines go over the bench's own session."""
    words = shlex.split(finding.fix or "")
    if words[0] == "printf":
        assert words[-3:] == ["-t5", "-", f"UNIX-CONNECT:{vm.target}"]
        for line in words[3 : words.index("|")]:
            sent = json.loads(line)
            vm.session.execute(sent["execute"], **sent.get("arguments", {}))
    else:
        command = ["sh", "-c", finding.fix or ""]
        if words[0] == "qmpmerge":
            command = [sys.executable, "-m", "qmpmerge", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


async def found_and_mended(vm: Machine, name: str, severity: str, where: str, text: str) -> None:
    """The one finding is this, and after its command there is none."""
    found = await examined(vm)
    assert set(found) == {name}
    finding = found[name]
    assert (finding.severity, finding.where) == (severity, where)
    assert text in finding.message and finding.why
    mend(vm, finding)
    assert not await examined(vm)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_healthy_vm_has_no_findings(kind: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        assert not await examined(setup.machine)


# --- jobs ---------------------------------------------------------------------------------------------------------


def commit(vm: Machine, top: str = "b", **options: Any) -> None:
    vm.session.execute(
        "block-commit", job_id="j", device="c", top_node=top, base_node="base", auto_dismiss=False, **options
    )


async def test_an_intermediate_job_in_each_state(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-io", "-f", "qcow2", "-c", "write 0 8M", images[2])
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        commit(vm, backing_file="base.raw", auto_finalize=False, speed=1)
        async with qmpmerge.live(vm.target) as target:
            assert not await qmpmerge.examine(target)  # it runs, and changes by itself
        vm.session.execute("job-pause", id="j")
        vm.wait_for_job("paused")
        paused = (await examined(vm))["job-paused"]
        assert (paused.severity, paused.where) == ("care", "j")
        assert "resume" in paused.message
        mend(vm, paused)
        vm.session.execute("block-job-set-speed", device="j", speed=0)
        vm.wait_for_job("pending")
        pending = (await examined(vm))["job-pending"]
        assert (pending.severity, pending.fix) == ("care", f"qmpmerge job {vm.target} j follow")
        vm.session.execute("job-cancel", id="j")
        await found_and_mended(vm, "job-concluded", "care", "j", "Operation canceled")


async def test_an_active_job_in_each_state(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        commit(vm, "c", auto_finalize=False)
        vm.wait_for_job("ready")
        ready = (await examined(vm))["job-ready"]
        assert (ready.severity, ready.fix) == ("care", f"qmpmerge job {vm.target} j pivot")
        vm.session.execute("job-pause", id="j")
        vm.wait_for_job("standby")
        mend(vm, (await examined(vm))["job-standby"])
        vm.wait_for_job("ready")
        vm.session.execute("job-complete", id="j")
        vm.wait_for_job("pending")
        frozen = (await examined(vm))["job-pending"]
        assert frozen.severity == "harm" and "stands still" in frozen.why
        vm.session.execute("job-finalize", id="j")
        found = await examined(vm)
        # Until it is dismissed it holds the nodes that it has merged away.
        assert found["job-concluded"].severity == "note"
        mend(vm, found["job-concluded"])
        await found_and_closed(vm)


async def found_and_closed(vm: Machine) -> None:
    """The images that a merge has left open are closed, and then are files that show older data."""
    found = await examined(vm)
    assert set(found) == {"unused-node"}
    mend(vm, found["unused-node"])
    async with qmpmerge.live(vm.target) as target:
        stale = await qmpmerge.examine(target)
    assert [(finding.name, finding.where[-7:]) for finding in stale] == [
        ("other-overlay", "a.qcow2"),
        ("other-overlay", "b.qcow2"),
        ("empty-overlay", "c.qcow2"),
    ]


async def test_a_job_without_space(tmp_path: Path, images: list[Path], content: Content) -> None:
    full = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on"
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", images[2])
    with machine(tmp_path, *injecting(images, "base", full)) as vm:
        commit(vm, on_error="enospc", backing_file="base.raw")
        vm.wait_for_job("paused")
        found = (await examined(vm))["job-no-space"]
        assert (found.severity, found.fix) == ("care", f"qmpmerge job {vm.target} j follow")


async def test_jobs_of_types_that_we_do_not_follow(tmp_path: Path, images: list[Path], content: Content) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "target", "8M", cwd=tmp_path)
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        vm.session.execute("blockdev-add", driver="file", node_name="t", filename=str(tmp_path / "target"))
        job = {
            "job_id": "j",
            "device": "c",
            "target": "t",
            "sync": "full",
            "auto_finalize": False,
            "auto_dismiss": False,
        }
        vm.session.execute("blockdev-mirror", **job)
        vm.wait_for_job("ready")
        found = await examined(vm)
        assert (set(found), found["job-ready"].fix) == ({"job-ready"}, None)  # only its owner knows what for
        vm.session.execute("job-cancel", id="j")
        vm.wait_for_job("concluded")
        vm.session.execute("job-dismiss", id="j")
        vm.session.execute("blockdev-backup", **job)
        vm.wait_for_job("pending")
        mend(vm, (await examined(vm))["job-pending"])
        vm.wait_for_job("concluded")


async def test_a_stream_that_was_not_dismissed_is_all_that_is_said(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Asking for more would crash some QEMUs."""
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        vm.session.execute("block-stream", job_id="j", device="c", base_node="b", auto_dismiss=False)
        vm.wait_for_job("concluded")
        async with qmpmerge.live(vm.target) as target:
            (found,) = await qmpmerge.examine(target)
        assert (found.name, found.severity) == ("stream-concluded", "harm")
        mend(vm, found)
        assert not await examined(vm)


async def test_a_job_that_a_qmpmerge_drives_is_no_finding(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, "disk0", ending="hold")
            assert outcome.job is not None
        assert set(await examined(setup.machine)) == {"job-ready"}
        with locks.held(Image(str(images[0]), "raw", 0)):
            assert not await examined(setup.machine)


# --- nodes --------------------------------------------------------------------------------------------------------


async def test_nodes_that_nobody_needs_are_closed_top_down(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "other", "1M", cwd=tmp_path)
    with blockdev(tmp_path, images, content) as setup:
        for form, node, options in (
            ("file", "f", {"filename": str(tmp_path / "other")}),
            ("qcow2", "n", {"file": "f"}),
        ):
            setup.machine.session.execute("blockdev-add", driver=form, node_name=node, **options)
        await found_and_mended(setup.machine, "unused-node", "care", "n", "(n, f)")


async def test_a_filter_without_its_job(tmp_path: Path, images: list[Path]) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "target", "8M", cwd=tmp_path)
    extra = [
        *("-blockdev", f"file,node-name=t,filename={tmp_path}/target"),
        *("-blockdev", "copy-before-write,node-name=cbw,file=c,target=t"),
    ]
    with machine(tmp_path, *nodes(images), *extra, *device("cbw")) as vm:
        found = await examined(vm)
        assert set(found) == {"filter-left"}
        assert (found["filter-left"].where, found["filter-left"].fix) == ("cbw", None)


@pytest.mark.parametrize("read", ["snapshot-access", "target"])
async def test_a_backup_that_somebody_reads_is_healthy(tmp_path: Path, images: list[Path], read: str) -> None:
    """Through the filter, or in the old way from a target that has the disk for its backing file; until nobody reads it."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "target", "8M", cwd=tmp_path)
    target = f"qcow2,node-name=t,file=tf{',backing=c' if read == 'target' else ''}"
    extra = [
        *("-blockdev", f"file,node-name=tf,filename={tmp_path}/target"),
        *("-blockdev", target),
        *("-blockdev", "copy-before-write,node-name=cbw,file=c,target=t"),
    ]
    with machine(tmp_path, *nodes(images), *extra, *device("cbw")) as vm:
        node = "t"
        if read == "snapshot-access":
            node = "acc"
            vm.session.execute("blockdev-add", driver="snapshot-access", node_name=node, file="cbw")
        vm.session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "export")}})
        vm.session.execute("block-export-add", type="nbd", id="backup", node_name=node, name="backup")
        assert await examined(vm) == {}
        vm.session.execute("block-export-del", id="backup")
        while vm.session.execute("query-block-exports"):  # it goes by and by
            pass
        assert "filter-left" in await examined(vm)


async def test_an_inconsistent_bitmap_live_and_offline(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        setup.machine.session.execute("block-dirty-bitmap-add", node="c", name="bits", persistent=True)
        setup.off()
    with blockdev(tmp_path, images, content) as setup:
        setup.machine.kill()
    (found,) = await qmpmerge.examine(images[3])
    assert (found.name, found.severity, "bits" in found.message) == ("bitmap-inconsistent", "care", True)
    assert found.fix == f"qemu-img bitmap --remove -f qcow2 {images[3]} bits"
    with blockdev(tmp_path, images, content) as setup:
        await found_and_mended(setup.machine, "bitmap-inconsistent", "care", "c", "bits")


# --- what a killed qmpmerge left ------------------------------------------------------------------------------------


async def test_a_node_of_a_killed_qmpmerge(tmp_path: Path, images: list[Path], content: Content) -> None:
    """It is no disk, and as long as the merge that has put it there is at work nothing is wrong with it."""
    with blockdev(tmp_path, images, content) as setup:
        unchanging = {"take_child_perms": ["write-unchanged"]}
        setup.machine.session.execute("blockdev-add", driver="blkdebug", node_name=flush.NODE, image="c", **unchanging)
        async with qmpmerge.live(setup.machine.target) as target:
            assert [disk.name for disk in await target.disks()] == ["disk0"]
            async with mutex.taken(mutex.FLUSH, target.monitor):
                assert not await qmpmerge.examine(target)
        await found_and_mended(setup.machine, "unused-node", "care", flush.NODE, f"({flush.NODE})")


@pytest.mark.parametrize("kind", [drive, blockdev])
async def test_a_limit_of_a_killed_qmpmerge(kind: Any, tmp_path: Path, images: list[Path], content: Content) -> None:
    with kind(tmp_path, images, content) as setup:
        vm = setup.machine
        (entry,) = vm.session.execute("query-block")
        limits = dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0)
        name = f"qmpmerge-throttle-{DEAD}-{setup.disk}"
        vm.session.execute("block_set_io_throttle", id=entry["qdev"], bps_wr=MIB, **limits, group=name)
        await found_and_mended(vm, "throttle-left", "harm", entry["device"] or entry["qdev"], name)
        (entry,) = vm.session.execute("query-block")
        assert "group" not in entry["inserted"]


# --- the guest ----------------------------------------------------------------------------------------------------


async def test_a_paused_guest(tmp_path: Path, images: list[Path], content: Content) -> None:
    """One that was never started (-S) is healthy."""
    with drive(tmp_path, images, content) as setup:
        setup.machine.session.execute("cont")
        setup.machine.session.execute("stop")
        found = await examined(setup.machine)
        assert (set(found), found["guest-paused"].severity) == ({"guest-paused"}, "care")
        mend(setup.machine, found["guest-paused"])
        assert setup.machine.session.execute("query-status")["running"]


async def test_a_guest_that_was_stopped_at_an_error(tmp_path: Path, images: list[Path]) -> None:
    """The firmware reads the first sector."""
    failing = injecting(images, "base", "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5")
    failing[-1] += ",rerror=stop,bootindex=0"
    with machine(tmp_path, *failing) as vm:
        vm.session.execute("cont")
        while vm.session.execute("query-status")["status"] != "io-error":
            pass
        found = await examined(vm)
        assert (set(found), found["guest-io-error"].severity) == ({"guest-io-error"}, "harm")
        mend(vm, found["guest-io-error"])


# --- headers and chains -------------------------------------------------------------------------------------------


async def test_a_header_that_disagrees_is_mended_with_the_vm_off(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", "base.raw", images[3])
    with blockdev(tmp_path, images, content) as setup:
        found = await examined(setup.machine)
        disagrees = found.pop("disagrees")
        assert (disagrees.severity, disagrees.where) == ("harm", str(images[3]))
        assert not found
        setup.off()
        subprocess.run(shlex.split(disagrees.fix or ""), check=True, cwd=tmp_path)
    with blockdev(tmp_path, images, content) as setup:
        assert not await examined(setup.machine)


async def test_a_header_without_a_format(tmp_path: Path, images: list[Path], content: Content) -> None:
    forget_format(images[3])
    with blockdev(tmp_path, images, content) as setup:
        found = (await examined(setup.machine))["no-format"]
        assert (found.severity, found.where) == ("care", str(images[3]))
    assert {found.name: found.severity for found in await qmpmerge.examine(images[3])} == {"no-format": "care"}


def forget_format(image: Path) -> None:
    """Make the extension with the backing format one that QEMU does not know."""
    data = image.read_bytes()
    assert data.count(b"\xe2\x79\x2a\xca") == 1
    image.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))


async def test_a_file_that_was_replaced(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        shutil.copy(images[1], tmp_path / "copy")
        os.replace(tmp_path / "copy", images[1])
        found = await examined(setup.machine)
        assert (set(found), found["replaced"].where) == ({"replaced"}, str(images[1]))


async def test_a_raw_image_that_begins_like_qcow2(tmp_path: Path, images: list[Path], content: Content) -> None:
    with images[0].open("r+b") as base:
        base.write(images[3].read_bytes()[:512])
    with blockdev(tmp_path, images, content) as setup:
        found = await examined(setup.machine)
        assert (set(found), found["disguised"].where) == ({"disguised"}, str(images[0]))
    assert [found.name for found in await qmpmerge.examine(images[3])] == ["disguised"]


async def test_a_deep_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "DEEP", 60)
    images = long_chain(tmp_path, target.DEEP)
    with machine(tmp_path, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda") as vm:
        found = await examined(vm)
        assert set(found) == {"deep-chain"}
        assert found["deep-chain"].fix == f"qmpmerge commit {vm.target} vda --top {target.DEEP - 1}"
    (offline,) = await qmpmerge.examine(images[-1])
    assert (offline.name, offline.severity) == ("deep-chain", "care")


def long_chain(folder: Path, depth: int) -> list[Path]:
    """Images that differ in the one name that each header holds: a thousand times quicker than qemu-img."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "0000", "1M", cwd=folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "0000", "-F", "qcow2", "0001", "1M", cwd=folder)
    model = (folder / "0001").read_bytes()
    assert model.count(b"0000") == 1
    for number in range(2, depth):
        (folder / f"{number:04}").write_bytes(model.replace(b"0000", b"%04d" % (number - 1)))
    return [folder / f"{number:04}" for number in range(depth)]


# --- files beside the chain -----------------------------------------------------------------------------------------


def leave(folder: Path) -> None:
    """What earlier merges and crashes leave."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "old.qcow2", cwd=folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2.merged", cwd=folder)
    note_stashed(folder / "b.qcow2.merged", folder / "base.raw")
    (folder / ".base.raw.qmpmerge-lock").touch()
    (folder / ".a.qcow2.qmpmerge-lock").write_text('{"record": "/gone", "suspect": null}')
    images = (Image(str(folder / "base.raw"), "raw", 1), Image(str(folder / "c.qcow2"), "qcow2", 1))
    path, job = str(folder / ".c.qcow2.qmpmerge-record"), "qmpmerge-commit-vda"
    store.write(Record(path, "vm1", "vda", job, Chain(images), base=1, top=2, state=State.SWITCHING))


OVERLAY = "empty-overlay"
"""Of a running chain; of images nobody can say whether it is to be used."""

LEFT = {
    "unsettled": ("harm", ".c.qcow2.qmpmerge-record"),
    OVERLAY: ("care", "old.qcow2"),
    "unfinished": ("note", ".a.qcow2.qmpmerge-lock"),
    "old-lock": ("note", ".base.raw.qmpmerge-lock"),
    "stashed": ("note", "b.qcow2.merged"),
}


def check_left(found: dict[str, Finding], folder: Path, overlay: str = OVERLAY) -> None:
    left = {overlay if name == OVERLAY else name: what for name, what in LEFT.items()}
    assert {name: (finding.severity, finding.where) for name, finding in found.items()} == {
        name: (severity, str(folder / file)) for name, (severity, file) in left.items()
    }
    assert list(found) == list(left), "the worst first"
    assert "state switching" in found["unsettled"].message and "qmpmerge-commit-vda" in found["unsettled"].message
    assert found["unsettled"].fix == f"qmpmerge recover {folder}/c.qcow2"


async def test_what_lies_about_beside_a_running_chain(tmp_path: Path, images: list[Path], content: Content) -> None:
    leave(tmp_path)
    with blockdev(tmp_path, images, content) as setup:
        found = await examined(setup.machine)
        check_left(found, tmp_path)
        for name in ("old-lock", "stashed"):
            mend(setup.machine, found[name])
        os.unlink(tmp_path / ".c.qcow2.qmpmerge-record")
        found = await examined(setup.machine)
        assert set(found) == {"unfinished", OVERLAY}
        assert found[OVERLAY].fix == f"rm -f -- {tmp_path}/old.qcow2", "it holds nothing"


async def test_an_image_of_another_vm_on_the_same_base_is_left_alone(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    leave(tmp_path)
    (tmp_path / "other").mkdir()
    theirs = ["-drive", f"file={tmp_path}/old.qcow2,format=qcow2,if=none,id=vda,read-only=on"]
    with machine(tmp_path / "other", "-name", "other", *theirs), blockdev(tmp_path, images, content) as setup:
        found = (await examined(setup.machine))["dependent"]
        assert (found.severity, found.fix, "VM other" in found.why) == ("care", None, True)


@pytest.mark.parametrize("whole_folder", [False, True])
async def test_what_lies_about_beside_images(whole_folder: bool, tmp_path: Path, images: list[Path]) -> None:
    assert await qmpmerge.examine(images[3]) == ()
    leave(tmp_path)
    if whole_folder:
        # There the old image is the top of a chain of its own, and no less likely to be wanted than the other.
        found = {finding.name: finding for finding in await qmpmerge.examine(tmp_path)}
        assert list(found) == [name.replace(OVERLAY, "shared-image") for name in LEFT]
        assert (found["shared-image"].where, found["shared-image"].fix) == (str(images[0]), None)
    else:
        check_left({finding.name: finding for finding in await qmpmerge.examine(images[3])}, tmp_path, "other-overlay")


async def test_what_was_not_looked_at_is_told(images: list[Path], tmp_path: Path) -> None:
    (found,) = await qmpmerge.examine(images[3], search=[tmp_path / "not-there"])
    assert (found.name, found.severity, "cannot be listed" in found.message) == ("not-looked-at", "care", True)


def test_a_record_that_is_not_believed_is_a_finding_without_a_command_that_would_refuse(tmp_path: Path) -> None:
    for name, text in (("a", "no json"), ("b", "[]\n[]\n"), ("c", '{}\n{"schema": 1}\n')):
        (tmp_path / f".{name}.qmpmerge-record").write_text(text)
    os.symlink("/etc/passwd", tmp_path / ".d.qmpmerge-record")
    found = leftovers.in_folder(str(tmp_path))
    assert [(one.name, one.severity, one.where, one.fix) for one in found] == [
        ("unsettled", "harm", str(tmp_path / f".{name}.qmpmerge-record"), None) for name in "abcd"
    ]
    reasons = ["it was cut short", "it makes no sense", "it is of schema 1", "it is a symlink"]
    assert all(reason in one.message for reason, one in zip(reasons, found, strict=True))


async def test_chains_that_go_round_are_found_in_their_folder(tmp_path: Path) -> None:
    """Nothing is built on any of them from outside; a chain that is as it should be is none of them."""
    make_chain(tmp_path)
    for image, backing in (("itself", "itself"), ("x", "y"), ("y", "x"), ("on-y", "y")):
        run(
            "qemu-img",
            "create",
            "-quf",
            "qcow2",
            "-b",
            f"{backing}.qcow2",
            "-F",
            "qcow2",
            tmp_path / f"{image}.qcow2",
            "1M",
        )
    found = await qmpmerge.examine(tmp_path)
    loops = {one.where for one in found if one.name == "backing-loop"}
    assert loops == {str(tmp_path / "itself.qcow2"), str(tmp_path / "on-y.qcow2")}
    (tmp_path / "on-y.qcow2").unlink()
    found = await qmpmerge.examine(tmp_path)
    assert [one.where for one in found if one.name == "backing-loop"] == [
        str(tmp_path / "itself.qcow2"),
        str(tmp_path / "x.qcow2"),
    ]
    assert {one.severity for one in found} == {"harm"}


# --- images that cannot be walked, or are in use ----------------------------------------------------------------------


def loop(images: list[Path]) -> None:
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "c.qcow2", images[1])


def foreign(images: list[Path]) -> None:
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", "/dev/null", images[1])


def missing(images: list[Path]) -> None:
    images[0].unlink()


def corrupt(images: list[Path]) -> None:
    with images[2].open("r+b") as image:
        image.seek(79)  # the lowest byte of the incompatible features
        image.write(b"\x02")


@pytest.mark.parametrize(
    ("harm", "name"),
    [(loop, "backing-loop"), (foreign, "foreign-name"), (missing, "image-unreadable"), (corrupt, "corrupt")],
)
async def test_chains_that_do_not_open(harm: Callable[[list[Path]], None], name: str, images: list[Path]) -> None:
    harm(images)
    (found,) = await qmpmerge.examine(images[3])
    assert (found.name, bool(found.why)) == (name, True)


async def test_images_in_use_lead_to_the_vm(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images[:3], content) as setup:
        below, used = await qmpmerge.examine(images[3])
    assert (below.name, below.severity) == ("used-below", "care")
    assert (used.name, used.fix) == ("in-use", f"qmpmerge doctor pid:{setup.machine.process.pid}")


async def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(qmpmerge.errors.NoSuchTarget):
        await qmpmerge.examine(tmp_path / "nothing")


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, images: list[Path], content: Content) -> None:
    def said(*arguments: str) -> str:
        return run(sys.executable, "-m", "qmpmerge", "doctor", *arguments)

    with blockdev(tmp_path, images, content) as setup:
        target = setup.machine.target
        told = json.loads(said(target, "--json"))
        assert told == {
            "schema": 1,
            "command": "doctor",
            "verdict": "done",
            "looked_at": {"vms": 1, "images": 4},
            "targets": [{"target": target, "verdict": "done", "error": None}],
            "findings": [],
        }
        leave(tmp_path)
        assert said(target).startswith(f"harm: {tmp_path}/.c.qcow2.qmpmerge-record (unsettled)\n  what  a merge of ")
    told = json.loads(said(str(tmp_path), "--json"))
    assert "shared-image" in [finding["name"] for finding in told["findings"]]
    assert set(told["findings"][0]) == {"target", "name", "severity", "where", "message", "why", "fix"}
