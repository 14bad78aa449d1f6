"""
Each refusal on a real QEMU: the harm that happens without it (`plain_...`, marked with `harm`), and that it does not happen.

Those whose harm is part of the safe sequence have their tests in test_merge.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rig.command import invoke
from rig.devices import loop, mounted
from rig.disks import BACKEND, blockdev, device, drive, nbd_server, nodes
from rig.harms import harm, marked
from rig.headers import may_trace, raw_header
from rig.machines import MIB, SIZE, Content, Machine, machine, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge import errors
from qmpmerge.checks import check, known_bad
from qmpmerge.errors import (
    FORCEABLE,
    Attached,
    BackingString,
    BitmapsNotCarried,
    Busy,
    CannotGrow,
    Dependents,
    DeviceTooSmall,
    Disagrees,
    Disguised,
    ForeignName,
    InUse,
    KnownBad,
    NoFormat,
    NoSpace,
    NotWritable,
    Refused,
    Replaced,
    SeveralRefusals,
    SharedBase,
    WouldLose,
)
from qmpmerge.errors import refused as refusals
from qmpmerge.images import dependents
from qmpmerge.qemu.bitmaps import carry, of

R = TypeVar("R", bound=Refused)
DRIVE = "file={},format=qcow2,if=none,id=vda"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this to files")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "vm").mkdir()
    return make_chain(tmp_path / "vm")


@pytest.fixture
def vm(tmp_path: Path, images: list[Path], content: Content) -> Iterator[Machine]:
    """A -blockdev disk with a chain of four and data in each; nodes are called like the files."""
    with blockdev(tmp_path, images, content) as setup:
        yield setup.machine


def plain(vm: Machine, device: str = "c", **arguments: object) -> dict[str, Any]:
    """The shortest QMP conversation that merges; returns the job as it ended."""
    vm.session.execute("block-commit", job_id="plain", device=device, auto_dismiss=False, **arguments)
    while True:
        (job,) = [job for job in vm.session.execute("query-jobs") if job["id"] == "plain"]
        if job["status"] == "ready":
            vm.session.ask("job-complete", id="plain")
        if job["status"] == "concluded":
            vm.session.execute("job-dismiss", id="plain")
            return dict(job)


async def refused(vm: Machine | Path, kind: type[R], **options: Any) -> R:
    """What a merge is refused for; nothing else may be wrong, and nothing is left behind."""
    name = vm.target if isinstance(vm, Machine) else vm
    async with qmpmerge.open(name) as target:
        with pytest.raises(kind) as found:
            await qmpmerge.commit(target, **options)
        assert not await target.jobs()
    return found.value


def view(image: Path, form: str = "qcow2") -> bytes:
    """What the image shows; nobody may hold it."""
    target = image.with_suffix(".view")
    run("qemu-img", "convert", "-U", "-f", form, "-O", "raw", image, target)
    data = target.read_bytes()
    target.unlink()
    return data


def overlay(path: Path, backing: Path | str, form: str = "raw", size: int = SIZE, kind: str = "qcow2") -> Path:
    run("qemu-img", "create", "-q", "-u", "-f", kind, "-b", str(backing), "-F", form, path, str(size))
    return path


# --- all at once ------------------------------------------------------------------------------------------------------


async def test_all_that_says_no_is_told_at_once(vm: Machine, images: list[Path]) -> None:
    other = overlay(images[0].parent / "other.qcow2", "base.raw")
    vm.session.execute("block-dirty-bitmap-add", node="c", name="daily", persistent=True)
    several = await refused(vm, SeveralRefusals)
    assert [refusal.name for refusal in several.refusals] == ["dependents", "would-lose"]
    assert all(str(refusal) in str(several) and refusal.hint in several.hint for refusal in several.refusals)
    done = invoke("commit", vm.target, "--json")
    error = done.document["error"]
    assert (done.code, error["name"], error["facts"]) == (3, "several-refusals", several.facts)
    assert error["facts"]["refusals"][0]["facts"]["dependents"] == [str(other)]
    text = invoke("commit", vm.target)
    assert [line.split(":")[0] for line in text.err.splitlines()] == ["refused", "hint"] * 2
    await refused(vm, WouldLose, force=["dependents"])
    async with qmpmerge.live(vm.target) as target:
        outcome = await qmpmerge.commit(target, force=["dependents", "would-lose"], dry_run=True)
    assert {check.name for check in outcome.checks if check.result == "forced"} == {"dependents", "would-lose"}


def test_a_dry_run_tells_what_passed_and_what_it_takes(vm: Machine, tmp_path: Path) -> None:
    planned = invoke("commit", vm.target, "--top", "[3]", "--dry-run", "--speed", "1M", "--json").document
    assert [check["name"] for check in planned["checks"]] == list(check.CHECKS)
    assert {check["name"] for check in planned["checks"] if check["result"] != "passed"} == {"not-writable"}
    estimate = planned["estimate"]
    assert estimate["copy"] == 2 * MIB + 384 * 1024  # what `fill` has written to a and b, once
    assert (estimate["seconds"], estimate["rate"], estimate["rate_given"]) == (estimate["copy"] / MIB, MIB, True)
    said = invoke("commit", vm.target, "--dry-run").out
    assert f"  checks  {len(check.CHECKS)} of {len(check.CHECKS)} passed\n" in said
    assert re.search(
        rf"no other image is built on what changes \(looked at \d files in 1 folder: {re.escape(str(tmp_path))}/vm\)",
        said,
    )
    assert "at least" in said and "200 MiB/s (assumed)" in said


def test_what_can_be_forced() -> None:
    assert set(FORCEABLE) - {"libvirt"} <= set(check.CHECKS)
    assert invoke("commit", "nobody", "--force", "shorter-layer").code == 2


# --- who else in this QEMU uses them ------------------------------------------------------------------------------------


def exporting(vm: Machine, node: str, folder: Path) -> None:
    vm.session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "export")}})
    vm.session.execute("block-export-add", type="nbd", id="theirs", node_name=node, name="theirs")


@harm("attached", "QEMU says `Permission conflict`, and a dry run that does not ask says `planned`")
def test_plain_commit_says_something_about_permissions(vm: Machine, tmp_path: Path) -> None:
    exporting(vm, "a", tmp_path)
    said = vm.session.ask("block-commit", job_id="plain", device="c", top_node="b", base_node="base")
    assert "conflict" in said["error"]["desc"].lower()


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("top", ["[3]", None])
async def test_an_exported_layer_is_told_with_the_export(
    vm: Machine, images: list[Path], tmp_path: Path, top: str | None, dry_run: bool
) -> None:
    exporting(vm, "a", tmp_path)
    found = await refused(vm, Attached, top=top, dry_run=dry_run)
    assert (found.file, found.users) == (str(images[1]), ["export theirs"])
    assert {other.name for other in images[0].parent.iterdir()} == {image.name for image in images}
    do(vm, found.hint)
    while vm.session.execute("query-block-exports"):  # it goes by and by
        pass
    async with qmpmerge.live(vm.target) as target:
        assert (await qmpmerge.commit(target, top=top, dry_run=dry_run)).verdict in ("planned", "merged", "pivoted")


@pytest.mark.parametrize(("node", "shared"), [("base", False), ("a", True)])
async def test_a_layer_under_a_second_device_is_told_with_the_device(
    tmp_path: Path, images: list[Path], node: str, shared: bool
) -> None:
    second = ["-device", f"virtio-blk-pci,drive={node},id=second,share-rw={'on' if shared else 'off'}"]
    with machine(tmp_path, *nodes(images), *device("c"), *second) as vm:
        found = await refused(vm, Attached, disk="disk0", dry_run=True)
        assert (Path(found.file).stem, found.users) == (node, ["device second"])
        assert '"device_del", "arguments": {"id": "second"}' in found.hint
        said = vm.session.ask("block-commit", job_id="j", device="c", base_node="base")
        assert "conflict" in said["error"]["desc"].lower()


async def test_who_is_in_nobodys_way_is_not_refused(tmp_path: Path, images: list[Path], content: Content) -> None:
    """A reader of the base that lets it be written to, of the top, which shows the same afterwards, and of the overlay."""
    second = ["-device", "virtio-blk-pci,drive=base,id=second,share-rw=on"]
    with machine(tmp_path, *nodes(images), *device("c"), *second) as vm:
        exporting(vm, "b", tmp_path)
        vm.session.execute("block-export-add", type="nbd", id="active", node_name="c", name="active")
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, "disk0", top="[3]")
        assert str(outcome.after) == "base.raw <-- c.qcow2"
        vm.stop()
    content.check(images[3])


def do(vm: Machine, hint: str) -> None:
    """What the first command of a hint sends, over the bench's own session."""
    words = shlex.split(hint.split("`")[1])
    assert words[:2] == ["printf", "%s\\n"] and words[-4:] == ["socat", "-t5", "-", f"UNIX-CONNECT:{vm.target}"]
    for line in words[3 : words.index("|")]:
        sent = json.loads(line)
        vm.session.execute(sent["execute"], **sent.get("arguments", {}))


# --- who else uses the images -------------------------------------------------------------------------------------------


@harm(
    "dependents",
    "an image that is built on the base shows other data, without a word, and `qemu-img check` finds it clean",
)
def test_plain_commit_changes_what_others_on_the_base_show(images: list[Path], content: Content) -> None:
    other = overlay(images[0].parent / "other.qcow2", "base.raw")
    before = view(other)
    run("qemu-img", "commit", "-q", "-b", images[0], images[3])
    assert view(other) != before
    run("qemu-img", "check", "-q", other)


@pytest.mark.parametrize("kind", ["qcow2", "qed", "vmdk"])
async def test_an_image_on_the_base_is_protected(kind: str, images: list[Path], vm: Machine) -> None:
    if kind == "vmdk":  # has parents of its own kind only; by another name it is on our base all the same
        run("qemu-img", "create", "-q", "-f", "vmdk", images[0].parent / "parent.vmdk", "8M")
        other = overlay(images[0].parent / "other.vmdk", images[0].parent / "parent.vmdk", "vmdk", kind="vmdk")
        (images[0].parent / "parent.vmdk").unlink()
        (images[0].parent / "parent.vmdk").symlink_to(images[0])
    else:
        other = overlay(images[0].parent / f"other.{kind}", "base.raw", kind=kind)
    found = await refused(vm, Dependents, top="[3]")
    assert (found.images, found.dependents) == ([str(images[0])], [str(other)])


async def test_what_is_only_called_like_a_stashed_image_is_protected(images: list[Path], vm: Machine) -> None:
    """Somebody's disk can be called so; nothing marks it as one that a merge has put aside."""
    other = overlay(images[0].parent / "vm2.merged", "base.raw")
    assert (await refused(vm, Dependents, top="[3]")).dependents == [str(other)]
    vm.stop()
    assert (await refused(images[3], Dependents, top="[3]")).dependents == [str(other)]


@pytest.mark.parametrize("live", [True, False])
async def test_a_chain_made_again_beside_what_was_stashed(live: bool, images: list[Path], tmp_path: Path) -> None:
    """The new images have the names that the stashed ones name as their backing files, and so have theirs in the end."""
    for number in ("", ".2", ".3"):
        with machine(tmp_path, *nodes(images), *device("c")) if live else contextlib.nullcontext() as vm:
            async with qmpmerge.open(vm.target if vm is not None else images[3]) as target:
                outcome = await qmpmerge.commit(target, top="[3]", dry_run=True)
                assert "dependents" in {check.name for check in outcome.checks if check.result == "passed"}
                assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
                assert (await qmpmerge.commit(target)).verdict == "pivoted"
        assert {f"{name}.qcow2.merged{number}" for name in "abc"} <= set(os.listdir(images[0].parent))
        for below, image in itertools.pairwise(images):
            overlay(image, below.name, below.suffix[1:])


@needs_root
def test_where_files_take_no_attributes_a_stashed_image_is_known_all_the_same(
    images: list[Path], tmp_path: Path
) -> None:
    with mounted(tmp_path / "m", "-t", "ramfs", "none") as folder:
        for image in images:
            shutil.copy(image, folder)
        assert invoke("commit", str(folder / "c.qcow2"), "--top", "[2]").code == 0
        assert invoke("commit", str(folder / "c.qcow2")).code == 0
        assert invoke("clean", str(folder), "--json").document["verdict"] == "done"
        assert os.listdir(folder) == ["base.raw"]


@pytest.fixture
def jobs(tmp_path: Path) -> list[Path]:
    """A golden image and five jobs that are built on it, each in a folder of its own."""
    golden = tmp_path / "ci" / "golden" / "base.raw"
    golden.parent.mkdir(parents=True)
    golden.write_bytes(b"\x11" * SIZE)
    tops = [tmp_path / "ci" / "jobs" / str(number) / "top.qcow2" for number in range(5)]
    for top in tops:
        top.parent.mkdir(parents=True)
        overlay(top, golden)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", tops[0])
    return [golden, *tops]


@harm("shared-base", "the images of others that are built on a golden image show other data, wherever they lie")
def test_plain_commit_into_a_golden_image(jobs: list[Path]) -> None:
    before = view(jobs[2])
    run("qemu-img", "commit", "-q", jobs[1])
    assert view(jobs[2]) != before


def asked(jobs: list[Path], vm: Machine | None, *options: str) -> Any:
    """The first job is merged, live or offline; what the command says."""
    where = [vm.target] if vm is not None else [str(jobs[1]), "--allow", str(jobs[0])]
    return invoke("commit", *where, *options, "--json").document


@contextlib.contextmanager
def job(live: bool, jobs: list[Path], tmp_path: Path) -> Iterator[Machine | None]:
    if not live:
        yield None
        return
    with machine(tmp_path, "-drive", DRIVE.format(jobs[1]), *device("vda")) as vm:
        yield vm


@pytest.mark.parametrize("live", [True, False])
def test_a_golden_image_is_protected(live: bool, jobs: list[Path], tmp_path: Path) -> None:
    """The search that the hint tells finds the others; without them it covers the base, and nobody needs to name it."""
    before = jobs[0].read_bytes()
    with job(live, jobs, tmp_path) as vm:
        for options in (["--shallow"], ["--search", str(jobs[1].parent)], []):
            error = asked(jobs, vm, *options)["error"]
            assert (error["name"], error["facts"]["base"]) == ("shared-base", str(jobs[0]))
        search = re.findall(r"`(--search \S+)`", asked(jobs, vm)["error"]["hint"])[0].split()
        assert search == ["--search", str(tmp_path / "ci")]
        error = asked(jobs, vm, *search)["error"]
        assert (error["name"], error["facts"]["dependents"]) == ("dependents", sorted(map(str, jobs[2:])))
        assert jobs[0].read_bytes() == before
        for other in jobs[2:]:
            other.unlink()
        merged = asked(jobs, vm, *search)
        (row,) = [row for row in merged["checks"] if row["name"] == "dependents"]
        assert (merged["verdict"], row["result"]) == ("pivoted", "passed")
        assert row["scope"].endswith(f", all below {tmp_path}/ci") and " in 8 folders: " in row["scope"]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("by_index", [True, False])
def test_a_golden_image_that_is_named_is_merged_into(
    by_index: bool, live: bool, jobs: list[Path], tmp_path: Path
) -> None:
    with job(live, jobs, tmp_path) as vm:
        hint = asked(jobs, vm)["error"]["hint"]
        base = re.findall(r"`--base (\S+)`", hint)[0]
        assert base == str(jobs[0])
        assert asked(jobs, vm, "--base", "[1]" if by_index else base)["verdict"] == "pivoted"


def test_a_search_that_comes_to_no_end_protects_nobody(
    jobs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no look at those who may be built on the base; where that is named, the check is not made."""
    monkeypatch.setattr(dependents, "MOST", 5)
    cut = asyncio.run(planned(jobs, search=[tmp_path]))
    assert isinstance(cut, SharedBase)
    cut = asyncio.run(planned(jobs, search=[str(tmp_path)], base="[1]"))
    (row,) = [row for row in cut.checks if row.name == "dependents"]
    assert (row.result, "more than 5 files" in (row.reason or "")) == ("not checked", True)


async def planned(jobs: list[Path], **options: Any) -> Any:
    """The plan of an offline merge, or what it is refused for."""
    try:
        async with qmpmerge.offline(jobs[1], allow=[jobs[0]]) as target:
            return await qmpmerge.commit(target, dry_run=True, **options)
    except Refused as refusal:
        return refusal


def test_a_base_below_the_active_images_folder_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "vm" / "base").mkdir(parents=True)
    (tmp_path / "vm" / "base" / "base.raw").write_bytes(bytes(SIZE))
    top = overlay(tmp_path / "vm" / "top.qcow2", "base/base.raw")
    (tmp_path / "link").symlink_to(top.parent)
    done = invoke("commit", str(tmp_path / "link" / "top.qcow2"), "--dry-run")
    assert (done.code, f"all below {tmp_path}/vm" in done.out) == (0, True)
    (tmp_path / "vm" / "other").mkdir()
    other = overlay(tmp_path / "vm" / "other" / "top.qcow2", "../base/base.raw")
    refused = invoke("commit", str(tmp_path / "link" / "top.qcow2"), "--json").document["error"]
    assert (refused["name"], refused["facts"]["dependents"]) == ("dependents", [str(other)])
    other.unlink()
    assert invoke("commit", str(tmp_path / "link" / "top.qcow2")).code == 0


async def test_a_base_on_a_server_is_anybodys(tmp_path: Path, images: list[Path]) -> None:
    """Named by its index: a hint can be typed."""
    with nbd_server(tmp_path, images[0]) as uri:
        top = overlay(tmp_path / "top.qcow2", uri)
        with machine(tmp_path, "-drive", DRIVE.format(top), *device("vda")) as vm:
            found = await refused(vm, SharedBase)
            assert (found.base, "`--base 1`" in found.hint) == (uri.replace(":///?", "://?"), True)
            done = invoke("commit", vm.target, "--base", "[1]", "--dry-run")
            assert f"(dependents): what is built on {found.base} cannot be looked for in folders" in done.out


@contextlib.contextmanager
def neighbour(tmp_path: Path, base: Path) -> Iterator[Machine]:
    """Another VM without locks, whose overlay on the base lies where nobody looks."""
    far = tmp_path / "far"
    far.mkdir()
    file = overlay(far / "other.qcow2", base)
    disk = f"file={file},format=qcow2,if=none,id=vda,file.locking=off,backing.file.locking=off"
    with machine(far, "-name", f"neighbour-{os.getpid()}", "-drive", disk, *device("vda")) as other:
        yield other


@harm("in-use", "another VM that has the base open without locks (`locking=off`) reads other data while it runs")
def test_plain_commit_changes_what_another_vm_reads(vm: Machine, images: list[Path], tmp_path: Path) -> None:
    with neighbour(tmp_path, images[0]) as other:
        other.io("vda", f"read -P 0 {3 * MIB} 1M")
        assert "error" not in plain(vm)
        other.io("vda", f"read -P 0x13 {3 * MIB} 64k")


async def test_a_vm_without_locks_is_found(vm: Machine, images: list[Path], tmp_path: Path) -> None:
    with neighbour(tmp_path, images[0]) as other:
        several = await refused(vm, SeveralRefusals)
        in_use, built_on = several.refusals
        assert isinstance(in_use, InUse) and isinstance(built_on, Dependents)
        assert (in_use.file, built_on.dependents) == (str(images[0]), [f"{tmp_path}/far/other.qcow2"])
        (holder,) = in_use.holders
        assert f"VM neighbour-{os.getpid()} (" in holder and f"pid {other.process.pid}" in holder
        assert other.target in holder
        other.io("vda", f"read -P 0 {3 * MIB} 1M")


async def test_a_disk_of_the_same_vm_on_the_same_base(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    second = overlay(tmp_path / "far" / "other.qcow2", images[0])
    explicit = [*nodes(images), "-blockdev", f"file,node-name=s-file,filename={second}"]
    explicit += ["-blockdev", "qcow2,node-name=s,file=s-file,backing=base", "-device", "virtio-blk-pci,drive=s"]
    with machine(tmp_path, *explicit, *device("c")) as vm:
        assert (await refused(vm, Dependents, disk="disk0")).dependents == [str(second)]


async def test_a_reader_is_named_and_can_be_known_to_be_harmless(vm: Machine, images: list[Path]) -> None:
    with (
        open(images[1]) as file,
        subprocess.Popen(["cat", "-"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]) as cat,
    ):
        try:
            in_use = await refused(vm, InUse, top="[3]")
            assert (in_use.file, in_use.holders) == (str(images[1]), [f"cat (pid {cat.pid})"])
            async with qmpmerge.live(vm.target) as target:
                assert (await qmpmerge.commit(target, top="[3]", force=["in-use"])).verdict == "merged"
        finally:
            cat.kill()


@pytest.fixture
def mountable(images: list[Path], content: Content) -> list[Path]:
    """The chain, with a filesystem in its base."""
    run("mkfs.ext4", "-q", "-F", images[0])
    return images


@needs_root
def test_plain_commit_writes_under_a_mounted_filesystem(mountable: list[Path], vm: Machine, tmp_path: Path) -> None:
    """A loop device locks nothing: what the kernel shows from there is overwritten, and the other way round."""
    with loop(mountable[0]) as disk, mounted(tmp_path / "m", disk):
        before = Path(disk).read_bytes()
        assert "error" not in plain(vm)
        run("blockdev", "--flushbufs", disk)
        assert Path(disk).read_bytes() != before


@needs_root
async def test_a_mounted_filesystem_is_named(mountable: list[Path], vm: Machine, tmp_path: Path) -> None:
    """Live, offline and to the doctor; once the hint was typed, the merge is made."""
    before = mountable[0].read_bytes()
    with loop(mountable[0]) as disk, mounted(tmp_path / "m", "-o", "ro", disk) as place:
        in_use = await refused(vm, InUse)
        assert (in_use.file, in_use.holders) == (str(mountable[0]), [f"loop device {disk} (mounted on {place})"])
        vm.stop()
        error = invoke("commit", str(mountable[3]), "--json").document["error"]
        assert (error["name"], error["facts"]["holders"]) == ("in-use", in_use.holders)
        assert in_use.hint.startswith(f"{error['hint']}; ")
        assert {odd.name for odd in (await looked_at(mountable[3])).oddities} == {"in-use"}
        (finding,) = invoke("doctor", str(mountable[3]), "--json").document["findings"]
        assert (finding["name"], f"`{finding['fix']}`") == ("in-use", error["hint"])
        assert mountable[0].read_bytes() == before
        run("sh", "-c", error["hint"].strip("`"))
        assert invoke("commit", str(mountable[3])).code == 0
        assert mountable[0].read_bytes() != before


async def looked_at(image: Path) -> qmpmerge.ChainView:
    async with qmpmerge.offline(image, write=False) as target:
        return await target.chain()


@needs_root
def test_the_kernel_is_asked_where_the_process_cannot_be(mountable: list[Path], tmp_path: Path) -> None:
    """By TCP nobody tells which process QEMU is."""
    monitor = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    with machine(tmp_path, "-drive", DRIVE.format(mountable[3]), *device("vda"), *monitor) as vm:
        names = [one["filename"] for one in vm.session.execute("query-chardev") if "tcp:" in one["filename"]]
        target = f"tcp:127.0.0.1:{re.findall('[0-9]+', names[0])[-1]}"
        with loop(mountable[0]) as disk, mounted(tmp_path / "m", disk):
            error = invoke("commit", target, "--json").document["error"]
        assert (error["name"], error["facts"]["file"]) == ("in-use", str(mountable[0]))


@needs_root
async def test_a_base_that_is_a_mounted_device(images: list[Path], tmp_path: Path) -> None:
    disk_file = tmp_path / "disk"
    disk_file.write_bytes(bytes(SIZE))
    run("mkfs.ext4", "-q", disk_file)
    with loop(disk_file) as disk:
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", disk, images[1])
        with mounted(tmp_path / "m", disk) as place:
            done = invoke("commit", str(images[3]), "--allow", disk, "--json")
            assert done.document["error"]["facts"]["holders"] == [f"mounted on {place}"]
        with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
            assert invoke("commit", vm.target, "--base", disk, "--dry-run").code == 0
            with mounted(tmp_path / "m", disk) as place:
                assert (await refused(vm, InUse, base=disk)).holders == [f"mounted on {place}"]


@needs_root
async def test_a_stashed_image_under_a_loop_device_is_not_removed(images: list[Path], tmp_path: Path) -> None:
    assert invoke("commit", str(images[3])).code == 0
    with loop(tmp_path / "vm" / "a.qcow2.merged") as disk:
        kept = {one.file: one.obstacle for one in await qmpmerge.clean([tmp_path / "vm"])}
    assert {file for file, reason in kept.items() if reason} == {f"{tmp_path}/vm/a.qcow2.merged"}
    assert kept[f"{tmp_path}/vm/a.qcow2.merged"] == f"in use by loop device {disk}"


@harm("busy", "QEMU says `Need a root block node`, from which nobody can tell what is wrong")
def test_plain_commit_of_a_busy_disk(vm: Machine) -> None:
    vm.session.execute("block-commit", job_id="first", device="c", top_node="b", base_node="a", speed=1)
    said = vm.session.ask("block-commit", job_id="second", device="c", top_node="a", base_node="base")
    assert said["error"]["desc"] == "Need a root block node"


async def test_a_strangers_job_is_named(vm: Machine) -> None:
    vm.session.execute("block-commit", job_id="first", device="c", top_node="b", base_node="a", speed=1)
    async with qmpmerge.live(vm.target) as target:
        with pytest.raises(Busy) as busy:
            await qmpmerge.commit(target, top="[2]")
    assert busy.value.job == "first"


async def test_a_job_that_has_just_begun_is_named(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all was checked, as that of another command of the same moment."""
    async with qmpmerge.live(vm.target) as target:

        async def open_for_writing(images: object) -> None:
            vm.session.execute("block-stream", job_id="theirs", device="c", base_node="a", speed=1)

        monkeypatch.setattr(target, "open_for_writing", open_for_writing)
        with pytest.raises(Busy) as busy:
            await qmpmerge.commit(target, top="[3]")
        assert busy.value.job == "theirs"


# --- files and names ------------------------------------------------------------------------------------------------


def replace(image: Path) -> bytes:
    """Put another file in its place, as a copy of a backup would."""
    other = image.with_suffix(".new")
    other.write_bytes(image.read_bytes())
    other.rename(image)
    return image.read_bytes()


@harm("replaced", "QEMU opens the base by its name again and writes into the other file")
def test_plain_commit_writes_into_another_file(vm: Machine, images: list[Path]) -> None:
    before = replace(images[0])
    assert "error" not in plain(vm)
    assert images[0].read_bytes() != before


async def test_another_file_under_the_name_is_left_alone(vm: Machine, images: list[Path]) -> None:
    before = replace(images[0])
    assert (await refused(vm, Replaced)).file == str(images[0])
    assert images[0].read_bytes() == before


async def test_a_merged_image_whose_name_is_gone_is_saved(vm: Machine, images: list[Path], content: Content) -> None:
    images[2].unlink()
    async with qmpmerge.live(vm.target) as target:
        assert (await qmpmerge.commit(target, force=["dependents"])).verdict == "pivoted"
    vm.stop()
    content.check(images[0])


def repoint(image: Path, name: str) -> None:
    """Change the backing name in a header, as somebody does with `qemu-img rebase -u` while QEMU runs."""
    data = image.read_bytes()
    old = b"b.qcow2"
    assert data.count(old) == 1 and len(name) == len(old)
    with image.open("r+b") as file:
        file.write(data.replace(old, name.encode()))


@harm("disagrees", "the header's own chain, which the next start would have used, is overwritten with QEMU's")
def test_plain_commit_overwrites_the_headers_chain(vm: Machine, images: list[Path]) -> None:
    repoint(images[3], "z.qcow2")
    plain(vm, top_node="b", base_node="base", backing_file="base.raw")
    assert "z.qcow2" not in run("qemu-img", "info", "-U", images[3])


async def test_a_header_that_tells_another_chain_is_left_alone(vm: Machine, images: list[Path]) -> None:
    repoint(images[3], "z.qcow2")
    found = await refused(vm, Disagrees, top="[3]")
    assert (found.header, found.graph) == ("z.qcow2", str(images[2]))
    async with qmpmerge.live(vm.target) as target:
        assert [odd.file for odd in (await target.chain()).oddities] == [str(images[3])]
    assert "z.qcow2" in run("qemu-img", "info", "-U", images[3])


@pytest.fixture
def linked(tmp_path: Path, images: list[Path]) -> list[Path]:
    """The overlays under symlinks in a folder from which another way leads to the base than from their own."""
    gold = tmp_path / "gold.raw"
    images[0].rename(gold)
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", gold, images[1])
    shop = tmp_path / "shop" / "shelf"
    shop.mkdir(parents=True)
    for image in images[1:]:
        (shop / image.name).symlink_to(image)
    return [gold, *(shop / image.name for image in images[1:])]


@harm("backing-string", "any string is taken; the chain cannot be opened any more at the next start")
def test_plain_commit_takes_any_string(tmp_path: Path, linked: list[Path], images: list[Path]) -> None:
    with machine(tmp_path, *nodes(linked), *device("c")) as vm:
        plain(vm, top_node="b", base_node="gold", backing_file="../../gold.raw")
    run("qemu-img", "info", "--backing-chain", linked[3])
    done = subprocess.run(["qemu-img", "info", "--backing-chain", str(images[3])], capture_output=True, check=False)
    assert b"No such file" in done.stderr


async def test_a_string_that_does_not_lead_there_from_everywhere_is_refused(tmp_path: Path, linked: list[Path]) -> None:
    with machine(tmp_path, *nodes(linked), *device("c")) as vm:
        assert (await refused(vm, BackingString, base="[1]", top="[3]")).backing == "../../gold.raw"
    run("qemu-img", "info", "--backing-chain", linked[3])


async def test_a_json_name_of_the_base_is_kept_to_the_letter(tmp_path: Path, images: list[Path]) -> None:
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{images[0]}"}}}}'
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", name, images[1])
    content = Content()
    run("qemu-io", "-f", "qcow2", "-c", content.put(9, 0, MIB), images[2])
    with drive(tmp_path, images, content) as setup:
        async with setup.target() as target:
            assert (await qmpmerge.commit(target, top="[3]")).after.active.backing == name
        setup.off()
    content.check(images[3])


def unrecorded(images: list[Path]) -> None:
    """An overlay whose header names the base and no format, as QEMU before 6.1 made them."""
    run("qemu-img", "create", "-q", "-f", "qcow2", images[1], str(SIZE))
    data = bytearray(images[1].read_bytes())
    name, place = b"base.raw", 512
    data[8:20] = place.to_bytes(8, "big") + len(name).to_bytes(4, "big")
    data[place : place + len(name)] = name
    images[1].write_bytes(data)


def disguise(vm: Machine) -> None:
    """The guest writes a qcow2 header into its raw disk."""
    for place, value in enumerate(raw_header(size=SIZE)[:104]):
        if value:
            vm.io("vda", f"write -P {value} {place} 1")


@harm(
    "no-format",
    "QEMU guesses that the base is raw, copies everything, and fails when the guest's data looks like another format",
)
def test_plain_commit_to_a_base_of_a_guessed_format(tmp_path: Path, images: list[Path]) -> None:
    unrecorded(images)
    with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
        disguise(vm)
        assert plain(vm, device="vda")["error"] == "Operation not permitted"


async def test_a_base_without_a_recorded_format_is_refused(tmp_path: Path, images: list[Path]) -> None:
    unrecorded(images)
    with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
        assert (await refused(vm, NoFormat)).image == str(images[1])
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target, force=["no-format"])).verdict == "pivoted"


@harm("foreign-name", "a file of yours is overwritten, because an image from elsewhere names it as its backing file")
def test_plain_commit_overwrites_a_strangers_choice(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(SIZE))
    image = overlay(tmp_path / "gift.qcow2", victim)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
    run("qemu-img", "commit", "-q", image)
    assert victim.read_bytes()[:MIB] == b"\1" * MIB


async def test_a_strangers_choice_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "gifts").mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(SIZE))
    image = overlay(tmp_path / "gifts" / "gift.qcow2", victim)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
    with pytest.raises(ForeignName):
        async with qmpmerge.offline(image):
            pass
    assert victim.read_bytes() == bytes(SIZE)


@harm("disguised", "a raw image in which its guest has written a header is followed to any file of yours")
def test_plain_info_follows_what_a_guest_has_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    overlay(tmp_path / "written-by-guest", secret).rename(tmp_path / "disk.raw")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "disk.raw", tmp_path / "copy")
    assert b"ssss" in (tmp_path / "copy").read_bytes()


async def test_what_a_guest_has_written_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(raw_header(b"/etc/passwd", b"raw").ljust(MIB, b"\0"))
    with pytest.raises(Disguised):
        async with qmpmerge.offline(tmp_path / "disk.raw"):
            pass


@harm("temporary", "what the guest wrote to be thrown away is written into the image that was to be protected")
def test_plain_commit_of_a_snapshot_on_drive(tmp_path: Path, images: list[Path]) -> None:
    before = images[3].read_bytes()
    with machine(tmp_path, "-drive", DRIVE.format(images[3]) + ",snapshot=on", *device("vda")) as vm:
        vm.io("vda", "write -P 7 0 1M")
        details = {node["file"]: node["node-name"] for node in vm.session.execute("query-named-block-nodes", flat=True)
                   if node["drv"] == "qcow2"}  # fmt: skip
        plain(vm, device="vda", base_node=details[str(images[3])])
    assert images[3].read_bytes() != before


async def test_a_snapshot_on_drive_is_refused_as_that_alone(tmp_path: Path, images: list[Path]) -> None:
    """That its active image has no name is so from the start, and nobody has to save its data."""
    with machine(tmp_path, "-drive", DRIVE.format(images[3]) + ",snapshot=on", *device("vda")) as vm:
        async with qmpmerge.open(vm.target) as target:
            for merge in (qmpmerge.commit, qmpmerge.pull):
                with pytest.raises(Refused) as found:
                    await merge(target, dry_run=True)
                assert [one.name for one in found.value.parts] == ["temporary"]


# --- writing ------------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("which", [0, 3])
async def test_an_immutable_image(which: int, vm: Machine, images: list[Path]) -> None:
    """Of the overlay without the check: test_merge, `test_plain_block_commit_crashes_qemu_there`."""
    if subprocess.run(["chattr", "+i", str(images[which])], capture_output=True, check=False).returncode != 0:
        pytest.skip("no attributes on this filesystem")
    try:
        found = await refused(vm, NotWritable, top="[3]")
    finally:
        run("chattr", "-i", images[which])
    assert (found.file, "immutable" in found.reason) == (str(images[which]), True)


@needs_root
async def test_a_qemu_that_has_given_up_its_privileges(images: list[Path], tmp_path: Path) -> None:
    disk = ["-drive", DRIVE.format(images[3]), *device("vda")]
    old = "-runas" in run("qemu-system-x86_64", "-help")
    with machine(tmp_path, *disk, *(["-runas", "nobody"] if old else ["-run-with", "user=nobody"])) as vm:
        found = await refused(vm, NotWritable)
        assert found.file == str(images[0]) and "as whom QEMU runs, may not" in found.reason


@needs_root
async def test_a_filesystem_that_is_mounted_read_only(images: list[Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "gold", "-t", "tmpfs", "-o", "size=16M", "none") as gold:
        base = gold / "base.raw"
        base.write_bytes(images[0].read_bytes())
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", base, images[1])
        with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
            run("mount", "-o", "remount,ro", gold)
            found = await refused(vm, NotWritable, base=str(base))
        assert (found.file, found.reason) == (str(base), "its filesystem is mounted read-only")


@needs_root
@harm("no-space", "the filesystem fills up; the job stands still, and so does everybody else who writes there")
async def test_plain_commit_fills_the_filesystem(images: list[Path], content: Content, tmp_path: Path) -> None:
    """And that it is refused: one mount for both. `--force no-space` starts it all the same."""
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=2M", "none") as full:
        base = full / "base.raw"
        run("qemu-img", "create", "-q", "-f", "raw", base, str(SIZE))
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", base, images[1])
        with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
            found = await refused(vm, NoSpace, base=str(base))
            assert found.growth > 2 * MIB >= found.free
            async with qmpmerge.live(vm.target) as target:
                with pytest.raises(errors.StillRunning):
                    patience = qmpmerge.Patience(detach=True)
                    await qmpmerge.commit(target, base=str(base), force=["no-space"], patience=patience)
            while (job := vm.session.execute("query-block-jobs")[0])["io-status"] == "ok":
                pass
            assert (job["io-status"], os.statvfs(full).f_bavail) == ("nospace", 0)
            assert invoke("job", vm.target, job["device"], "cancel").code == 0


@needs_root
@harm("device-too-small", "the job fails after it has begun, with nothing but `Invalid argument`")
async def test_plain_commit_to_a_device_too_small(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE // 2))
    with loop(tmp_path / "disk") as disk:
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", disk, images[1])
        with machine(tmp_path, "-drive", DRIVE.format(images[3]), *device("vda")) as vm:
            assert (await refused(vm, DeviceTooSmall, base=disk)).size == SIZE // 2
            said = vm.session.ask("block-commit", job_id="plain", device="vda", auto_dismiss=False)
            while "error" not in said:
                (said,) = [job for job in vm.session.execute("query-jobs") if job["status"] == "concluded"] or [{}]
            assert "nvalid argument" in str(said["error"])


@pytest.mark.parametrize(
    ("form", "top"),
    [
        ("raw", "[3]"),
        ("raw", None),
        ("qcow2", "[3]"),
        ("qcow2", None),
        ("qcow2,cluster_size=4096", "[3]"),
        ("qcow2,preallocation=metadata", "[3]"),
        ("raw,preallocation=falloc", "[3]"),
        ("qcow2,extended_l2=on", None),
    ],
)
async def test_the_estimate_is_what_happens(form: str, top: str | None, tmp_path: Path) -> None:
    """Bytes copied as QEMU counts them where it does, and by how much the base really grows."""
    kind, _, option = form.partition(",")
    images = make_chain(tmp_path, (f"base.{kind}", "a.qcow2", "b.qcow2", "c.qcow2"), size=64 * MIB)
    if option:
        run("qemu-img", "create", "-q", "-f", kind, "-o", option, images[0], "64M")
    for image, writes in zip(
        images, (("0 1M",), ("512k 1M", "-z 8M 1M"), ("40M 3M", "1M 4k"), ("63M 1M",)), strict=True
    ):
        for write in writes:
            run("qemu-io", "-f", image.suffix[1:], "-c", f"write {write}", image)
    os.sync()
    before = images[0].stat().st_blocks * 512
    async with qmpmerge.offline(images[3]) as target:
        told = (await qmpmerge.commit(target, top=top, dry_run=True)).estimate
        outcome = await qmpmerge.commit(target, top=top)
    os.sync()
    assert told is not None and told.copy is not None and told.growth is not None
    assert told.copy == (6 * MIB if top is None else 5 * MIB)
    assert outcome.copied is None or outcome.copied == told.copy
    grown = images[0].stat().st_blocks * 512 - before
    assert grown <= told.growth <= grown + MIB + 256 * 1024


@harm("cannot-grow", "the job fails after it has begun, with nothing but `Operation not supported`")
async def test_plain_commit_into_a_base_that_cannot_hide_what_it_is_built_on(tmp_path: Path) -> None:
    """And both ways out that the refusal names."""
    images, below = [tmp_path / f"l{number}.qcow2" for number in range(4)], list[str | Path]()
    for image, size, compat in zip(
        images, (4 * MIB, 3 * MIB, 4 * MIB, 4 * MIB), ("1.1", "0.10", "1.1", "1.1"), strict=True
    ):
        run("qemu-img", "create", "-qf", "qcow2", "-o", f"compat={compat}", *below, image, str(size))
        below = ["-b", image, "-F", "qcow2"]
    with machine(tmp_path, *nodes(images), *device("l3")) as vm:
        asked = {"top_node": "l2", "base_node": "l1", "backing_file": str(images[1])}
        vm.session.execute("block-commit", job_id="plain", device="l3", auto_dismiss=False, **asked)
        vm.wait_for_job("concluded")
        assert "Operation not supported" in vm.session.execute("query-jobs")[0]["error"]
    found = await refused(images[3], CannotGrow, base="[2]", top="[3]")
    assert (found.size, found.needed) == (3 * MIB, 4 * MIB)
    assert "pull" in found.pull and invoke(*shlex.split(found.pull)[1:], "--dry-run").code == 0
    assert f"`{found.cure}`" in found.hint  # as it is typed
    run(*shlex.split(found.cure))
    async with qmpmerge.open(images[3]) as target:
        assert (await qmpmerge.commit(target, base="[2]", top="[3]")).verdict == "merged"


# --- what would be lost -----------------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """A chain that has room for bitmaps everywhere; `low` holds data, `mid` has a bitmap and an internal snapshot."""
    images = make_chain(tmp_path, ("low.qcow2", "mid.qcow2", "top.qcow2"))
    run("qemu-img", "bitmap", "--add", images[1], "daily")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 256k", images[1])
    return images


def dirty(vm: Machine, node: str, name: str = "daily") -> str:
    """What a bitmap marks, as one string."""
    return str(vm.session.execute("x-debug-block-dirty-bitmap-sha256", node=node, name=name)["sha256"])


def bitmaps(vm: Machine, node: str) -> dict[str, dict[str, Any]]:
    (told,) = [one for one in vm.session.execute("query-named-block-nodes", flat=True) if one["node-name"] == node]
    return {bitmap["name"]: bitmap for bitmap in told.get("dirty-bitmaps", ())}


@harm(
    "would-lose",
    "dirty bitmaps are gone, and the next incremental backup misses what they told; so are internal snapshots",
)
def test_plain_commit_forgets_bitmaps(tmp_path: Path, layers: list[Path]) -> None:
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        vm.session.execute("block-dirty-bitmap-add", node="top", name="hourly", persistent=True)
        assert bitmaps(vm, "mid") and bitmaps(vm, "top")
        assert "error" not in plain(vm, device="top")
        assert not bitmaps(vm, "low")


@pytest.mark.parametrize("top", ["[2]", None])
async def test_what_would_be_lost_is_named(top: str | None, tmp_path: Path, layers: list[Path]) -> None:
    """An internal snapshot, and a bitmap of a VM that was killed; not those that come along."""
    run("qemu-img", "snapshot", "-c", "before-update", layers[1])
    with machine(tmp_path, *nodes(layers[:2]), *device("mid")) as vm:
        vm.kill()
    run("qemu-img", "bitmap", "--add", layers[1], "whole")
    run("qemu-img", "bitmap", "--add", layers[2], "daily")
    lost = [
        f"internal snapshot before-update of {layers[1]}",
        f"dirty bitmap daily of {layers[1]} (it is inconsistent, its VM was killed)",
    ]
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        assert (await refused(vm, WouldLose, top=top)).lost == lost
        keeping = invoke("commit", vm.target, "--keep-overlay", "--dry-run", *(["--top", top] if top else []))
        assert keeping.code == (3 if top else 0), "only an overlay that is kept keeps what is in it"
    assert (await refused(layers[2], WouldLose, top=top)).lost == lost
    async with qmpmerge.offline(layers[2]) as target:
        await qmpmerge.commit(target, top=top, force=["would-lose"])
    told = run("qemu-img", "info", layers[0])
    assert ("whole" in told, "daily" in told) == (True, False), "a part of a bitmap is worse than none"


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("top", ["[2]", None])
async def test_bitmaps_come_along(live: bool, top: str | None, tmp_path: Path, layers: list[Path]) -> None:
    """To the base that has none of the name, and to one that has; what they mark is the same, also after a restart."""
    run("qemu-img", "bitmap", "--add", layers[0], "other")
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        before = dirty(vm, "mid")
        if live:
            async with qmpmerge.live(vm.target) as target:
                await qmpmerge.commit(target, top=top)
            assert set(bitmaps(vm, "low")) == {"daily", "other"}
            assert dirty(vm, "low") == before
            if top is None:
                vm.io(BACKEND, "write -P 6 4M 64k")
                assert dirty(vm, "low") != before
                before = dirty(vm, "low")
        vm.stop()
    if not live:
        async with qmpmerge.offline(layers[2]) as target:
            await qmpmerge.commit(target, top=top)
    with machine(tmp_path, *nodes([layers[0]]), *device("low")) as vm:
        assert dirty(vm, "low") == before
        told = bitmaps(vm, "low")["daily"]
        assert (told["persistent"], told["recording"], told.get("inconsistent", False)) == (True, True, False)


async def test_no_write_of_the_guest_falls_between(tmp_path: Path, layers: list[Path]) -> None:
    """Written after the bitmaps were carried over and before the switch: both the old one and the new one mark it."""
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        vm.session.execute("block-dirty-bitmap-add", node="top", name="hourly", persistent=True)
        vm.session.execute("block-commit", job_id="j", device="top", auto_dismiss=False)
        while vm.session.execute("query-jobs")[0]["status"] != "ready":
            pass
        async with qmpmerge.live(vm.target) as target:
            view = await target.chain()
            found = of(view.layout, view.chain.images[1:])
            await carry(target.monitor, view.layout, view.chain.base, found)
        vm.io(BACKEND, "write -P 7 5M 64k")
        expected = dirty(vm, "top", "hourly")
        vm.session.execute("job-complete", id="j")
        while vm.session.execute("query-jobs")[0]["status"] != "concluded":
            pass
        assert dirty(vm, "low", "hourly") == expected


async def test_bitmaps_are_merged_into_those_of_their_names(tmp_path: Path, layers: list[Path]) -> None:
    """Of another granularity, and not recording so far; of two images above, one of them not on disk."""
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "128k", layers[0], "daily")
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        vm.session.execute("block-dirty-bitmap-add", node="top", name="daily", granularity=65536)
        vm.io(BACKEND, "write -P 6 4M 64k")
        async with qmpmerge.live(vm.target) as target:
            await qmpmerge.commit(target)
        told = bitmaps(vm, "low")["daily"]
        assert (told["recording"], told["count"], told["granularity"]) == (True, (256 + 128) * 1024, 128 * 1024)
        vm.io(BACKEND, "write -P 6 6M 64k")
        assert bitmaps(vm, "low")["daily"]["count"] == (256 + 256) * 1024


@pytest.mark.parametrize(("top", "verdict"), [("[2]", "merged"), (None, "pivoted")])
async def test_bitmaps_come_along_with_a_job_that_was_left(
    top: str | None, verdict: str, tmp_path: Path, layers: list[Path]
) -> None:
    """Once it goes on, and not before: a merge that is taken back leaves none in base."""
    with machine(tmp_path, *nodes(layers), *device("top")) as vm:
        before = dirty(vm, "mid")
        async with qmpmerge.live(vm.target) as target:
            job = (await qmpmerge.commit(target, top=top, ending="hold")).job
            assert job is not None and not bitmaps(vm, "low")
            assert (await qmpmerge.follow(target, job.id)).verdict == verdict
        assert dirty(vm, "low") == before


async def test_a_name_in_force_that_nobody_can_know_better_about_is_not_heard(vm: Machine, images: list[Path]) -> None:
    replace(images[0])
    async with qmpmerge.live(vm.target) as target:
        with pytest.raises(ValueError, match="and not 'replaced'"):
            await qmpmerge.commit(target, force=["replaced"])


async def test_behind_a_relay_the_process_is_not_taken_for_qemu(
    vm: Machine, images: list[Path], tmp_path: Path
) -> None:
    """As with `ssh -L`: what the relay has open says nothing."""
    relay = tmp_path / "relay"
    with listening(relay) as listener:
        carried_on = threading.Thread(target=relayed, args=(listener, vm.target))
        carried_on.start()
        async with qmpmerge.live(str(relay)) as target:
            outcome = await qmpmerge.commit(target, top="[3]", dry_run=True)
        carried_on.join()
    assert {check.name for check in outcome.checks if check.result == "not checked"} == {
        "in-use",
        "not-writable",
        "replaced",
    }


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def relayed(listener: socket.socket, target: str) -> None:
    """Pass one conversation on, both ways, until either side ends it."""
    client, _ = listener.accept()
    with client, socket.socket(socket.AF_UNIX) as server:
        server.connect(target)
        ways = {client: server, server: client}
        while True:
            for ready in select.select([*ways], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                ways[ready].sendall(data)


async def test_bitmaps_that_cannot_come_along(vm: Machine) -> None:
    """A raw base has no room for them."""
    vm.session.execute("block-dirty-bitmap-add", node="c", name="daily", persistent=True)
    assert "raw" in (await refused(vm, WouldLose)).lost[0]
    async with qmpmerge.live(vm.target) as target:
        assert (await qmpmerge.commit(target, force=["would-lose"])).verdict == "pivoted"


async def test_bitmaps_that_an_old_base_cannot_keep(tmp_path: Path, layers: list[Path]) -> None:
    """QEMU tells it when all has been copied."""
    run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", layers[0])
    with machine(tmp_path, *nodes(layers), *device("top")) as holder:
        holder.session.execute("block-dirty-bitmap-add", node="top", name="daily", persistent=True)
        assert "compat=0.10" in (await refused(holder, WouldLose)).lost[0]


@pytest.mark.parametrize("force", [[], ["would-lose"]])
async def test_bitmaps_that_qemu_does_not_carry(force: list[str], tmp_path: Path, layers: list[Path]) -> None:
    """Somebody else takes one away once all was checked."""
    with machine(tmp_path, *nodes(layers), *device("top")) as holder:
        session = holder.session
        session.execute("block-dirty-bitmap-add", node="top", name="hourly")

        def meanwhile(direction: str, text: str) -> None:
            if direction == "->" and '"block-commit"' in text:
                session.execute("block-dirty-bitmap-remove", node="top", name="hourly")

        async with heard(meanwhile), qmpmerge.live(holder.target) as target:
            if force:
                outcome = await qmpmerge.commit(target, force=force)
                assert outcome.verdict == "pivoted"
                assert any("the next backup must be a full one" in hint for hint in outcome.hints)
                return
            with pytest.raises(BitmapsNotCarried, match="hourly"):
                await qmpmerge.commit(target)
            assert len((await target.chain()).chain) == 3


# --- known to be bad ----------------------------------------------------------------------------------------------------


async def test_an_nvme_disk_is_not_moved_by_qemu_7(tmp_path: Path, images: list[Path]) -> None:
    """Without the check: `test_plain_pivot_of_a_busy_nvme_disk` in test_guest_story, which boots a guest."""
    for name in ("id=disk0,", ""):
        with machine(tmp_path, *nodes(images), "-device", f"nvme,drive=c,{name}serial=1") as vm:
            harmful: list[dict[str, Any]] = [{}, {"ending": "hold"}]
            harmless: list[dict[str, Any]] = [{"top": "[3]"}, {"ending": "keep"}, {"force": ["known-bad"]}]
            async with qmpmerge.live(vm.target) as target:
                for options in harmful:
                    if (6, 0, 0) <= target.monitor.version < (10, 0, 0):
                        with pytest.raises(KnownBad):
                            await qmpmerge.commit(target, dry_run=True, **options)
                for options in harmless:
                    assert (await qmpmerge.commit(target, dry_run=True, **options)).verdict == "planned"


async def test_chains_that_are_too_deep(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_bad, "DEEPEST", 2)
    async with qmpmerge.live(vm.target) as target:
        assert (await qmpmerge.commit(target, top="[3]", dry_run=True)).verdict == "planned"
        expected = pytest.raises(KnownBad) if target.monitor.version >= (8, 0, 0) else contextlib.nullcontext()
        with expected:
            await qmpmerge.commit(target, dry_run=True)


# --- hostile images -----------------------------------------------------------------------------------------------------

LOOK = """
import asyncio, sys, qmpmerge
async def main(name, good, *gifts):
    for gift in gifts:
        for write in (False, True):
            try:
                async with qmpmerge.offline(gift, write=write) as target:
                    await target.chain()
                    await qmpmerge.commit(target)
            except qmpmerge.Error as refused:
                print(refused.name)
    async with qmpmerge.offline(good) as target:
        await qmpmerge.commit(target, dry_run=True)
    async with qmpmerge.live(name) as target:
        await target.chain()
        try:
            await qmpmerge.commit(target, dry_run=True)
        except qmpmerge.Error as refused:
            print(refused)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(not may_trace(), reason="strace is needed, and leave to use it")
def test_nothing_that_a_strangers_header_names_is_opened(tmp_path: Path, images: list[Path]) -> None:
    """By hostile images themselves, as neighbours of a good chain, and under a running VM."""
    folder, secret = images[0].parent, tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    os.mkfifo(tmp_path / "pipe")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"nbd://127.0.0.1:{listener.getsockname()[1]}/x"
        names = [f"{secret}", "../secret", f"{tmp_path}/pipe", "/dev/zero", url, f'json:{{"file.filename":"{secret}"}}',
                 f'json:{{"driver":"raw","file":"{url}"}}', f"file:{secret}", "loop.qcow2"]  # fmt: skip
        gifts = [folder / f"gift{number}.qcow2" for number in range(len(names) + 1)]
        for gift, name in zip(gifts, names, strict=False):
            gift.write_bytes(raw_header(name.encode(), b"raw", size=SIZE).ljust(65536, b"\0"))
        gifts[-1].write_bytes(raw_header(data_file=os.fsencode(secret)).ljust(65536, b"\0"))
        (folder / "loop.qcow2").symlink_to(gifts[-2])
        (tmp_path / "live").mkdir()
        live = make_chain(tmp_path / "live")
        with machine(tmp_path, *nodes(live), *device("c")) as vm:
            live[2].write_bytes(gifts[0].read_bytes())
            log = tmp_path / "calls"
            traced: list[str | Path] = [
                "strace",
                "-f",
                "-qq",
                "-s",
                "300",
                "-e",
                "trace=open,openat,openat2,connect",
                "-o",
                log,
            ]
            told = run(*traced, sys.executable, "-c", LOOK, vm.target, images[3], *gifts).splitlines()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert told[:-1] == ["foreign-name"] * 16 + ["backing-loop"] * 2 + ["foreign-name"] * 2
    assert "disagrees" in told[-1] or "names" in told[-1]
    hostile = ("/secret", "/pipe", "/dev/zero")
    calls = [call for call in log.read_text().splitlines() if any(name in call for name in hostile)]
    assert not [call for call in calls if "O_PATH" not in call]  # which looks, and opens nothing
    assert "AF_INET" not in log.read_text()


@pytest.mark.parametrize("base", ["base.raw", "base.qcow2"])
@pytest.mark.parametrize("top", ["[2]", None])
def test_zeros_take_the_room_that_was_foreseen(tmp_path: Path, base: str, top: str | None) -> None:
    """Up to QEMU 10.0 an intermediate merge copies them as data; an active one, and 11.1, do not."""
    images = make_chain(tmp_path, (base, "a.qcow2", "b.qcow2"))
    run("qemu-io", "-c", "write -P 1 0 2M", "-c", "write -z 2M 2M", images[1])
    options = ["--top", top] if top else []
    with drive(tmp_path, images, Content()) as setup:
        planned = invoke("commit", setup.machine.target, "vda", *options, "--dry-run", "--json").document["estimate"]
        before = images[0].stat().st_blocks * 512
        assert invoke("commit", setup.machine.target, "vda", *options, "--verify").code == 0
        setup.off()
        version = setup.machine.session.greeting["QMP"]["version"]["qemu"]
    os.sync()
    grown = images[0].stat().st_blocks * 512 - before
    copies = top is not None and version["major"] < 11
    assert grown <= planned["growth"]
    assert (grown > 3.9 * MIB) == copies
    # Whether an active one gives zeros room in a raw file is the filesystem's business: room for them is asked for.
    assert (planned["growth"] > 3.9 * MIB) == (copies or (top is None and base == "base.raw"))


# --- docs/refusals.md ----------------------------------------------------------------------------------------------------


def test_the_page_tells_each_refusal_and_its_harm() -> None:
    page = (Path(__file__).parents[2] / "docs/refusals.md").read_text()
    sections = dict(re.findall(r"^### ([a-z-]+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    harms = {name: re.findall(r"^\* without this check: (.+)$", text, re.MULTILINE) for name, text in sections.items()}
    rows = {name: harm for name, (harm,) in ((name, found) for name, found in harms.items() if found)}
    assert rows == marked()
    named = {
        kind.__name__: kind for kind in vars(refusals).values() if isinstance(kind, type) and issubclass(kind, Refused)
    }
    names = {re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower() for name in named}
    assert set(check.CHECKS) <= set(rows) <= names
