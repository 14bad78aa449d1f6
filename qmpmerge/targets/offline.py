"""
The door to images not in use: a private storage daemon opens the chain, and the same engine works on it.

The chain is walked first without opening what has not passed the rule for names (`walk`), then opened node by node under
QEMU's own locks (`nodes`). What is planned and proved is read again after that: from then on nothing can change it. A chain
that is only looked at is told by `qemu-img info` where that is all it takes (`shown`), else it is opened too.

Middle layers could be copied by an active merge of the lower part, 16 requests at a time instead of one: 0.27 s instead of
0.33 s for 512 MiB. It was not done: the overlay's header would have to be written by somebody else, past the locks, since
QEMU's `change-backing-file` records the overlay's own format for the base.
"""

import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from qmpmerge import given
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import InUse, NotWritable, QemuRefused, SessionLost
from qmpmerge.given import Paths
from qmpmerge.images import walk
from qmpmerge.images.headers import Oddity
from qmpmerge.images.qemuimg import Header
from qmpmerge.images.walk import Layer
from qmpmerge.processes import holders, limits
from qmpmerge.processes.holders import User
from qmpmerge.qemu import discovery, storagedaemon
from qmpmerge.qemu.blockgraph import Disk, DiskName, Layout
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets import identity, nodes, shown
from qmpmerge.targets.nodes import Named
from qmpmerge.targets.shown import Shown
from qmpmerge.targets.target import ChainView, Target


class OfflineTarget(Target):
    """One disk: the chain whose active image the user named."""

    is_live = False

    def __init__(self, session: Monitor | None, target: str, users: tuple[User, ...]) -> None:
        super().__init__(session, target)
        self._name = os.path.basename(target)
        self.users = users

    def _named(self, layout: Layout) -> Layout:
        """The disk is called like its active image's file; that we have opened it read-only is not the disk's doing."""
        return replace(layout, disks=tuple(map(self._called, layout.disks)))

    def _called(self, disk: Disk) -> Disk:
        assert disk.chain is not None, "there are no empty drives here"
        active = replace(disk.chain.active, read_only=not os.access(disk.chain.active.file, os.W_OK))
        return replace(disk, name=self._name, chain=Chain((*disk.chain.images[:-1], active)))

    async def view(self, layout: Layout, disk: DiskName | None = None) -> ChainView:
        """As of any target, and who has it in use."""
        view = await super().view(layout, disk)
        odd = [
            Oddity("in-use", user.file, f"in use by {user}: what is shown may be out of date")
            for user in _harmful(self.users or (), view.chain.active.file)
        ]
        return replace(view, oddities=(*view.oddities, *odd))


class _Opened(OfflineTarget):
    """The chain is open in a storage daemon."""

    def __init__(self, session: Monitor, target: str, users: tuple[User, ...], images: Sequence[Named]) -> None:
        super().__init__(session, target, users)
        self._images = images
        self._paths = {image.name: image.layer.file for image in images}

    async def open_for_writing(self, images: Collection[Image]) -> None:
        """The last time that they are opened by name. Raises NotWritable, Replaced, NotSeen."""
        by_node = {image.node: image for image in self._images}
        written = [by_node[image.node or ""] for image in images]
        for image, opened in zip(images, written, strict=True):
            if image.inode not in opened.layer.inodes:  # its name led elsewhere when QEMU was asked for it
                raise identity.swapped(opened.layer.file)
        # the active image is open for writing already
        options = list(nodes.reopened([opened for opened in written if opened is not self._images[-1]]))
        replies = await self.monitor.execute_all([("blockdev-reopen", {"options": [node]}) for node in options])
        approved = [opened.layer for opened in self._images]
        await nodes.see_approved(self.monitor, approved, [opened.layer for opened in written])
        for node, reply in zip(options, replies, strict=True):
            if isinstance(reply, QemuRefused):
                raise NotWritable(file=self._paths.get(node["filename"], node["filename"]), reason=reply.reason)

    async def layout(self, known: Layout | None = None) -> Layout:
        return self._named(await super().layout(known))

    def locate(self) -> discovery.Locate:
        """The daemon was given names that begin in its folder: they mean the files that were walked."""
        located = super().locate()
        return lambda name: located(self._paths.get(name, name))


class _Shown(OfflineTarget):
    """The chain as it was when it was looked at: there is no session."""

    def __init__(self, target: str, users: tuple[User, ...], told: Shown) -> None:
        super().__init__(None, target, users)
        self._told = told

    async def layout(self, known: Layout | None = None) -> Layout:
        return self._named(self._told.layout)

    async def written(self, chain: Chain) -> tuple[Header | None, ...]:
        return self._told.headers


@contextlib.asynccontextmanager
async def offline(
    image: "str | os.PathLike[str]",
    *,
    write: bool = True,
    dry_run: bool = False,
    allow: Paths = (),
    form: str | None = None,
    secret: str | None = None,
) -> AsyncIterator[OfflineTarget]:
    """
    Open the chain whose active image is `image`.

    With `write` the active image is locked, and it is refused when anybody holds that one, or may write to another: who only
    reads those below is in the target's `users`. Without, they are read shared with whoever writes them, and where their
    headers tell all, only once and without a session. A `dry_run` asks for the same as `write` and changes nothing: QEMU
    repairs an image that it opens for writing, and clears marks in its header that it does not know. `allow` are files and
    folders that headers may name besides the image's folder. `form` is the image's own format, where it is a device or is
    called raw. `secret` is the passphrase of encrypted images.

    Raises InUse, NeedsSecret, Replaced, TooDeep, TooFewFiles, what `walk.walk` raises, ToolMissing.
    """
    image, allowed = os.fspath(image), tuple(given.paths(allow))
    layers = walk.walk(image, allow=allowed, form=form, deepest=None)
    target: OfflineTarget
    if not write and (told := await shown.read(layers)) is not None:
        target = _Shown(image, await holders.lasting([layer.file for layer in layers]), told)
        target.allowed = allowed
        yield target
        return
    walk.refuse_deep(layers)
    limits.refuse_few(len(layers))
    folder = nodes.folder_of(layers)
    async with storagedaemon.started(folder) as daemon:
        users = await holders.lasting([layer.file for layer in layers])
        if write:
            _refuse_used(layers, users)
        async with daemon.session() as session:
            images = nodes.named(layers, folder)
            await nodes.add(session, images, write=write, dry_run=dry_run, secret=secret)
            target = _Opened(session, image, users, images)
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
    harmful = _harmful(users, active)
    if harmful:
        file = harmful[-1].file
        names = [str(user) for user in harmful if user.file == file]
        raise InUse(file=file, holders=names, command=_instead(harmful[-1]))
    if holders.is_locked(active):
        raise InUse(file=active, holders=["a process that we may not see"], command=holders.UNKNOWN)


def _harmful(users: Iterable[User], active: str) -> list[User]:
    """Those that may write to the chain at `active`, now or when they like; who reads what lies below it harms nobody."""
    return [user for user in users if user.file == active or user.may_write]


def _instead(user: User) -> str:
    """What to do about an image in use; the command and its options are the user's."""
    if user.vm is None:
        return user.instead
    if not user.may_write:  # it is below the image that the VM writes to: the same command there is for another disk
        return "shut that VM down, or give it a copy of the image"
    if user.vm.monitors and not user.vm.libvirt:
        name = shlex.quote(user.vm.name or f"pid:{user.vm.pid}")
        return f"run the command with `{name}` for TARGET, in place of the image: `qmpmerge disks {name}` shows what it has"
    return "shut that VM down first, or start it with a QMP monitor and merge live"
