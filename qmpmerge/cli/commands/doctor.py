"""`doctor`: report problems with chains and jobs."""

from typing import TYPE_CHECKING

import click

from qmpmerge.cli import options
from qmpmerge.cli.commands import group
from qmpmerge.cli.options import Options, for_headers, forcing, shared
from qmpmerge.cli.run import door, run, show

if TYPE_CHECKING:
    from qmpmerge.cli.render.output import Output
    from qmpmerge.operations.examine import Examination


@group.cli.command()
@options.targets
@options.search
@click.option("--exit-code", is_flag=True, help="Tell by the exit code what was found: 10 for care, 11 for harm.")
@for_headers
@forcing("libvirt")
@shared
def doctor(targets: tuple[str, ...], search: tuple[str, ...], exit_code: bool, options: Options) -> int:
    """
    Find problems with chains and jobs, and what fixes each.

    TARGET may also be a folder, of which all images are looked at, and those in all folders below; symlinks to folders are
    not followed, and other filesystems not entered. What cannot be looked at is said, and stops no other TARGET.

    Nothing is changed. The worst comes first: `harm` is for data or a guest that suffer now or at the next start, `care` for
    what somebody has to decide or to look at, `note` for what nobody has to do anything about now. With -q notes are left out,
    and where there is nothing else nothing is printed, so that cron sends no mail.

    \b
    Examples:
      qmpmerge doctor vm1
      qmpmerge doctor vm1 vm2 /vm
      qmpmerge doctor -q /vm              for cron: silent but for harm and care
      qmpmerge doctor --exit-code /vm > report || mail -s images root < report

    \b
    Exit codes:
      0    whatever is found; with --exit-code nothing but notes
      3    refused: the hint says what to do instead
      4    no session with a TARGET
      6    a TARGET has stopped answering
      10   with --exit-code: care
      11   with --exit-code: harm

    What could not be looked at comes first: 6, 4 or 3 leave open what was found in the others, which is printed all the same.
    """
    if not targets:
        raise click.UsageError("name a VM, an image or a folder, as in `qmpmerge doctor vm1`")
    reports: list[Examination] = []

    async def work(output: "Output") -> str:
        from qmpmerge.operations import examine

        report = await examine.examine_all(
            targets, allow=options.allow, search=search, form=options.form, door=door(options, output)
        )
        reports.append(report)
        output.doctor(report)
        if not options.json:
            for error in report.errors:
                show(error, options, output)
        return report.verdict

    code = run(options, work)
    if code or not exit_code:
        return code
    from qmpmerge.doctor.findings import EXIT_CODES

    return EXIT_CODES[reports[0].severity]
