"""
Pull: the other way to shorten a chain. What lies below an image goes into it, and what lies below is left as it is.

All else is as of a merge: what was begun before, what is refused, how it is left and gone on with.
"""

from collections.abc import Collection

from qmpmerge import given
from qmpmerge.chain.layer import LayerName
from qmpmerge.chain.outcome import Outcome, Policy
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.engine.pace.progress import Report
from qmpmerge.engine.request import Request
from qmpmerge.given import Paths
from qmpmerge.operations import commit
from qmpmerge.qemu.blockgraph import DiskName
from qmpmerge.targets.target import Target


async def pull(
    target: Target,
    disk: DiskName | None = None,
    *,
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
    speed: int | None = None,
    verify: bool | None = None,
    hold: bool = False,
    merged_files: Policy = "keep",
    force: Collection[str] = (),
    search: Paths = (),
    dry_run: bool = False,
    report: Report | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
    polite: float | None = None,
) -> Outcome:
    """
    Pull what lies below `top` (default: the active image) and above `base` (default: all of it) into `top`, which keeps its
    name: nothing changes for the next start of the VM. No image shows other data than before, so others may be built on those
    that are only read.

    Before anything is switched it is seen that nothing is missing; with `verify` what was copied is compared too, without one
    where that is cheap and nobody can write meanwhile. `merged_files` says what becomes of the files that leave the chain, once
    `top` is durable: kept is what somebody else needs, and that of which nobody can see whether they do; what is to be deleted
    is compared. With `hold` it ends as `commit.commit` does with the `ending` ``hold``. The rest is as of `commit.commit`.

    Raises as `commit.commit`.
    """
    request = Request(
        direction="pull",
        base=base,
        top=top,
        shallow=shallow,
        speed=speed,
        verify=verify,
        ending="hold" if hold else "pivot",
        merged_files=merged_files,
        force=given.forced(force),
        search=given.paths(search),
        dry_run=dry_run,
        polite=polite,
        patience=patience or Patience(timeout),
    )
    return await commit.carry_out(target, disk, request, report)
