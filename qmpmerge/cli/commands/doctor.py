"""`doctor`: report problems with chains and jobs."""

import os
from typing import TYPE_CHECKING

from qmpmerge.cli import options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, for_headers, forcing, shared
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@options.target
@options.search
@for_headers
@forcing("libvirt")
@shared
def doctor(target: str, search: tuple[str, ...], options: Options) -> int:
    """
    Find problems with chains and jobs, and what fixes each.

    TARGET may also be a folder of images. Nothing is changed. The worst comes first: `harm` is for data or a guest that
    suffer now or at the next start, `care` for what somebody has to decide, `note` for what only takes up room.

    \b
    Examples:
      qmpmerge doctor vm1
      qmpmerge doctor /vm
      qmpmerge doctor vm1 --json | jq -e 'all(.findings[]; .severity == "note")'

    \b
    Exit codes:
      0    whatever is found
      3    refused: the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """

    async def work(output: "Output") -> str:
        from qmpmerge.operations import examine

        found = await examine.examine_path(target, allow=options.allow, search=search, form=options.form)
        output.doctor(target, found)
        return "done"

    async def on_live(target: "Target", output: "Output") -> str:
        from qmpmerge.doctor.target import examine

        output.doctor(target.name, await examine(target, search=search))
        return "done"

    from qmpmerge.targets.open import is_image

    is_path = is_image(target) or os.path.isdir(target)
    return run(options, work if is_path else on_target(target, options, on_live))
