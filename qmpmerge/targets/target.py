"""
A target: what the user calls by one word, with a QMP session to its disks. `live`, `offline` and `open` make one; everything
above talks to a `Target` and does not care which of them did.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpmerge.chain.chain import Chain, Image, Inode
from qmpmerge.errors import NoSuchJob, PauseUnproven, QemuRefused, SessionLost, StreamConcluded, WentAway
from qmpmerge.images import files, headers
from qmpmerge.images.headers import Oddity
from qmpmerge.images.qemuimg import Header
from qmpmerge.journal import store
from qmpmerge.journal.store import Disbelieved
from qmpmerge.processes import proc
from qmpmerge.processes.openfiles import OpenFiles
from qmpmerge.qemu import discovery
from qmpmerge.qemu.blockgraph import Disk, DiskName, Layout
from qmpmerge.qemu.jobs import Job, query
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets import identity
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.journal.record import Record
    from qmpmerge.processes.holders import User
    from qmpmerge.qemu.details import ImageDetails


class ChainView(Value):
    """
    A disk, its chain with the backing strings as they stand in the headers, problems with it, and the graph; and of each image
    the details, base first, where they were asked for.
    """

    disk: Disk
    chain: Chain
    oddities: tuple[Oddity, ...]
    layout: Layout
    details: "tuple[ImageDetails, ...]" = ()


class Target:
    """
    Disks and the QMP session to them. `name` is what the user called it, `allowed` are the files and folders that headers, and
    records, may name besides those of the image.

    `is_live` says that somebody else, a guest, can write to the disks at any time. `users` are the others that have an image of
    the chain, None where that was not looked for as it was opened. `notes` is what the user should know of
    how it was found.
    """

    is_live = True

    def __init__(
        self, session: Monitor | None, name: str, connect: Callable[[], Awaitable[Monitor]] | None = None
    ) -> None:
        self._session = session
        self.name = name
        self.allowed: tuple[str, ...] = ()
        self.users: tuple[User, ...] | None = None
        self.notes: list[str] = []
        self._connect = connect
        self._files: dict[tuple[int | None, str], Inode] = {}

    @property
    def monitor(self) -> Monitor:
        """The session. Raises ValueError where there is none: of images that were opened to be looked at."""
        if self._session is None:
            raise ValueError(
                f"{self.name} was opened with write=False: its disks and chains can be asked for, nothing else"
            )
        return self._session

    @property
    def pid(self) -> int | None:
        """The QEMU process, where the kernel tells it."""
        return None if self._session is None else self._session.pid

    def tell_waits(self, tell: Callable[[str], None]) -> None:
        """Have `tell` hear a sentence when others are waited for."""
        if self._session is not None:
            self._session.tell = tell

    @property
    def can_reconnect(self) -> bool:
        """Whether the session can be left and made again."""
        return self._connect is not None

    async def reconnect(self) -> None:
        """
        Give up the session, if there still is one, and make a new one. A guest that was paused in the old one runs again:
        its dead man's switch had no other session. Raises what the door raises, PauseUnproven.
        """
        assert self._connect is not None, "see `can_reconnect`"
        await self.monitor.close()
        old, self._session = self.monitor, await self._connect()
        self.monitor.tell, self.monitor.has_acted = old.tell, old.has_acted
        if old.has_paused:
            try:
                await self.monitor.execute("cont")
            except QemuRefused as error:
                raise PauseUnproven(target=self.name, reason=str(error)) from None

    @contextlib.contextmanager
    def looking(self, *, only: bool = False) -> Iterator[None]:
        """
        A session that is lost in the block while only questions were asked leaves all as it was; with `only` whatever else was
        sent changes nothing either. Raises WentAway.
        """
        try:
            yield
        except SessionLost as lost:
            if self.monitor.has_acted and not only:
                raise
            raise WentAway(target=lost.target, command=lost.command, reason=lost.reason) from None

    async def guest_runs(self) -> bool:
        """
        Whether a guest can write now; a storage daemon does not tell, its clients can. One that another merge has paused
        for a moment runs. Raises `mutex.NoTurn` where that moment does not end.
        """
        from qmpmerge.qemu import mutex  # merges alone ask, and the engine has imported it

        try:
            async with mutex.taken(mutex.PAUSE, self.monitor):
                return bool((await self.monitor.execute("query-status"))["running"])
        except QemuRefused:
            return True

    async def layout(self, known: Layout | None = None) -> Layout:
        """
        Disks, jobs and nodes as they are now. Of a long chain that is `known` nothing is asked again that stays as it is (see
        `discover`), where it can be seen which files QEMU has open, and that it has opened none since.
        """
        pid = self.pid
        files = frozenset(proc.open_inodes(pid)) if pid is not None else frozenset()
        is_same = known is not None and bool(files) and files <= known.files
        return replace(await discovery.discover(self.monitor, self.locate(), known if is_same else None), files=files)

    async def disks(self, *, details: bool = False) -> list[Disk]:
        """All disks, empty drives included; with `details` of each the device, and how large its storage is."""
        layout = await self.layout()
        if not details:
            return list(layout.disks)
        from qmpmerge.qemu.details import of_disk, of_disks

        if self._session is None:
            return [of_disk(layout, disk) for disk in layout.disks]
        return await of_disks(self._session, layout)

    async def disk(self, name: DiskName | None = None) -> Disk:
        """The disk that `name` means; without one the only disk with a backing chain."""
        return (await self.layout()).find(name, self.name)

    async def job(self, name: str) -> Job:
        """The job of this id, or the only one on the disk of this name. Raises NoSuchJob."""
        known = await self._running()
        found = next((job for job in known if job.id == name), None)
        if found is None:
            with contextlib.suppress(StreamConcluded):
                return (await self.layout()).find_job(name, self.name)
            raise NoSuchJob(job=name, target=self.name, known=[job.id for job in known])
        return found

    async def chain(
        self, disk: DiskName | None = None, *, details: bool = False, known: Layout | None = None
    ) -> ChainView:
        """
        The chain of a disk: QEMU's graph next to the headers on disk; with `details` what each image is like. `known` is as
        for `layout`.

        Raises NoSuchDisk, DiskNeeded, NoDisk, ToolMissing.
        """
        view = await self.view(await self.layout(known), disk)
        if not details:
            return view
        from qmpmerge.qemu.details import of_image

        return replace(view, details=tuple(of_image(view.layout, image) for image in view.chain))

    async def view(self, layout: Layout, disk: DiskName | None = None) -> ChainView:
        """The same, of a layout that was asked for already."""
        found, chain = self._found(layout, disk)
        if self._is_reminded(chain):
            layout = await self.layout()
            found, chain = self._found(layout, disk)
        written = await self.written(chain)
        odd = (*headers.oddities(chain, written), *unfinished(found))
        return ChainView(found, headers.as_written(chain, written), odd, layout)

    async def written(self, chain: Chain) -> tuple[Header | None, ...]:
        """The headers of its images as they stand on disk now, base first, as `headers.read` has it."""
        return await headers.read(chain)

    def _found(self, layout: Layout, disk: DiskName | None) -> tuple[Disk, Chain]:
        found = layout.find(disk, self.name)
        assert found.chain is not None, "find() returns disks with an image only"
        return found, found.chain

    async def jobs(self) -> list[Job]:
        """All block jobs, each with the disk it works on where the graph tells it."""
        if not await self._running():
            return []
        try:
            return list((await self.layout()).jobs)
        except StreamConcluded:
            return await self._running()

    async def _running(self) -> list[Job]:
        return [] if self._session is None else await query(self._session)

    async def close(self, nodes: Sequence[str]) -> None:
        """Close nodes, top down, that nobody uses any more; those that QEMU has named go by themselves."""
        named = [node for node in nodes if not node.startswith("#")]
        # All are sent before the first is answered. One that went with its parent, or that is in use, is an error to QEMU.
        await self.monitor.execute_all([("blockdev-del", {"node_name": node}) for node in named])

    async def open_for_writing(self, images: Collection[Image]) -> None:
        """
        Have QEMU open the files of these images for that, where the session is our own and nothing else would keep a job
        from opening them later, by names that lead elsewhere by then. Raises NotWritable, Replaced.
        """

    def remember(self, images: Iterable[Image]) -> None:
        """Which files these were when somebody saw them earlier: a name that was taken from one since still means it."""
        self._files.update({(self.pid, image.file): image.inode for image in images if image.inode is not None})

    def _is_reminded(self, chain: Chain) -> bool:
        """Whether a record tells which file an image was of which that is not known now."""
        unknown = {image.file for image in chain if image.has_path and image.inode is None}
        found = [one for folder in dict.fromkeys(map(os.path.dirname, unknown)) for one in store.in_folder(folder)]
        records = [one for one in found if not isinstance(one, Disbelieved)]
        told = [image for record in records for image in record.chain if image.file in unknown]
        self.remember(told)
        return bool(told)

    def locate(self) -> discovery.Locate:
        """
        What tells where the files of QEMU's names lie, and which files it has open by them now; a name that is no path stays
        as it is.
        """
        pid = self.pid
        lying, opened = OpenFiles(pid), identity.Opened(pid)

        def located(name: str) -> tuple[str, Inode | None]:
            path = _plain(name)
            if path is None:
                return name, None
            file = lying.locate(path)
            if not file.startswith("/"):
                return file, None
            file = files.plain(file)
            found = opened.located(file, self._files.get((pid, file)))
            if found is not None:
                self._files.setdefault((pid, file), found)
            return file, found

        return located


def unfinished(disk: Disk) -> list[Oddity]:
    """Merges of the disk that nobody is at work on, neither one of us nor a job; and records that are not believed."""
    if disk.chain is None:
        return []
    odd = []
    for found in store.about(disk.chain):
        if isinstance(found, Disbelieved):
            what = f"what lies here as the record of a merge is not believed: {found.reason}"
            odd.append(Oddity("record-not-believed", found.path, what))
        elif found.is_abandoned and not _is_harmless(found, disk):
            name = found.chain.active.file
            odd.append(Oddity("unfinished", name, f"a merge was not finished: `qmpmerge recover {shlex.quote(name)}`"))
    return odd


def _is_harmless(record: "Record", disk: Disk) -> bool:
    """Its job is there to be followed; or it was cancelled, and the chain is what it was."""
    assert disk.chain is not None
    if disk.job is not None and disk.job.id == record.job:
        return True
    return record.has_old_chain and record.chain.same_files(disk.chain)


def _plain(name: str) -> str | None:
    """The path in a file name of QEMU's; None for a URI or a json: name that is more than a file."""
    if name.startswith("json:"):
        try:
            options = json.loads(name.removeprefix("json:"))
        except ValueError:
            return None
        return options.get("filename") if options.get("driver") in ("file", "host_device") else None
    if name.startswith("/"):
        return name
    return None if ":" in name.split("/", 1)[0] else name
