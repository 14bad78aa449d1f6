"""
After a crash: put names and headers right, as far as the evidence goes.

Which records are meant is found out here; `engine.resume` brings each to an end.
"""

import errno
import os
from collections.abc import Sequence

from qmpmerge import given
from qmpmerge.engine import resume
from qmpmerge.engine.resume import Recovery
from qmpmerge.errors import EXIT_CODES, Error, NothingThere, NotSeen, worst
from qmpmerge.given import Paths
from qmpmerge.images import files, stashed
from qmpmerge.images.stashed import Note
from qmpmerge.journal import lookup, store
from qmpmerge.recovery.evidence import Use


def verdict_of(found: Sequence[Recovery]) -> str:
    """What all of it came to: the worst; of what went well, what was done comes before what was not needed."""
    verdicts = {one.verdict for one in found}
    code = worst(EXIT_CODES[verdict] for verdict in verdicts)
    return next(one for one in ("planned", "done", *EXIT_CODES) if one in verdicts and EXIT_CODES[one] == code)


async def recover(
    path: "str | os.PathLike[str]",
    *,
    use: Use | None = None,
    allow: Paths = (),
    dry_run: bool = False,
) -> list[Recovery]:
    """
    Put right every merge that was not finished at `path`: the name that a VM is started from, even if nothing has it any
    more, another image of the chain, or a folder.

    `use` decides where the evidence does not. `allow` are folders and files that a record may have us rename besides those in
    its own folder. Nothing is deleted: a merge that was to delete what it merged is finished as one that stashes it.

    Of several merges one that cannot be put right stops no other, and its error is in its Recovery. Raises NothingThere,
    NotSeen, RecordNotBelieved; of a single merge ForeignFile, Undecided, Locked, CannotRecover, and what the live door raises
    where the QEMU that carried the merge out still runs.
    """
    path = os.path.abspath(path)
    records = store.believed(lookup.concerned(path))
    if not records:
        return [_nothing(path)]
    allowed = given.paths(allow)
    found = []
    for record in records:
        try:
            found.append(await resume.recover(record, use, allow=allowed, dry_run=dry_run))
        except Error as error:
            if len(records) == 1:
                raise
            image = record.chain.active.file
            found.append(Recovery(error.verdict, image, None, str(error), hints=(error.hint,), error=error))
    return found


def _nothing(path: str) -> Recovery:
    """No record: nothing is suspected without proof, but what is there is record."""
    if os.path.exists(path):
        return Recovery("unchanged", path, None, "no merge was left unfinished here", _unread(path))
    aside = list(stashed.names_of(files.real(path)))
    if not aside:
        raise NothingThere(path=path)
    known = {file: stashed.look(file) for file in aside}
    file, note = next(((file, note) for file, note in known.items() if isinstance(note, Note)), (aside[0], None))
    if note is None:
        action = f"{file} is there, and no merge was left unfinished"
        return Recovery("unchanged", path, None, action, (f"{known[file]}",))
    action = f"{file} was put aside, and nothing was left unfinished"
    return Recovery("unchanged", path, None, action, (f"what it held is in {note.base}",))


def _unread(path: str) -> tuple[str, ...]:
    """What was not looked at. Raises NotSeen where that is all there is."""
    found = files.unread(path)
    unread = [file for file, is_unread in found if is_unread]
    if unread and len(unread) == len(found):
        raise NotSeen(unseen=unread, reason=os.strerror(errno.EACCES), cure="run it as a user who may read the images")
    return tuple(f"{file} may not be read, and was not looked at" for file in unread)
