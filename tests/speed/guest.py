"""
What a guest feels of a merge: a real Linux that never stops writing, merged by each peer in turn.

The longest gap is between two acknowledgements (all writes up to there completed, and a flush after them returned), by
the host's clock, so a pause of the guest is in it. The slowest write is by the guest's clock, which stands still with the
guest.
"""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rig import guests
from rig.guests import Guest, Ports, Writer, guest
from rig.machines import MIB, run

from speed.figures import BARE, OURS, VIRSH, Figures, alternating
from speed.images import remove
from speed.peers import COMMAND, Libvirt

SECTION = "guest"
SEED = 31
SIZE = 256 * MIB
RATE = 1000
BETWEEN = 300
"""Operations before each snapshot and each merge."""


async def measure(figures: Figures, runs: int, peer: Libvirt | None) -> None:
    """Boot a guest, and one of libvirt's; then merge in turn."""
    async with contextlib.AsyncExitStack() as running:
        folder = Path(running.enter_context(TemporaryDirectory(prefix="feel-")))
        folder.chmod(0o755)
        mine = Direct(await running.enter_async_context(_direct(folder / "own")), folder / "own")
        peers: dict[str, Direct] = {OURS: mine, BARE: mine}
        if peer is not None:
            peers[VIRSH] = Domain(
                await running.enter_async_context(_domain(peer, folder / "libvirt")), folder / "libvirt", peer
            )
        for who in alternating(runs, peers):
            await _cycle(figures, who, peers[who])


async def _cycle(figures: Figures, who: str, vm: "Direct") -> None:
    """Three overlays with data, an intermediate merge of two, an active one of the rest."""
    writer = await vm.guest.start_writer("/dev/vda", SEED, rate=RATE, first=vm.last + 1, rhythm=0.001)
    overlays = [await vm.grow(writer) for _ in range(3)]
    for kind, top in (("intermediate", overlays[-2]), ("active, pivot", None)):
        await writer.advance(BETWEEN)
        begun, first = time.monotonic(), len(writer.times)
        await vm.merge(who, top)
        took = time.monotonic() - begun
        for overlay in overlays[:-1] if top else overlays[-1:]:
            remove(overlay)
        await writer.advance(20)
        figures.add(SECTION, f"{kind}: whole merge", who, took * 1000)
        # The gap that the merge began in counts from its last acknowledgement before.
        gaps = itertools.pairwise(writer.times[first - 1 :])
        figures.add(SECTION, f"{kind}: longest gap", who, max(later - earlier for earlier, later in gaps) * 1000)
        figures.add(SECTION, f"{kind}: slowest write", who, max(writer.slowest[first:]) * 1000)
    # The same without a merge: what the machine itself does to a guest.
    first = len(writer.times)
    await writer.advance(BETWEEN)
    quiet = itertools.pairwise(writer.times[first - 1 :])
    figures.add(SECTION, "no merge: longest gap", who, max(later - earlier for earlier, later in quiet) * 1000)
    vm.last = await writer.stop()
    verdict = await vm.guest.check("/dev/vda", SEED, vm.last, issued=vm.last)
    if not verdict.clean:
        raise SystemExit(f"bench: {who} lost data: {verdict.said}")


class Direct:
    """A guest on a QEMU that we started: merged by us, or by bare QMP."""

    def __init__(self, vm: Guest, folder: Path) -> None:
        self.guest = vm
        self.last = 0
        self.base = folder / "base.raw"
        self._numbers = itertools.count(1)

    async def grow(self, writer: Writer) -> Path:
        """Put an overlay on the disk and have it written to."""
        overlay = self.base.parent / f"overlay{next(self._numbers)}.qcow2"
        await self.snapshot(overlay)
        await writer.advance(BETWEEN)
        return overlay

    async def snapshot(self, overlay: Path) -> None:
        await self.guest.qmp("blockdev-snapshot-sync", device="vda", snapshot_file=str(overlay), format="qcow2")

    async def merge(self, who: str, top: Path | None) -> None:
        if who == OURS:
            await _run(COMMAND, "commit", str(self.guest.monitor), "vda", *(["--top", str(top)] if top else []))
        else:
            await self._bare(top)

    async def _bare(self, top: Path | None) -> None:
        details = await self.guest.qmp("query-named-block-nodes", flat=True)
        nodes = {node["file"]: node["node-name"] for node in details if node["drv"] != "file"}
        inserted = next(device for device in await self.guest.qmp("query-block") if device["device"] == "vda")[
            "inserted"
        ]
        extra: dict[str, Any] = {} if top is None else {"backing_file": str(self.base)}
        names = {"top_node": nodes[str(top) if top else inserted["file"]], "base_node": nodes[str(self.base)]}
        await self.guest.qmp("block-commit", job_id="bare", device="vda", auto_dismiss=False, **names, **extra)
        completing = False
        while True:
            (job,) = await self.guest.qmp("query-jobs")
            if job["status"] == "ready" and not completing:
                await self.guest.qmp("job-complete", id="bare")
                completing = True
            elif job["status"] == "concluded":
                break
            else:
                await asyncio.sleep(0.01)
        await self.guest.qmp("job-dismiss", id="bare")


class Domain(Direct):
    """A guest of libvirt's."""

    def __init__(self, vm: Guest, folder: Path, peer: Libvirt) -> None:
        super().__init__(vm, folder)
        self._peer = peer

    async def snapshot(self, overlay: Path) -> None:
        words = ("snapshot-create-as", "peer", "--disk-only", "--no-metadata", "--atomic", "--diskspec")
        await _run(*self._peer.virsh(*words, f"vda,file={overlay}"))

    async def merge(self, who: str, top: Path | None) -> None:
        ending = ["--active", "--pivot"] if top is None else ["--top", str(top)]
        words = ("blockcommit", "peer", "vda", "--wait", "--verbose", "--base", str(self.base), *ending)
        await _run(*self._peer.virsh(*words))


async def _run(*command: str) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    output, complaints = await process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"bench: {command} failed: {output.decode()}{complaints.decode()}")


@contextlib.asynccontextmanager
async def _direct(folder: Path) -> AsyncIterator[Guest]:
    folder.mkdir()
    run("qemu-img", "create", "-q", "-f", "raw", folder / "base.raw", str(SIZE))
    drive = f"file={folder}/base.raw,format=raw,if=none,id=vda,discard=unmap"
    async with guest([["-drive", drive, "-device", "virtio-blk-pci,drive=vda"]], agent=False) as vm:
        yield vm


class DomainGuest(Guest):
    """The same guest where libvirt has QEMU: there is no monitor for us, and no process of ours."""

    def __init__(self, peer: Libvirt, folder: Path, ports: Ports) -> None:
        nobody: Any = None
        super().__init__(nobody, folder, ports)
        self._peer = peer

    async def boot(self) -> None:
        await _run(*self._peer.virsh("resume", "peer"))
        await self._ready.wait()


@contextlib.asynccontextmanager
async def _domain(peer: Libvirt, folder: Path) -> AsyncIterator[Guest]:
    folder.mkdir()
    run("qemu-img", "create", "-q", "-f", "raw", folder / "base.raw", str(SIZE))
    peer.let_in(folder)
    built = guests.built()
    kernel = (
        f"<kernel>{built}/vmlinux</kernel><initrd>{built}/initramfs</initrd><cmdline>{guests.KERNEL_OPTIONS}</cmdline>"
    )
    with peer.domain(folder / "base.raw", os_words=kernel, devices=_channels(folder)):
        streams = {name: await _connected(folder / name) for name in ("writers", "control")}
        ports = Ports(qmp=streams["control"], **streams)
        try:
            vm = DomainGuest(peer, folder, ports)
            async with asyncio.timeout(guests.BOOT_SECONDS):
                await vm.boot()
            yield vm
        finally:
            await ports.close()


def _channels(folder: Path) -> str:
    return "".join(
        f"<channel type='unix'><source mode='bind' path='{folder}/{name}'/>"
        f"<target type='virtio' name='qmpmerge.{name}'/></channel>"
        for name in ("writers", "control")
    )


async def _connected(path: Path) -> guests.Stream:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return await asyncio.open_connection(sock=connection, limit=guests.REPLY_LIMIT)
