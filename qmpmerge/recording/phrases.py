"""
Why each QMP command is sent, in a sentence, and what does the same by virsh or qemu-img: for who reads a recording, and for
docs/recording.md. What virsh's commands are in ours is in docs/phrasebook.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

FLUSH_NODE = "qmpmerge-flush"
"""As `flush.NODE`, which takes more to be imported."""

TURN = "qmpmerge-turn-"
"""How the tickets of `mutex` begin."""


class Phrase(NamedTuple):
    """`twin` has names in braces: ``vm``, ``disk``, ``base``, ``top``, ``file``, ``speed``. None: nothing is like it."""

    why: str
    twin: str | None = None


ASKED: dict[str, Phrase] = {
    "query-jobs": Phrase("its jobs, and how they stand"),
    "query-block-jobs": Phrase("how far the block jobs are", "virsh blockjob {vm} {disk} --info"),
    "x-debug-query-block-graph": Phrase("which node stands on which, filters and jobs included"),
    "query-named-block-nodes": Phrase("the image of each node", "qemu-img info -U --backing-chain {file}"),
    "query-block": Phrase("which drive has which image", "virsh domblklist {vm}"),
    "query-blockstats": Phrase(
        "what was read and written, and which node stands on which", "virsh domblkstat {vm} {disk}"
    ),
    "query-status": Phrase("whether the guest runs", "virsh domstate {vm}"),
    "query-migrate": Phrase("whether the VM is being migrated", "virsh domjobinfo {vm}"),
    "query-block-exports": Phrase("who else writes through QEMU"),
    "query-qmp-schema": Phrase("which arguments this QEMU takes"),
    "query-chardev": Phrase("where the guest agent listens"),
    "query-pci": Phrase("where the device is"),
    "query-version": Phrase("QEMU's version", "virsh version"),
    "query-name": Phrase("the VM's name"),
    "qom-list": Phrase("whose turn it is, of several merges of this QEMU"),
    "qom-get": Phrase("a property of a device"),
    "human-monitor-command": Phrase("what only the human monitor tells", "virsh qemu-monitor-command {vm} --hmp"),
}
"""Questions, and what is wanted to be known."""

SENT: dict[str, Phrase] = {
    "qmp_capabilities": Phrase("begins the session"),
    "block-commit": Phrase(
        "the job that copies what the merged images hold into base",
        "virsh blockcommit {vm} {disk} --base {base} --top {top}",
    ),
    "block-stream": Phrase(
        "the job that copies what lies below into the image itself", "virsh blockpull {vm} {disk} --base {base}"
    ),
    "change-backing-file": Phrase(
        "writes the backing name that is there already: it fails here, and unharmed, where the end of the job would fail",
        "qemu-img rebase -u -b {base} {file}",
    ),
    "job-finalize": Phrase("lets the job end: QEMU takes the merged images out of the chain, and writes the header"),
    "job-complete": Phrase("moves the guest onto base", "virsh blockjob {vm} {disk} --pivot"),
    "block-job-complete": Phrase("moves the guest onto base", "virsh blockjob {vm} {disk} --pivot"),
    "job-cancel": Phrase("takes the job back: the old chain stays", "virsh blockjob {vm} {disk} --abort"),
    "block-job-cancel": Phrase("ends the job, and leaves the guest where it is", "virsh blockjob {vm} {disk} --abort"),
    "job-dismiss": Phrase("what the job came to was read: QEMU may forget it"),
    "job-pause": Phrase("the job waits"),
    "job-resume": Phrase("the job goes on"),
    "block-job-set-speed": Phrase("how much the job may copy in a second", "virsh blockjob {vm} {disk} {speed}"),
    "stop": Phrase("pauses the guest: nobody writes while it is moved", "virsh suspend {vm}"),
    "cont": Phrase("the guest runs again", "virsh resume {vm}"),
    "block_set_io_throttle": Phrase(
        "how much the guest may write, so that the job gets on", "virsh blkdeviotune {vm} {disk}"
    ),
    "blockdev-add": Phrase("opens an image"),
    "blockdev-del": Phrase("closes a node that nobody uses any more"),
    "blockdev-reopen": Phrase("opens an image once more, by other options"),
    "blockdev-snapshot": Phrase("puts an overlay on top", "virsh snapshot-create-as {vm} --disk-only --no-metadata"),
    "blockdev-snapshot-sync": Phrase(
        "puts an overlay on top", "virsh snapshot-create-as {vm} --disk-only --no-metadata"
    ),
    "transaction": Phrase("all of it or nothing", "virsh snapshot-create-as {vm} --disk-only --no-metadata --atomic"),
    "block-dirty-bitmap-add": Phrase("follows what is written from now on", "virsh checkpoint-create-as {vm}"),
    "block-dirty-bitmap-merge": Phrase("carries a bitmap to the image that stays"),
    "block-dirty-bitmap-remove": Phrase("the bitmap has done its work", "virsh checkpoint-delete {vm}"),
    "object-add": Phrase("makes an object"),
    "object-del": Phrase("takes an object away"),
    "block-export-add": Phrase("lets others read an image through QEMU"),
    "block-export-del": Phrase("nobody reads it any more"),
    "getfd": Phrase("hands over a descriptor"),
    "add-fd": Phrase("hands over a descriptor"),
    "remove-fd": Phrase("takes it back"),
    "quit": Phrase("ends the process", "virsh destroy {vm}"),
}
"""What changes something, and why."""

_OF_FLUSH = {
    "blockdev-add": Phrase("a node beside the others on an image, through which a flush can be asked for"),
    "blockdev-reopen": Phrase(
        "flushes the image, and tells the error, which QEMU hides otherwise; it stands still meanwhile"
    ),
    "blockdev-del": Phrase("takes that node away, or what an interrupted merge has left of it"),
}

_OF_TURN = {
    "object-add": Phrase("asks for the turn: one merge of this QEMU at a time pauses the guest, or flushes"),
    "object-del": Phrase("gives back the turn"),
}


def of(command: str, arguments: Mapping[str, Any]) -> Phrase:
    """What there is to say of this command; of one that is not ours nothing."""
    if is_of_flush(arguments) and command in _OF_FLUSH:
        return _OF_FLUSH[command]
    if str(arguments.get("id", "")).startswith(TURN) and command in _OF_TURN:
        return _OF_TURN[command]
    if command == "block_set_io_throttle" and not limits(arguments):
        return Phrase("the guest may write as it likes again", SENT[command].twin)
    return SENT.get(command) or ASKED.get(command) or Phrase("")


def refused(command: str, arguments: Mapping[str, Any], reason: str | None) -> str | None:
    """What there is to say where QEMU's refusal is as it should be; None where it is not, or it did not refuse."""
    is_absent = reason is not None and "find node" in reason
    if command == "blockdev-del" and is_of_flush(arguments) and is_absent:
        return "an interrupted merge has left no such node: as it should be"
    return None


def limits(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Those that `block_set_io_throttle` sets."""
    given = {name: value for name, value in arguments.items() if name.startswith(("bps", "iops"))}
    return {name: value for name, value in given.items() if isinstance(value, int) and value > 0}


def is_of_flush(arguments: Mapping[str, Any]) -> bool:
    """Whether a command is about the node through which a flush is asked for."""
    options = arguments.get("options")
    nodes = [arguments, *(options if isinstance(options, list) else [])]
    return any(isinstance(node, dict) and node.get("node-name") == FLUSH_NODE for node in nodes)
