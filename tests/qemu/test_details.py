"""`--details`: the device of each disk, and what each image is like, as the QEMU at hand tells it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from rig.command import invoke
from rig.disks import WAYS, nodes
from rig.machines import SIZE, Content, Machine, create_encrypted, machine, make_chain, run

import qmpmerge
from qmpmerge.qemu.details import Device, ImageDetails

CONTROLLERS = ["virtio-scsi-pci,id=scsi0,addr=08", "qemu-xhci,id=xhci", "usb-storage,id=usb,drive=usb"]
DEVICES = [
    "virtio-blk-pci,drive=vda,addr=05,iothread=io0",
    "scsi-hd,drive=sda,id=sda0,bus=scsi0.0,scsi-id=3",
    "ide-hd,drive=ide,bus=ide.2",
    "nvme,drive=nvme,serial=x,addr=06",
    "floppy,drive=floppy,bus=floppy0.0",
    "ide-cd,id=cd0,bus=ide.1",
    "scsi-cd,drive=cd1,bus=scsi0.0,scsi-id=4",
]


def drives(folder: Path) -> list[str]:
    arguments = ["-object", "iothread,id=io0", "-device", "isa-fdc,id=floppy0"]
    for name in ("vda", "sda", "ide", "nvme", "usb", "floppy", "cd1", "spare"):
        run("qemu-img", "create", "-q", "-f", "raw", folder / name, str(SIZE))
        more = ",readonly=on" if name == "cd1" else ""
        arguments += ["-drive", f"if=none,id={name},format=raw,file={folder / name}{more}"]
    for device in (*CONTROLLERS, *DEVICES):
        arguments += ["-device", device]
    return arguments


async def test_devices(tmp_path: Path) -> None:
    with machine(tmp_path, *drives(tmp_path)) as vm:
        async with qmpmerge.live(vm.target) as target:
            found = {disk.name: disk.details for disk in await target.disks(details=True)}
            assert all(disk.details is None for disk in await target.disks())
        text = invoke("disks", vm.target, "--details")
        document = invoke("disks", vm.target, "--details", "--json").document
    devices = {name: details.device for name, details in found.items() if details is not None}
    assert devices == {
        "vda": Device("virtio-blk-pci", "pcie.0", "05.0", "io0", removable=False),
        "sda": Device("scsi-hd", "scsi0.0", "0:3:0", removable=False),
        "ide": Device("ide-hd", "ide.2", "0", removable=False),
        "nvme": Device("nvme", "pcie.0", "06.0", removable=False),
        "usb": Device("usb-storage", "xhci.0", removable=False),
        "floppy": Device("floppy", "floppy0.0", "0", removable=True),
        "cd0": Device("ide-cd", "ide.1", "0", removable=True, tray_open=False),
        "cd1": Device("scsi-cd", "scsi0.0", "0:4:0", removable=True, tray_open=False),
        "spare": None,
    }
    physical = {name: details.physical for name, details in found.items() if details is not None}
    assert physical == {name: None if name == "cd0" else SIZE for name in devices}
    assert "vda: virtio-blk-pci on pcie.0 at 05.0, iothread io0; 8 MiB on its storage\n" in text.out
    assert "cd1: scsi-cd on scsi0.0 at 0:4:0, removable, tray closed, read-only; 8 MiB on its storage\n" in text.out
    assert "spare: no device; 8 MiB on its storage\n" in text.out
    (told,) = [disk["details"] for disk in document["disks"] if disk["disk"] == "sda"]
    assert told == {
        "device": "scsi-hd",
        "bus": "scsi0.0",
        "address": "0:3:0",
        "iothread": None,
        "removable": False,
        "tray_open": None,
        "physical": SIZE,
    }


@pytest.mark.parametrize("way", WAYS)
async def test_disks_given_in_every_way(tmp_path: Path, way: str) -> None:
    images = make_chain(tmp_path, ("base.raw", "a.qcow2"))
    is_guests = way not in ("storage-daemon", "offline")
    with WAYS[way](tmp_path, images, Content()) as setup:
        async with setup.target() as target:
            (found,) = [disk.details for disk in await target.disks(details=True)]
            view = await target.chain(details=True)
    assert found is not None
    assert (found.device.kind if found.device else None) == ("virtio-blk-pci" if is_guests else None)
    assert found.physical == view.details[1].physical
    assert [one.physical for one in view.details] == [-(-image.stat().st_size // 512) * 512 for image in images]
    assert [(one.compat, one.cluster_size) for one in view.details] == [(None, None), ("1.1", 65536)]


def featured(folder: Path) -> list[Path]:
    """A chain of images that differ in all that is told of one."""
    old, new, data = folder / "old.qcow2", folder / "new.qcow2", folder / "data.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", old, str(SIZE))
    run("qemu-img", "snapshot", "-c", "before", old)
    features = "cluster_size=128k,extended_l2=on,lazy_refcounts=on,compression_type=zstd"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", features, "-b", old, "-F", "qcow2", new)
    more = f"data_file={folder}/data,data_file_raw=off"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", more, "-b", new, "-F", "qcow2", data)
    run("qemu-img", "bitmap", "--add", "-g", "32k", data, "daily")
    run("qemu-img", "bitmap", "--add", "--disable", data, "old")
    return [old, new, data]


def see_features(found: Sequence[ImageDetails]) -> None:
    old, new, data = found
    assert (old.compat, old.cluster_size, old.snapshots) == ("0.10", 4096, (("1", "before"),))
    assert (old.extended_l2, old.lazy_refcounts, old.corrupt, old.dirty) == (None, None, None, False)
    assert (new.compat, new.cluster_size, new.extended_l2, new.lazy_refcounts) == ("1.1", 131072, True, True)
    assert (new.compression, new.encryption, new.corrupt, new.snapshots) == ("zstd", None, False, ())
    told = {(one.name, one.granularity, one.recording, one.persistent) for one in data.bitmaps}
    assert told == {("daily", 32768, True, True), ("old", 65536, False, True)}


async def test_features_of_images(tmp_path: Path) -> None:
    images = featured(tmp_path)
    async with qmpmerge.open(images[-1], write=False) as target:
        see_features((await target.chain(details=True)).details)
    with machine(tmp_path, *with_data(images)) as vm:
        async with qmpmerge.live(vm.target) as target:
            see_features((await target.chain(details=True)).details)
        see_text(vm, tmp_path)


def with_data(images: Sequence[Path]) -> list[str]:
    return [*nodes(images), "-device", "virtio-blk-pci,drive=data,id=disk0"]


def see_text(vm: Machine, folder: Path) -> None:
    out = invoke("chain", vm.target, "--details").out
    assert "1: qcow2 0.10, clusters of 4 KiB" in out
    assert "    internal snapshot before\n" in out
    assert "2: qcow2 1.1, clusters of 128 KiB, zstd, extended L2, lazy refcounts; " in out
    assert f"    data file {folder}/data\n" in out
    assert "    bitmap daily: 32 KiB, recording, persistent\n" in out
    assert "    bitmap old: 64 KiB, disabled, persistent\n" in out
    images = invoke("chain", vm.target, "--details", "--json").document["images"]
    assert images[0]["details"]["snapshots"] == [{"id": "1", "name": "before"}]
    assert {bitmap["name"]: bitmap["recording"] for bitmap in images[2]["details"]["bitmaps"]} == {
        "daily": True,
        "old": False,
    }
    assert invoke("chain", vm.target, "--json").document["images"][0]["details"] is None


async def test_encryption(tmp_path: Path) -> None:
    base, image, secret = tmp_path / "base.luks", tmp_path / "a.qcow2", "secret,id=s,data=x"
    cheap = "key-secret=s,iter-time=10,hash-alg=sha512"
    inner = f"encrypt.format=luks,encrypt.{cheap.replace(',', ',encrypt.')}"
    create_encrypted("-f", "luks", "--object", secret, "-o", cheap, base, str(SIZE))
    options = ["-o", inner, "-u", "-b", str(base), "-F", "luks"]
    create_encrypted("-f", "qcow2", "--object", secret, *options, image, str(SIZE))
    async with qmpmerge.open(image, write=False, secret="x") as target:
        found = (await target.chain(details=True)).details
    assert [(one.encryption, one.dirty, one.corrupt) for one in found] == [("luks", None, None), ("luks", False, False)]
