"""The layouts of disks of which there are film strips: each is started, paused, on tiny images."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rig.disks import nbd_server
from rig.machines import Content, Machine, fill, machine, make_chain, run

Start = Callable[[Machine], None]

NODES = [
    *("-blockdev", "file,node-name=base-file,filename=base.raw,auto-read-only=on"),
    *("-blockdev", "raw,node-name=base,file=base-file"),
    *("-blockdev", "file,node-name=a-file,filename=a.qcow2,auto-read-only=on"),
    *("-blockdev", "qcow2,node-name=a,file=a-file,backing=base"),
    *("-blockdev", "file,node-name=b-file,filename=b.qcow2"),
    *("-blockdev", "qcow2,node-name=b,file=b-file,backing=a"),
]
THROTTLE = ["-object", "throttle-group,id=limits"]
COR = ["-blockdev", "copy-on-read,node-name=cor,file=limited"]
DRIVE = ["-drive", "if=none,id=vda,file=b.qcow2,format=qcow2"]
EXPORT = ["--nbd-server", "addr.type=unix,addr.path=export", "--export", "nbd,id=export0,node-name=b,writable=on"]


def virtio(root: str) -> list[str]:
    return ["-device", f"virtio-blk-pci,id=disk0,drive={root}"]


def throttled(below: str) -> list[str]:
    return [*THROTTLE, "-blockdev", f"throttle,node-name=limited,throttle-group=limits,file={below}"]


def layout(*options: str, program: str = "qemu-system-x86_64", start: Start | None = None) -> Any:
    """A machine with a chain of three images and these options; `start` begins a job."""

    @contextlib.contextmanager
    def begin(folder: Path) -> Iterator[Machine]:
        files = make_chain(folder, ["base.raw", "a.qcow2", "b.qcow2"])
        if start is not None:
            fill(files, Content())
        with machine(folder, *options, program=program) as started:
            if start is not None:
                start(started)
            yield started

    return begin


@contextlib.contextmanager
def nbd_base(folder: Path) -> Iterator[Machine]:
    """Two overlays over a base that a qemu-nbd serves."""
    (base,) = make_chain(folder, ["base.raw"])
    with nbd_server(folder, base) as uri:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", "a.qcow2", cwd=folder)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", cwd=folder)
        with machine(folder, *DRIVE, *virtio("vda")) as started:
            yield started


def commit(top: str, status: str, **options: object) -> Start:
    """A commit of `top` into base, waited for until it is in this state."""

    def start(machine: Machine) -> None:
        ids = {"job-id": "qmpmerge-commit-disk0", "device": "b", "top-node": top, "base-node": "base"}
        if top != "b":
            ids["backing-file"] = "base.raw"
        machine.session.execute("block-commit", **ids, auto_dismiss=False, **options)
        while [job["status"] for job in machine.session.execute("query-jobs")] != [status]:
            pass

    return start


LAYOUTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Machine]]] = {
    "drive": layout(*DRIVE, *virtio("vda")),
    "blockdev": layout(*NODES, *virtio("b")),
    "ide": layout(*NODES, "-device", "ide-hd,id=disk0,drive=b"),
    "backing-null": layout("-blockdev", json.dumps({"driver": "qcow2", "node-name": "b", "backing": None,
                           "file": {"driver": "file", "filename": "b.qcow2"}}), *virtio("b")),
    "filters-on-top": layout(*NODES, *throttled("b"), *COR, *virtio("cor")),
    "filter-in-the-middle": layout(*NODES[:8], *throttled("a"), *NODES[8:-1],
                                   NODES[-1].replace("backing=a", "backing=limited"), *virtio("b")),
    "nbd-base": nbd_base,
    "snapshot-drive": layout("-drive", f"{DRIVE[1]},snapshot=on", *virtio("vda")),
    "empty-cd": layout("-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,bus=ide.0,drive=cd0,id=slot0",
                       "-device", "ide-cd,bus=ide.1,id=slot1", *DRIVE, *virtio("vda")),
    "storage-daemon": layout(*(option.replace("-blockdev", "--blockdev") for option in NODES), *EXPORT,
                             program="qemu-storage-daemon"),
    "commit-running": layout(*NODES, *virtio("b"), start=commit("a", "running", speed=1, auto_finalize=False)),
    "commit-pending": layout(*NODES, *virtio("b"), start=commit("a", "pending", auto_finalize=False)),
    "commit-ready": layout(*NODES, *virtio("b"), start=commit("b", "ready")),
    "commit-concluded": layout(*NODES, *virtio("b"), start=commit("a", "concluded")),
}  # fmt: skip
