"""
What goes wrong while a job runs: a full disk, failing storage, a server that goes away, a guest that is stopped, rebooted,
switched off, killed or unplugged, and people who want something else of the disk meanwhile.

In each case the old chain is right or the merge is proved, and one sentence says which.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from rig.command import COMMAND, invoke
from rig.disks import Setup, blockdev, device, drive, form, nbd_server, nodes
from rig.faults import injecting, untouched
from rig.folder import litter
from rig.machines import MIB, SIZE, Content, fill, machine, make_chain, run
from rig.wire import heard

import qmpmerge as library
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.errors import Busy, CannotRecord, DaemonEnded, JobFailed, OutOfQuota, SessionLost, Suspect
from qmpmerge.qemu import jobs

JOB = "qmpmerge-commit-vda"
TOPS = pytest.mark.parametrize("top", ["[3]", "[4]"])
OLD = "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"


def failing(kind: str, number: int, once: bool = False) -> str:
    rule = f"inject-error.0.event=none,inject-error.0.iotype={kind},inject-error.0.errno={number}"
    return f"{rule},inject-error.0.once=on" if once else rule


UNREADABLE = "inject-error.0.event=read_aio,inject-error.0.iotype=read,inject-error.0.errno=5"
"""The data, not the header."""


@contextlib.asynccontextmanager
async def begun(
    name: str, top: str = "[3]", speed: int = 1, work: Callable[..., Awaitable[library.Outcome]] = library.commit
) -> AsyncIterator["asyncio.Future[library.Outcome]"]:
    """A merge that has begun and does not end by itself."""
    seen = asyncio.Event()
    async with library.live(name) as target:
        merge = asyncio.ensure_future(work(target, base="[1]", top=top, speed=speed, report=lambda told: seen.set()))
        waiting = asyncio.ensure_future(seen.wait())
        await asyncio.wait({merge, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not merge.done(), merge.exception()
        yield merge


# --- space ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    run("umount", folder)


def crowded(folder: Path, small: Path) -> tuple[list[Path], Content]:
    """A chain whose base lies on a filesystem that something else fills up."""
    images = make_chain(folder)
    content = Content()
    fill(images, content)
    run("cp", "--sparse=always", images[0], small / "base.raw")
    images[0].unlink()
    images[0].symlink_to(small / "base.raw")
    crowd(small)
    return images, content


def crowd(small: Path, *, but: int = 16384) -> None:
    """Fill it up, but for some bytes: what we note beside base before a job is started finds room in them."""
    with (small / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - but)


@TOPS
async def test_a_full_disk_is_told_and_waited_for(
    top: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: the job stands still until somebody makes room, then it ends as if nothing had been."""
    monkeypatch.setattr(jobs, "RESUME_SECONDS", 0.2)
    images, content = crowded(tmp_path, small)
    seen: list[Progress] = []

    def make_room(told: Progress) -> None:
        seen.append(told)
        if told.shortage is not None:
            (small / "filler").unlink(missing_ok=True)

    with drive(tmp_path, images, content) as setup:
        async with setup.target() as target:
            outcome = await library.commit(target, "vda", top=top, force=["no-space"], report=make_room)
        assert outcome.verdict in ("merged", "pivoted")
        setup.check()
    short = next(told for told in seen if told.shortage is not None)
    assert short.shortage is not None and short.status == "paused"
    assert short.shortage.filesystem == str(small) and 0 < short.shortage.needed <= SIZE
    content.check(outcome.after.active.file, form(images[0] if top == "[4]" else images[3]))


@TOPS
async def test_a_disk_without_room_for_the_record_is_refused(top: str, small: Path, tmp_path: Path) -> None:
    """A real one, with the active image on it: it was full before us, and we leave nothing there."""
    images, content = make_chain(tmp_path), Content()
    fill(images, content)
    run("cp", "--sparse=always", images[3], small / "c.qcow2")
    images[3].unlink()
    images[3] = small / "c.qcow2"
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", images[2], "-F", "qcow2", images[3])
    crowd(small, but=0)
    before = sorted(small.iterdir())
    with drive(tmp_path, images, content) as setup:
        async with setup.target() as target:
            with pytest.raises(CannotRecord, match="No space left"):
                await library.commit(target, "vda", base="[1]", top=top)
            assert (await target.chain()).chain.files == [str(image) for image in images]
        assert (setup.machine.session.execute("query-jobs"), sorted(small.iterdir())) == ([], before)
        (small / "filler").unlink()
        async with setup.target() as target:
            outcome = await library.commit(target, "vda", base="[1]", top=top)
        setup.check()
    content.check(outcome.after.active.file, form(images[0] if top == "[4]" else images[3]))


def test_a_full_disk_in_text_and_json_and_ctrl_c(small: Path, tmp_path: Path) -> None:
    images, content = crowded(tmp_path, small)
    with drive(tmp_path, images, content) as setup:
        for options, mark in (([], "no space"), (["--json"], '"needed"')):
            line = [COMMAND, "commit", setup.machine.target, "--top", "[3]", "--force", "no-space", *options]
            tool = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert tool.stderr is not None
            told = next((line for line in tool.stderr if mark in line), "")
            tool.terminate()
            tool.communicate()
            assert tool.returncode == 130
            if options:
                assert json.loads(told)["shortage"]["filesystem"] == str(small)
            else:
                assert f"paused: no space on {small}, " in told and told.endswith("more needed\n")
        assert setup.machine.session.execute("query-jobs") == []
        setup.check()
        setup.off()
    content.check(images[3])


@TOPS
async def test_a_quota_is_called_a_quota(tmp_path: Path, images: list[Path], content: Content, top: str) -> None:
    """QEMU does not wait there, as it does for a full disk."""
    with machine(tmp_path, *injecting(images, "base", failing("write", 122))) as vm:
        async with library.live(vm.target) as target:
            with pytest.raises(OutOfQuota, match="quota exceeded on /") as failed:
                await library.commit(target, top=top)
        assert "raise the quota" in failed.value.hint and failed.value.exit_code == 5
        await untouched(vm)
        vm.stop()
    content.check(images[3])


# --- failing storage, and the comparison that it makes compulsory ------------------------------------------------------


@TOPS
async def test_a_merged_image_that_cannot_be_read_fails_the_job(
    tmp_path: Path, images: list[Path], content: Content, top: str
) -> None:
    with machine(tmp_path, *injecting(images, "b", UNREADABLE)) as vm:
        async with library.live(vm.target) as target:
            with pytest.raises(JobFailed, match="Input/output error"):
                await library.commit(target, top=top)
        await untouched(vm)
        vm.stop()
    content.check(images[3])


@TOPS
async def test_after_a_write_error_the_next_merge_compares_whatever_it_is_told(
    tmp_path: Path, images: list[Path], content: Content, top: str
) -> None:
    """QEMU may believe that base holds what the storage has lost. The note that says so goes once they were compared."""
    note = tmp_path / ".base.raw.qmpmerge-lock"
    with machine(tmp_path, *injecting(images, "base", failing("write", 5, once=True))) as vm:
        async with library.live(vm.target) as target:
            with pytest.raises(JobFailed):
                await library.commit(target, top=top)
        assert json.loads(note.read_text())["suspect"] == "Input/output error"
        await untouched(vm)
        async with library.live(vm.target) as target:
            outcome = await library.commit(target, top=top, verify=False)
        assert outcome.verified and not note.exists()
        vm.stop()
    content.check(outcome.after.active.file)


async def test_what_an_earlier_failure_left_in_base_is_found(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """Storage that says yes and writes nothing, as it looks after a server has lost what was not flushed."""
    with machine(tmp_path, *injecting(images, "base", failing("write", 5, once=True))) as vm:
        async with library.live(vm.target) as target:
            with pytest.raises(JobFailed):
                await library.commit(target, top="[3]")

            def corrupt(direction: str, text: str) -> None:
                if "write-unchanged" in text and direction == "->":
                    with images[0].open("r+b") as file:
                        file.seek(2 * MIB)
                        file.write(b"lost")

        async with heard(corrupt), library.live(vm.target) as target:
            with pytest.raises(library.errors.NotVerified, match="different data"):
                await library.commit(target, top="[3]", verify=False)
        await untouched(vm)
        vm.stop()
    assert (tmp_path / ".base.raw.qmpmerge-lock").exists()
    content.check(images[3])


async def test_a_guest_that_runs_is_not_moved_onto_a_suspect_base(
    tmp_path: Path, images: list[Path], content: Content
) -> None:
    """It cannot be compared while the guest writes; what lies below an overlay can."""
    with machine(tmp_path, *injecting(images, "base", failing("write", 5, once=True))) as vm:
        async with library.live(vm.target) as target:
            with pytest.raises(JobFailed):
                await library.commit(target)
            vm.session.execute("cont")
            with pytest.raises(Suspect, match="Input/output error") as refused:
                await library.commit(target)
            assert "qmpmerge snapshot" in refused.value.hint
            assert (await library.commit(target, top="[3]")).verified
            assert (await library.commit(target)).verdict == "pivoted"
        vm.stop()
    content.check(images[0])


# --- a base on the network ------------------------------------------------------------------------------------------------


async def test_a_server_that_went_away_and_came_back(tmp_path: Path, images: list[Path], content: Content) -> None:
    """The job is not resumed but begun again, and base read back, whatever the user says."""
    (tmp_path / "server").mkdir()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        uri = first.enter_context(nbd_server(tmp_path / "server", images[0]))
        path = uri.partition("socket=")[2]
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", images[1])
        arguments = nodes(images)
        arguments[1] = f"nbd,node-name=base-file,server.type=unix,server.path={path}"
        vm = stack.enter_context(machine(tmp_path, *arguments, *device("c")))
        async with begun(vm.target) as merge:
            first.close()
            vm.session.ask("block-job-set-speed", device="qmpmerge-commit-disk0", speed=0)
            with pytest.raises(JobFailed, match="Input/output error"):
                await merge
        second = stack.enter_context(nbd_server(tmp_path / "server", images[0]))
        assert second == uri
        async with library.live(vm.target) as target:
            assert not await target.jobs()
            outcome = await again(target)
        assert (outcome.verdict, outcome.verified) == ("merged", True)
        vm.stop()
        content.check(images[3])


async def again(target: library.Target) -> library.Outcome:
    """A lost server is noticed by the first who asks: QEMU connects anew for the one after."""
    for _ in range(5):
        with contextlib.suppress(JobFailed, library.errors.NotDurable):
            return await library.commit(target, base="[1]", top="[3]", verify=False)
    raise AssertionError("it does not come back")


# --- what happens to the guest -------------------------------------------------------------------------------------------


@TOPS
async def test_a_guest_may_be_stopped_go_on_and_be_reset_meanwhile(setup: Setup, content: Content, top: str) -> None:
    ask = setup.machine.session.execute
    ask("cont")
    async with begun(setup.machine.target, top) as merge:
        for command in ("stop", "cont", "system_reset", "system_powerdown"):
            ask(command)
        setup.machine.session.ask("block-job-set-speed", device=JOB, speed=0)  # an active one may have ended already
        outcome = await merge
    assert outcome.verdict in ("merged", "pivoted")
    assert ask("query-status")["running"]
    setup.check()
    setup.off()
    content.check(outcome.after.active.file)


@pytest.mark.parametrize("way", ["quit", "SIGTERM", "SIGKILL"])
async def test_a_qemu_that_ends_leaves_the_old_chain_and_the_merge_can_be_made_again(
    tmp_path: Path, images: list[Path], content: Content, way: str
) -> None:
    with drive(tmp_path, images, content) as setup:
        async with begun(setup.machine.target) as merge:
            if way == "quit":
                setup.machine.session.ask("quit")
            elif way == "SIGTERM":
                setup.machine.process.terminate()
            else:
                setup.machine.kill()
            with pytest.raises((SessionLost, JobFailed)) as ended:  # it cancels its jobs before it goes
                await merge
        assert ended.value.exit_code in (5, 6)
    content.check(images[3])
    with drive(tmp_path, images, content) as setup:
        async with setup.target() as target:
            assert (await library.commit(target, top="[3]")).verdict == "merged"
    content.check(images[3])


@pytest.mark.parametrize(("verb", "top"), [("commit", "[3]"), ("commit", "[4]"), ("pull", "[4]")])
async def test_a_power_cut_while_qemu_copies_may_take_the_record_with_it(
    tmp_path: Path, images: list[Path], content: Content, verb: str, top: str
) -> None:
    """Its name and the note in the lock may not be durable yet: then nothing is to be told, and nothing to be put right."""
    work = library.commit if verb == "commit" else library.pull
    before = sorted(file.name for file in tmp_path.glob("*.[qr]*"))
    with drive(tmp_path, images, content) as setup:
        async with begun(setup.machine.target, top, work=work) as merge:
            setup.machine.kill()
            with pytest.raises((SessionLost, JobFailed)):
                await merge
    assert litter(tmp_path)
    for name in litter(tmp_path):
        (tmp_path / name).unlink()
    assert sorted(file.name for file in tmp_path.glob("*.[qr]*")) == before
    assert library.active(images[0]).file == str(images[3])
    content.check(images[3])
    with drive(tmp_path, images, content) as setup:
        async with setup.target() as target:
            outcome = await work(target, top=top)
        setup.off()
    content.check(outcome.after.active.file)


@pytest.mark.parametrize("verb", ["commit", "pull"])
async def test_a_daemon_that_dies_while_it_copies_has_switched_nothing(
    verb: str, images: list[Path], content: Content
) -> None:
    with pytest.raises(DaemonEnded):
        async with library.offline(images[3]) as target:
            pid = target.pid or 0
            await getattr(library, verb)(target, speed=1, report=lambda told: os.kill(pid, signal.SIGKILL))
    stays = [] if verb == "commit" else [".c.qcow2.qmpmerge-lock"]
    assert litter(images[3].parent) == stays, "it is over and done with, but what was copied was not compared"
    content.check(images[3])


@TOPS
async def test_a_device_may_be_unplugged_meanwhile(
    tmp_path: Path, images: list[Path], content: Content, top: str
) -> None:
    """The nodes stay for as long as the job holds them, or their user does, and so does the proof."""
    scsi = ["-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=c,id=disk0"]
    with machine(tmp_path, *nodes(images), *scsi) as vm:
        async with library.live(vm.target) as target:
            outcome = await library.commit(target, "disk0", top=top, ending="hold") if top == "[4]" else None
        async with begun(vm.target, top) if outcome is None else contextlib.nullcontext() as merge:
            vm.session.execute("device_del", id="disk0")
            vm.session.execute("block-job-set-speed", device="qmpmerge-commit-disk0", speed=0)
            if merge is not None:
                outcome = await merge
            else:
                async with library.live(vm.target) as target:
                    outcome = await library.follow(target, "qmpmerge-commit-disk0")
        assert outcome.verdict in ("merged", "pivoted")
        vm.stop()
    content.check(outcome.after.active.file)


@pytest.mark.parametrize("words", [("commit", "--top", "[3]"), ("pull",)], ids=["commit", "pull"])
def test_a_drive_that_is_unplugged_goes_with_the_job(
    words: tuple[str, ...], tmp_path: Path, images: list[Path], content: Content
) -> None:
    """
    Nothing is left to look at in QEMU, but by `recover`: while the job is there it says so, and then what lies on disk tells.
    """
    drive = ["-drive", f"file={images[3]},format=qcow2,if=none,id=vda"]
    scsi = ["-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=vda,id=disk0"]
    with machine(tmp_path, *drive, *scsi) as vm:
        assert invoke(words[0], vm.target, "vda", *words[1:], "--hold").code == 0
        vm.session.execute("device_del", id="disk0")
        assert invoke("recover", str(images[3]), "--json").document["verdict"] == "running"
        assert invoke("job", vm.target, f"qmpmerge-{words[0]}-vda", "follow").code == 6
        assert vm.session.execute("query-named-block-nodes", flat=True) == []
        told = invoke("recover", str(images[3]), "--json").document
        assert (told["verdict"], told["merges"][0]["start_from"]) == ("done", str(images[3]))
    assert run("qemu-img", "info", "--backing-chain", images[3]).count("image:") == (2 if words[0] == "commit" else 1)
    content.check(images[3])


# --- what others want of the disk meanwhile -------------------------------------------------------------------------------


@TOPS
async def test_nothing_else_can_be_done_with_the_disk_meanwhile(
    tmp_path: Path, images: list[Path], content: Content, top: str
) -> None:
    """QEMU refuses what would disturb the job, and we refuse before we ask."""
    run("qemu-img", "create", "-qf", "qcow2", tmp_path / "new.qcow2", "8M")
    new = {"driver": "file", "filename": str(tmp_path / "new.qcow2")}
    with blockdev(tmp_path, images, content) as setup:
        ask = setup.machine.session.ask
        assert "error" not in ask("blockdev-add", driver="qcow2", node_name="new", file=new, backing=None)
        async with setup.target() as target:
            with pytest.raises(library.errors.StillRunning):
                patience = library.Patience(detach=True)
                await library.commit(target, top=top, speed=1, patience=patience)
            for command, arguments in FORBIDDEN:
                assert "error" in ask(command, **arguments), command
            with pytest.raises(Busy):
                await library.snapshot(target, {"disk0": str(tmp_path / "other.qcow2")})
            with pytest.raises(Busy):
                await library.commit(target, base="[2]", top="[3]")
            setup.check()
            assert (await library.commit(target, top=top, speed=0)).verdict in ("merged", "pivoted")
        setup.check()


FORBIDDEN: list[tuple[str, dict[str, object]]] = [
    ("block-commit", {"device": "c", "job_id": "j", "top_node": "b", "base_node": "a"}),
    ("block-stream", {"device": "c", "job_id": "j"}),
    ("blockdev-snapshot", {"node": "c", "overlay": "new"}),
    ("blockdev-mirror", {"device": "c", "job_id": "j", "target": "new", "sync": "full"}),
    ("block_resize", {"node_name": "c", "size": 2 * SIZE}),
    ("blockdev-del", {"node_name": "a"}),
    ("change-backing-file", {"device": "c", "image_node_name": "c", "backing_file": "x"}),
]


def test_a_silly_speed_is_refused_in_one_sentence(setup: Setup) -> None:
    for speed in ("99999999T", "-1", "fast", "1e400"):
        refused = invoke("commit", setup.machine.target, "--top", "[3]", "--speed", speed)
        assert refused.code in (2, 3) and len(refused.err.strip().splitlines()) <= 5
    assert setup.machine.session.execute("query-jobs") == []
