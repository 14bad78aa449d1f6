"""
The door to images not in use: a private storage daemon opens the chain, and the same engine works on it.

The chain is walked first without opening what has not passed the rule for names (`walk`), then opened node by node under
QEMU's own locks. What is planned and proved is read again after that: from then on nothing can change it.

The daemon opens by name, so what it has open is compared with what the walk has approved, before anything is made of it,
and once more when the images that are to be written are open for that. A node of a file that another node was made with
is opened again by name whenever that is (7.2 to 11.1), one that was there before is not; with `auto-read-only` it is opened
again when somebody first writes. So files have nodes of their own, and no job opens a name: test_offline pins it.

Middle layers could be copied by an active merge of the lower part, 16 requests at a time instead of one: 0.27 s instead of
0.33 s for 512 MiB. It was not done: the overlay's header would have to be written by somebody else, past the locks, since
QEMU's `change-backing-file` records the overlay's own format for the base.
"""

import contextlib
import os
import re
import shlex
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qmpmerge import given
from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import ImageUnreadable, InUse, NeedsSecret, NotWritable, QemuRefused, SessionLost
from qmpmerge.given import Paths
from qmpmerge.images import walk
from qmpmerge.images.headers import Oddity
from qmpmerge.images.walk import Layer
from qmpmerge.processes import holders, limits, proc
from qmpmerge.processes.holders import User
from qmpmerge.qemu import discovery, storagedaemon
from qmpmerge.qemu.blockgraph import Disk, DiskName, Layout
from qmpmerge.qemu.monitor import Monitor, Trace
from qmpmerge.targets import identity
from qmpmerge.targets.target import ChainView, Target

SECRET = "qmpmerge-secret"  # noqa: S105 - the id of the object, not the passphrase


class OfflineTarget(Target):
    """One disk: the chain whose active image the user named."""

    is_live = False

    def __init__(self, session: Monitor, target: str, layers: tuple[Layer, ...], users: tuple[User, ...]) -> None:
        super().__init__(session, target)
        self._name = os.path.basename(target)
        self._layers = layers
        self.users = users

    async def open_for_writing(self, images: Collection[Image]) -> None:
        """The last time that they are opened by name. Raises NotWritable, Replaced."""
        numbered = {f"layer{number}": (number, layer) for number, layer in enumerate(self._layers, 1)}
        written = [numbered[image.node or ""] for image in images]
        for image, (_number, layer) in zip(images, written, strict=True):
            if image.inode not in layer.inodes:  # its name led elsewhere when QEMU was asked for it
                raise identity.swapped(layer.file)
        nodes = [
            node
            for number, layer in written
            if layer is not self._layers[-1]  # the active image is open for writing already
            for node in _files(layer, number, write=True, now=True)
            if "filename" in node
        ]
        replies = await self.monitor.execute_all([("blockdev-reopen", {"options": [node]}) for node in nodes])
        _see_approved(self.pid, self._layers, [layer for _number, layer in written])
        for node, reply in zip(nodes, replies, strict=True):
            if isinstance(reply, QemuRefused):
                raise NotWritable(file=str(node["filename"]), reason=reply.reason)

    async def layout(self) -> Layout:
        """The disk is called like its active image's file; that we have opened it read-only is not the disk's doing."""
        layout = await discovery.discover(self.monitor, self.locate())
        return replace(layout, disks=tuple(map(self._named, layout.disks)))

    def _named(self, disk: Disk) -> Disk:
        assert disk.chain is not None, "there are no empty drives here"
        active = replace(disk.chain.active, read_only=not os.access(disk.chain.active.file, os.W_OK))
        return replace(disk, name=self._name, chain=Chain((*disk.chain.images[:-1], active)))

    async def view(self, layout: Layout, disk: DiskName | None = None) -> ChainView:
        """As of any target, and who has it in use."""
        view = await super().view(layout, disk)
        odd = [
            Oddity("in-use", user.file, f"in use by {user}: what is shown may be out of date")
            for user in self.users or ()
        ]
        return replace(view, oddities=(*view.oddities, *odd))


@contextlib.asynccontextmanager
async def offline(
    image: "str | os.PathLike[str]",
    *,
    write: bool = True,
    dry_run: bool = False,
    allow: Paths = (),
    form: str | None = None,
    secret: str | None = None,
    trace: Trace | None = None,
) -> AsyncIterator[OfflineTarget]:
    """
    Open the chain whose active image is `image`.

    With `write` the active image is locked, and it is refused when anybody holds that one, or may write to another: who only
    reads those below is in the target's `users`. Without, they are read shared with whoever writes them. A `dry_run` asks for
    the same and changes nothing: QEMU repairs an image that it opens for writing, and clears marks in its header that it does
    not know. `allow` are files and folders that headers may name besides the image's folder. `form` is the image's own format,
    where it is a device or is called raw. `secret` is the passphrase of encrypted images.

    Raises InUse, NeedsSecret, Replaced, TooFewFiles, what `walk.walk` raises, ToolMissing.
    """
    image, allowed = os.fspath(image), tuple(given.paths(allow))
    async with storagedaemon.started() as daemon:
        layers = walk.walk(image, allow=allowed, form=form)
        limits.refuse_few(len(layers))
        users = await holders.lasting([layer.file for layer in layers])
        if write:
            _refuse_used(layers, users)
        async with daemon.session(trace=trace) as session:
            await _open(session, layers, write=write, dry_run=dry_run, secret=secret)
            target = OfflineTarget(session, image, layers, users)
            target.allowed = allowed
            with _known_to_be_gone(image):
                yield target


@contextlib.contextmanager
def _known_to_be_gone(image: str) -> Iterator[None]:
    """A lost session says which image to look at: nobody else can ask the daemon, and it ends with us."""
    try:
        yield
    except SessionLost as lost:
        raise SessionLost(target=lost.target, command=lost.command, reason=lost.reason, image=image) from None


def _refuse_used(layers: tuple[Layer, ...], users: tuple[User, ...]) -> None:
    active = layers[-1].file
    harmful = [user for user in users if user.file == active or user.may_write]
    if harmful:
        file = harmful[-1].file
        names = [str(user) for user in harmful if user.file == file]
        raise InUse(file=file, holders=names, command=_instead(harmful[-1]))
    if holders.is_locked(active):
        raise InUse(file=active, holders=["a process that we may not see"], command=holders.UNKNOWN)


def _instead(user: User) -> str:
    """What to do about an image in use; the command and its options are the user's."""
    if user.vm is None:
        return user.instead
    if user.vm.monitors and not user.vm.libvirt:
        name = shlex.quote(user.vm.name or f"pid:{user.vm.pid}")
        return f"run the command with `{name}` for TARGET, in place of the image: `qmpmerge disks {name}` shows what it has"
    return "shut that VM down first, or start it with a QMP monitor and merge live"


async def _open(session: Monitor, layers: tuple[Layer, ...], *, write: bool, dry_run: bool, secret: str | None) -> None:
    """Open the nodes, base first, named ``layer1`` and up; the active image alone is opened for writing."""
    encrypted = next((layer for layer in layers if layer.encrypted), None)
    if encrypted is not None:
        if secret is None:
            raise NeedsSecret(image=encrypted.file)
        await session.execute("object-add", qom_type="secret", id=SECRET, data=secret)
    active = None if dry_run or not write else layers[-1]
    nodes = [
        (layer, node)
        for number, layer in enumerate(layers, 1)
        for node in [
            *_files(layer, number, write=write, now=write and layer is layers[-1]),
            _image(layer, number, write=write, writable=layer is active),
        ]
    ]
    replies = await session.execute_all([("blockdev-add", node) for _layer, node in nodes])
    for (layer, _node), reply in zip(nodes, replies, strict=True):
        if isinstance(reply, QemuRefused):
            if re.search(r"Failed to get .*lock", reply.reason):
                raise InUse(file=layer.file, holders=["another process"], command="end it, or wait")
            raise ImageUnreadable(file=layer.file, reason=reply.reason)
    _see_approved(session.pid, layers, layers)


def _see_approved(pid: int | None, approved: Sequence[Layer], needed: Sequence[Layer]) -> None:
    """The daemon has open what is needed, and nothing but what was approved. Raises Replaced."""
    opened = proc.open_inodes(pid) if pid is not None else set()
    unknown = opened - {inode for layer in approved for inode in layer.inodes}
    for layer in reversed(needed):
        if unknown or not layer.inodes <= opened:
            raise identity.swapped(layer.file)


def _files(layer: Layer, number: int, *, write: bool, now: bool) -> list[dict[str, Any]]:
    """The nodes of an image's file, or of the part of it, and of its data; `now` opens them for writing at once."""
    node = f"layer{number}"
    file = _file(layer.file, f"{node}-file", is_device=layer.is_device, write=write, now=now)
    nodes = [file]
    if layer.slice is not None:
        more = {"node-name": f"{node}-part", "read-only": not write, "auto-read-only": True, "discard": "unmap"}
        nodes.append(
            {**backing.part(layer.slice, file["node-name"]), **more, **({} if write else {"force-share": True})}
        )
    if layer.data_file is not None:
        nodes.append(_file(layer.data_file, f"{node}-data", write=write, now=now))
    return nodes


def _image(layer: Layer, number: int, *, write: bool, writable: bool) -> dict[str, Any]:
    """An image's node on those of its files."""
    node = f"layer{number}"
    options: dict[str, Any] = {
        "driver": layer.format,
        "node-name": node,
        "read-only": not writable,
        "discard": "unmap",
        "file": f"{node}-file" if layer.slice is None else f"{node}-part",
        **_key(layer),
    }
    if layer.format == "qcow2":
        options["backing"] = f"layer{number - 1}" if number > 1 else None
    if layer.data_file is not None:
        options["data-file"] = f"{node}-data"
    if not write:
        options["force-share"] = True
    return options


def _file(file: str, node: str, *, is_device: bool = False, write: bool, now: bool) -> dict[str, Any]:
    """
    The node of the file, by threads through the host's cache, which is QEMU's default.

    io_uring is no faster for certain on two processors, and the one of QEMU 7.2 and 10.0 hangs on compressed clusters;
    past the cache (`cache.direct`) a merge takes twice as long.
    """
    return {
        "driver": "host_device" if is_device else "file",
        "node-name": node,
        "filename": file,
        "read-only": not write,
        "auto-read-only": not now,
        "discard": "unmap",
        # A reader takes no locks: while an image is merged not even `force-share` would let it in.
        **({} if write else {"force-share": True, "locking": "off"}),
    }


def _key(layer: Layer) -> dict[str, Any]:
    if not layer.encrypted:
        return {}
    return {"key-secret": SECRET} if layer.format == "luks" else {"encrypt": {"format": "luks", "key-secret": SECRET}}
