"""
What virsh, qemu-img, QMP, Proxmox and people call our commands and options, and what we have nothing like.

Nothing here is imported before a line has failed.
"""

from collections.abc import Sequence

COMMANDS = {
    "vms": ("list", "ls", "ps", "vm"),
    "disks": ("list", "ls", "domblklist", "domblkinfo", "query-block"),
    "chain": ("info", "backing-chain", "snapshot-list", "snapshots", "layers"),
    "snapshot": ("snapshot-create-as", "snapshot-create", "blockdev-snapshot-sync", "snap", "create"),
    "commit": ("blockcommit", "block-commit", "merge"),
    "pull": ("blockpull", "block-stream", "stream", "rebase"),
    "jobs": ("blockjob", "status", "query-jobs", "query-block-jobs"),
    "doctor": ("check", "fsck", "repair"),
    "clean": ("cleanup", "prune", "rm", "delete"),
}
"""Of several commands of ours the first that takes the rest of the line is meant."""

VERBS = {"abort": "cancel", "complete": "pivot"}
"""What virsh and QMP do with a job, and our verb for it."""

_NO_COPY = "there is nothing like it here: qmpmerge merges the images of a chain, and copies none elsewhere"
_NO_WAY_BACK = (
    "there is nothing like it here, and what was merged is merged; what the newest overlay holds is undone by hand:"
    " switch the VM off and move that file away, then start the VM from what `qmpmerge active FOLDER` names"
)
_MERGED = "a snapshot goes by merging the image that was made for it: see `qmpmerge commit --help`"

OTHERWISE = {
    **dict.fromkeys(("blockcopy", "mirror", "drive-mirror", "blockdev-mirror", "convert"), _NO_COPY),
    **dict.fromkeys(("backup", "backup-begin", "drive-backup", "blockdev-backup"), _NO_COPY),
    **dict.fromkeys(("undo", "revert", "rollback", "snapshot-revert", "snapshot-apply", "loadvm"), _NO_WAY_BACK),
    **dict.fromkeys(("delsnapshot", "snapshot-delete", "delvm"), _MERGED),
}
"""Commands whose words are not those of any of ours, and what is said of each."""

OPTIONS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("--active", "--async", "--keep-relative", "--verbose", "--wait", "--domain", "--path"), ()),
    **dict.fromkeys(("--atomic", "--disk-only", "--info", "--no-metadata"), ()),
    **dict.fromkeys(("-p", "-U", "--force-share", "--backing-chain"), ()),
    **dict.fromkeys(("-t", "-T", "-F"), ("{:.0}",)),
    "--abort": ("cancel",),
    "--bandwidth": ("--speed", "{}M"),
    "--delete": ("--merged-files", "delete"),
    "--diskspec": ("{}",),
    "--output": ("--{}",),
    "--reuse-external": ("--reuse",),
    "-b": ("--base", "{}"),
    "-d": ("--merged-files", "keep"),
    "-f": ("--format", "{}"),
    "-r": ("--speed", "{}"),
}
"""
What virsh's and qemu-img's options are here, {} being their value: nothing where it is so anyway, or where the value stands for
itself; {:.0} takes the value away.
"""


_OF_QEMU_IMG = frozenset({"-d", "-f", "-p", "-t"})


def translated(name: str, words: Sequence[str]) -> list[str]:
    """
    The words after the command `name` of this or another tool, without the options of other tools, or with ours in their place;
    and with what has to be said here where the other command does less than ours.
    """
    found = _translated(words)
    if name == "commit" and not _OF_QEMU_IMG.isdisjoint(words) and "-b" not in words:
        return [*found, "--shallow"]  # into the image right below
    if name == "blockcommit" and "--active" in words and {"--pivot", "--keep-overlay"}.isdisjoint(words):
        return [*found, "--wait-ready"]
    return found


def _translated(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    left = list(words)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option not in OPTIONS:
            found.append(option + equals + value)
            continue
        meant = OPTIONS[option]
        has_value = "{" in "".join(meant)
        if has_value and not equals:
            value = left.pop(0) if left else ""
        if value or not has_value:  # qemu-img's `-b ""` is no base at all
            disk, _, file = value.partition(",file=")
            value = f"{disk}={file.partition(',')[0]}" if file else value
            found += [word for one in meant if (word := one.format(value))] if meant or not value else [value]
    return found
