"""Records of merges that somebody has left, or says that somebody has."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import qmpmerge
from qmpmerge import folder
from qmpmerge.chain import plan
from qmpmerge.images import files, stashed
from qmpmerge.journal import stash, store
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Process
from rig.machines import MIB


def chain_of(images: Sequence[Path]) -> qmpmerge.Chain:
    """The chain that these images are, base first, each named by its last part in the folder that it lies in."""
    found = []
    below: Path | None = None
    for image in images:
        status = image.stat()
        near = below is not None and below.parent == image.parent
        backing = ((below.name if near else str(below)), below.suffix[1:]) if below else (None, None)
        found.append(
            qmpmerge.Image(
                str(image), image.suffix[1:], 8 * MIB, backing=backing[0], backing_format=backing[1],
                inode=(status.st_dev, status.st_ino),
            )
        )  # fmt: skip
        below = image
    return qmpmerge.Chain(tuple(found))


def dead() -> Process:
    """A process that was here a moment ago."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        process = proc.process(sleeper.pid)
        sleeper.kill()
    assert process is not None
    return process


def record(images: Sequence[Path], top: int, **changes: Any) -> Record:
    """What a merge of these images up to that index would have written down beside the last, and then died."""
    chain, process = chain_of(images), dead()
    planned = plan.commit(chain, base="[1]", top=f"[{top}]")
    told = Record(
        path=store.path_of(str(images[-1])),
        target="/nowhere",
        disk="vda",
        job="qmpmerge-commit-vda",
        chain=chain,
        base=1,
        top=chain.index(planned.top),
        qemu=process,
        tool=process,
        away=stash.names_away(chain, 1, chain.index(planned.top)),
    )
    return replace(told, **changes)


def note_stashed(file: Path, base: Path, **changes: Any) -> stashed.Note:
    """What a merge into `base` that has stashed `file` leaves beside it."""
    status, below = file.stat(), base.stat()
    note = stashed.Note(
        original=stashed.original_of(str(file)) or str(file),
        format="qcow2",
        inode=(status.st_dev, status.st_ino),
        seen=files.seen(str(file)),
        base=str(base),
        base_inode=(below.st_dev, below.st_ino),
        verified=True,
        since=time.time(),
    )
    with folder.beside(stashed.note_path(str(file))) as (place, name):
        place.put(name, stashed.encode(replace(note, **changes)))
    return note
