"""`tidy`: chains of several VMs and folders, each down to its base and its newest overlays, on real QEMUs."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import faults, kills
from rig.command import COMMAND, Run, held, invoke
from rig.machines import Content, Machine, fill, have, machine, make_chain, run

import qmpmerge
from qmpmerge.operations.tidy import Tidied

NAMES = ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")
DISKS = ("vda", "vdb")


@dataclass
class Vm:
    """A QEMU with two disks, of a chain of four images each."""

    machine: Machine
    chains: dict[str, list[Path]]
    contents: dict[str, Content]

    @property
    def target(self) -> str:
        return self.machine.target

    def check(self) -> None:
        """The guest sees what it should, and so does who starts it again."""
        self.machine.stop()
        for disk, images in self.chains.items():
            active = next(image for image in reversed(images) if image.exists())
            self.contents[disk].check(active)


def chain(folder: Path) -> tuple[list[Path], Content]:
    folder.mkdir(parents=True)
    images, content = make_chain(folder, NAMES), Content()
    fill(images, content)
    return images, content


@contextlib.contextmanager
def vm(folder: Path, name: str) -> Iterator[Vm]:
    made = {disk: chain(folder / name / disk) for disk in DISKS}
    arguments = [
        word
        for disk, (images, _content) in made.items()
        for word in (
            "-drive", f"file={images[-1]},format=qcow2,if=none,id={disk}",
            "-device", f"virtio-blk-pci,drive={disk}",
        )
    ]  # fmt: skip
    with machine(folder / name, *arguments, "-name", name) as started:
        yield Vm(started, {disk: images for disk, (images, _) in made.items()}, {d: c for d, (_, c) in made.items()})


def tidy(*words: str | Path) -> Run:
    return invoke("tidy", *map(str, words), "--json")


def entries(run: Run) -> dict[tuple[str, str | None], str]:
    return {(one["target"], one["disk"]): one["verdict"] for one in run.document["tidied"]}


def after(run: Run) -> list[list[str]]:
    return [[Path(file).name for file in one["outcome"]["after"]] for one in run.document["tidied"]]


# --- what is meant ----------------------------------------------------------------------------------------------------


def test_every_disk_of_every_vm_is_left_its_base_and_its_newest_overlays(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one, vm(tmp_path, "two") as two:
        done = tidy(one.target, two.target, "--keep", "1")
        assert (done.code, done.document["verdict"]) == (0, "done")
        assert entries(done) == {(each.target, disk): "merged" for each in (one, two) for disk in DISKS}
        assert after(done) == [["base.raw", "c.qcow2"]] * 4
        again = tidy(one.target, two.target, "--keep", "1")
        assert (again.code, again.document["verdict"], set(entries(again).values())) == (0, "unchanged", {"unchanged"})
        one.check()
        two.check()


def test_a_chain_that_is_short_enough_is_left_alone_though_it_is_in_use(tmp_path: Path) -> None:
    images, _content = chain(tmp_path / "vm")
    with machine(tmp_path, "-drive", f"file={images[-1]},format=qcow2,if=none,id=vda") as _running:
        assert entries(tidy(tmp_path / "vm", "--keep", "3")) == {(str(images[-1]), "c.qcow2"): "unchanged"}
        refused = tidy(tmp_path / "vm", "--keep", "2")
        assert (refused.code, refused.document["error"]["name"]) == (3, "in-use")


def test_of_a_folder_those_chains_are_meant_whose_active_image_lies_there(tmp_path: Path) -> None:
    folder, below = tmp_path / "vm", tmp_path / "vm/below"
    images, content = chain(folder)
    chain(below)
    make_chain(folder, ["alone.raw"])
    (folder / "link.qcow2").symlink_to("c.qcow2")
    (folder / "notes.txt").write_text("no image")
    done = tidy(folder, "--keep", "2")
    assert entries(done) == {(str(images[-1]), "c.qcow2"): "merged"}
    assert after(done) == [["base.raw", "b.qcow2", "c.qcow2"]]
    content.check(images[-1])
    assert entries(tidy(folder, images[-1], "--keep", "2")) == {(str(images[-1]), "c.qcow2"): "unchanged"}


def test_what_a_vm_among_the_targets_has_is_not_asked_for_again_by_its_folder(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one:
        folder = tmp_path / "one/vda"
        done = tidy(folder, one.target, "--keep", "0")
        assert entries(done) == {(one.target, disk): "pivoted" for disk in DISKS}
        one.check()


def test_a_vm_that_is_named_twice_is_one(tmp_path: Path) -> None:
    with vm(tmp_path, "tidy-twice") as one:
        pid = one.machine.process.pid
        done = tidy("tidy-twice", one.target, f"pid:{pid}", "--keep", "3")
        assert entries(done) == {("tidy-twice", disk): "unchanged" for disk in DISKS}


def test_all_are_the_vms_that_are_ours_to_touch(tmp_path: Path) -> None:
    with vm(tmp_path, "tidy-all") as one, machine(tmp_path, "-name", "guest=tidy-lv,debug-threads=on") as other:
        done = tidy("--all", "--keep", "3", "--dry-run")
        mine = {disk: verdict for (target, disk), verdict in entries(done).items() if target == "tidy-all"}
        assert mine == dict.fromkeys(DISKS, "unchanged")
        assert other.process.poll() is None and one.machine.process.poll() is None


def test_nothing_to_do_is_done_well(tmp_path: Path) -> None:
    done = tidy(tmp_path, "--keep", "2")
    assert (done.code, done.document["verdict"], done.document["tidied"]) == (0, "unchanged", [])
    assert invoke("tidy", str(tmp_path), "--keep", "2").out == "0 disks\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--keep", "2"], "or say `--all`"),
        (["vm1"], "Missing option '--keep'"),
        (["vm1", "--keep", "1", "--parallel", "0"], "'--parallel'"),
        (["vm1", "--keep", "1", "--direction", "auto", "--merged-files", "delete"], "cannot be used together"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(words: list[str], told: str) -> None:
    done = invoke("tidy", *words)
    assert (done.code, told in done.err) == (2, True), done.err


# --- several outcomes -------------------------------------------------------------------------------------------------


def test_one_refusal_and_one_failure_stop_no_other(tmp_path: Path) -> None:
    failing_images, failing_content = chain(tmp_path / "failing/vda")
    broken = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5"
    shared, _content = chain(tmp_path / "shared")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "z.qcow2", cwd=tmp_path / "shared")
    with (
        vm(tmp_path, "one") as one,
        machine(tmp_path / "failing", *faults.injecting(failing_images, "base", broken)) as failing,
    ):
        done = tidy(failing.target, one.target, tmp_path / "shared", "/nowhere/monitor", "--keep", "1")
        shown = invoke("tidy", failing.target, str(shared[-1]), "--keep", "1")
        failing.stop()
        one.check()
    failing_content.check(failing_images[-1])
    told = entries(done)
    assert [verdict for (target, _disk), verdict in told.items() if target == failing.target] == ["failed"]
    assert {told[one.target, disk] for disk in DISKS} == {"merged"}
    assert told[str(shared[-1]), "c.qcow2"] == "refused" and told["/nowhere/monitor", None] == "unreachable"
    assert (done.code, done.document["verdict"], done.document["error"]["name"]) == (5, "failed", "job-failed")
    refused = next(one for one in done.document["tidied"] if one["verdict"] == "refused")
    assert refused["error"]["name"] == "dependents" and refused["outcome"] is None
    assert shown.code == 5 and shown.out == "2 disks: 1 failed, 1 refused\n"
    assert f"refused: {shared[-1]}: other images are built on" in shown.err and shown.err.count("hint: ") == 2


def test_a_line_for_each_disk_and_one_for_all(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one:
        planned = invoke("tidy", one.target, "--keep", "1", "--dry-run").out.splitlines()
        lines = [line for line in planned if not line.startswith("  not checked  ")]
        way = "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2, then base.raw <-- c.qcow2"
        assert sorted(lines) == sorted(
            [*(f"{one.target} {disk}: planned: {way}" for disk in DISKS), "2 disks: 2 planned"]
        )
        done = invoke("tidy", one.target, "--keep", "1")
        *lines, summary = done.out.splitlines()
        assert summary == "2 disks: 2 merged"
        assert {line.partition(": ")[0] for line in lines} == {f"{one.target} {disk}" for disk in DISKS}
        assert all(line.startswith(f"{one.target} vd") and line.endswith(": base.raw <-- c.qcow2") for line in lines)
        one.check()


# --- the other way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["pull", "auto"])
def test_a_golden_base_stays_as_it_is(direction: str, tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    (golden,) = make_chain(tmp_path / "golden", ["base.raw"])
    contents = []
    for name in ("one", "two"):
        folder, content = tmp_path / name, Content()
        folder.mkdir()
        below = str(golden)
        for layer in ("a", "b"):
            form = below.rpartition(".")[2]
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", form, f"{layer}.qcow2", cwd=folder)
            below = f"{layer}.qcow2"
        fill([folder / "a.qcow2", folder / "b.qcow2"], content)
        contents.append((folder / "b.qcow2", content))
    before = golden.read_bytes()
    folders = [tmp_path / "one", tmp_path / "two"]
    allow = ("--allow", tmp_path / "golden", "--keep", "1")
    refused = tidy(*folders, *allow)
    assert (refused.code, {one["error"]["name"] for one in refused.document["tidied"]}) == (3, {"shared-base"})
    done = tidy(*folders, *allow, "--direction", direction)
    assert (done.code, set(entries(done).values())) == (0, {"pulled"})
    assert after(done) == [["base.raw", "b.qcow2"]] * 2 and golden.read_bytes() == before
    for active, content in contents:
        content.check(active)


# --- ended, left and begun again --------------------------------------------------------------------------------------


class Begun:
    """A `tidy` that copies next to nothing, seen at work on so many disks."""

    def __init__(self, *words: str | Path, disks: int) -> None:
        line = [COMMAND, "tidy", *map(str, words), "--speed", "2", "--json"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        seen: set[tuple[str, str]] = set()
        while len(seen) < disks:
            told = json.loads(self.process.stderr.readline())
            if told["event"] == "progress":
                seen.add((told["target"], told["disk"]))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> Run:
        out, err = self.process.communicate(timeout=60)
        return held(Run(self.process.returncode, out, err))


def test_killed_and_run_again_all_is_well(tmp_path: Path) -> None:
    images, content = chain(tmp_path / "offline")
    with vm(tmp_path, "one") as one, vm(tmp_path, "two") as two:
        words = (one.target, two.target, tmp_path / "offline", "--keep", "1")
        begun = Begun(*words, "--parallel", "4", disks=4)
        begun.kill()
        done = tidy(*words, "--speed", "0")
        assert (done.code, after(done)) == (0, [["base.raw", "c.qcow2"]] * 5)
        one.check()
        two.check()
    content.check(images[-1])


def test_images_that_lost_their_names_to_a_kill_get_them_back(tmp_path: Path) -> None:
    """After a pivot that was not finished a folder holds no active image, but a record of one."""
    images, content = chain(tmp_path / "offline")
    line = [tmp_path / "notes", "both", "<= rename #1", "tidy", tmp_path / "offline", "--keep", "0"]
    killed = subprocess.run([sys.executable, kills.__file__, *map(str, line)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL and not images[-1].exists()
    dry = tidy(tmp_path / "offline", "--keep", "0", "--dry-run")
    assert (dry.code, dry.document["error"]["name"]) == (3, "unfinished") and not images[-1].exists()
    done = tidy(tmp_path / "offline", "--keep", "0")
    assert (done.code, entries(done)) == (0, {(str(images[-1]), "c.qcow2"): "pivoted"})
    content.check(images[0])


def test_ctrl_c_cancels_all_and_tells_of_each(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one, vm(tmp_path, "two") as two:
        begun = Begun(one.target, two.target, "--keep", "1", disks=2)
        begun.process.send_signal(signal.SIGINT)
        done = begun.end()
        assert (done.code, done.document["verdict"]) == (130, "cancelled")
        assert set(entries(done).values()) == {"cancelled"} and {target for target, _ in entries(done)} == {
            one.target,
            two.target,
        }
        for each in (one, two):
            assert each.machine.session.execute("query-jobs") == []
            each.check()


def test_a_closed_terminal_leaves_the_jobs(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one:
        begun = Begun(one.target, "--keep", "1", disks=2)
        begun.process.send_signal(signal.SIGHUP)
        done = begun.end()
        assert (done.code, entries(done)) == (7, {(one.target, disk): "running" for disk in DISKS})
        assert len(one.machine.session.execute("query-jobs")) == 2
        assert set(entries(tidy(one.target, "--keep", "1", "--speed", "0")).values()) == {"merged"}
        one.check()


def test_after_the_time_limit_nothing_is_begun_and_what_is_at_work_is_left(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one:
        done = tidy(one.target, "--keep", "1", "--speed", "1", "--parallel", "1", "--timeout", "5")
        told = entries(done)
        assert (done.code, told[one.target, "vdb"]) == (7, "postponed")
        assert told[one.target, "vda"] in ("running", "postponed")  # the latter where it took five seconds to begin
        assert len(one.machine.session.execute("query-jobs")) == list(told.values()).count("running")
        assert set(entries(tidy(one.target, "--keep", "1", "--speed", "0")).values()) == {"merged"}
        one.check()


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_one_is_refused_what_the_first_is_at_work_on(tmp_path: Path) -> None:
    images, content = chain(tmp_path / "offline")
    begun = Begun(tmp_path / "offline", "--keep", "1", disks=1)
    second = tidy(tmp_path / "offline", "--keep", "1")
    assert (second.code, second.document["error"]["name"]) == (3, "in-use")
    begun.process.send_signal(signal.SIGINT)
    assert begun.end().code == 130
    content.check(images[-1])


def test_two_at_once_do_no_harm(tmp_path: Path) -> None:
    images, content = chain(tmp_path / "offline")
    with vm(tmp_path, "one") as one:
        line = [COMMAND, "tidy", one.target, str(tmp_path / "offline"), "--keep", "1", "--json"]
        both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        ended = [process.communicate(timeout=60) for process in both]
        codes = [process.returncode for process in both]
        assert set(codes) <= {0, 3, 4}, ended
        assert tidy(one.target, tmp_path / "offline", "--keep", "1").document["verdict"] == "unchanged"
        one.check()
    content.check(images[-1])


# --- the speed of all together ----------------------------------------------------------------------------------------


async def test_the_speed_is_shared_by_what_is_at_work(tmp_path: Path) -> None:
    with vm(tmp_path, "one") as one:
        speeds: dict[str, int] = {}
        seen = asyncio.Event()

        def report(progress: qmpmerge.Progress) -> None:
            speeds[progress.disk] = progress.job.speed
            seen.set()

        async def until(expected: dict[str, int]) -> None:
            while speeds != expected:
                seen.clear()
                await seen.wait()

        told: list[Tidied] = []
        work = asyncio.create_task(qmpmerge.tidy([one.target], keep=1, speed=1000, report=report, told=told.append))
        await until(dict.fromkeys(DISKS, 500))
        one.machine.session.execute("job-cancel", id="qmpmerge-commit-vda")
        await until({"vda": 500, "vdb": 1000})
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert [(one.disk, one.verdict) for one in told] == [("vda", "failed"), ("vdb", "cancelled")]
        assert one.machine.session.execute("query-jobs") == []
        one.check()


async def test_the_library_gives_each_disk_in_the_order_of_the_targets(tmp_path: Path) -> None:
    images, _content = chain(tmp_path / "offline")
    with vm(tmp_path, "one") as one:
        done = await qmpmerge.tidy([tmp_path / "offline", one.target], keep=2, dry_run=True)
    assert (done.verdict, done.error) == ("planned", None)
    assert [each.target for each in done.tidied] == [str(images[-1]), one.target, one.target]
    with pytest.raises(ValueError, match="parallel"):
        await qmpmerge.tidy([], keep=1, parallel=0)


# --- every night ------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples"


def nightly() -> dict[str, str]:
    """The command lines of the examples."""
    cron = (EXAMPLES / "qmpmerge-tidy.cron").read_text().splitlines()[-1]
    (service,) = re.findall(r"^ExecStart=(.*)$", (EXAMPLES / "qmpmerge-tidy.service").read_text(), re.MULTILINE)
    return {"cron": cron.split(None, 6)[6], "systemd": service}


@pytest.mark.parametrize("kind", ["cron", "systemd"])
def test_the_example_shortens_chains_and_says_only_what_went_wrong(kind: str, tmp_path: Path) -> None:
    """With our paths for those that it names; and without `--all`, which would be the VMs of other tests."""
    images, content = chain(tmp_path / "vm")
    (tmp_path / "vm/broken.qcow2").write_bytes((tmp_path / "vm/c.qcow2").read_bytes().replace(b"b.qcow2", b"gone.qc"))
    line = nightly()[kind]
    for theirs, ours in (
        ("/usr/local/bin/qmpmerge", COMMAND),
        (" --all /vm ", f" {tmp_path}/vm "),
        ("/run/", f"{tmp_path}/"),
    ):
        assert kind == "systemd" or theirs in line
        line = line.replace(theirs, ours)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (
        done.returncode == 3
        and f"refused: {tmp_path}/vm/broken.qcow2: " in done.stderr
        and done.stderr.count("\n") == 2
    )
    assert (done.stdout == "") == (kind == "cron")
    assert entries(tidy(images[-1], "--keep", "2")) == {(str(images[-1]), "c.qcow2"): "unchanged"}
    assert not images[1].exists()
    content.check(images[-1])


@pytest.mark.skipif(not have("systemd-analyze"), reason="no systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in ("qmpmerge-tidy.service", "qmpmerge-tidy.timer"):
        text = (EXAMPLES / unit).read_text().replace("/usr/local/bin/qmpmerge", COMMAND)
        (tmp_path / unit).write_text(text)
    run("systemd-analyze", "verify", *tmp_path.iterdir())
