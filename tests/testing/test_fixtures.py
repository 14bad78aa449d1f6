"""What the fixtures of the plugin make, as any test would use them."""

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.command import COMMAND, invoke
from rig.machines import run

from qmpmerge.testing import Content, FreezeJob, GuestReads, GuestWrites, KillAt, Layer, MakeChain, Session, StartVm
from qmpmerge.testing.content import MIB
from qmpmerge.testing.jobs import Kind, Status
from qmpmerge.testing.kills import Moment, Victim
from qmpmerge.testing.vms import Style, started


def test_a_chain_of_any_layout_shows_what_was_written_into_its_layers(
    qcow2_chain: MakeChain, qemu_vm: StartVm, tmp_path: Path
) -> None:
    chain = qcow2_chain(
        "base.raw",
        Layer("elsewhere/a.qcow2", cluster_size=4096, absolute=True),
        Layer("b.qcow2", data_file=True, writes=((7, MIB, 4096),)),
        Layer("c.qcow2", size=1 << 40),
    )
    assert [image.relative_to(tmp_path) for image in chain] == [
        *map(Path, ("base.raw", "elsewhere/a.qcow2", "b.qcow2", "c.qcow2"))
    ]
    headers = [run("qemu-img", "info", image) for image in chain]
    assert f"backing file: {chain.base}\n" in headers[1] and "cluster_size: 4096" in headers[1]
    assert "backing file: elsewhere/a.qcow2 (" in headers[2] and f"data file: {chain[2]}.data" in headers[2]
    assert "1 TiB" in headers[3]
    for style in ("drive", "blockdev"):
        vm = qemu_vm(chain, style=style)
        vm.check()
        vm.write(1 << 39, 0x77)
        vm.stop()
    chain.check()
    assert chain.content.read(MIB, 1) == b"\x07" and (1 << 39, 0x77) in [
        (at, byte) for byte, at, _ in chain.content.written()
    ]


def test_what_beginners_do_is_answered(qcow2_chain: MakeChain, qemu_vm: StartVm, guest_reads: GuestReads) -> None:
    with pytest.raises(AssertionError, match="no VM yet: start one with"):
        guest_reads(0, 0)
    with pytest.raises(TypeError, match="'64M', and not a number of bytes"):
        qcow2_chain(size="64M")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'a.qcow2' is no disk"):
        qemu_vm("a.qcow2")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="^qemu-[^\n]* -nonsense: invalid option\n"):
        qemu_vm(arguments=["-nonsense"])
    vm = qemu_vm(chain := qcow2_chain("base.raw", "a.qcow2"))
    with pytest.raises(AssertionError) as caught:
        chain.check()
    assert "by vm.check()" in caught.value.__notes__[0]
    vm.kill()
    with pytest.raises(AssertionError, match="its QEMU has ended"):
        guest_reads(0, 0)


def test_content_that_is_not_there_is_seen(qcow2_chain: MakeChain, qemu_vm: StartVm, guest_reads: GuestReads) -> None:
    chain, tiny = qcow2_chain("a.qcow2", "b.qcow2"), qcow2_chain("t.raw", size=64 * 1024)
    chain.check()
    with pytest.raises(AssertionError, match="a.qcow2 differs at "):
        chain.check(chain.base)
    assert tiny.base.parent.name == "chain2"
    vm = qemu_vm(chain, other=tiny)
    vm.check()
    guest_reads(0, 0x10, disk="vda")
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        guest_reads(0, 0x55, disk="vda")
    with pytest.raises(AssertionError, match="which disk"):
        guest_reads(0, 0x10)
    with pytest.raises(AssertionError, match="is not within 65536"):
        vm.write(64 * 1024, 1, disk="other")


def test_files_of_others_are_let_alone(qcow2_chain: MakeChain, tmp_path: Path) -> None:
    chain = qcow2_chain("base.raw", "a.qcow2")
    (mine := tmp_path / "a.qcow2.view").write_text("mine")
    before = set(tmp_path.iterdir())
    chain.check()
    assert mine.read_text() == "mine" and set(tmp_path.iterdir()) == before
    for name in ("../../../a.qcow2", "../../a.qcow2", str(tmp_path.parent / "a.qcow2")):
        with pytest.raises(ValueError, match="is not within"):
            qcow2_chain("base.raw", name, folder=tmp_path / "deep")
    assert qcow2_chain("../b.raw", str(tmp_path / "b.qcow2")).base.samefile(tmp_path / "b.raw")


def test_writes_cover_one_another() -> None:
    content, plain = Content(MIB), bytearray(MIB)
    for pattern, offset, length in [(1, 0, 100), (2, 50, 10), (3, 55, 100), (4, 0, 10), (5, 40, 60), (6, MIB - 5, 5)]:
        content.put(pattern, offset, length)
        plain[offset : offset + length] = bytes([pattern]) * length
        assert content.data == plain
    assert sum(length for _, _, length in content.runs()) == MIB
    other = content.copy()
    other.resize(45)
    assert other.data == plain[:45] and content.data == plain


def test_several_monitors_at_once(qcow2_chain: MakeChain, qemu_vm: StartVm, guest_writes: GuestWrites) -> None:
    vm = qemu_vm(qcow2_chain("base.raw", "a.qcow2", "b.qcow2"), monitors=3, name="three")
    guest_writes(3 * MIB, 0x33)
    shown = [invoke("chain", monitor, "vda").out for monitor in vm.monitors]
    assert len(set(shown)) == 1 and "b.qcow2" in shown[0] and len(vm.monitors) == 3
    assert qemu_vm(arguments=["-m", "64"]).session.execute("query-block") == []


@pytest.mark.parametrize("style", ["drive", "blockdev"])
@pytest.mark.parametrize(
    ("status", "kinds"),
    [
        ("running", ("commit", "commit-active", "stream")),
        ("paused", ("commit", "commit-active")),
        ("ready", ("commit-active",)),
        ("standby", ("commit-active",)),
        ("pending", ("commit", "stream")),
        ("concluded", ("commit", "commit-active", "stream")),
    ],
)
def test_a_job_is_held(
    status: Status,
    kinds: tuple[Kind, ...],
    style: Style,
    qcow2_chain: MakeChain,
    qemu_vm: StartVm,
    frozen_job: FreezeJob,
) -> None:
    for kind in kinds:
        chain = qcow2_chain("base.raw", "a.qcow2", "b.qcow2")
        vm = qemu_vm(chain, style=style)
        job = frozen_job(status, kind=kind, vm=vm)
        assert (job.status, job.query()["type"]) == (status, kind.removesuffix("-active"))
        told = invoke("jobs", vm.monitor, "--json").document["jobs"]
        assert [(one["id"], one["status"]) for one in told] == [("frozen", status)]
        vm.check()
        vm.stop()


def test_a_job_that_cannot_be_held_is_refused(
    qcow2_chain: MakeChain, qemu_vm: StartVm, frozen_job: FreezeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = qemu_vm(qcow2_chain("base.raw", "a.qcow2", "b.qcow2"))
    with pytest.raises(AssertionError, match="never ready"):
        frozen_job("ready", kind="stream")
    with pytest.raises(AssertionError, match="another kind"):
        frozen_job("pending", kind="commit-active")
    with pytest.raises(ValueError, match="'redy', and not one of running, paused, ready, standby, pending, concluded"):
        frozen_job("redy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind is 'pull', and not one of "):
        frozen_job("running", kind="pull")  # type: ignore[arg-type]
    paused = frozen_job("paused", id="paused")
    monkeypatch.setattr("qmpmerge.testing.jobs.SECONDS", 0.1)
    with pytest.raises(AssertionError, match="does not get on, and is not pending"):
        paused.wait_for("pending")
    monkeypatch.undo()
    vm.session.execute("job-cancel", id="paused")
    paused.wait_for("concluded")
    vm.session.execute("job-dismiss", id="paused")
    job = frozen_job("concluded")
    with pytest.raises(AssertionError, match="instead of running: was there nothing to copy"):
        job.wait_for("running")
    assert vm.process.poll() is None


# --- kills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["tool", "qemu", "both"])
def test_who_is_to_die_at_a_command_dies(
    victim: Victim, qcow2_chain: MakeChain, qemu_vm: StartVm, kill_at: KillAt
) -> None:
    moments: dict[str, Moment] = {"block-commit": "answered", "job-finalize": "sent"}
    for command, moment in moments.items():
        chain = qcow2_chain("base.raw", "a.qcow2", "b.qcow2")
        vm = qemu_vm(chain)
        killer = kill_at(command, victim=victim, moment=moment, vm=vm)
        ended = subprocess.run([COMMAND, "commit", killer.path, "vda", "--top", "2"], capture_output=True, check=False)
        assert killer.struck and killer.seen[-1] == command
        assert (ended.returncode == -9) == (victim != "qemu"), ended
        assert (vm.process.poll() == -9) == (victim != "tool")
        if victim == "tool":
            vm.check()
            vm.kill()
        chain.check()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Ends after the plugin's fixtures have, where it comes first."""
    with contextlib.ExitStack() as stack:
        yield stack


def test_nobody_dies_where_the_command_never_comes(
    stack: contextlib.ExitStack, qcow2_chain: MakeChain, qemu_vm: StartVm, kill_at: KillAt
) -> None:
    chain = qcow2_chain("base.raw", "a.qcow2", "b.qcow2")
    vm = qemu_vm(chain)
    killer = kill_at("job-finalize", number=2)
    with pytest.raises(AssertionError, match="nobody has died: job-finalize was to go by 2 times, .* is nothing"):
        kill_at.close()
    killer.optional = True
    with pytest.raises(ValueError, match="victim is 'qmpmerge', and not one of tool, qemu, both"):
        kill_at("job-finalize", victim="qmpmerge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="moment is 'before'"):
        kill_at("job-finalize", moment="before")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number is 0"):
        kill_at("job-finalize", number=0)
    told = invoke("commit", killer.path, "vda", "--top", "2", "--json").document
    assert (told["verdict"], killer.struck, killer.seen.count("job-finalize")) == ("merged", False, 1)
    vm.check()
    with socket.socket(socket.AF_UNIX) as connection:  # descriptors go over the wire too
        connection.connect(killer.path)
        with contextlib.closing(Session(connection)) as session:
            session.give("ours", connection.fileno())
            session.execute("closefd", fdname="ours")
    left = stack.enter_context(socket.socket(socket.AF_UNIX))  # and who is still connected at the end holds nobody
    left.connect(killer.path)
    Session(left)


def test_who_is_to_kill_the_test_itself_is_told(qemu_vm: StartVm, kill_at: KillAt) -> None:
    killer = kill_at("query-status", victim="tool", vm=qemu_vm())
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(killer.path)
        with contextlib.closing(Session(connection)) as session, pytest.raises(ValueError):
            session.execute("query-status")
    with pytest.raises(AssertionError, match="the test itself"):
        kill_at.close()
    killer.problem, killer.optional = "", True


DAEMON = """
import os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
going_on, parent = os.pipe()
if os.fork():
    os._exit(0)
os.close(parent)
os.read(going_on, 1)  # until the parent is gone
stream = connection.makefile("rw")
for command in ("qmp_capabilities", "query-status"):
    stream.readline()
    stream.write('{"execute": "%s"}\\n' % command)
    stream.flush()
stream.read()
print("lives")
"""


def test_a_tool_that_has_forked_and_gone_is_not_taken_for_killed(qemu_vm: StartVm, kill_at: KillAt) -> None:
    killer = kill_at("query-status", victim="tool", vm=qemu_vm())
    assert run(sys.executable, "-c", DAEMON, killer.path) == "lives\n"
    with pytest.raises(AssertionError, match="is gone, and a child of its goes on"):
        kill_at.close()
    assert not killer.struck
    killer.problem, killer.optional = "", True


def test_sockets_of_a_folder_with_a_long_name_are_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with started(folder, {}, monitors=2) as vm:
        (place,) = {Path(path).parent for path in vm.monitors}
        assert place != folder
        for monitor in vm.monitors:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(monitor)
                Session(connection).close()
    assert not place.exists()


def test_of_runs_that_were_killed_no_such_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short := Path(tempfile.mkdtemp(dir="/tmp"))))
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    left = short / "qmpmerge-testing-left"
    left.mkdir()
    (left / "monitor").touch()
    with started(folder, {}) as vm, started(folder, {}) as other:
        assert set(short.iterdir()) == {Path(one.monitor).parent for one in (vm, other)}
    short.rmdir()
