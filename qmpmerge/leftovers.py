"""
What lies about beside a chain: files that an earlier merge, a killed qmpmerge or a crash left in its folders.

All of it is told by names and by what headers say; nothing is opened that a header names, nothing is changed, not even
for a moment: a lock is looked up and not tried.
"""

import contextlib
import json
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from qmpmerge import dependents, processes, witness
from qmpmerge.chain import Chain, Image
from qmpmerge.dependents import Dependent
from qmpmerge.findings import Finding, Severity

_WITNESS = re.compile(r"\.(?P<image>.+)\.qmpmerge-witness", re.DOTALL)
_LOCK = re.compile(r"\.(?P<image>.+)\.qmpmerge-lock", re.DOTALL)
_OWNED = re.compile(r"qmpmerge-(?:[a-z]+-)?(\d+)-")
_LARGEST_NOTE = 1024 * 1024


@dataclass(frozen=True)
class Account:
    """What a witness file says: `image` is the active image of then; None is what it does not tell."""

    file: str
    image: str
    phase: str | None
    job: str | None


def beside(
    chain: Chain, search: Collection[str] = (), *, pid: int | None = None, jobs: Collection[str] = ()
) -> list[Finding]:
    """
    All of it, in the folders of the chain's files and in those of `search`.

    What was noted about one of `jobs`, which are there still, is left out, and so are images that the process `pid`, which
    has the chain, has open besides: the jobs and its nodes tell more.
    """
    found: list[Finding] = []
    for folder in folders(chain, search):
        found += in_folder(folder, jobs)
    return [*found, *_built_on(chain, search, pid)]


def in_folder(folder: str, jobs: Collection[str] = ()) -> list[Finding]:
    """What the names in one folder tell. The witness of a merge that is under way, as its lock shows, is no finding."""
    at_work = any(is_held(path) for path, _image in _named(folder, _LOCK))
    unsettled = [] if at_work else [_unsettled(told) for told in witnesses(folder) if told.job not in jobs]
    return [*unsettled, *_old_locks(folder, jobs), *_stashed(folder)]


def folders(chain: Chain, search: Collection[str] = ()) -> list[str]:
    """The folders in which the chain's files are, under their names and their real ones."""
    files = [image.file for image in chain if image.has_path]
    names = [*map(os.path.dirname, files), *(os.path.dirname(os.path.realpath(file)) for file in files), *search]
    return list(dict.fromkeys(map(os.path.realpath, names)))


def is_orphan(name: str) -> bool:
    """Whether something of ours (a socket's folder, an export, a throttle group) is of a qmpmerge that is gone."""
    match = _OWNED.match(name)
    return match is not None and not os.path.exists(f"/proc/{match[1]}")


# --- witnesses ----------------------------------------------------------------------------------------------------


def witnesses(folder: str) -> list[Account]:
    """The witness files of a folder; one that cannot be read is there all the same, and says so by its silence."""
    return [_account(path, image) for path, image in _named(folder, _WITNESS)]


def _account(path: str, image: str) -> Account:
    told = witness.read(path)
    place = os.path.join(os.path.dirname(path), image)
    return Account(path, place, told.phase if told else None, told.job if told else None)


def _told(path: str) -> dict[str, object]:
    """The JSON object in a file of ours; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        told = json.loads(_read(path))
        return told if isinstance(told, dict) else {}
    return {}


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read(_LARGEST_NOTE) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


_PHASES: dict[str | None, tuple[Severity, str]] = {
    "copying": ("care", "the old chain is right; its job may be at work still, and goes with QEMU"),
    "proved": ("note", "the new chain is right; only the merged files remain to be dealt with"),
}
_UNSETTLED: tuple[Severity, str] = (
    "harm",
    "nothing in the images says which of them is right now: do not start the VM before this is settled",
)


def _unsettled(told: Account) -> Finding:
    phase = f"in phase {told.phase}" if told.phase else "in a phase that it does not tell"
    job = f" (job {told.job})" if told.job else ""
    severity, why = _PHASES.get(told.phase, _UNSETTLED)
    what = f"a merge of {told.image}{job} was left or cut off {phase}"
    return Finding("unsettled", severity, told.file, what, why, shlex.join(["qmpmerge", "recover", told.image]))


# --- locks --------------------------------------------------------------------------------------------------------


def is_held(lock: str) -> bool:
    """Whether somebody holds this lock file: by its inode in /proc/locks, since trying it would get in others' way."""
    try:
        inode = os.stat(lock, follow_symlinks=False).st_ino
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return True  # nothing is said about what cannot be seen
    return any("FLOCK" in row and any(word.endswith(f":{inode}") for word in row) for row in rows)


def _old_locks(folder: str, jobs: Collection[str]) -> Iterator[Finding]:
    for path, image in _named(folder, _LOCK):
        note = _told(path)
        if is_held(path) or note.get("job") in jobs:
            continue
        if note:
            what = f"the note of a merge into {image} that was left or killed"
            why = "the next merge into it reads the note: it goes on with its job, or looks closer"
            yield Finding("unfinished", "note", path, what, why)
        else:
            what = f"a lock file that nobody holds: a merge into {image} was killed"
            yield Finding("old-lock", "note", path, what, "it keeps nobody out", shlex.join(["rm", "-f", "--", path]))


# --- images -------------------------------------------------------------------------------------------------------


def _stashed(folder: str) -> Iterator[Finding]:
    paths = [
        path for path, _image in _named(folder, re.compile(r"(?P<image>.+)" + re.escape(witness.STASHED), re.DOTALL))
    ]
    users = {user.file: user for user in processes.users(paths)} if paths else {}
    for path in paths:
        why = "it takes up room" + (f", and {users[path]} has it open still" if path in users else "")
        command = "" if path in users else shlex.join(["qmpmerge", "clean", path])
        yield Finding("stashed", "note", path, "an image that a merge put aside", why, command)


def _built_on(chain: Chain, search: Collection[str], pid: int | None) -> Iterator[Finding]:
    """Images outside the chain whose headers name an image of it, or one that is built on it."""
    for dependent in _above(chain, search):
        users = processes.users([dependent.file])
        if pid in {user.pid for user in users}:
            continue
        what = f"it is built on {dependent.image}, but is not in the chain"
        if users:
            why = (
                f"{users[0]} has it open: what is written to {dependent.image}, by a merge too, changes what that sees"
            )
            yield Finding("dependent", "care", dependent.file, what, why)
        else:
            why = (
                "if an earlier merge left it, it opens without a word and shows older data: put it out of reach; if "
                f"somebody wants it, it is ruined by every write to {dependent.image}"
            )
            stash = shlex.join(["mv", "-n", "--", dependent.file, dependent.file + witness.STASHED])
            yield Finding("stale-image", "care", dependent.file, what, why, stash)


def _above(chain: Chain, search: Collection[str]) -> Iterator[Dependent]:
    seen: set[str] = set()
    wanted: Sequence[Image] = chain.images
    while wanted:
        new = [found for found in dependents.find(wanted, chain, search) if found.file not in seen]
        seen |= {found.file for found in new}
        yield from (found for found in new if not found.file.endswith(witness.STASHED))
        wanted = [image_at(found.file) for found in new]


def image_at(file: str) -> Image:
    """A file by its identity alone."""
    try:
        status = os.stat(file)
    except OSError:
        return Image(file, "qcow2", 0)
    return Image(file, "qcow2", 0, inode=(status.st_dev, status.st_ino))


def _named(folder: str, pattern: "re.Pattern[str]") -> list[tuple[str, str]]:
    """The regular files of a folder whose whole name matches, each with the image's name in it."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return []
    matches = [(name, pattern.fullmatch(name)) for name in names]
    return [(os.path.join(folder, name), match["image"]) for name, match in matches if match is not None]
