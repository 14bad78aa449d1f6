"""
What cannot be looked at: it is said, and where others could be harmed unseen, refused.
"""

import os
import shlex
from collections.abc import AsyncIterator

from qmpmerge.chain.chain import ELSEWHERE, Image
from qmpmerge.checks.question import Question, Unseen
from qmpmerge.errors import NotSeen, Refused
from qmpmerge.processes import holders, proc
from qmpmerge.processes.openfiles import FDSET

INSIST = "`--force not-seen` goes on if you know that nobody else needs these images"
ABSOLUTE = "start the VM with absolute file names, or merge with the VM off"


async def not_seen(question: Question) -> AsyncIterator[Refused]:
    """
    Images of which we do not know where they lie, folders of the chain that may not be listed, and what may be built on these
    images and does not tell.

    Where QEMU's process may not be looked at, the images' own locks tell that some QEMU has the very file open.
    """
    pid = question.target.pid
    again = f"{question.plan.direction} pid:{pid} {shlex.quote(question.view.disk.name)}"
    found: dict[tuple[str, str], list[str]] = {}
    for image in question.touched:
        why = whereabouts(image, pid, again) if image.is_elsewhere else doubtful(image, is_seen=bool(question.opened))
        if why is not None:
            found.setdefault(why, []).append(image.file.removeprefix(ELSEWHERE))
    for (reason, cure), files in found.items():
        yield NotSeen(unseen=files, reason=reason, cure=f"{cure}; {INSIST}")
    folders = question.others.unlisted
    if folders:
        reason = "we may not list the folder, and who else is built on its images cannot be told"
        yield NotSeen(unseen=folders, reason=reason, cure=f"run qmpmerge as a user who may, such as root; {INSIST}")
    for (reason, cure), files in _doubted(question).items():
        yield NotSeen(unseen=files, reason=reason, cure=f"{cure}; {INSIST}")
    others = _other_folders(question)
    if others and pid is not None:
        reason = f"what QEMU (pid {pid}) sees under the name of this folder is another one"
        yield NotSeen(unseen=others, reason=reason, cure=f"{inside(pid, again)}; {INSIST}")


def _doubted(question: Question) -> dict[tuple[str, str], list[str]]:
    """What was found on disk and does not tell what it is built on, by the reason and the cure."""
    found: dict[tuple[str, str], list[str]] = {}
    for doubt in question.others.doubts:
        found.setdefault((doubt.reason, doubt.cure), []).append(doubt.file)
    return found


def whereabouts(image: Image, pid: int | None, again: str) -> tuple[str, str]:
    """Why it is not known where the file of an image lies, and the cure; `again` is what to run where it can be seen."""
    if image.file.startswith(f"{ELSEWHERE}{FDSET}"):
        return "QEMU was handed it as a descriptor (`-add-fd`), and has no name for it", ABSOLUTE
    if pid is None:
        return "its name is relative, and which process QEMU is we cannot tell", ABSOLUTE
    sees = proc.sees_our_files(pid)
    if sees is None:
        return f"we may not look at QEMU (pid {pid})", "run qmpmerge as root, or as the user whom QEMU runs as"
    if sees:
        return f"its name is relative, and nothing that QEMU (pid {pid}) has open is known to be it", ABSOLUTE
    return f"QEMU (pid {pid}) is in another mount namespace, or has another root", inside(pid, again)


def inside(pid: int, again: str) -> str:
    """The cure that looks through QEMU's eyes."""
    return f"run it there, with all options that you gave: `nsenter --target {pid} --mount qmpmerge {again}`"


def _other_folders(question: Question) -> list[str]:
    """Folders of files that QEMU and we see alike, as one mounted into a container, while what else is there differs."""
    pid = question.target.pid
    if pid is None or proc.sees_our_files(pid) is not False:
        return []
    names = [question.view.layout.reopened(image) or "" for image in question.touched if image.has_path]
    folders = dict.fromkeys(os.path.dirname(name) for name in names if name.startswith("/"))
    return [one for one in folders if proc.identity(proc.as_seen_by(pid, one)) != proc.identity(one)]


def doubtful(image: Image, *, is_seen: bool) -> tuple[str, str] | None:
    """The same of a file of which we have the name alone; `is_seen` says that what QEMU has open can be seen."""
    if is_seen or not image.has_path or holders.is_locked(image.file):
        return None
    return (
        "we may not look at QEMU, and no lock on the file tells that it is the one that QEMU has open",
        "run qmpmerge as root, or as the user whom QEMU runs as, on QEMU's host",
    )


def unseen(question: Question) -> list[Unseen]:
    """For a check that looks at files: those that it cannot look at."""
    names = [image.file.removeprefix(ELSEWHERE) for image in question.touched if image.is_elsewhere]
    return [Unseen(f"where these are is not known: {', '.join(names)}")] if names else []


def unread(question: Question) -> list[Unseen]:
    """For a check that looks at the headers of what leaves the chain, and of the overlay."""
    touched = {image.file for image in question.relinked}
    odd = [one for one in question.view.oddities if one.name in ("unreadable", "not-seen") and one.file in touched]
    return [Unseen(f"its header cannot be read: {', '.join(one.file for one in odd)}")] if odd else []


def unseen_dependents(question: Question) -> list[Unseen]:
    """For the search for who is built on our images."""
    return [*unseen(question), *map(Unseen, question.others.unseen)]
