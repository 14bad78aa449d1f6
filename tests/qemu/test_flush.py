"""Flushes whose error is seen, wherever and as whom QEMU runs, and whatever its disks are used for."""

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rig import faults
from rig.disks import KINDS, blockdev, device, drive, nodes
from rig.machines import MIB, SIZE, Content, Machine, fill, machine, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge.errors import Busy, NotDurable
from qmpmerge.qemu import flush, mutex

FAILS = "inject-error.0.event=flush_to_disk,inject-error.0.iotype=flush,inject-error.0.errno=5"
QCOW2 = ("base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2")
OWN_TMP = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /tmp && exec "$@"', "sh"]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def pend(vm: Machine, top: str) -> None:
    """A job that has copied what is above the base, and waits."""
    commit = {"job_id": "job", "device": top, "top_node": "a", "base_node": "base", "backing_file": "base.qcow2"}
    vm.session.execute("block-commit", **commit, auto_finalize=False)
    vm.wait_for_job("pending")


async def flushed(vm: Machine) -> None:
    async with qmpmerge.live(vm.target) as target:
        await flush.flush(target.monitor, (await target.chain()).chain.base)


# --- the error is seen ---------------------------------------------------------------------------------------------------


@pytest.fixture
def grown(tmp_path: Path) -> list[Path]:
    """The base is half as large as what lies above it: a job that has grown it lets nobody else resize it."""
    images = make_chain(tmp_path, ("base.qcow2", "a.qcow2", "b.qcow2"))
    for image in images[1:]:
        run("qemu-img", "resize", "-q", image, str(2 * SIZE))
    run("qemu-io", "-c", f"write -P 5 {SIZE} 1M", images[1])
    return images


IOTHREAD = ["-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=b,iothread=io"]


@pytest.mark.parametrize("way", [[], device("b"), IOTHREAD], ids=["storage daemon", "VM", "iothread"])
@pytest.mark.parametrize("error", ["", FAILS])
async def test_the_error_of_a_flush_is_seen(way: list[str], error: str, tmp_path: Path, grown: list[Path]) -> None:
    explicit = faults.injecting(grown, "base", error or "align=512")[:-2]
    program = "qemu-system-x86_64" if way else "qemu-storage-daemon"
    arguments = [*explicit, *way] if way else [part.replace("-blockdev", "--blockdev") for part in explicit]
    with machine(tmp_path, *arguments, program=program) as vm:
        pend(vm, "b")
        with pytest.raises(NotDurable, match="Input/output error") if error else contextlib.nullcontext():
            await flushed(vm)
        if not error:
            vm.session.execute("job-finalize", id="job")


async def test_the_human_monitor_shows_none(tmp_path: Path, grown: list[Path]) -> None:
    with machine(tmp_path, *faults.injecting(grown, "base", FAILS)) as vm:
        pend(vm, "b")
        assert vm.session.execute("human-monitor-command", command_line="qemu-io base flush") == ""
        assert (tmp_path / "stdout").read_text() == ""


async def test_a_base_that_grows_needs_no_comparison(tmp_path: Path, grown: list[Path]) -> None:
    content = Content(2 * SIZE)
    fill(grown, content)
    run("qemu-io", "-c", content.put(0x77, SIZE + MIB, MIB), grown[-1])
    run("qemu-io", "-c", content.put(5, SIZE, MIB), grown[-1])
    with drive(tmp_path, grown, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            outcome = await qmpmerge.commit(target, top="[2]", verify=False)
        assert not outcome.verified
        assert outcome.after.base.virtual_size == 2 * SIZE
        setup.check()
        setup.off()
    content.check(outcome.after.active.file)


async def test_what_is_read_only_was_flushed_before(tmp_path: Path, grown: list[Path]) -> None:
    """QEMU does so when it makes it that, and leaves it writable where that fails."""
    with machine(tmp_path, *nodes(grown), *device("b")) as vm:
        await flushed(vm)
    with machine(tmp_path, *faults.injecting(grown, "base", FAILS)) as vm:
        pend(vm, "b")
        vm.session.execute("job-finalize", id="job")
        while vm.session.execute("query-jobs"):
            pass
        entries = vm.session.execute("query-named-block-nodes", flat=True)
        assert [entry["ro"] for entry in entries if entry["node-name"] == "base"] == [False]


# --- QEMU need not stand still ---------------------------------------------------------------------------------------------


async def test_a_header_is_synced_by_ourselves_where_the_file_is_the_one_that_qemu_has(
    tmp_path: Path, grown: list[Path]
) -> None:
    said: list[str] = []
    with machine(tmp_path, *nodes(grown), *device("b")) as vm:
        async with heard(lambda *told: said.append(" ".join(told))), qmpmerge.live(vm.target) as target:
            overlay = (await target.chain()).chain.active
            said.clear()
            await flush.flush(target.monitor, overlay, header_only=True)
            assert not said
            os.rename(overlay.file, f"{overlay.file}.moved")
            shutil.copy(f"{overlay.file}.moved", overlay.file)
            await flush.flush(target.monitor, overlay, header_only=True)
            assert [line for line in said if "blockdev-reopen" in line]
            said.clear()
            await flush.flush(target.monitor, replace(overlay, inode=None), header_only=True)
            assert [line for line in said if "blockdev-reopen" in line]


# --- wherever and as whom QEMU runs ----------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder for all users, and not in /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def allowed(command: list[str]) -> bool:
    """Whether we may start programs like that here."""
    try:
        return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("before", [OWN_TMP, NOBODY], ids=["its own /tmp", "another user"])
@pytest.mark.parametrize("names", [QCOW2, ("base.raw", *QCOW2[1:])], ids=["qcow2", "raw"])
async def test_a_qemu_elsewhere(
    before: list[str], names: tuple[str, ...], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not allowed(before):
        pytest.skip("not allowed here")
    images, content = make_chain(shared, names), Content()
    fill(images, content)
    for image in images:
        os.chmod(image, 0o666)
    monkeypatch.setenv("TMPDIR", str(shared / ("long" * 40)))
    with machine(shared, *nodes(images), *device("c"), before=before) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top="[3]")
        assert (outcome.verdict, str(outcome.after)) == ("merged", f"{names[0]} <-- c.qcow2")
        vm.stop()
    content.check(images[3])


async def test_a_monitor_over_tcp(tmp_path: Path) -> None:
    """It passes no descriptors, and does not tell whose it is."""
    images, content = make_chain(tmp_path, QCOW2), Content()
    fill(images, content)
    monitor = ["-chardev", "socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off", "-mon", "tcp,mode=control"]
    with machine(tmp_path, *nodes(images), *device("c"), *monitor) as vm:
        names = {entry["label"]: entry["filename"] for entry in vm.session.execute("query-chardev")}
        port = names["tcp"].partition("tcp:127.0.0.1:")[2].partition(",")[0]
        async with qmpmerge.live(f"tcp:127.0.0.1:{port}") as target:
            assert target.pid is None
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
        vm.stop()
    content.check(images[3])


@pytest.mark.parametrize("kind", ["storage-daemon", "blockdev"])
async def test_the_nbd_server_of_somebody_else_does_not_matter(kind: str, tmp_path: Path) -> None:
    """A storage daemon mostly has one; a VM while it is backed up."""
    images, content = make_chain(tmp_path, QCOW2), Content()
    fill(images, content)
    with KINDS[kind](tmp_path, images, content) as setup:
        session = setup.machine.session
        address = {"type": "unix", "data": {"path": str(tmp_path / "server")}}
        assert ("error" in session.ask("nbd-server-start", addr=address)) == (kind == "storage-daemon"), "it has one"
        async with setup.target() as target:
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
        assert "already running" in session.ask("nbd-server-start", addr=address)["error"]["desc"]
        setup.check()
        setup.off()
    content.check(images[3])


# --- merges at the same time -----------------------------------------------------------------------------------------------


async def test_merges_of_one_qemu_take_turns(tmp_path: Path) -> None:
    """One that took away the node of another would fail its merge."""
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    chains = [make_chain(folder) for folder in folders]
    contents = [Content() for _ in chains]
    arguments: list[str] = []
    for images, content in zip(chains, contents, strict=True):
        fill(images, content)
        name = images[0].parent.name
        arguments += ["-drive", f"file={images[-1]},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]
    said: list[str] = []
    with machine(tmp_path, *arguments) as vm:
        async with (
            heard(lambda direction, text: said.append(f"{direction} {text}")),
            qmpmerge.live(vm.target) as target,
        ):
            merges = [qmpmerge.commit(target, images[0].parent.name, top="[3]") for images in chains]
            outcomes = await asyncio.gather(*merges)
        vm.stop()
    assert [outcome.verdict for outcome in outcomes] == ["merged"] * len(chains)
    flushes = [line for line in said if line.startswith("->") and flush.NODE in line]
    words = [line.split('"')[3] for line in flushes]
    assert len(words) >= 8 * len(chains)
    assert words == ["blockdev-del", "blockdev-add", "blockdev-reopen", "blockdev-del"] * (len(words) // 4)
    for images, content in zip(chains, contents, strict=True):
        content.check(images[-1])


async def test_another_merge_that_does_not_end_its_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "SECONDS", 0.1)
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    with blockdev(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            async with mutex.taken(mutex.FLUSH, target.monitor):
                with pytest.raises(Busy) as refused:
                    await qmpmerge.commit(target, top="[3]")
            assert refused.value.holder == f"pid {os.getpid()} of user {pwd.getpwuid(os.geteuid()).pw_name}"
            assert refused.value.hint.startswith(f"wait until {refused.value.holder} has done")
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
