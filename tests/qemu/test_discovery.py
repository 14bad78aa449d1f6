"""What `disks` and `chain` tell must be what QEMU has: every layout here is a real QEMU, paused, on tiny images."""

import json
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from rig import machines
from rig.disks import nbd_server
from rig.machines import SIZE, Machine, make_chain, run
from rig.wire import heard

import qmpmerge
from qmpmerge.chain.chain import Chain
from qmpmerge.errors import DiskNeeded, NoDisk, NoSuchDisk, Replaced, StreamConcluded
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.discovery import DEEP
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import ChainView

CHAIN = [
    ("base.raw", "raw", None, None),
    ("a.qcow2", "qcow2", "base.raw", "raw"),
    ("b.qcow2", "qcow2", "a.qcow2", "qcow2"),
    ("c.qcow2", "qcow2", "b.qcow2", "qcow2"),
]
"""What must be told of the chain that `make_chain` makes: file, format, backing and its format as written."""

STABLE_ONLY = ["-compat", "unstable-input=reject"]
THROTTLE = ["-object", "throttle-group,id=limits"]
STORAGE_DAEMON = "qemu-storage-daemon"


# --- the bench's words: options ------------------------------------------------------------------------------------


def blockdev(driver: str, name: str, **options: object) -> list[str]:
    sent = {"driver": driver, "node-name": name, **{key.replace("_", "-"): value for key, value in options.items()}}
    return ["-blockdev", json.dumps(sent)]


def image(name: str, file: Path | str, *, backing: str | None = None, driver: str = "qcow2") -> list[str]:
    """An image node over a file node; `backing` is a node's name, "" for what the header says."""
    options: dict[str, object] = {} if driver == "raw" or backing == "" else {"backing": backing}
    return [
        *blockdev("file", f"{name}-file", filename=str(file), auto_read_only=True),
        *blockdev(driver, name, file=f"{name}-file", **options),
    ]


def nodes(*, folder: str = "", below: dict[str, str] | None = None) -> list[str]:
    """The whole chain as nodes ``base``, ``a``, ``b``, ``c``; `below` puts other nodes below some of them."""
    under = {"a": "base", "b": "a", "c": "b", **(below or {})}
    return [
        *image("base", f"{folder}base.raw", driver="raw"),
        *(option for name in "abc" for option in image(name, f"{folder}{name}.qcow2", backing=under[name])),
    ]


def throttle(name: str, below: str) -> list[str]:
    return blockdev("throttle", name, throttle_group="limits", file=below)


def drive(file: Path | str, name: str = "vda", *, more: str = "discard=unmap") -> list[str]:
    return ["-drive", f"if=none,id={name},file={file},format=qcow2,{more}"]


def virtio(root: str, name: str = "disk0") -> list[str]:
    return ["-device", f"virtio-blk-pci,id={name},drive={root}"]


# --- the bench's words: answers ------------------------------------------------------------------------------------


async def ask(machine: Machine, disk: str | None = None) -> ChainView:
    async with qmpmerge.live(machine.target) as target:
        return await target.chain(disk)


async def ask_all(machine: Machine) -> Layout:
    async with qmpmerge.live(machine.target) as target:
        return await target.layout()


Told = tuple[str, str, str | None, str | None]


def told(chain: Chain | None, folder: Path) -> list[Told]:
    """What is told of each image, with its file as seen from `folder`."""
    assert chain is not None
    return [(shown(image.file, folder), image.format, image.backing, image.backing_format) for image in chain]


def shown(file: str, folder: Path) -> str:
    return file.removeprefix(f"{folder}/")


def odd(view: ChainView, folder: Path) -> list[tuple[str, str]]:
    return [(oddity.name, shown(oddity.file, folder)) for oddity in view.oddities]


def node_names(chain: Chain) -> list[str | None]:
    return [image.node for image in chain]


def identity(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def stable(layout: Layout) -> str:
    """The disks as text, the names that QEMU made up numbered in their order."""
    known: dict[str, str] = {}
    return re.sub(r"#block\d+", lambda name: known.setdefault(name[0], f"#{len(known)}"), repr(layout.disks))


# --- one chain, however it was started ------------------------------------------------------------------------------


async def test_drive(tmp_path: Path) -> None:
    files = make_chain(tmp_path)
    with machines.machine(tmp_path, *drive(files[-1]), *virtio("vda")) as machine:
        view = await ask(machine)
    disk = view.disk
    assert (disk.name, disk.drive, disk.qdev) == ("vda", "vda", "disk0")
    assert told(view.chain, tmp_path) == CHAIN
    assert all(str(name).startswith("#block") for name in node_names(view.chain))
    assert disk.root == view.chain.active.node
    assert disk.nodes == tuple(reversed(node_names(view.chain)))
    assert [image.inode for image in view.chain] == [identity(file) for file in files]
    assert {image.virtual_size for image in view.chain} == {SIZE}
    assert [image.allocated for image in view.chain] == [os.stat(file).st_blocks * 512 for file in files]
    assert [image.read_only for image in view.chain] == [True, True, True, False]
    assert not view.oddities
    assert disk.job is None and not view.layout.jobs


@pytest.mark.parametrize(
    ("option", "name"),
    [(["-hda", "c.qcow2"], "ide0-hd0"), (["-drive", "if=virtio,format=qcow2,file=c.qcow2"], "virtio0")],
    ids=["hda", "if=virtio"],
)
async def test_drives_without_an_id_have_the_name_that_qemu_gives_them(
    tmp_path: Path, option: list[str], name: str
) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *option) as machine:
        view = await ask(machine, name)
    assert (view.disk.name, view.disk.drive) == (name, name)
    assert told(view.chain, tmp_path) == CHAIN and not view.oddities


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
async def test_blockdev(tmp_path: Path, absolute: bool) -> None:
    files = make_chain(tmp_path)
    written = CHAIN
    if absolute:
        for below, file in pairwise(files):
            run("qemu-img", "rebase", "-u", "-b", below, "-F", below.suffix[1:], file)
        written = [(name, form, str(tmp_path / b) if b else None, f) for name, form, b, f in CHAIN]
    folder = f"{tmp_path}/" if absolute else ""
    with machines.machine(tmp_path, *nodes(folder=folder), *virtio("c")) as machine:
        view = await ask(machine)
    disk = view.disk
    assert (disk.name, disk.drive, disk.qdev, disk.root) == ("disk0", None, "disk0", "c")
    assert told(view.chain, tmp_path) == written
    assert node_names(view.chain) == ["base", "a", "b", "c"]
    assert disk.nodes == ("c", "b", "a", "base")
    assert [image.inode for image in view.chain] == [identity(file) for file in files]
    assert not view.oddities


@pytest.mark.parametrize(
    "device",
    [
        ["-device", "virtio-blk-pci,id=disk0,drive=c"],
        ["-device", "ide-hd,id=disk0,drive=c"],
        ["-device", "virtio-scsi-pci", "-device", "scsi-hd,id=disk0,drive=c"],
        ["-device", "nvme,id=disk0,serial=1,drive=c"],
        ["-device", "qemu-xhci", "-device", "usb-storage,id=disk0,drive=c"],
    ],
    ids=["virtio", "ide", "scsi", "nvme", "usb"],
)
async def test_a_qdev_id_is_no_drive_id(tmp_path: Path, device: list[str]) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *nodes(), *device) as machine:
        disk = (await ask(machine)).disk
    assert (disk.name, disk.drive, disk.qdev, disk.root) == ("disk0", None, "disk0", "c")


async def test_a_device_without_an_id(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *nodes(), "-device", "virtio-blk-pci,drive=c") as machine:
        view = await ask(machine, "c")
    assert view.disk.drive is None and view.disk.root == "c"
    assert told(view.chain, tmp_path) == CHAIN


async def test_a_protocol_node_as_the_raw_base(tmp_path: Path) -> None:
    make_chain(tmp_path)
    bare = blockdev("file", "bare", filename="base.raw")
    with machines.machine(tmp_path, *bare, *nodes(below={"a": "bare"})[4:], *virtio("c")) as machine:
        view = await ask(machine)
    assert told(view.chain, tmp_path) == CHAIN
    assert view.chain.base.node == "bare"
    assert not view.oddities


async def test_backing_null_cuts_the_chain_and_the_header_disagrees(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *image("c", "c.qcow2"), *virtio("c")) as machine:
        view = await ask(machine, "disk0")
    assert told(view.chain, tmp_path) == CHAIN[-1:]
    assert odd(view, tmp_path) == [("disagrees", "c.qcow2")]


async def test_another_backing_node_than_the_header_names(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *nodes(below={"c": "a"}), *virtio("c")) as machine:
        view = await ask(machine, "disk0")
    assert [image.name for image in view.chain] == ["base.raw", "a.qcow2", "c.qcow2"]
    assert view.chain.active.backing == "b.qcow2"
    assert odd(view, tmp_path) == [("disagrees", "c.qcow2")]


async def test_a_snapshot_drive_has_a_temporary_image_on_top(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *drive("c.qcow2", more="snapshot=on"), *virtio("vda")) as machine:
        view = await ask(machine)
    assert told(view.chain, tmp_path)[:-1] == CHAIN
    assert view.chain.active.name.startswith("vl.")
    assert view.chain.active.inode is not None and not Path(view.chain.active.file).exists(), "QEMU unlinked it"
    assert odd(view, tmp_path) == [("unreadable", view.chain.active.file)]


# --- filters -------------------------------------------------------------------------------------------------------


async def test_filters_on_top_are_the_root_and_no_images(tmp_path: Path) -> None:
    make_chain(tmp_path)
    filters = [*THROTTLE, *throttle("limited", "c"), *blockdev("copy-on-read", "cor", file="limited")]
    with machines.machine(tmp_path, *nodes(), *filters, *virtio("cor")) as machine:
        view = await ask(machine)
    assert view.disk.root == "cor"
    assert view.disk.nodes == ("cor", "limited", "c", "b", "a", "base")
    assert told(view.chain, tmp_path) == CHAIN
    assert not view.oddities


async def test_a_filter_in_the_middle(tmp_path: Path) -> None:
    files = make_chain(tmp_path)
    options = [*nodes()[:8], *THROTTLE, *throttle("limited", "a"), *nodes(below={"b": "limited"})[8:]]
    with machines.machine(tmp_path, *options, *virtio("c")) as machine:
        view = await ask(machine)
    assert view.disk.root == "c"
    assert view.disk.nodes == ("c", "b", "limited", "a", "base")
    assert told(view.chain, tmp_path) == CHAIN
    assert [image.inode for image in view.chain] == [identity(file) for file in files]


async def test_a_filter_below_the_format(tmp_path: Path) -> None:
    files = make_chain(tmp_path)
    with machines.machine(tmp_path, *FILTER_BELOW_THE_FORMAT, *virtio("c")) as machine:
        view = await ask(machine)
    assert view.disk.nodes == ("c", "b", "a", "base")
    assert told(view.chain, tmp_path) == CHAIN
    assert [image.inode for image in view.chain] == [identity(file) for file in files]
    assert not view.oddities


FILTER_BELOW_THE_FORMAT = [
    *nodes()[:12],
    *THROTTLE,
    *blockdev("file", "file", filename="c.qcow2"),
    *throttle("limited", "file"),
    *blockdev("qcow2", "c", file="limited", backing="b"),
]

LIMITED_DRIVE = [*drive("c.qcow2", more="throttling.bps-total=1000000,copy-on-read=on"), *virtio("vda")]


async def test_limits_of_a_drive_are_no_nodes(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *LIMITED_DRIVE) as machine:
        view = await ask(machine)
    assert view.disk.root == view.chain.active.node
    assert told(view.chain, tmp_path) == CHAIN and not view.oddities


# --- what a disk is called -----------------------------------------------------------------------------------------


async def test_a_disk_is_addressed_by_every_name_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_chain(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(files[-1])
    monkeypatch.chdir(tmp_path)
    with machines.machine(tmp_path, *drive(files[-1], more="node-name=top"), *virtio("vda")) as machine:
        layout = await ask_all(machine)
        for name in ("vda", "disk0", "top", str(files[-1]), "c.qcow2", str(link), None):
            assert layout.find(name, "").name == "vda"
        base = layout.disks[0].chain
        assert base is not None
        assert layout.find(str(base.base.node), "").name == "vda"
        for name in ("", "vd", "b.qcow2", str(files[0]), "/nowhere"):
            with pytest.raises(NoSuchDisk) as refused:
                layout.find(name, machine.target)
            assert refused.value.known == ["vda"]


async def test_a_disk_is_addressed_by_its_filters(tmp_path: Path) -> None:
    make_chain(tmp_path)
    filters = [*THROTTLE, *throttle("limited", "c"), *blockdev("copy-on-read", "cor", file="limited")]
    with machines.machine(tmp_path, *nodes(), *filters, *virtio("cor")) as machine:
        layout = await ask_all(machine)
    assert {layout.find(name, "").name for name in ("disk0", "cor", "limited", "c", "b")} == {"disk0"}
    with pytest.raises(NoSuchDisk):
        layout.find("b-file", "")


async def test_the_name_that_is_shown_wins_over_another_disk_s_qdev_id(tmp_path: Path) -> None:
    make_chain(tmp_path, ["base.raw", "a.qcow2"])
    make_chain(tmp_path, ["other.raw", "b.qcow2"])
    crossed = [*drive("a.qcow2", "x"), *drive("b.qcow2", "y"), *virtio("x", "y"), *virtio("y", "x")]
    with machines.machine(tmp_path, *crossed) as machine:
        layout = await ask_all(machine)
    assert [layout.find(disk.name, "").name for disk in layout.disks] == ["x", "y"]


# --- several disks -------------------------------------------------------------------------------------------------


async def test_several_disks_in_the_order_of_the_machine(tmp_path: Path) -> None:
    make_chain(tmp_path)
    make_chain(tmp_path, ["other.raw", "d.qcow2"])
    make_chain(tmp_path, ["single.qcow2"])
    disks = [*drive("c.qcow2"), *virtio("vda"), *drive("d.qcow2", "vdb"), *drive("single.qcow2", "vdc")]
    with machines.machine(tmp_path, *disks) as machine:
        layout = await ask_all(machine)
        assert [disk.name for disk in layout.disks] == ["vda", "vdb", "vdc"]
        assert [len(disk.chain or ()) for disk in layout.disks] == [4, 2, 1]
        with pytest.raises(DiskNeeded) as refused:
            layout.find(None, machine.target)
        assert refused.value.known == ["vda", "vdb"]
        view = await ask(machine, "vdb")
    assert told(view.chain, tmp_path) == [("other.raw", "raw", None, None), ("d.qcow2", "qcow2", "other.raw", "raw")]


async def test_two_disks_on_one_base(tmp_path: Path) -> None:
    make_chain(tmp_path, ["base.raw", "a.qcow2"])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "b.qcow2", cwd=tmp_path)
    options = [
        *image("base", "base.raw", driver="raw"),
        *image("a", "a.qcow2", backing="base"),
        *image("b", "b.qcow2", backing="base"),
    ]
    with machines.machine(tmp_path, *options, *virtio("a", "disk0"), *virtio("b", "disk1")) as machine:
        layout = await ask_all(machine)
    assert [disk.nodes for disk in layout.disks] == [("a", "base"), ("b", "base")]


async def test_only_one_disk_has_a_backing_chain(tmp_path: Path) -> None:
    make_chain(tmp_path)
    make_chain(tmp_path, ["single.qcow2"])
    with machines.machine(tmp_path, *drive("single.qcow2", "vdb"), *drive("c.qcow2", "vda")) as machine:
        assert (await ask(machine)).disk.name == "vda"


async def test_empty_drives(tmp_path: Path) -> None:
    make_chain(tmp_path)
    cds = ["-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,bus=ide.0,drive=cd0,id=slot0"]
    with machines.machine(tmp_path, *cds, "-device", "ide-cd,bus=ide.1,id=slot1", *drive("c.qcow2")) as machine:
        layout = await ask_all(machine)
    empty = [disk for disk in layout.disks if disk.chain is None]
    assert [(disk.name, disk.drive, disk.qdev) for disk in empty] == [("cd0", "cd0", "slot0"), ("slot1", None, "slot1")]
    assert layout.find(None, "").name == "vda"
    with pytest.raises(NoSuchDisk):
        layout.find("cd0", "")


async def test_no_disk_at_all(tmp_path: Path) -> None:
    with machines.machine(tmp_path) as machine:
        layout = await ask_all(machine)
        assert not layout.disks
        with pytest.raises(NoDisk):
            layout.find(None, machine.target)


async def test_a_node_that_no_device_uses(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *nodes()) as machine:
        view = await ask(machine)
    assert (view.disk.name, view.disk.drive, view.disk.qdev, view.disk.root) == ("c", None, None, "c")
    assert told(view.chain, tmp_path) == CHAIN


# --- names and places of files -------------------------------------------------------------------------------------


async def test_relative_names_are_resolved_where_qemu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chain(tmp_path)
    decoy = tmp_path / "elsewhere"
    decoy.mkdir()
    make_chain(decoy, ["base.raw", "c.qcow2"])
    monkeypatch.chdir(decoy)
    with machines.machine(tmp_path, *drive("c.qcow2"), *virtio("vda")) as machine:
        view = await ask(machine)
        assert told(view.chain, tmp_path) == CHAIN and not view.oddities
        assert view.layout.find(str(tmp_path / "c.qcow2"), machine.target) == view.disk
        with pytest.raises(NoSuchDisk):  # that is the other one, from where the tool runs
            view.layout.find("c.qcow2", machine.target)


async def test_an_active_image_reached_by_a_link_in_another_folder(tmp_path: Path) -> None:
    files = make_chain(tmp_path)
    link = tmp_path / "links" / "disk"
    link.parent.mkdir()
    link.symlink_to(files[-1])
    options = [*nodes()[:12], *image("c", link, backing="b")]
    with machines.machine(tmp_path, *options, *virtio("c")) as machine:
        view = await ask(machine)
    assert view.chain.active.file == str(link)
    assert view.chain.active.inode == identity(files[-1])
    assert told(view.chain, tmp_path)[:-1] == CHAIN[:-1]
    assert not view.oddities
    for name in (files[-1], link):
        assert view.layout.find(str(name), machine.target) == view.disk


async def test_a_link_that_leads_to_the_new_overlay_by_now(tmp_path: Path) -> None:
    """People let the name that a VM is started from follow its newest overlay; QEMU has the old image open by it."""
    files = make_chain(tmp_path)
    old, link, new = tmp_path / "old.qcow2", files[-1], tmp_path / "new.qcow2"
    link.rename(old)
    link.symlink_to(old)
    with machines.machine(tmp_path, *drive(link), *virtio("vda")) as machine:
        run("qemu-img", "create", "-qf", "qcow2", "-u", "-b", old, "-F", "qcow2", new, str(machines.SIZE))
        given = {"snapshot_file": str(new), "format": "qcow2", "mode": "existing"}
        machine.session.execute("blockdev-snapshot-sync", device="vda", **given)
        link.unlink()
        link.symlink_to(new)
        view = await ask(machine)
        assert [image.name for image in view.chain] == [*(file.name for file in files), "new.qcow2"]
        assert [(odd.name, odd.file) for odd in view.oddities] == [("replaced", str(link))]
        assert view.chain.find(str(link)) is view.chain.active  # what the name means now
        async with qmpmerge.live(machine.target) as target:
            (found,) = [one for one in await qmpmerge.examine(target) if one.where == str(link)]
            assert (found.name, found.severity, found.fix) == ("replaced", "harm", None)
            for top in ("[4]", "[5]"):
                with pytest.raises(Replaced, match="is not the file that QEMU has open"):
                    await qmpmerge.commit(target, top=top, base="[3]", force=["dependents"])


async def test_names_that_lead_back_are_shown_without_dots(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    make_chain(tmp_path / "one", ["base.raw", "a.qcow2"])
    (tmp_path / "two").mkdir()
    name = "../two/../one/a.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", name, "-F", "qcow2", "top.qcow2", cwd=tmp_path / "two")
    with machines.machine(tmp_path, *drive("two/top.qcow2"), *virtio("vda")) as machine:
        view = await ask(machine)
    assert view.chain.files == [str(tmp_path / name) for name in ("one/base.raw", "one/a.qcow2", "two/top.qcow2")]
    assert not view.oddities


ODD_NAMES = ["with space", "co,mma", "co:lon", "quo\"te'", "new\nline", "per%cent", "back\\slash", "$(x)", "nbd:x", "ü"]


async def test_names_that_need_care(tmp_path: Path) -> None:
    below, files = "", [tmp_path / f"{name}.qcow2" for name in ODD_NAMES]
    for file in files:
        backing = ["-b", below, "-F", "qcow2"] if below else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, file, "1M")
        below = f"./{file.name}"
    with machines.machine(tmp_path, *image("top", files[-1], backing=""), *virtio("top")) as machine:
        view = await ask(machine, str(files[-1]))
    assert view.chain.files == [str(file) for file in files]
    assert [image.backing for image in view.chain] == [None, *(f"./{file.name}" for file in files[:-1])]
    assert [image.inode for image in view.chain] == [identity(file) for file in files]
    assert not view.oddities


async def test_json_names_in_headers(tmp_path: Path) -> None:
    make_chain(tmp_path, ["base.raw"])
    name = "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "base.raw")}})
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "a.qcow2", cwd=tmp_path)
    with machines.machine(tmp_path, *drive("a.qcow2"), *virtio("vda")) as machine:
        view = await ask(machine)
    assert told(view.chain, tmp_path) == [("base.raw", "raw", None, None), ("a.qcow2", "qcow2", name, "raw")]
    assert not view.oddities


async def test_a_file_that_qemu_got_as_a_descriptor(tmp_path: Path) -> None:
    """Its name is not known; what is told must not be another file's."""
    make_chain(tmp_path, ["base.raw", "a.qcow2"])
    opener = tmp_path / "opener"
    opener.write_text('#!/bin/sh\nexec 8<> a.qcow2 9< a.qcow2 && exec qemu-system-x86_64 "$@"\n')
    opener.chmod(0o755)
    added = ["-add-fd", "fd=8,set=1", "-add-fd", "fd=9,set=1"]
    options = [*image("base", "base.raw", driver="raw"), *image("a", "/dev/fdset/1", backing="base"), *virtio("a")]
    with machines.machine(tmp_path, *added, *options, program=str(opener)) as machine:
        view = await ask(machine)
    assert view.chain.files == [str(tmp_path / "base.raw"), "qemu:/dev/fdset/1"]
    assert view.chain.active.inode is None
    assert odd(view, tmp_path) == [("not-seen", "qemu:/dev/fdset/1")]


# --- network and other formats -------------------------------------------------------------------------------------


async def test_a_base_on_nbd(tmp_path: Path) -> None:
    (base,) = make_chain(tmp_path, ["base.raw"])
    with nbd_server(tmp_path, base) as uri:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", "a.qcow2", cwd=tmp_path)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", cwd=tmp_path)
        with machines.machine(tmp_path, *drive("b.qcow2"), *virtio("vda")) as machine:
            view = await ask(machine)
    assert [image.format for image in view.chain] == ["raw", "qcow2", "qcow2"]
    base_on_nbd, a, b = view.chain
    assert not base_on_nbd.has_path and base_on_nbd.inode is None and base_on_nbd.virtual_size == SIZE
    assert base_on_nbd.file.startswith("nbd+unix://") and base_on_nbd.file.endswith(f"?socket={tmp_path}/nbd")
    assert (a.file, a.backing) == (str(tmp_path / "a.qcow2"), uri)
    assert (b.file, b.backing) == (str(tmp_path / "b.qcow2"), "a.qcow2")
    assert not view.oddities


async def test_a_luks_base(tmp_path: Path) -> None:
    secret = "secret,id=key,data=abc"
    cheap = "key-secret=key,iter-time=10,hash-alg=sha512"
    machines.create_encrypted("-f", "luks", "--object", secret, "-o", cheap, "base.luks", "4M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "base.luks", "-F", "luks", "a.qcow2", "4M", cwd=tmp_path)
    options = [
        *("-object", secret),
        *blockdev("luks", "base", key_secret="key", file={"driver": "file", "filename": "base.luks"}),
        *image("a", "a.qcow2", backing="base"),
    ]
    with machines.machine(tmp_path, *options, *virtio("a")) as machine:
        view = await ask(machine)
    assert told(view.chain, tmp_path) == [("base.luks", "luks", None, None), ("a.qcow2", "qcow2", "base.luks", "luks")]
    assert not view.oddities


@pytest.mark.parametrize("form", ["qed", "vmdk", "vdi", "vhdx", "vpc"])
async def test_a_base_of_another_format(tmp_path: Path, form: str) -> None:
    make_chain(tmp_path, [f"base.{form}"])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"base.{form}", "-F", form, "a.qcow2", cwd=tmp_path)
    with machines.machine(tmp_path, *drive("a.qcow2"), *virtio("vda")) as machine:
        view = await ask(machine)
    assert told(view.chain, tmp_path) == [
        (f"base.{form}", form, None, None),
        ("a.qcow2", "qcow2", f"base.{form}", form),
    ]
    assert not view.oddities


def make_data_file_chain(folder: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=base.data", "base.qcow2", "8M", cwd=folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2", cwd=folder)


async def test_a_base_with_its_data_in_another_file(tmp_path: Path) -> None:
    make_data_file_chain(tmp_path)
    with machines.machine(tmp_path, *drive("a.qcow2"), *virtio("vda")) as machine:
        view = await ask(machine)
    assert [image.name for image in view.chain] == ["base.qcow2", "a.qcow2"]
    assert [image.format for image in view.chain] == ["qcow2", "qcow2"]
    assert not view.oddities


async def test_two_images_inside_one_container(tmp_path: Path) -> None:
    """Slices of one file or device, as of an OVA: an answer of ours, whatever it is, and no traceback."""
    make_chain(tmp_path, ["one.qcow2", "two.qcow2"], size=1024 * 1024)
    half = 4 * 1024 * 1024
    container = tmp_path / "container"
    container.write_bytes(
        (tmp_path / "one.qcow2").read_bytes().ljust(half, b"\0")
        + (tmp_path / "two.qcow2").read_bytes().ljust(half, b"\0")
    )
    store = {"driver": "file", "filename": str(container), "locking": "off"}
    first, second = ({"driver": "raw", "offset": offset, "size": half, "file": store} for offset in (0, half))
    options = [
        *blockdev("qcow2", "one", file=first, backing=None, read_only=True),
        *blockdev("qcow2", "two", file=second, backing="one"),
    ]
    with machines.machine(tmp_path, *options, *virtio("two")) as machine:
        disk = (await ask_all(machine)).find("disk0", machine.target)
    assert disk.nodes == ("two", "one")


# --- qemu-storage-daemon -------------------------------------------------------------------------------------------

NBD_EXPORT = [
    *("--nbd-server", "addr.type=unix,addr.path=nbd"),
    *("--export", "nbd,id=export0,node-name=c,writable=on"),
]


def daemon(*options: str) -> list[str]:
    """The same options as the storage daemon wants them, with two dashes."""
    return [f"-{option}" if option == "-blockdev" else option for option in options]


@pytest.mark.parametrize("export", [[], NBD_EXPORT], ids=["not exported", "exported"])
async def test_a_storage_daemon(tmp_path: Path, export: list[str]) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, *daemon(*nodes()), *export, program=STORAGE_DAEMON) as machine:
        view = await ask(machine)
    assert (view.disk.name, view.disk.drive, view.disk.qdev, view.disk.root) == ("c", None, None, "c")
    assert told(view.chain, tmp_path) == CHAIN and not view.oddities
    assert len(view.layout.disks) == 1


async def test_a_storage_daemon_that_exports_a_bare_file(tmp_path: Path) -> None:
    make_chain(tmp_path, ["base.raw"])
    options = daemon(*blockdev("file", "c", filename="base.raw"))
    with machines.machine(tmp_path, *options, *NBD_EXPORT, program=STORAGE_DAEMON) as machine:
        layout = await ask_all(machine)
    assert [(disk.name, told(disk.chain, tmp_path)) for disk in layout.disks] == [("c", CHAIN[:1])]


# --- jobs ----------------------------------------------------------------------------------------------------------


def commit(machine: Machine, top: str) -> None:
    """Start a commit that is still there when we look: slow, and not gone by itself when it ends."""
    wait = {} if top == "c" else {"auto_finalize": False}
    machine.session.execute(
        "block-commit",
        job_id="slow", device="c", top_node=top, base_node="base", speed=1, auto_dismiss=False, **wait,
    )  # fmt: skip


def fill(files: list[Path]) -> None:
    machines.fill(files, machines.Content())


@pytest.mark.parametrize(("top", "kind"), [("b", "intermediate"), ("c", "active")])
async def test_a_running_commit_leaves_the_chain_as_it_is(tmp_path: Path, top: str, kind: str) -> None:
    fill(make_chain(tmp_path))
    make_chain(tmp_path, ["single.qcow2"])
    with machines.machine(tmp_path, *nodes(), *virtio("c"), *drive("single.qcow2", "other")) as machine:
        before = await ask(machine, "disk0")
        commit(machine, top)
        during = await ask(machine, "disk0")
        other = await ask(machine, "other")
    assert before.disk.job is None
    assert told(during.chain, tmp_path) == CHAIN and not during.oddities
    assert node_names(during.chain) == ["base", "a", "b", "c"]
    assert during.disk.name == "disk0"
    assert during.disk.job is not None
    assert (during.disk.job.id, during.disk.job.type, during.disk.job.disk) == ("slow", "commit", "disk0")
    assert [(job.id, job.disk) for job in during.layout.jobs] == [("slow", "disk0")]
    filters = [name for name in during.disk.nodes if name not in before.disk.nodes]
    assert len(filters) == 1
    assert (during.disk.root == filters[0]) is (kind == "active"), "the root is what a job would take as its device"
    assert other.disk.job is None


async def concluded(folder: Path) -> tuple[ChainView, list[Job]]:
    """A disk and the jobs, after an intermediate merge that nobody has dismissed."""
    make_chain(folder)
    with machines.machine(folder, *nodes(), *virtio("c")) as machine:
        machine.session.execute(
            "block-commit", job_id="quick", device="c", top_node="b", base_node="base",
            backing_file="base.raw", auto_dismiss=False,
        )  # fmt: skip
        machine.wait_for_job("concluded")
        async with qmpmerge.live(machine.target) as target:
            return await target.chain("disk0"), await target.jobs()


async def test_a_concluded_commit_holds_its_disk_until_it_is_dismissed(tmp_path: Path) -> None:
    view, jobs = await concluded(tmp_path)
    assert told(view.chain, tmp_path) == [CHAIN[0], ("c.qcow2", "qcow2", "base.raw", "raw")]
    assert not view.oddities
    assert view.disk.job is not None
    assert (view.disk.job.id, view.disk.job.status, view.disk.job.disk) == ("quick", "concluded", "disk0")
    assert [(job.id, job.status) for job in jobs] == [("quick", "concluded")]
    assert [disk.name for disk in view.layout.disks] == ["disk0", "b"], "the merged nodes are still there"


async def test_a_concluded_commit_is_on_the_disk_that_it_was_started_on(tmp_path: Path) -> None:
    _view, jobs = await concluded(tmp_path)
    assert [job.disk for job in jobs] == ["disk0"]


async def test_a_concluded_stream_makes_discovery_refuse(tmp_path: Path) -> None:
    """On QEMU 7.2 to 10.0 the question for the nodes would kill the guest: it must not even be asked."""
    make_chain(tmp_path)
    with machines.machine(tmp_path, *nodes(), *virtio("c")) as machine:
        machine.session.execute("block-stream", job_id="stream", device="c", auto_dismiss=False)
        machine.wait_for_job("concluded")
        asked: list[str] = []
        async with heard(sent(asked)), qmpmerge.live(machine.target) as target:
            for question in (target.disks, target.chain, target.layout, target.disk):
                with pytest.raises(StreamConcluded) as refused:
                    await question()
                assert refused.value.job == "stream"
            assert [(job.id, job.status) for job in await target.jobs()] == [("stream", "concluded")]
        assert set(asked) <= {"query-jobs", "query-block-jobs", "x-debug-query-block-graph"}, "which are harmless"
        assert machine.session.execute("query-status")["status"] == "prelaunch"
        machine.session.execute("job-dismiss", id="stream")
        assert (await ask(machine, "disk0")).chain.files == [str(tmp_path / "c.qcow2")]


def sent(commands: list[str]) -> Callable[[str, str], None]:
    """A trace that notes the commands; what else they said is of no interest."""

    def note(direction: str, text: str) -> None:
        if direction == "->":
            command = json.loads(text)
            commands.append(command["execute"])
            if command["execute"] == "query-named-block-nodes":
                assert command["arguments"] == {"flat": True}, "without `flat` the guest stands still"

    return note


# --- without the debug command -------------------------------------------------------------------------------------

LAYOUTS: dict[str, list[str]] = {
    "drive": [*drive("c.qcow2"), *virtio("vda")],
    "hda": ["-hda", "c.qcow2"],
    "blockdev": [*nodes(), *virtio("c")],
    "limited drive": LIMITED_DRIVE,
    "filters on top": [*nodes(), *THROTTLE, *throttle("limited", "c"),
                       *blockdev("copy-on-read", "cor", file="limited"), *virtio("cor")],
    "filter in the middle": [*nodes()[:8], *THROTTLE, *throttle("limited", "a"),
                             *nodes(below={"b": "limited"})[8:], *virtio("c")],
    "filter on a single image": [*nodes()[:4], *THROTTLE, *throttle("limited", "base"), *virtio("limited")],
    "filter below the format": [*FILTER_BELOW_THE_FORMAT, *virtio("c")],
    "protocol node as base": [*blockdev("file", "bare", filename="base.raw"),
                              *nodes(below={"a": "bare"})[4:], *virtio("c")],
    "empty CD": ["-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,bus=ide.0,drive=cd0,id=slot0",
                 "-device", "ide-cd,bus=ide.1,id=slot1", *drive("c.qcow2")],
    "several": [*drive("c.qcow2"), *virtio("vda"), *image("other", "other.raw", driver="raw"),
                *virtio("other", "disk1")],
}  # fmt: skip


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in LAYOUTS.items()])
async def test_the_stable_commands_tell_the_same(tmp_path: Path, options: list[str]) -> None:
    make_chain(tmp_path)
    make_chain(tmp_path, ["other.raw"])
    with machines.machine(tmp_path, *options) as machine:
        told_by_graph = await ask_all(machine)
    with machines.machine(tmp_path, *options, *STABLE_ONLY) as machine:
        assert "error" in machine.session.ask("x-debug-query-block-graph")
        told_by_stats = await ask_all(machine)
    assert stable(told_by_stats) == stable(told_by_graph)


async def test_the_stable_commands_tell_the_same_of_a_data_file(tmp_path: Path) -> None:
    make_data_file_chain(tmp_path)
    with machines.machine(tmp_path, *drive("a.qcow2"), *virtio("vda"), *STABLE_ONLY) as machine:
        view = await ask(machine)
    assert [image.name for image in view.chain] == ["base.qcow2", "a.qcow2"]
    assert not view.oddities


@pytest.mark.parametrize("top", ["b", "c"])
async def test_a_running_commit_seen_with_the_stable_commands(tmp_path: Path, top: str) -> None:
    fill(make_chain(tmp_path))
    with machines.machine(tmp_path, *nodes(), *virtio("c"), *STABLE_ONLY) as machine:
        commit(machine, top)
        view = await ask(machine, "disk0")
    assert told(view.chain, tmp_path) == CHAIN and not view.oddities
    assert [job.id for job in view.layout.jobs] == ["slow"]


# --- long chains ---------------------------------------------------------------------------------------------------


def make_layers(folder: Path, count: int) -> list[Path]:
    """A chain with absolute names, fast: one header is made, the others differ in one name of the same length."""
    files = [folder / f"l{number:04}.qcow2" for number in range(count)]
    run("qemu-img", "create", "-q", "-f", "qcow2", files[0], "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", files[0], "-F", "qcow2", files[1])
    template = files[1].read_bytes()
    for below, file in pairwise(files[1:]):
        file.write_bytes(template.replace(bytes(files[0]), bytes(below)))
    return files


def long_drive(files: list[Path]) -> list[str]:
    return [*drive(files[-1]), *virtio("vda")]


def long_blockdev(files: list[Path]) -> list[str]:
    options, below = [], None
    for number, file in enumerate(files):
        options += image(f"n{number}", file, backing=below)
        below = f"n{number}"
    return [*options, *virtio(str(below))]


@pytest.mark.parametrize("start", [long_drive, long_blockdev])
async def test_200_layers_take_five_questions(tmp_path: Path, start: Callable[[list[Path]], list[str]]) -> None:
    files = make_layers(tmp_path, 200)
    asked: list[str] = []
    with machines.machine(tmp_path, *start(files)) as machine:
        async with heard(sent(asked)), qmpmerge.live(machine.target) as target:
            view = await target.chain()
    assert view.chain.files == [str(file) for file in files]
    assert [image.backing for image in view.chain] == [None, *(str(file) for file in files[:-1])]
    assert [image.inode for image in view.chain] == [identity(file) for file in files]
    assert not view.oddities
    asked_at_once = ["query-jobs", "query-block-jobs", "x-debug-query-block-graph"]
    assert asked == [*asked_at_once, "query-block", "query-named-block-nodes"]


async def test_500_layers(tmp_path: Path) -> None:
    """
    Deeper than `DEEP`: `query-block` would take QEMU seconds, and is not asked.

    1000 layers are right too, but QEMU takes 20 to 60 s for them: what is ours is tested with 1000 headers
    (test_headers) and 3000 nodes (test_filmstrips). No device: it would read the partition table, and QEMU 10 and 11
    crash when they read through so many layers.
    """
    files = make_layers(tmp_path, 500)
    asked: list[str] = []
    with machines.machine(tmp_path, *drive(files[-1])) as machine:
        async with heard(sent(asked)), qmpmerge.live(machine.target) as target:
            view = await target.chain("vda")
    assert len(files) > DEEP
    assert (view.disk.name, view.disk.drive, view.disk.root) == ("vda", "vda", view.chain.active.node)
    assert view.chain.files == [str(file) for file in files]
    assert not view.oddities
    assert sorted(asked) == ["query-block-jobs", "query-jobs", "query-named-block-nodes", "x-debug-query-block-graph"]


def test_an_empty_drive_is_called_nothing() -> None:
    empty = Disk(name="cd0", drive="cd0", qdev=None, root="", chain=None, nodes=())
    with pytest.raises(NoSuchDisk):
        Layout((empty,), (), {}, {}).find("cd0", "vm")
