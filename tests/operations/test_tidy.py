"""`tidy`: chains of several VMs and folders, each down to its base and its newest overlays, on real QEMUs."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rig import contract, exits, faults, kills
from rig.command import COMMAND, Run, held, invoke, scripted
from rig.faults import digests
from rig.fleet import DISKS, Fleet, drive, left
from rig.machines import Content, Machine, fill, have, machine, make_chain, run
from rig.terminal import ENTER, on_terminal, plain

import qmpmerge
from qmpmerge import errors
from qmpmerge.cli.ask import CHOICE
from qmpmerge.operations.places import LeftOut
from qmpmerge.operations.tidy import Tidied
from qmpmerge.qemu import flush
from qmpmerge.testing.machines import CPU


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def tidy(*words: str | Path) -> Run:
    return invoke("tidy", *map(str, words), "--json")


def entries(run: Run) -> dict[tuple[str, str | None], str]:
    return {(one["target"], one["disk"]): one["verdict"] for one in run.document["tidied"]}


def after(run: Run) -> list[list[str]]:
    errors = [one["error"] for one in run.document["tidied"] if one["error"] is not None]
    assert not errors, errors
    return [[Path(file).name for file in one["outcome"]["after"]] for one in run.document["tidied"]]


# --- what is meant ----------------------------------------------------------------------------------------------------


def test_every_disk_of_every_vm_is_left_its_base_and_its_newest_overlays(fleet: Fleet) -> None:
    with fleet.vm("one") as one, fleet.vm("two") as two:
        done = tidy(one.target, two.target, "--keep", "1")
        assert (done.code, done.document["verdict"]) == (0, "done")
        assert entries(done) == {(each.target, disk): "merged" for each in (one, two) for disk in DISKS}
        assert after(done) == [["base.raw", "c.qcow2"]] * 4
        again = tidy(one.target, two.target, "--keep", "1")
        assert (again.code, again.document["verdict"], set(entries(again).values())) == (0, "unchanged", {"unchanged"})
        one.check()
        two.check()


def test_disks_are_told_in_their_order_however_long_each_takes(fleet: Fleet) -> None:
    with fleet.vm("one") as one:
        assert invoke("commit", one.target, "vdb", "--keep", "2").code == 0
        done = tidy(one.target, "--keep", "2")
        assert [*entries(done).items()] == [((one.target, "vda"), "merged"), ((one.target, "vdb"), "unchanged")]


def test_of_a_folder_what_is_in_use_is_left_out(fleet: Fleet) -> None:
    """Where its chain is too long; named by itself it is refused."""
    with fleet.vm("one", ["vda"]) as one:
        active = one.chains["vda"].active
        assert entries(tidy(active.parent, "--keep", "3")) == {(str(active), "c.qcow2"): "unchanged"}
        done = tidy(active.parent, "--keep", "2")
        (left_out,) = done.document["left_out"]
        assert (done.code, done.document["tidied"], left_out["target"]) == (0, [], str(active))
        assert left_out["reason"].startswith("it is in use by VM one")
        assert tidy(active, "--keep", "2").document["error"]["name"] == "in-use"


def test_a_folder_whose_chains_lie_further_below_is_told_to_be_the_wrong_one(fleet: Fleet, tmp_path: Path) -> None:
    chain = fleet.chain("vms/vm")
    shown = invoke("tidy", str(tmp_path / "vms"), "--keep", "2", "-q")
    below = f"name the folders below it that hold images, such as {chain.active.parent}"
    assert (shown.code, shown.err) == (0, f"hint: {tmp_path}/vms: {below}\n")
    (left_out,) = tidy(tmp_path / "vms", "--keep", "2").document["left_out"]
    assert (left_out["target"], left_out["hint"]) == (str(tmp_path / "vms"), below)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "vm/c.qcow2", "-F", "qcow2", "d.qcow2", cwd=tmp_path / "vms")
    assert tidy(tmp_path / "vms", "--keep", "9").document["left_out"] == []


def test_of_a_folder_those_chains_are_meant_whose_active_image_lies_there(fleet: Fleet) -> None:
    vm, _below = fleet.chain("vm"), fleet.chain("vm/below")
    active, folder = vm.active, vm.active.parent
    make_chain(folder, ["alone.raw"])
    (folder / "link.qcow2").symlink_to("c.qcow2")
    (folder / "notes.txt").write_text("no image")
    done = tidy(folder, "--keep", "2")
    assert entries(done) == {(str(active), "c.qcow2"): "merged"}
    assert after(done) == [["base.raw", "b.qcow2", "c.qcow2"]]
    vm.check()
    assert entries(tidy(folder, active, "--keep", "2")) == {(str(active), "c.qcow2"): "unchanged"}


def test_what_a_vm_among_the_targets_has_is_not_asked_for_again_by_its_folder(fleet: Fleet) -> None:
    with fleet.vm("one") as one:
        done = tidy(one.chains["vda"].active.parent, one.target, "--keep", "0")
        assert entries(done) == {(one.target, disk): "pivoted" for disk in DISKS}
        one.check()


def test_a_vm_that_is_named_twice_is_one(fleet: Fleet, tmp_path: Path) -> None:
    """By its name, its pid, each of its monitors, and what it has open."""
    other = tmp_path / "other"
    with fleet.vm("tidy-twice", more=["-qmp", f"unix:{other},server=on,wait=off"]) as one:
        pid, image = one.machine.process.pid, one.chains["vda"].active
        done = tidy(image, one.target, other, "tidy-twice", f"pid:{pid}", "--keep", "2")
        assert (done.code, entries(done)) == (0, {(one.target, disk): "merged" for disk in DISKS})
        one.check()


def test_what_is_meant_to_be_thrown_away_is_left_out(fleet: Fleet) -> None:
    with fleet.vm("rig", more=["-snapshot"]) as one:
        done = tidy(one.target, "--keep", "0", "--yes")
        assert (done.code, done.document["tidied"]) == (0, [])
        told = {(each["target"], each["disk"]) for each in done.document["left_out"]}
        assert told == {(one.target, disk) for disk in DISKS}
        assert f"left out: {one.target} vda: it is a snapshot=on drive" in invoke("tidy", one.target, "--keep", "1").err
        one.check()


async def test_all_are_the_vms_that_are_ours_to_touch(fleet: Fleet) -> None:
    """The monitors of all others that run here are left alone: a monitor has one client at a time."""

    def only_ours(name: str, **how: Any) -> contextlib.AbstractAsyncContextManager[qmpmerge.Target]:
        if name != "tidy-all":
            raise errors.NoSuchTarget(target=name)
        return qmpmerge.open(name, **how)

    mute = subprocess.Popen(["qemu-system-x86_64", *CPU, "-name", "tidy-mute"], stdin=subprocess.DEVNULL)
    try:
        with fleet.vm("tidy-all") as one:
            done = await qmpmerge.tidy(every=True, keep=1, door=only_ours)
            assert {each.disk: each.verdict for each in done.tidied if not each.error} == dict.fromkeys(DISKS, "merged")
            assert LeftOut("tidy-mute", "it has no QMP monitor") in done.left_out
            one.check()
    finally:
        mute.kill()
        mute.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of its own needs root")
def test_of_a_host_without_vms_all_are_none(tmp_path: Path) -> None:
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    assert json.loads(run(*alone, COMMAND, "tidy", "--all", "--keep", "3", "--json"))["tidied"] == []


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
        (["vm1", "--keep", "0", "--direction", "pull"], "no overlay to pull into: keep one with `--keep 1`"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(words: list[str], told: str) -> None:
    done = invoke("tidy", *words)
    assert (done.code, told in done.err) == (2, True), done.err


# --- several outcomes -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_one_refusal_and_one_failure_stop_none_of_38_merges(fleet: Fleet) -> None:
    """40 disks: of 19 VMs, of one that cannot write to its base, and a chain on which somebody else has built."""
    broken = "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5"
    shared, failing = fleet.chain("shared"), fleet.chain("failing")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", shared.active.with_name("z.qcow2"))
    with contextlib.ExitStack() as running:
        vms = [running.enter_context(fleet.vm(f"vm{number}")) for number in range(19)]
        words = faults.injecting(failing.images, "base", broken)
        ill = running.enter_context(machine(failing.active.parent, *words))
        done = tidy(*(vm.target for vm in vms), shared.active, ill.target, "--keep", "1", "--parallel", "4")
        shown = invoke("tidy", vms[0].target, ill.target, str(shared.active), "--keep", "1")
        assert left(vms, []) == []
        ill.stop()
        for vm in vms:
            vm.check()
    failing.check()
    shared.check()
    told: Any = done.document
    *merged, refused, failed = told["tidied"]
    assert [one["verdict"] for one in told["tidied"]] == [*["merged"] * 38, "refused", "failed"]
    assert [one["target"] for one in merged] == [vm.target for vm in vms for _disk in vm.chains]
    assert {(one["target"], one["disk"]) for one in merged} == {(vm.target, disk) for vm in vms for disk in DISKS}
    assert {tuple(Path(file).name for file in one["outcome"]["after"]) for one in merged} == {("base.raw", "c.qcow2")}
    assert not [one for one in merged if one["error"] is not None or not one["outcome"]["verified"]]
    assert (refused["target"], refused["outcome"], refused["error"]["name"]) == (str(shared.active), None, "dependents")
    assert f"`{refused['error']['facts']['pull']}` shortens" in refused["error"]["hint"]
    assert (failed["target"], failed["outcome"], failed["error"]["name"]) == (ill.target, None, "job-failed")
    assert (done.code, told["verdict"], told["error"]) == (5, "failed", failed["error"])
    assert (shown.code, sorted(shown.out.splitlines()[-1].split(": ")[1].split(", "))) == (
        5, ["1 failed", "1 refused", "2 unchanged"],
    )  # fmt: skip
    assert f"refused: {shared.active}: other images are built on" in shown.err and shown.err.count("hint: ") == 2


def test_a_line_for_each_disk_and_one_for_all(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.vm("one") as one:
        before = digests(tmp_path / "one/vda")
        planned = invoke("tidy", one.target, "/nowhere/monitor", "--keep", "1", "--dry-run")
        way = "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2, then base.raw <-- c.qcow2"
        *lines, unchecked, summary = planned.out.splitlines()
        heads = [number for number, line in enumerate(lines) if not line.startswith("  ")]
        assert sorted(lines[number] for number in heads) == [f"{one.target} {disk}: planned: {way}" for disk in DISKS]
        for number in heads:  # as `commit --dry-run` has them
            assert [line[2:10] for line in lines[number + 1 : number + 4]] == ["files   ", "copies  ", "space   "]
        names = sorted(f"{one.target} {disk}" for disk in DISKS)
        assert unchecked.startswith(f"{names[0]}, {names[1]}: not checked  ")
        assert summary == "2 disks: 2 planned; not looked at: /nowhere/monitor"
        assert planned.code == 4 and digests(tmp_path / "one/vda") == before and one.left == []
        done = invoke("tidy", one.target, "--keep", "1")
        *lines, summary = done.out.splitlines()
        assert summary == "2 disks: 2 merged"
        assert {line.partition(": ")[0] for line in lines} == {f"{one.target} {disk}" for disk in DISKS}
        assert all(line.startswith(f"{one.target} vd") and line.endswith(": base.raw <-- c.qcow2") for line in lines)
        one.check()


# --- the question before guests are moved -----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["n", "y"])
def test_on_a_terminal_pivots_are_shown_and_asked_about(answer: str, fleet: Fleet) -> None:
    short = fleet.chain("short")
    assert tidy(short.active.parent, "--keep", "0").code == 0
    with fleet.vm("one") as one:
        with on_terminal(
            "tidy", one.target, str(short.images[0].parent), "--keep", "0", elsewhere="< /dev/null"
        ) as seen:
            seen.wait_for(CHOICE)
            assert seen.screen.count(": planned: ") == 2 and "have the VMs use the bases from now on?" in seen.screen
            assert one.machine.session.execute("query-jobs") == []
            assert entries(tidy(one.target, "--keep", "3")) == {(one.target, disk): "unchanged" for disk in DISKS}
            seen.type(answer + ENTER)
            ended = seen.end()
        names = {image.name for chain in one.chains.values() for image in chain.images if image.exists()}
        if answer == "y":
            assert ended.code == 0 and names == {"base.raw"} and "2 pivoted" in plain(ended.out)
        else:
            assert ended.code == 130 and len(names) == 4 and "cancelled" in plain(ended.out)
        one.check()


def test_what_has_changed_since_it_was_agreed_to_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.vm("one") as one:
        with on_terminal("tidy", one.target, "--keep", "0") as seen:
            seen.wait_for(CHOICE)
            assert invoke("snapshot", one.target, f"vdb={tmp_path}/one/vdb/d.qcow2").code == 0
            seen.type("y" + ENTER)
            ended = seen.end()
        shown = " ".join(plain(ended.out).split())
        assert ended.code == 3 and "what would be merged now is not what was agreed to" in shown
        now = {entry["disk"]: entry["outcome"]["after"] for entry in tidy(one.target, "--keep", "4").document["tidied"]}
        assert {disk: len(images) for disk, images in now.items()} == {"vda": 1, "vdb": 5}
        one.machine.stop()
        one.chains["vda"].check()


def test_who_was_asked_nothing_is_told_why_nothing_is_done(tmp_path: Path) -> None:
    """Each is refused, so there is no plan to agree to."""
    base, first = make_chain(tmp_path, ["base.raw", "a.qcow2"])
    second = tmp_path / "b.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", second)
    with on_terminal("tidy", str(tmp_path), "--keep", "0") as seen:
        ended = seen.end()
    shown = " ".join(plain(ended.out).split())
    assert ended.code == 3 and "agreed" not in shown and str(first) in shown and str(second) in shown, shown


@pytest.mark.parametrize("words", [("--keep", "0", "--yes"), ("--keep", "1"), ("--keep", "0", "--dry-run")])
def test_nobody_is_asked_who_has_said_yes_or_about_what_moves_no_guest(words: tuple[str, ...], fleet: Fleet) -> None:
    chain = fleet.chain("vm")
    with on_terminal("tidy", str(chain.active), *words) as seen:
        ended = seen.end()
    assert (ended.code, CHOICE in ended.out) == (0, False)
    chain.check()


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
    done = tidy(*folders, *allow, "--direction", direction, "--merged-files", "delete")
    assert (done.code, set(entries(done).values())) == (0, {"pulled"})
    assert after(done) == [["base.raw", "b.qcow2"]] * 2 and golden.read_bytes() == before
    assert not any((folder / "a.qcow2").exists() for folder in folders)
    for active, content in contents:
        content.check(active)


@contextlib.contextmanager
def built_on(golden: Path, name: str, disks: Sequence[str]) -> Iterator[tuple[Machine, dict[Path, Content]]]:
    """A VM with these disks, three overlays each, on an image that is others' too."""
    contents = {}
    for disk in disks:
        folder = golden.parent / name / disk
        folder.mkdir(parents=True)
        below = [str(golden), "a.qcow2", "b.qcow2"]
        for image, backing in zip(("a.qcow2", "b.qcow2", "c.qcow2"), below, strict=True):
            form = backing.rpartition(".")[2]
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", form, image, cwd=folder)
        contents[folder / "c.qcow2"] = content = Content()
        fill([folder / "a.qcow2", folder / "b.qcow2", folder / "c.qcow2"], content)
    drives = [word for image in contents for word in drive(image.parent.name, image)]
    with machine(golden.parent / name, *drives, "-name", name) as started:
        yield started, contents


def test_auto_pulls_where_others_run_on_the_base_and_goes_on_with_a_pull(tmp_path: Path) -> None:
    """Two disks of one VM, and one that is off, are others to each other, and no other qmpmerge."""
    (golden,) = make_chain(tmp_path, ["golden.raw"])
    before = golden.read_bytes()
    riddle = 'json:{"driver":"qcow2","file":{"driver":"whatever","x":"y"}}'
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", riddle, "-F", "qcow2", "odd.qcow2", "1M", cwd=tmp_path)
    with built_on(golden, "off", ["vda"]) as (off, its):
        off.stop()
    with built_on(golden, "one", DISKS) as (one, ours), built_on(golden, "two", ["vda"]) as (two, theirs):
        words = [one.target, two.target, *map(str, its), "--allow", str(tmp_path), "--keep", "1"]
        refused = tidy(*words, "--parallel", "4", "--dry-run")
        names = {error["name"] for each in refused.document["tidied"] for error in _all_of(each["error"])}
        assert (refused.code, names) == (3, {"in-use", "dependents", "not-seen", "shared-base"})
        planned = tidy(*words, "--direction", "auto", "--parallel", "4", "--dry-run")
        assert (planned.code, set(entries(planned).values())) == (0, {"planned"})
        Begun(*words, "--direction", "auto", "--parallel", "4", disks=4).kill()
        assert [job["type"] for job in one.session.execute("query-jobs")] == ["stream", "stream"]
        done = tidy(*words, "--direction", "auto", "--speed", "0", "--parallel", "4")
        assert (done.code, set(entries(done).values())) == (0, {"pulled"})
        assert after(done) == [["golden.raw", "c.qcow2"]] * 4
        one.stop()
        two.stop()
    assert golden.read_bytes() == before
    for active, content in {**its, **ours, **theirs}.items():
        content.check(active)


def _all_of(error: dict[str, Any]) -> list[dict[str, Any]]:
    return error["facts"].get("refusals") or [error]


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


def test_killed_in_the_middle_and_run_again_all_is_well(fleet: Fleet, tmp_path: Path) -> None:
    """Killed while four disks are copied, and again at the third switch of the next run; `scripts/faults TT` has 20 VMs."""
    offline = fleet.chain("offline")
    with contextlib.ExitStack() as running:
        vms = [running.enter_context(fleet.vm(name)) for name in ("one", "two", "three")]
        words = [*(vm.target for vm in vms), str(offline.active.parent), "--keep", "1"]
        Begun(*words, "--parallel", "4", disks=4).kill()
        line = [tmp_path / "notes", "tool", "-> job-finalize #3", "tidy", *words, "--speed", "0"]
        killed = scripted(kills.__file__, *line)
        assert killed.code == -signal.SIGKILL
        done = tidy(*words, "--speed", "0")
        assert (done.code, after(done)) == (0, [["base.raw", "c.qcow2"]] * 7)
        assert left(vms, [offline]) == []
        for vm in vms:
            vm.check()
    offline.check()


def test_where_another_merge_just_flushes_is_no_disk(fleet: Fleet) -> None:
    with fleet.vm("one") as vm:
        session = vm.machine.session
        image = session.execute("query-block")[0]["inserted"]["node-name"]
        session.execute("blockdev-add", driver="blkdebug", node_name=flush.NODE, image=image, read_only=True)
        told = tidy(vm.target, "--keep", "9").document["tidied"]
        assert sorted(one["disk"] for one in told) == ["vda", "vdb"]


def test_images_that_lost_their_names_to_a_kill_get_them_back(fleet: Fleet, tmp_path: Path) -> None:
    """After a pivot that was not finished a folder holds no active image, but a record of one."""
    chain = fleet.chain("offline")
    folder, active = chain.active.parent, chain.active
    line = [tmp_path / "notes", "both", "<= rename #1", "tidy", folder, "--keep", "0"]
    killed = scripted(kills.__file__, *line)
    assert killed.code == -signal.SIGKILL and not active.exists()
    dry = tidy(folder, "--keep", "0", "--dry-run")
    assert (dry.code, dry.document["error"]["name"]) == (3, "unfinished") and not active.exists()
    done = tidy(folder, "--keep", "0")
    assert (done.code, entries(done)) == (0, {(str(active), "c.qcow2"): "pivoted"})
    chain.check()


def test_ctrl_c_cancels_all_and_tells_of_each(fleet: Fleet) -> None:
    """Of an image whose turn had not come as of a disk, too."""
    off = fleet.chain("off")
    with fleet.vm("one") as one, fleet.vm("two") as two:
        begun = Begun(one.target, two.target, off.active, "--keep", "1", disks=2)
        begun.process.send_signal(signal.SIGINT)
        done = begun.end()
        assert (done.code, done.document["verdict"]) == (130, "cancelled")
        assert set(entries(done).values()) == {"cancelled"} and {target for target, _ in entries(done)} == {
            one.target,
            two.target,
            str(off.active),
        }
        assert entries(done)[str(off.active), "c.qcow2"] == "cancelled"
        for each in (one, two):
            assert each.machine.session.execute("query-jobs") == []
            each.check()


def test_a_closed_terminal_leaves_the_jobs(fleet: Fleet) -> None:
    with fleet.vm("one") as one:
        begun = Begun(one.target, "--keep", "1", disks=2)
        begun.process.send_signal(signal.SIGHUP)
        done = begun.end()
        assert (done.code, entries(done)) == (7, {(one.target, disk): "running" for disk in DISKS})
        assert len(one.machine.session.execute("query-jobs")) == 2
        assert set(entries(tidy(one.target, "--keep", "1", "--speed", "0")).values()) == {"merged"}
        one.check()


def test_after_the_time_limit_nothing_is_begun_and_what_is_at_work_is_left(fleet: Fleet) -> None:
    with fleet.vm("one") as one:
        done = tidy(one.target, "--keep", "1", "--speed", "1", "--parallel", "1", "--timeout", "5")
        told = entries(done)
        assert (done.code, told[one.target, "vdb"]) == (7, "postponed")
        assert told[one.target, "vda"] in ("running", "postponed")  # the latter where it took five seconds to begin
        assert len(one.machine.session.execute("query-jobs")) == list(told.values()).count("running")
        assert set(entries(tidy(one.target, "--keep", "1", "--speed", "0")).values()) == {"merged"}
        one.check()


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_one_leaves_alone_what_the_first_is_at_work_on(fleet: Fleet) -> None:
    """A monitor has one client at a time, an image one writer."""
    offline = fleet.chain("offline")
    with fleet.vm("one") as one, fleet.vm("two") as two:
        begun = Begun(one.target, offline.active, "--keep", "1", "--parallel", "3", disks=3)
        second = tidy(one.target, offline.active, two.target, "--keep", "1")
        exits.see_that_it_is_told(["tidy"], second.code)
        assert second.code == 4
        told = entries(second)
        assert (told.pop((one.target, None)), told.pop((str(offline.active), "c.qcow2"))) == ("unreachable", "refused")
        assert told == {(two.target, disk): "merged" for disk in DISKS}
        monitor, image = [one["error"]["name"] for one in second.document["tidied"][:2]]
        assert (monitor in ("monitor-held", "monitor-silent"), image) == (True, "in-use")  # who holds it `ss` tells
        begun.process.send_signal(signal.SIGINT)
        ended = begun.end()
        assert (ended.code, set(entries(ended).values())) == (130, {"cancelled"})
        assert left([one, two], [offline]) == []
        one.check()
        two.check()
    offline.check()


def test_two_at_once_do_no_harm(fleet: Fleet) -> None:
    """Whatever they meet at: each disk is done by one of them, or is told to be in use, and nothing fails."""
    offline = fleet.chain("offline")
    with fleet.vm("one") as one, fleet.vm("two") as two:
        line = ["tidy", one.target, two.target, str(offline.active.parent), "--keep", "1", "--json"]
        both = [
            subprocess.Popen([COMMAND, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
        ]
        ended = [Run(process.wait(60), *process.communicate()) for process in both]
        for run in ended:
            assert run.code in (0, 3, 4), run
            contract.hold(run.out, run.err)
            names = {one["error"]["name"] for one in run.document["tidied"] if one["error"] is not None}
            assert names <= {"in-use", "locked", "monitor-held", "monitor-silent"}
        assert {disk for run in ended for disk, verdict in entries(run).items() if verdict == "merged"} == {
            *((vm.target, disk) for vm in (one, two) for disk in DISKS),
            (str(offline.active), "c.qcow2"),
        }
        assert left([one, two], [offline]) == []
        one.check()
        two.check()
    offline.check()


# --- the speed of all together ----------------------------------------------------------------------------------------


async def test_the_speed_is_shared_by_what_is_at_work(fleet: Fleet) -> None:
    with fleet.vm("one") as one:
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


async def test_the_library_gives_each_disk_in_the_order_of_the_targets(fleet: Fleet) -> None:
    offline = fleet.chain("offline")
    with fleet.vm("one") as one:
        done = await qmpmerge.tidy([offline.active.parent, one.target], keep=2, dry_run=True)
    assert (done.verdict, done.error) == ("planned", None)
    assert [each.target for each in done.tidied] == [str(offline.active), one.target, one.target]
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
def test_the_example_shortens_chains_and_says_only_what_went_wrong(kind: str, fleet: Fleet, tmp_path: Path) -> None:
    """With our paths for those that it names; and without `--all`, which would be the VMs of other tests."""
    vm = fleet.chain("vm")
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
    assert entries(tidy(vm.active, "--keep", "2")) == {(str(vm.active), "c.qcow2"): "unchanged"}
    assert not vm.images[1].exists()
    vm.check()


def test_the_unit_has_no_mounts_of_its_own() -> None:
    """With these (systemd.exec(5)) it would be in another mount namespace than the VMs, and what is not seen is refused."""
    apart = r"^(Private\w+|Protect\w+|\w+Paths|Root\w+|Bind\w+|TemporaryFileSystem|DynamicUser)="
    assert not re.findall(apart, (EXAMPLES / "qmpmerge-tidy.service").read_text(), re.MULTILINE)


@pytest.mark.skipif(not have("systemd-analyze"), reason="no systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in ("qmpmerge-tidy.service", "qmpmerge-tidy.timer"):
        text = (EXAMPLES / unit).read_text().replace("/usr/local/bin/qmpmerge", COMMAND)
        (tmp_path / unit).write_text(text)
    run("systemd-analyze", "verify", *tmp_path.iterdir())
