"""
An image is the file that QEMU has open: what is said, and what can be saved, when its name is taken away or given to
another file while a merge is under way.

Everything that a hint says in backticks is done as it stands.
"""

import contextlib
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.command import Begun, invoke
from rig.disks import KINDS, Setup, blockdev, device, drive, nodes, storage_daemon
from rig.harms import harm
from rig.machines import MIB, SIZE, Content, Machine, machine, run
from rig.wire import heard

import qmpmerge
from qmpmerge.chain.outcome import Policy
from qmpmerge.errors import Displaced, FileExists, LeftDisplaced, NotProven, NotUnderItsName, NotVerified, Replaced

JOB = "qmpmerge-commit-vda"
ENDS = pytest.mark.parametrize("top", ["[3]", "[4]"], ids=["intermediate", "active"])
Displace = Callable[[Path], None]


def renamed(image: Path) -> None:
    image.rename(image.with_name(f"elsewhere.{image.name}"))


def removed(image: Path) -> None:
    image.unlink()


def replaced(image: Path) -> None:
    """By an older copy, say."""
    copy = image.with_name("copy")
    copy.write_bytes(bytes(SIZE))
    copy.rename(image)


HOWS = pytest.mark.parametrize("displace", [renamed, removed, replaced])


def do(vm: Machine, hint: str) -> list[str]:
    """The commands of a hint, one after the other, but for verbs alone; QMP goes over the bench's own session."""
    commands = re.findall("`([^`]+)`", hint)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "printf":
            assert words[-3:-1] == ["-t5", "-"]
            assert words[-1].removeprefix("UNIX-CONNECT:") == vm.target or words[-1].startswith("TCP:127.0.0.1:")
            for line in words[3 : words.index("|")]:
                vm.session.execute(json.loads(line)["execute"])
                if "quit" in line:
                    vm.process.wait(20)
        elif words == ["cancel"]:
            continue
        elif words[:2] == ["qmpmerge", "job"] and vm.process.poll() is not None:
            continue  # that is for a QEMU that runs
        elif words[0] == "qmpmerge":
            said = invoke(*words[1:])
            assert said.code == 0, said.err
        else:
            subprocess.run(command, shell=True, check=True)
    return commands


def swapped(image: Path) -> None:
    """Renamed, and another file in its place."""
    renamed(image)
    replaced(image)


# --- seen before the switch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drive", "blockdev"])
@HOWS
@ENDS
def test_a_base_that_is_displaced_while_it_is_copied(
    displace: Displace, top: str, kind: str, images: list[Path], content: Content, tmp_path: Path
) -> None:
    with KINDS[kind](tmp_path, images, content) as setup:
        vm = setup.machine
        merge = Begun("commit", vm.target, setup.disk, "--top", top, "--speed", "1")
        inode = images[0].stat().st_ino
        displace(images[0])
        vm.session.execute("block-job-set-speed", device=f"qmpmerge-commit-{setup.disk}", speed=0)
        done = merge.end()
        error = done.document["error"]
        assert (done.code, error["name"], error["facts"]["file"]) == (7, "left-displaced", str(images[0]))
        assert f"QEMU has inode {inode} open" in error["message"]
        setup.check()  # the guest has all its data
        assert sorted(tmp_path.glob("*.merged")) == []
        for verb in ("follow", "cancel"):
            said = invoke("job", vm.target, error["facts"]["job"], verb, "--json")
            assert (said.code, said.document["error"]["name"]) == (3, "replaced")
        again = invoke("commit", vm.target, setup.disk, "--top", top, "--json")
        assert (again.code, again.document["error"]["name"]) == (3, "replaced")
        setup.write(0x77, 2 * MIB, MIB)
        commands = do(vm, error["hint"])
        if displace is renamed:
            assert commands[0] == f"mv -nT -- {tmp_path}/elsewhere.base.raw {images[0]}"
            assert (commands[1].endswith("follow"), commands[2]) == (True, "cancel")
            setup.check()
            setup.off()
            content.check(images[3] if top == "[3]" else images[0])
        else:
            assert vm.process.poll() is not None
            content.check(images[3])
        assert sorted(tmp_path.glob(".*record")) == []


@harm("replaced", "where nothing is there, it dies with its guest")
@pytest.mark.parametrize(("verb", "top"), [("job-cancel", "[3]"), ("job-finalize", "[3]"), ("job-cancel", "[4]")])
def test_plain_end_of_a_job_whose_base_has_lost_its_name(
    verb: str, top: str, images: list[Path], content: Content, tmp_path: Path
) -> None:
    """Explicit nodes with `auto-read-only`, as everybody writes them: QEMU dies with its guest."""
    with blockdev(tmp_path, images, content) as setup:
        session = setup.machine.session
        node = images[int(top[1]) - 1].stem
        session.execute(
            "block-commit", job_id="j", device="c", top_node=node, base_node="base", auto_finalize=top == "[4]"
        )
        setup.machine.wait_for_job("ready" if top == "[4]" else "pending")
        images[0].unlink()
        with contextlib.suppress(OSError, ValueError):  # it may be gone before it has answered
            session.ask(verb, id="j")
        assert setup.machine.process.wait(20) == -signal.SIGABRT


@HOWS
async def test_a_base_that_is_displaced_while_the_guest_is_paused_for_the_pivot(
    displace: Displace, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    """The active image has lost its name by then, and gets it back."""
    setup.machine.session.execute("cont")
    late = after("block-commit", lambda: displace(images[0]))
    async with heard(late), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(LeftDisplaced):
            await qmpmerge.commit(target)
    assert setup.machine.session.execute("query-status")["status"] == "running"
    assert images[3].exists() and sorted(tmp_path.glob("*.merged")) == []
    setup.check()


def test_a_job_that_is_cancelled_while_its_base_has_no_name_is_left(
    images: list[Path], content: Content, tmp_path: Path
) -> None:
    with blockdev(tmp_path, images, content) as setup:
        merge = Begun("commit", setup.machine.target, setup.disk, "--top", "[3]", "--speed", "1")
        renamed(images[0])
        merge.process.send_signal(signal.SIGINT)
        done = merge.end()
        assert (done.code, done.document["error"]["name"]) == (7, "left-displaced")
        do(setup.machine, done.document["error"]["hint"].replace("follow", "cancel"))
        assert not setup.machine.session.execute("query-jobs")
        setup.check()


def by_tcp(vm: Machine) -> str:
    """The monitor that does not tell whose it is."""
    told = next(one["filename"] for one in vm.session.execute("query-chardev") if one["label"] == "m2")
    return f"tcp:127.0.0.1:{re.findall('[0-9]+', told)[-1]}"


@HOWS
@ENDS
def test_a_base_that_is_displaced_where_qemu_cannot_be_looked_at(
    displace: Displace, top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """As for a user who is not QEMU's: names alone tell, and what could not be seen is not claimed."""
    more = ["-chardev", "socket,id=m2,host=127.0.0.1,port=0,server=on,wait=off", "-mon", "m2,mode=control"]
    with machine(tmp_path, "-drive", f"file={images[3]},if=none,id=vda", *device("vda"), *more) as vm:
        merge = Begun("commit", by_tcp(vm), "vda", "--top", top, "--speed", "1")
        displace(images[0])
        vm.session.execute("block-job-set-speed", device=JOB, speed=0)
        done = merge.end()
        error = done.document["error"]
        assert (done.code, error["name"], error["facts"]["file"]) == (7, "left-displaced", str(images[0]))
        do(vm, error["hint"])
        assert vm.process.poll() is not None
    content.check(images[3])


# --- seen after the switch ------------------------------------------------------------------------------------------

SWITCHES = {"[3]": "job-finalize", "[4]": "job-complete"}


def at(moment: str, act: Callable[[], None]) -> Callable[[str, str], None]:
    """A trace that does something once, when this command is on its way: after our last look."""
    left = [act]

    def trace(direction: str, text: str) -> None:
        if direction == "->" and json.loads(text)["execute"] == moment and left:
            left.pop()()

    return trace


def after(moment: str, act: Callable[[], None]) -> Callable[[str, str], None]:
    """The same once this command was answered."""
    asked, left = [False], [act]

    def trace(direction: str, text: str) -> None:
        if direction == "->" and asked[0] and left:
            left.pop()()
        asked[0] = asked[0] or (direction == "->" and json.loads(text)["execute"] == moment)

    return trace


@pytest.mark.parametrize("displace", [renamed, removed])
@ENDS
async def test_a_base_that_is_displaced_at_the_switch(
    displace: Displace, top: str, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    displaced = at(SWITCHES[top], lambda: displace(images[0]))
    async with heard(displaced), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotUnderItsName) as lost:
            await qmpmerge.commit(target, top=top)
    assert (lost.value.exit_code, lost.value.file) == (6, str(images[0]))
    again = invoke("commit", setup.machine.target, "vda", "--top", top, "--json")
    assert (again.code, again.document["error"]["name"]) == (6, "not-under-its-name")
    said = invoke("recover", str(images[3]), "--json")
    assert (said.code, said.document["error"]["name"]) == (6, "not-under-its-name")
    setup.write(0x77, 2 * MIB, MIB)  # the guest goes on, and what it writes is saved too
    setup.check()
    commands = do(setup.machine, said.document["error"]["hint"])
    if displace is renamed:
        assert commands == [f"mv -nT -- {tmp_path}/elsewhere.base.raw {images[0]}", f"qmpmerge recover {images[3]}"]
        setup.check()
        setup.off()
    assert setup.machine.process.poll() is not None
    setup.content.check(images[3] if top == "[3]" else images[0])
    assert [file.name for file in sorted(tmp_path.glob("*.merged"))] == [
        f"{name}.qcow2.merged" for name in ("ab" if top == "[3]" else "abc")
    ]
    assert sorted(tmp_path.glob(".*record")) == []


@ENDS
async def test_a_base_that_is_replaced_at_the_switch(
    top: str, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    """An intermediate merge has QEMU open it by its name again, and nothing can be done but to say so."""
    inode = images[0].stat().st_ino
    swap = at(SWITCHES[top], lambda: swapped(images[0]))
    async with heard(swap), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises((NotUnderItsName, NotProven)) as lost:
            await qmpmerge.commit(target, top=top)
    assert str(inode) in str(lost.value) and str(images[0].stat().st_ino) in str(lost.value)
    assert isinstance(lost.value, NotProven if top == "[3]" else NotUnderItsName)
    assert [file.name for file in sorted(tmp_path.glob("[ab].*.merged"))] == []
    if top == "[4]":
        setup.check()
        do(setup.machine, lost.value.hint)
        setup.off()
        setup.content.check(images[0])


async def test_an_overlay_that_is_displaced_at_the_switch(setup: Setup, images: list[Path], tmp_path: Path) -> None:
    async with heard(at("job-finalize", lambda: removed(images[3]))), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotUnderItsName) as lost:
            await qmpmerge.commit(target, top="[3]")
    assert lost.value.file == str(images[3])
    setup.write(0x77, 2 * MIB, MIB)
    do(setup.machine, lost.value.hint)
    setup.content.check(images[3])
    assert run("qemu-img", "info", "--backing-chain", images[3]).count("image:") == 2


def test_an_overlay_that_is_displaced_while_the_base_is_copied(setup: Setup, images: list[Path]) -> None:
    """Its header would be rewritten: in another file, were it to be opened by its name again."""
    merge = Begun("commit", setup.machine.target, "vda", "--top", "[2]", "--speed", "1")
    swapped(images[2])
    before = images[2].read_bytes()
    setup.machine.session.execute("block-job-set-speed", device=JOB, speed=0)
    done = merge.end()
    assert (done.code, done.document["error"]["name"]) == (5, "displaced")
    assert (done.document["error"]["facts"]["file"], images[2].read_bytes()) == (str(images[2]), before)
    setup.check()
    do(setup.machine, done.document["error"]["hint"])
    assert invoke("commit", setup.machine.target, "vda", "--top", "[2]").code == 0
    setup.off()
    setup.content.check(images[3])


async def test_a_base_that_is_displaced_when_the_overlay_is_kept(setup: Setup, images: list[Path]) -> None:
    """Base was to hold all data of this moment, and nobody would find it."""
    async with qmpmerge.live(setup.machine.target) as target:
        job = (await qmpmerge.commit(target, ending="hold")).job
        renamed(images[0])
        assert job is not None
        with pytest.raises(Replaced):
            await qmpmerge.control(target, job.id, "keep")
    done = at("block-job-cancel", lambda: renamed(images[0]))
    images[0].with_name("elsewhere.base.raw").rename(images[0])
    async with heard(done), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotUnderItsName) as lost:
            await qmpmerge.control(target, job.id, "keep")
    do(setup.machine, lost.value.hint)
    setup.check()
    setup.off()
    setup.content.check(images[3])


# --- taken over -----------------------------------------------------------------------------------------------------


@HOWS
@pytest.mark.parametrize("way", ["pivot", "commit"])
def test_a_base_that_is_displaced_before_a_job_is_taken_over(
    way: str, displace: Displace, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    vm = setup.machine
    assert invoke("commit", vm.target, "vda", "--wait-ready").code == 0
    displace(images[0])
    commands = {"pivot": ["job", vm.target, JOB, "pivot"], "commit": ["commit", vm.target, "vda"]}
    said = invoke(*commands[way], "--json")
    error = said.document["error"]
    assert (said.code, error["name"], error["facts"]["file"]) == (3, "replaced", str(images[0]))
    assert [job["status"] for job in vm.session.execute("query-jobs")] == ["ready"]
    setup.write(0x55, 4 * MIB, MIB)
    do(vm, error["hint"])
    if displace is renamed:
        assert invoke(*commands[way]).code == 0
        setup.check()
        setup.off()
        setup.content.check(images[0])
    else:
        assert vm.process.poll() is not None
        setup.content.check(images[3])


# --- before anything is begun ---------------------------------------------------------------------------------------


@HOWS
@ENDS
async def test_a_base_that_was_displaced_before(
    displace: Displace, top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """QEMU has it open read-write from the start, and would not open it again: only a look at its name tells."""
    arguments = [part.replace(",read-only=on", "") for part in nodes(images)]
    with machine(tmp_path, *arguments, *device("c")) as vm:
        displace(images[0])
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(Replaced) as found:
                await qmpmerge.commit(target, top=top)
        assert found.value.file == str(images[0])
        assert {file.name for file in tmp_path.glob("*.qcow2")} == {"a.qcow2", "b.qcow2", "c.qcow2"}


@pytest.mark.parametrize("top", ["[3]", "[4]"])
async def test_plain_commit_into_a_base_without_a_name(
    top: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """No error, and no such file."""
    with drive(tmp_path, images, content) as setup:
        vm = setup.machine
        vm.session.execute("block-commit", job_id="j", device="vda", top=str(images[int(top[1]) - 1]), speed=1)
        images[0].unlink()
        vm.session.execute("block-job-set-speed", device="j", speed=0)
        if top == "[4]":
            vm.wait_for_job("ready")
            vm.session.execute("job-complete", id="j")
        while (event := vm.session.event())["event"] != "BLOCK_JOB_COMPLETED":
            pass
        assert "error" not in event["data"] and not images[0].exists()
        setup.check()


# --- snapshots ------------------------------------------------------------------------------------------------------


@harm("replaced", "below a new overlay the guest reads the other file")
def test_plain_snapshot_reads_another_file(setup: Setup, images: list[Path], tmp_path: Path) -> None:
    """The old active image is opened again, to read it only, by its name."""
    swapped(images[3])
    arguments = {"device": "vda", "snapshot-file": str(tmp_path / "d.qcow2"), "format": "qcow2"}
    setup.machine.session.execute("blockdev-snapshot-sync", **arguments)
    with pytest.raises(AssertionError):
        setup.check()


@HOWS
@pytest.mark.parametrize("name", ["d.qcow2", "c.qcow2"])
async def test_a_snapshot_over_an_image_that_was_displaced(
    name: str, displace: Displace, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    """Nor is its name used for the overlay, whose header would name itself."""
    displace(images[3])
    before = sorted(tmp_path.glob("*.qcow2"))
    async with qmpmerge.live(setup.machine.target) as target:
        with pytest.raises((Replaced, FileExists)) as found:
            await qmpmerge.snapshot(target, {"vda": tmp_path / name})
        assert isinstance(found.value, FileExists if name == "c.qcow2" and displace is replaced else Replaced)
        assert str((await target.chain()).chain) == "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"
    assert sorted(tmp_path.glob("*.qcow2")) == before
    setup.check()


async def test_an_image_that_is_displaced_while_its_overlay_is_made(
    setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    at_the_node = at("blockdev-add", lambda: swapped(images[3]))
    async with heard(at_the_node), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(Replaced) as found:
            await qmpmerge.snapshot(target, {"vda": tmp_path / "d.qcow2"})
    assert not (tmp_path / "d.qcow2").exists()
    setup.check()
    do(setup.machine, found.value.hint)
    setup.off()
    setup.content.check(images[3])


async def test_an_image_that_is_displaced_at_the_snapshot_is_told_apart(
    setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    inode = images[3].stat().st_ino
    async with heard(at("transaction", lambda: swapped(images[3]))), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotProven) as found:
            await qmpmerge.snapshot(target, {"vda": tmp_path / "d.qcow2"})
    assert f"{images[3]} (inode {inode} " in found.value.expected
    assert f"{images[3]} (inode {images[3].stat().st_ino} " in found.value.found


def test_a_snapshot_of_an_image_that_another_process_has_open(setup: Setup, images: list[Path], tmp_path: Path) -> None:
    asked = ["snapshot", setup.machine.target, f"vda={tmp_path}/d.qcow2"]
    with (
        images[3].open() as file,
        subprocess.Popen(["cat", "-"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]) as cat,
    ):
        try:
            said = invoke(*asked, "--json")
            assert (said.code, said.document["error"]["name"]) == (3, "in-use")
            assert f"cat (pid {cat.pid})" in said.document["error"]["facts"]["holders"]
            assert not (tmp_path / "d.qcow2").exists()
            assert invoke(*asked, "--force", "in-use").code == 0
        finally:
            cat.kill()
    setup.check()


@harm("in-use", "below a new overlay another VM goes on writing, and the guest reads it")
def test_plain_snapshot_below_another_vm_that_writes(setup: Setup, images: list[Path], tmp_path: Path) -> None:
    """What became a backing file is changed all the same, and the guest reads it."""
    (tmp_path / "other").mkdir()
    disk = f"file={images[3]},format=qcow2,if=none,id=vda,file.locking=off,backing.file.locking=off"
    with machine(tmp_path / "other", "-drive", disk, *device("vda")) as other:
        arguments = {"device": "vda", "snapshot-file": str(tmp_path / "d.qcow2"), "format": "qcow2"}
        setup.machine.session.execute("blockdev-snapshot-sync", **arguments)
        other.io("vda", "write -P 0x99 3M 64k")
        with pytest.raises(AssertionError):
            setup.check()


# --- after a crash --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("displace", [removed, replaced])
@ENDS
async def test_recover_does_not_take_another_file_for_the_base(
    displace: Displace, top: str, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    """QEMU and its descriptor are gone: what lies there now is for the user to judge."""
    setup.machine.session.execute("stop")
    async with heard(at(SWITCHES[top], lambda: removed(images[0]))), qmpmerge.live(setup.machine.target) as target:
        with pytest.raises(NotUnderItsName):
            await qmpmerge.commit(target, top=top)
    if displace is replaced:  # before the inode is free again
        images[0].write_bytes(bytes(SIZE))
    setup.off()
    before = sorted(tmp_path.iterdir())
    said = invoke("recover", str(images[3]), "--json")
    assert (said.code, said.document["error"]["name"]) == (6, "undecided")
    assert str(images[0]) in said.document["error"]["message"]
    assert sorted(tmp_path.iterdir()) == before
    chosen = invoke("recover", str(images[3]), "--use", "base", "--json")
    assert chosen.code == (0 if displace is replaced else 6)


# --- merged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stash", "delete"])
@ENDS
async def test_a_merged_file_that_is_replaced_is_left_alone(
    policy: Policy, top: str, setup: Setup, images: list[Path], tmp_path: Path
) -> None:
    """What was merged came from the file that QEMU had open; nor is the other file compared with anything."""
    async with heard(at("block-commit", lambda: swapped(images[1]))), qmpmerge.live(setup.machine.target) as target:
        if policy == "delete":  # which takes a comparison
            with pytest.raises(NotVerified) as found:
                await qmpmerge.commit(target, top=top, merged_files=policy, verify=True)
            assert f"{images[1]} is another file now" in found.value.reason
        else:
            outcome = await qmpmerge.commit(target, top=top, merged_files=policy)
            assert (outcome.merged[0].action, outcome.merged[0].now) == ("gone", None)
    assert images[1].read_bytes() == bytes(SIZE)
    assert (tmp_path / "elsewhere.a.qcow2").exists() and not (tmp_path / "a.qcow2.merged").exists()
    setup.check()


# --- nobody else's --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("displace", [renamed, removed])
@ENDS
async def test_a_base_that_is_displaced_while_nobody_has_it(
    displace: Displace, top: str, images: list[Path], content: Content, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(images[0].read_bytes())
    async with heard(after("block-commit", lambda: displace(images[0]))), qmpmerge.offline(images[3]) as target:
        with pytest.raises(Displaced) as found:
            await qmpmerge.commit(target, top=top)
        hint = found.value.hint
    if displace is renamed:
        subprocess.run(re.findall("`([^`]+)`", hint)[0], shell=True, check=True)
    else:
        assert f"put a copy of it at {images[0]}" in hint
        saved.rename(images[0])
    content.check(images[3])
    assert invoke("commit", str(images[3]), "--top", top).code == 0


def test_a_storage_daemon_is_not_told_to_stop_a_guest(tmp_path: Path, images: list[Path], content: Content) -> None:
    with storage_daemon(tmp_path, images, content) as setup:
        removed(images[0])
        said = invoke("commit", setup.machine.target, "--top", "[3]", "--json").document["error"]
        assert said["name"] == "replaced" and "end whoever writes to it" in said["hint"]
        assert do(setup.machine, said["hint"])
    setup.content.check(images[3])


def test_an_active_image_that_has_no_name_is_not_said_to_open(
    images: list[Path], content: Content, tmp_path: Path
) -> None:
    """It was moved away under the guest; the merge leaves it, and the advice says what is there."""
    with drive(tmp_path, images, content) as setup:
        (tmp_path / "far").mkdir()
        images[3].rename(tmp_path / "far" / "moved.qcow2")
        told = invoke("commit", setup.machine.target, "--json").document
    assert told["verdict"] == "pivoted", told
    (advice,) = [hint for hint in told["hints"] if hint.startswith("start the VM from")]
    assert f"nothing is called {images[3]}" in advice
