"""
What QEMU's own integration tests (tp-qemu, `blockdev_commit*`, `block_commit*`, `blk_commit`) check of a block commit,
through our command line.

    scenario                                what is checked                                 test
    ------------------------------------    --------------------------------------------    ----------------------------------
    blockdev_commit, blk_commit             a range below the active image                  a_range[middle], [to the base]
    blockdev_commit_top, _auto_readonly     the active image; images opened auto-read-only  a_range[all]
    blockdev_commit_throttle                a range, then the rest                          in_two_steps
    blockdev_commit_backing_file            the overlay's header afterwards                 the_header_that_is_left
    blockdev_commit_backing_mask_on, _off   the format in it, over a bare protocol node     the_header_that_is_left
    blockdev_commit_cor                     a copy-on-read filter on top stays              filters_stay
    blockdev_commit_filter_node_name        the chain as it is shown during the job         what_is_shown_meanwhile
    blockdev_commit_query_named_block_nodes the same, asked by somebody else                what_is_shown_meanwhile
    blockdev_commit_cancel                  cancelled before it is ready, and when it is    cancelled
    blockdev_commit_general_operation       pause, resume, speed, both kinds of ending      controlled
    blockdev_commit_speed_limit             limits from none to the largest, and beyond     speed_limits
    blockdev_commit_standby                 paused when ready; completed once it goes on    standby
    blockdev_commit_stop_cont               a stopped guest that goes on meanwhile          the_guest
    blockdev_commit_reboot, block_commit_   a reset meanwhile                               the_guest
    reboot
    blockdev_commit_powerdown               QEMU ends; the merge is made again              test_faults: a_qemu_that_ends
    blockdev_commit_hotunplug               the device goes meanwhile                       test_faults: a_device_may_be
    blockdev_commit_forbidden_actions       commit, resize, mirror, snapshot, stream        test_faults: nothing_else_can_be
    blockdev_commit_non_existed_node        a base or a top that is not there               nonsense
    blockdev_commit_specify_node            base is top, base above top                     nonsense
    blockdev_commit_fio, _stress, block_    the guest writes all the time                   a_busy_guest, test_guest_story
    commit_stress, _install
    blockdev_commit_to_nospace, _with_stop  no space for base, then some                    test_faults: a_full_disk
    blockdev_commit_with_ignore             never: QEMU spins, thousands of errors a second (left out on purpose)
    blockdev_commit_with_ioerror            the active image has no space, guest stopped    a_stopped_guest_without_space
    blockdev_commit_server_down, _firewall  the server of base goes, and comes back         test_faults: a_server_that_went
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.command import JOB, Begun, Run, invoke
from rig.disks import BACKEND, KINDS, Setup, device, filters, nodes
from rig.machines import MIB, Content, machine, make_chain, run

NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2")
TWO = pytest.mark.parametrize("kind", ["drive", "blockdev"])


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return make_chain(tmp_path, NAMES)


@pytest.fixture
def setup(kind: str, tmp_path: Path, images: list[Path], content: Content) -> Iterator[Setup]:
    with KINDS[kind](tmp_path, images, content) as setup:
        yield setup


def commit(setup: Setup, *options: str) -> Run:
    return invoke("commit", setup.machine.target, *options, "--json")


def merged(run: Run) -> list[str]:
    assert (run.code, run.document["verdict"] in ("merged", "pivoted")) == (0, True), run.out + run.err
    return [Path(file).name for file in run.document["after"]]


def job_id(setup: Setup) -> str:
    return f"qmpmerge-commit-{setup.disk}"


def ends_well(setup: Setup, active: str) -> None:
    """The guest sees what it should, while it runs and after a start from the new active image."""
    setup.check()
    setup.off()
    setup.content.check(setup.machine.folder / active)


@TWO
@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("--base", "[2]", "--top", "[4]"), ["base.raw", "a.qcow2", "d.qcow2"]),
        (("--top", "[4]"), ["base.raw", "d.qcow2"]),
        (("--shallow",), ["base.raw", "a.qcow2", "b.qcow2", "c.qcow2"]),
        ((), ["base.raw"]),
    ],
    ids=["middle", "to the base", "shallow", "all"],
)
def test_a_range(setup: Setup, options: tuple[str, ...], left: list[str]) -> None:
    assert merged(commit(setup, *options)) == left
    ends_well(setup, left[-1])


@pytest.mark.parametrize("kind", ["drive"])
def test_in_two_steps(setup: Setup) -> None:
    """What the first one has merged away is deleted: the second one would find it built on its images."""
    first = commit(setup, "--base", "[2]", "--top", "[4]")
    assert merged(first) == ["base.raw", "a.qcow2", "d.qcow2"]
    for entry in first.document["merged"]:
        Path(entry["now"]).unlink()
    assert merged(commit(setup)) == ["base.raw"]
    ends_well(setup, "base.raw")


@pytest.mark.parametrize("bare", [False, True])
def test_the_header_that_is_left(tmp_path: Path, images: list[Path], content: Content, bare: bool) -> None:
    explicit = nodes(images)
    if bare:  # the lowest node is the file itself
        del explicit[2:4]
        explicit = [part.replace("backing=base,", "backing=base-file,") for part in explicit]
    with machine(tmp_path, *explicit, *device("d")) as vm:
        merged(invoke("commit", vm.target, "--top", "[4]", "--json"))
        told = json.loads(run("qemu-img", "info", "-U", "--output=json", images[4]))
    assert told["backing-filename"] == "base.raw"
    # QEMU before 9.0 is not known to write raw for a protocol node.
    assert told["backing-filename-format"] in (("raw", "file") if bare else ("raw",))
    content.check(images[4])


def test_filters_stay(tmp_path: Path, images: list[Path], content: Content) -> None:
    with filters(tmp_path, images, content) as setup:
        merged(commit(setup))
        names = {node["node-name"]: node["drv"] for node in named(setup)}
        assert (names["cor"], names["throttled"]) == ("copy-on-read", "throttle")
        ends_well(setup, "base.raw")


def named(setup: Setup) -> Any:
    return setup.machine.session.execute("query-named-block-nodes", flat=True)


@pytest.mark.parametrize("kind", ["blockdev"])
@pytest.mark.parametrize("top", ["[4]", "[5]"])
def test_what_is_shown_meanwhile(setup: Setup, top: str) -> None:
    """The filter that QEMU puts in is nobody's image: the chain is shown as it was, with the job on it."""
    before = invoke("chain", setup.machine.target, "--json").document
    assert commit(setup, "--top", top, "--speed", "1", "--detach").code == 7
    during = invoke("chain", setup.machine.target, "--json").document
    files = [[image["file"] for image in told["images"]] for told in (before, during)]
    assert files[0] == files[1] and before["job"] is None
    assert during["job"]["id"] == job_id(setup) and "follow" in during["job"]["verbs"]
    assert f"job {job_id(setup)} (commit): " in invoke("chain", setup.machine.target).out
    assert invoke("disks", setup.machine.target, "--json").document["disks"][0]["job"]["id"] == job_id(setup)
    assert len(setup.machine.session.execute("query-named-block-nodes")) > 5
    merged(commit(setup, "--top", top, "--speed", "0"))


@pytest.mark.parametrize("kind", ["blockdev"])
@pytest.mark.parametrize("ready", [False, True])
def test_cancelled(setup: Setup, ready: bool) -> None:
    options = ("--wait-ready",) if ready else ("--top", "[4]", "--speed", "1", "--detach")
    assert commit(setup, *options).code in (0, 7)
    assert invoke("job", setup.machine.target, job_id(setup), "cancel").code == 0
    assert len(invoke("chain", setup.machine.target, "--json").document["images"]) == 5
    ends_well(setup, "d.qcow2")


@pytest.mark.parametrize("kind", ["drive"])
@pytest.mark.parametrize("top", ["-1", "[4]"])
def test_who_cancels_is_told_that_base_is_no_way_back(setup: Setup, top: str) -> None:
    begun = Begun("commit", setup.machine.target, "--top", top, "--speed", "64k")
    while not setup.machine.session.execute("query-block-jobs")[0]["offset"]:
        time.sleep(0.05)
    begun.process.terminate()
    ended = begun.end()
    assert (ended.code, "nothing to start from or to build on" in ended.err) == (130, True), ended.err
    ends_well(setup, "d.qcow2")


@pytest.mark.parametrize("kind", ["drive"])
def test_controled(setup: Setup) -> None:
    target, job = setup.machine.target, job_id(setup)
    assert commit(setup, "--top", "[4]", "--speed", "1", "--detach").code == 7
    for verb in (("pause",), ("speed", "1M"), ("resume",), ("speed", "0")):
        assert invoke("job", target, job, *verb).code == 0
    merged(invoke("job", target, job, "follow", "--json"))
    assert commit(setup, "--wait-ready").document["verdict"] == "ready"
    assert invoke("job", target, job, "keep", "--json").document["verdict"] == "kept"
    ends_well(setup, "d.qcow2")


@pytest.mark.parametrize("kind", ["drive"])
def test_speed_limits(setup: Setup) -> None:
    begun = Begun("commit", setup.machine.target, "--top", "[4]", "--speed", "1")
    limit = setup.machine.session.execute("query-block-jobs")[0]["speed"]
    begun.process.terminate()
    assert (limit, begun.end().code) == (1, 130)
    assert commit(setup, "--speed", str(2**63)).code == 2
    assert merged(commit(setup, "--top", "[4]", "--speed", str(2**63 - 1))) == ["base.raw", "d.qcow2"]


@pytest.mark.parametrize("kind", ["drive"])
def test_standby(setup: Setup) -> None:
    target = setup.machine.target
    assert commit(setup, "--wait-ready").code == 0
    assert invoke("job", target, JOB, "pause").code == 0
    refused = invoke("job", target, JOB, "pivot")
    assert (refused.code, "is standby" in refused.err, "resume" in refused.err) == (3, True, True)
    assert invoke("job", target, JOB, "resume").code == 0
    merged(invoke("job", target, JOB, "pivot", "--json"))
    ends_well(setup, "base.raw")


@pytest.mark.parametrize("kind", ["drive"])
@pytest.mark.parametrize("top", ["[5]"])
def test_the_guest(setup: Setup, top: str) -> None:
    """Stopped, going on, reset: the job does not mind, and the guest is left as it was."""
    assert commit(setup, "--top", top, "--speed", "1", "--detach").code == 7
    for command in ("cont", "system_reset", "stop", "cont"):
        setup.machine.session.execute(command)
    left = merged(commit(setup, "--top", top, "--speed", "1G"))
    assert setup.machine.session.execute("query-status")["running"]
    ends_well(setup, left[-1])


@pytest.mark.parametrize("kind", ["blockdev"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--base", "sn0"), "no image sn0"),
        (("--top", "sn0"), "no image sn0"),
        (("--base", "c", "--top", "c"), "nothing to merge"),
        (("--base", "c", "--top", "a"), "lies above"),
    ],
)
def test_nonsense(setup: Setup, options: tuple[str, ...], told: str) -> None:
    refused = commit(setup, *options)
    assert refused.code == 3 and told in refused.document["error"]["message"]
    assert setup.machine.session.execute("query-jobs") == []


@pytest.mark.parametrize("kind", ["blockdev"])
@pytest.mark.parametrize("options", [("--top", "[4]"), ("--wait-ready",)], ids=["below", "active"])
def test_a_busy_guest(setup: Setup, options: tuple[str, ...]) -> None:
    """
    Writes go on through job, switch and proof.

    But for the pivot of an active merge: there QEMU 7.2 fails an assertion (`child->perm & BLK_PERM_WRITE`) where writes
    come through the human monitor. test_guest_story has a guest that writes through it.
    """
    stopped = threading.Event()

    def work() -> None:
        for number in range(100_000):
            if stopped.is_set():
                return
            setup.write(0x40 + number % 100, number % 64 * 128 * 1024, 64 * 1024)

    guest = threading.Thread(target=work)
    guest.start()
    try:
        assert commit(setup, *options).document["verdict"] in ("merged", "ready")
    finally:
        stopped.set()
        guest.join()
    if "--wait-ready" in options:
        assert merged(commit(setup)) == ["base.raw"]
    ends_well(setup, "base.raw" if "--wait-ready" in options else "d.qcow2")


def test_a_stopped_guest_without_space(tmp_path: Path, images: list[Path], content: Content) -> None:
    """The guest's disk is full: merging its images into the base below gives it room, and it goes on."""
    full = "inject-error.0.event=write_aio,inject-error.0.iotype=write,inject-error.0.errno=28"
    explicit = nodes(images)
    explicit[-1] = explicit[-1].replace("file=d-file", "file=d-debug")
    faulty = ["-blockdev", f"blkdebug,node-name=d-debug,image=d-file,{full}"]
    with machine(tmp_path, *explicit[:-2], *faulty, *explicit[-2:], *device("d")) as vm:
        with pytest.raises(AssertionError, match="No space left"):
            vm.io(BACKEND, f"write -P 9 {MIB} 4096")
        assert merged(invoke("commit", vm.target, "--json")) == ["base.raw"]
        vm.io(BACKEND, f"read -v {MIB} 512")
        vm.stop()
    content.check(images[0])


def test_it_is_the_installed_command_that_is_tested() -> None:
    done = subprocess.run([sys.executable, "-m", "qmpmerge", "--version"], capture_output=True, text=True, check=True)
    assert invoke("--version").out == done.stdout
