"""
What lies about beside a chain: files that an earlier merge, a killed qmpmerge or a crash left in its folders.

All of it is told by names and by what headers say; nothing is opened that a header names, nothing is changed, not even
for a moment: a lock is looked up and not tried.
"""

import os
import re
import shlex
from collections.abc import AsyncIterator, Collection, Iterator

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.state import State
from qmpmerge.doctor import launch
from qmpmerge.doctor.findings import Finding, Severity
from qmpmerge.errors import ImageUnreadable, ToolMissing
from qmpmerge.images import dependents, files, notes, overlays, qcow2, qemuimg, stashed
from qmpmerge.images.dependents import Dependent, Look
from qmpmerge.journal import locks, lookup, store
from qmpmerge.journal.locks import Note
from qmpmerge.journal.record import Record
from qmpmerge.journal.store import Disbelieved, Found, Unlisted
from qmpmerge.processes import holders
from qmpmerge.processes.holders import User

_LOCK = re.compile(r"\.(?P<image>.+)\.qmpmerge-lock", re.DOTALL)
_ANY = re.compile(r"(?P<image>.+)", re.DOTALL)
_OWNED = re.compile(r"qmpmerge-(?:[a-z]+-)?(\d+)-")


async def beside(
    chain: Chain, search: Collection[str] = (), *, pid: int | None = None, jobs: Collection[str] = ()
) -> list[Finding]:
    """
    All of it, in the folders of the chain's files and in those of `search`.

    What was noted about one of `jobs`, which are there still, is left out, and so are images that the process `pid`, which
    has the chain, has open besides: the jobs and its nodes tell more.
    """
    found: list[Finding] = []
    for folder in dependents.folders(chain, search):
        found += in_folder(folder, jobs)
    far = elsewhere(chain.active.file, jobs) if chain.active.has_path else ()
    return [*found, *far, *[one async for one in _built_on(chain, search, pid)]]


def in_folder(folder: str, jobs: Collection[str] = ()) -> list[Finding]:
    """What the names in one folder tell. The record of a merge that is under way, as its lock shows, is no finding."""
    at_work = any(locks.is_held(path) for path, _image in files.matching(folder, _LOCK))
    found = [] if at_work else store.in_folder(folder)
    unsettled = [_unsettled(one) for one in found if isinstance(one, Disbelieved) or one.job not in jobs]
    return [*unsettled, *_old_locks(folder, jobs), *_stashed(folder), *_kept(folder)]


def elsewhere(path: str, jobs: Collection[str] = ()) -> list[Finding]:
    """The records in other folders that tell of the image at `path`, or of an image in the folder `path`."""
    found = [one for one in lookup.concerned(path) if not (isinstance(one, Record) and _is_known(one, jobs))]
    return [_unsettled(one) for one in found]


def _is_known(record: Record, jobs: Collection[str]) -> bool:
    """Whether its job tells more, or a qmpmerge is at work on it."""
    locked = [locks.lock_path(image) for image in record.chain if image.has_path]
    return record.job in jobs or any(map(locks.is_held, filter(os.path.exists, locked)))


def is_orphan(name: str) -> bool:
    """Whether something of ours (a socket's folder, an export, a throttle group) is of a qmpmerge that is gone."""
    match = _OWNED.match(name)
    return match is not None and not os.path.exists(f"/proc/{match[1]}")


_STATES: dict[State, tuple[Severity, str]] = {
    State.COPYING: ("care", "the old chain is right; its job may be at work still, or held, and goes with QEMU"),
    State.PROVED: ("note", "the new chain is right; only the merged files remain to be dealt with"),
}
_UNSETTLED: tuple[Severity, str] = (
    "harm",
    "nothing in the images says which of them is right now: do not start the VM before this is settled",
)
_PULL: tuple[Severity, str] = (
    "care",
    "the VM is started from the same image whatever has come of it",
)


def _unsettled(found: Found) -> Finding:
    if isinstance(found, Unlisted):
        return Finding(
            "not-looked-at", "care", found.path, found.reason, f"what a merge left could lie there: {found.cure}"
        )
    if isinstance(found, Disbelieved):
        what = f"the record of a merge of {found.image} that is not believed: {found.reason}"
        why = "which image is right is not known, so nothing is merged, recovered or cleaned here while it lies there"
        why = f"{why}: {found.cure}"
        return Finding("unsettled", "harm", found.path, what, why)
    image = found.chain.active.file
    word, otherwise = ("pull", _PULL) if found.direction == "pull" else ("merge", _UNSETTLED)
    is_moved_maybe = found.state is State.COPYING and not found.has_old_chain
    severity, why = otherwise if is_moved_maybe else _STATES.get(found.state, otherwise)
    what = f"a {word} of {image} (job {found.job}) was left or interrupted in state {found.state.value}"
    return Finding("unsettled", severity, found.path, what, why, shlex.join(["qmpmerge", "recover", image]))


def _old_locks(folder: str, jobs: Collection[str]) -> Iterator[Finding]:
    for path, image in files.matching(folder, _LOCK):
        note = locks.read(path) or Note()
        record = store.read(note.record) if note.record is not None else None
        if locks.is_held(path) or (isinstance(record, Record) and record.job in jobs):
            continue
        file = os.path.join(folder, image)
        if locks.is_damaged(Image(file, "raw", 0)):
            what = "a pull found that it holds something else than was copied into it"
            why = "what is right may be in the images below it alone: keep them, and put it right before anything is merged"
            yield Finding("doubtful", "harm", file, what, why)
        elif locks.is_partial(Image(file, "raw", 0)) and note == Note(partial=note.partial):
            what = f"{image} holds what a pull or a merge that was taken back has copied up, and that was not compared"
            why = (
                "until nothing lies below it any more, no merge of it is verified, and none deletes what lies below it"
            )
            yield Finding("unfinished", "note", path, what, why)
        elif note == Note():
            what = f"a lock file without a holder: a merge into {image} was killed"
            yield Finding("old-lock", "note", path, what, "it keeps nobody out", shlex.join(["rm", "-f", "--", path]))
        else:
            what = f"the note of a merge into {image} that was left or killed"
            why = "the next merge into it reads the note: it goes on with its job, or looks closer"
            yield Finding("unfinished", "note", path, what, why)


# --- images -------------------------------------------------------------------------------------------------------


def _stashed(folder: str) -> Iterator[Finding]:
    paths = [path for path, _image in files.matching(folder, _ANY) if stashed.is_stashed(path)]
    users = {user.file: user for user in holders.users(paths)} if paths else {}
    for path in paths:
        why = "it takes up room" + (f", and {users[path]} has it open still" if path in users else "")
        command = None if path in users else shlex.join(["qmpmerge", "clean", path])
        yield Finding("stashed", "note", path, "an image that a merge or a pull put aside", why, command)


def _kept(folder: str) -> Iterator[Finding]:
    """Images that were merged and have kept their names: a note proves it."""
    merged = [path for path, _image in files.matching(folder, _ANY) if notes.base_of(path) is not None]
    users = {user.file: user for user in holders.users(merged)} if merged else {}
    for path in merged:
        what = f"it was merged into {notes.base_of(path)}"
        why = "it opens without a word and shows older data: put it out of reach" + (
            f", once {users[path]} has closed it" if path in users else ""
        )
        command = None if path in users else dependents.out_of_reach(path)
        yield Finding("stale-image", "care", path, what, why, command)


async def _built_on(chain: Chain, search: Collection[str], pid: int | None) -> AsyncIterator[Finding]:
    """Images outside the chain whose headers name an image of it, or one that is built on it."""
    noted, odd = _noted(chain)
    for one in odd:
        yield one
    search = [*search, *noted]
    look = dependents.look_now(chain.images, chain, search, holders.qemu_files() if pid is None else ())
    for reason in look.unseen:
        why = "an image that is built on the chain could lie there: a merge would ruin it"
        yield Finding("not-looked-at", "care", chain.active.file, reason, why)
    above = [one for one in _above(chain, look, search) if notes.base_of(one.file) is None]
    found = [one for one in above if not _is_left_by_pull(one.file, chain)]
    roots = _started_from(chain, found, pid)
    for dependent in found:
        users = holders.users([dependent.file])
        if pid is None or pid not in {user.pid for user in users}:
            yield await _beyond(chain, dependent, users, roots, is_live=pid is not None)


def _is_left_by_pull(file: str, chain: Chain) -> bool:
    """Whether it left this very chain: nothing is wrong about it."""
    own = {image.inode for image in chain}
    return any(not note.reason and files.inode(note.file) in own for note in notes.pulled_into(file))


def _started_from(chain: Chain, found: list[Dependent], pid: int | None) -> set[str]:
    """
    The images of the chain from which a running VM was started stale if another image is built on them: the active one, and
    that which the command line names; none where it was started from an image above and was moved down since.
    """
    launched = launch.images(pid)
    above = {files.inode(dependent.file) for dependent in found}
    if pid is None or above & {files.inode(path) for path in launched}:
        return set()
    return {chain.active.file, launch.started_from(chain, launched) or chain.active.file}


async def _beyond(
    chain: Chain, dependent: Dependent, users: tuple[User, ...], roots: set[str], *, is_live: bool
) -> Finding:
    """What an image outside the chain means. That it is a leftover nothing proves, so no command takes it away."""
    file, image = dependent.file, dependent.image
    what = f"it is built on {image}, but is not in the chain"
    if users:
        why = f"{users[0]} has it open: what is written to {image}, by a merge too, changes what that sees"
        return Finding("dependent", "care", file, what, why)
    if is_live and await _holds_nothing(file, chain):
        origin = "a snapshot that was not carried out has left it, or it was made for one"
        why = f"it holds nothing, and shows what {image} does: {origin}"
        left = [file, *(note.path for note in notes.above(image) if note.file == os.path.realpath(file))]
        return Finding("empty-overlay", "care", file, what, why, shlex.join(["rm", "-f", "--", *left]))
    if image in roots:
        return launch.stale(chain, dependent)
    if not is_live and image == chain.active.file:
        why = "a VM that is started from the image below shows older data, and ruins this one"
        command = shlex.join(["qmpmerge", "active", image]) if _has_one_active(image) else None
        return Finding("not-active", "care", image, f"{file} is built on it", why, command)
    why = (
        f"it is ruined by every write to {image}, by a merge too; if it is wanted, merge it or copy it elsewhere, and if you "
        "know that it is a leftover, put it out of reach, for it opens without a word"
    )
    return Finding("other-overlay", "care", file, what, why)


def _has_one_active(image: str) -> bool:
    """Whether `qmpmerge active` can name the image that a VM is to be started from."""
    try:
        above = overlays.above(image, os.path.dirname(image))
    except OSError:
        return False
    return len(above.leaves) == 1 and not above.odd


async def _holds_nothing(file: str, chain: Chain) -> bool:
    """As `snapshot --reuse` takes it for empty; nor is it needed by an image that is built on it."""
    try:
        needed = dependents.look_now([Image(file, "qcow2", 0, inode=files.inode(file))], chain).dependents
        header = qcow2.read(file)
        is_alone = header is not None and header.data_file is None and not header.snapshots and not needed
        return is_alone and not await qemuimg.held_by(file)
    except (OSError, ImageUnreadable, ToolMissing):
        return False


def _noted(chain: Chain) -> tuple[list[str], list[Finding]]:
    """The folders in which notes say that overlays of the chain's images are; and the notes that are not right."""
    noted: list[str] = []
    odd: list[Finding] = []
    for image in chain:
        found, wrong = overlays.noted(image.file) if image.has_path else ((), ())
        noted += [os.path.dirname(note.file) for note in found if not files.is_device(note.file)]
        for one in wrong:
            why = f"`qmpmerge active` tells no image of this chain until that is settled: {one.cure}"
            odd.append(Finding("odd-note", "care", one.file, f"it {one.reason}", why))
    return noted, odd


def _above(chain: Chain, look: Look, search: Collection[str]) -> Iterator[Dependent]:
    """What was found to be built on the chain, and on that, and so on."""
    seen: set[str] = set()
    while new := [found for found in look.dependents if found.file not in seen]:
        seen |= {found.file for found in new}
        yield from (found for found in new if found.file not in chain.files)
        look = dependents.look_now([dependents.image_at(found.file) for found in new], chain, search)
