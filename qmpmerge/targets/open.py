"""
The two doors to disks: `live` to a running QEMU, `offline` to images not in use. Behind both stands a `Target`.
"""

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Collection

from qmpmerge.errors import Stashed, Unfinished
from qmpmerge.given import Paths
from qmpmerge.images import files, stashed
from qmpmerge.journal import store
from qmpmerge.qemu.monitor import GREETING_SECONDS
from qmpmerge.targets.target import Target


@contextlib.asynccontextmanager
async def open(
    target: "str | os.PathLike[str]",
    *,
    write: bool = True,
    dry_run: bool = False,
    timeout: float = GREETING_SECONDS,
    force: Collection[str] = (),
    allow: Paths = (),
    form: str | None = None,
    secret: str | None = None,
) -> AsyncIterator[Target]:
    """
    The door that `target` calls for: an image file or a block device is opened offline, all else is live.

    `write`, `dry_run`, `allow`, `form` and `secret` are for images, `timeout` and `force` for a running QEMU. Raises what the
    doors raise, and Unfinished or Stashed for an image whose name was taken away by a merge.
    """
    target = os.fspath(target)
    _refuse_taken_away(target)
    if is_image(target):
        from qmpmerge.targets.offline import offline

        async with offline(
            target, write=write, dry_run=dry_run, allow=allow, form=form, secret=secret
        ) as opened_target:
            yield opened_target
    else:
        from qmpmerge.targets.live import live

        async with live(target, timeout=timeout, force=force) as opened_target:
            yield opened_target


def _refuse_taken_away(target: str) -> None:
    """An image that lost its name to a merge is no misspelt VM; what lies in a folder that we may not enter may be there."""
    try:
        os.stat(target)
        return
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return
    found = store.beside(target)
    for record in store.believed([] if found is None else [found]):
        place = record.place(len(record.chain)) or "not there"
        raise Unfinished(image=target, found=f"its file is {place} now", path=target)
    aside = stashed.of(files.real(target))
    if aside is not None:
        raise Stashed(image=target, now=aside)


def is_image(target: str) -> bool:
    """Whether TARGET is the path of an image: a regular file or a block device."""
    try:
        mode = os.stat(target).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)
