"""
How a VM was started, next to what its images are now: a start by the same command line may show older data, and ruin the
newer.
"""

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence

from qmpmerge.chain.chain import Chain, Inode
from qmpmerge.doctor.findings import Finding
from qmpmerge.errors import Error
from qmpmerge.images import files, notes, stashed
from qmpmerge.images.dependents import Dependent
from qmpmerge.processes import commandline, proc


def images(pid: int | None) -> tuple[str, ...]:
    """The image files that the command line of a QEMU names, as absolute paths; none where it may not be looked at."""
    if pid is None:
        return ()
    line = commandline.parse(
        proc.read_text(f"/proc/{pid}/cmdline").split("\0"), proc.start_folder(pid), proc.executable(pid)
    )
    return line.images if line is not None else ()


def started_from(chain: Chain, launched: Sequence[str]) -> str | None:
    """The topmost image of the chain that the command line names; None where it names none of it."""
    inodes = {files.inode(path) for path in launched}
    return next((image.file for image in reversed(chain.images) if image.inode in inodes), None)


Refusal = Callable[[str], Error | None]
"""Why `qmpmerge active` tells no image for this path, and so fails a launch script that asks; None where it does."""


def examine(chains: Sequence[Chain], launched: Sequence[str], refusal: Refusal) -> Iterator[Finding]:
    """Where a start by the same command line would not show what the guest sees now."""
    for path, what, why in _misleading(chains, launched):
        refused = refusal(path)
        if refused is None:
            why, command = f"{why}: nothing to do if the launch script asks", shlex.join(["qmpmerge", "active", path])
            yield Finding("launch-path", "note", path, what, why, command)
        else:
            why = f"{why}, and a launch script that asks `qmpmerge active` fails: {refused}; {refused.hint}"
            yield Finding("launch-path", "care", path, what, why)


def _misleading(chains: Sequence[Chain], launched: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The paths of the command line that lead to no active image; what they are, and what a start by them comes to."""
    for path in launched:
        inode = files.inode(path)
        chain = next(filter(None, (_chain_of(one, chains) for one in (inode, *_pulled_into(path)))), None)
        if chain is not None and path_of_active(chain, launched) is None:
            started = started_from(chain, launched) or path
            if files.inode(started) == inode:
                what = f"its command line names {path}, and the guest writes to {chain.active.file} since a snapshot"
                yield path, what, "a start by the same line shows older data, and ruins the newer image"
        elif chain is None and inode is not None and notes.base_of(path) is not None:
            what = f"its command line names {path}, which was merged into {notes.base_of(path)}"
            yield path, what, "a start by the same line shows older data, without a word"
        elif inode is None and stashed.of(files.real(path)) is not None:
            what = f"its command line names {path}, which a merge has put aside"
            yield path, what, "a start by the same line fails"


def _chain_of(inode: Inode | None, chains: Sequence[Chain]) -> Chain | None:
    return next((chain for chain in chains if inode is not None and inode in {image.inode for image in chain}), None)


def _pulled_into(path: str) -> list[Inode | None]:
    with contextlib.suppress(OSError):
        return [files.inode(note.file) for note in notes.pulled_into(path) if not note.reason]
    return []


def path_of_active(chain: Chain, launched: Sequence[str]) -> str | None:
    """The word of the command line that leads to the active image."""
    return next((path for path in launched if files.inode(path) == chain.active.inode), None)


def stale(chain: Chain, dependent: Dependent) -> Finding:
    """The VM writes to an image that another is built on."""
    what = f"the VM uses {_told(dependent.image)}, and not {_told(dependent.file)}, which is built on it"
    why = (
        "it was started from older data, and what it writes ruins the other image: shut it down before it writes more, keep "
        "copies of both, and start it from the one that holds what you need; nothing proves that one of them is a leftover"
    )
    return Finding("started-stale", "harm", chain.active.file, what, why)


def merged_away(chain: Chain) -> Iterator[Finding]:
    """The VM runs from an image that was merged and has kept its name."""
    for image in chain:
        note = notes.of_this(image.file) if image.has_path and files.inode(image.file) == image.inode else None
        if note is not None:
            what = f"the VM uses {_told(image.file)}, which was merged into {_told(note.file)}"
            why = (
                "it was started from older data, and what it writes is not in the base: shut it down before it writes more, "
                "keep copies of both, and start it from the base, or from what is built on that"
            )
            yield Finding("started-stale", "harm", chain.active.file, what, why)


def _told(file: str) -> str:
    """An image with when it was last written to, and how much it holds."""
    try:
        status = os.stat(file)
    except OSError:
        return file
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.st_mtime))
    return f"{file} (last written {when}, holds {status.st_blocks / 2048:.1f} MiB)"
