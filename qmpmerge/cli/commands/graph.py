"""`graph`: the block graph as QEMU has it."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import complete, options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, for_images, forcing, refuse_together, shared
from qmpmerge.cli.run import on_target, run

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.targets.target import Target


@group.cli.command()
@options.target
@click.argument("disk", required=False, shell_complete=complete.disks)
@click.option("--dot", is_flag=True, help="As a drawing for graphviz: `| dot -Tsvg > graph.svg`.")
@click.option("--mermaid", is_flag=True, help="As a flowchart for Mermaid, which GitHub and GitLab draw in Markdown.")
@for_images
@forcing("libvirt")
@shared
def graph(target: str, disk: str | None, dot: bool, mermaid: bool, options: Options) -> int:
    """
    Show the block graph, and who uses which node of it.

    All nodes are shown, with the jobs, exports and devices that have them; with DISK those of that one. The images of its
    chain have an index, the active one a star. A node stands below the one that uses it, and of each is told what that one
    does with it (TAKES) and what it lets others do (LETS): where the w is missing nobody else may write, as a commit into it
    would, and where the s is missing nobody may resize it. What deserves a look is told below the node: filters of jobs,
    what a job copies to, who is in the way of a commit, what nobody needs.

    Nothing is changed. Of an image that no VM uses its chain is shown, without permissions.

    \b
    Examples:
      qmpmerge graph vm1
      qmpmerge graph vm1 vda
      qmpmerge graph vm1 --dot | dot -Tsvg > graph.svg
      qmpmerge graph vm1 --json | jq -r '.nodes[].driver'

    \b
    Exit codes:
      0    it is shown
      3    refused: the hint says what to do instead
      4    no session with TARGET
      6    TARGET has stopped answering
    """
    refuse_together({"--dot": dot, "--mermaid": mermaid, "--json": options.json})

    async def work(target: "Target", output: "Output") -> str:
        from qmpmerge.operations import graph as operation

        found = await operation.graph(target, disk)
        output.graph(found, drawn="dot" if dot else "mermaid" if mermaid else None)
        return "done"

    return run(options, on_target(target, options, work))
