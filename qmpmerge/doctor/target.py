"""
The doctor: problems with the disks and jobs of a QEMU, and the command that fixes each.

It only looks: nothing that it asks changes anything, and it names no command that it has not thought through for the
state that it saw. Nodes that are left over are told by `nodes`, what it finds on disk beside the chains by `leftovers`;
images not in use are looked at by `images`, folders by `folders`.
"""

import contextlib
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from typing import Any

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.doctor import jobs, launch, leftovers, nodes
from qmpmerge.doctor.findings import Finding, Looked, Severity, sort
from qmpmerge.errors import QemuRefused
from qmpmerge.images import headers, qcow2
from qmpmerge.images.dependents import is_outside
from qmpmerge.images.headers import Oddity
from qmpmerge.images.walk import DEEPEST
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.sockets import typed
from qmpmerge.targets import identity
from qmpmerge.targets.target import Target

DEEP = 300
"""Images in a chain from which on it costs: `query-block` takes 0.1 s there and 0.4 s at 500, all I/O standing still."""


async def look(target: Target, *, refusal: launch.Refusal, search: Collection[str] = ()) -> Looked:
    """
    All findings about a running QEMU or qemu-storage-daemon, the worst first, and the images that were looked at.

    `search` are more folders in which images may be built on those in use. Raises what `Target.layout` raises, but for
    StreamConcluded, which is a finding.
    """
    known = await jobs.settled(target.monitor)
    crashing = jobs.crashing(target, known)
    if crashing:
        return Looked(sort(crashing), frozenset())
    layout = await target.layout()
    at_work = [job.id for job in known]
    findings = [
        *jobs.examine(target, layout, known),
        *await nodes.examine(target, layout),
        *_bitmaps(target, layout),
    ]
    findings += await _guest(target, layout)
    chains = [disk.chain for disk in layout.disks if disk.chain is not None]
    findings += launch.examine(chains, launch.images(target.pid), refusal)
    for disk in layout.disks:
        if disk.chain is not None and disk.root in layout.held:
            findings += await _chain(target, disk)
            findings += await leftovers.beside(disk.chain, search, pid=target.pid, jobs=at_work)
    return Looked(sort(findings), frozenset(image.inode or image.file for chain in chains for image in chain))


# --- nodes --------------------------------------------------------------------------------------------------------


def _bitmaps(target: Target, layout: Layout) -> Iterator[Finding]:
    for name, node in layout.nodes.items():
        for bitmap in node.info.get("dirty-bitmaps", ()):
            if bitmap.get("inconsistent"):
                given = {"node": name, "name": bitmap["name"]}
                command = typed(target.monitor.name, ("block-dirty-bitmap-remove", given))
                yield inconsistent(name, bitmap["name"], command)


def inconsistent(where: str, bitmap: str, command: str) -> Finding:
    """A dirty bitmap that is of no use any more."""
    what = f"dirty bitmap {bitmap} is inconsistent: QEMU was killed while it was in use"
    why = "no incremental backup can be based on it any more, the next one must be full"
    return Finding("bitmap-inconsistent", "care", where, what, why, command)


# --- the guest --------------------------------------------------------------------------------------------------------


STANDING: dict[str, tuple[Severity, str, str]] = {
    "io-error": (
        "harm",
        "QEMU has stopped the guest at an I/O error",
        "it stands still since then: see to the storage, for space mostly, then let it go on",
    ),
    "paused": (
        "care",
        "the guest is paused",
        "it stands still until somebody lets it go on; who has paused it is not told",
    ),
}
"""What it means that a guest does not run, by its RunState; one that was never started (`prelaunch`) is as it should be."""


async def _guest(target: Target, layout: Layout) -> list[Finding]:
    """A guest that stands still or is throttled. Whether its filesystems are frozen only its agent could tell."""
    findings: list[Finding] = []
    with _guestless():
        status = (await target.monitor.execute("query-status"))["status"]
        if status in STANDING:
            severity, what, why = STANDING[status]
            findings.append(
                Finding(f"guest-{status}", severity, target.name, what, why, typed(target.monitor.name, ("cont", {})))
            )
        if all(len(disk.chain or ()) < DEEP for disk in layout.disks):  # else the question alone takes seconds
            findings += _throttled(target, await target.monitor.execute("query-block"))
    return findings


@contextlib.contextmanager
def _guestless() -> Iterator[None]:
    """A storage daemon has no guest, and no command to ask about one."""
    try:
        yield
    except QemuRefused as error:
        if not error.is_unheard_of:
            raise


_NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


def _throttled(target: Target, devices: list[dict[str, Any]]) -> Iterator[Finding]:
    for entry in devices:
        group = str(entry.get("inserted", {}).get("group", ""))
        if leftovers.is_orphan(group):
            device = {"device": entry["device"]} if entry["device"] else {"id": entry.get("qdev", "")}
            what = f"a killed qmpmerge left its limit on the guest's writes (throttle group {group})"
            why = "the guest's disk is slow until the limit is lifted; limits of your own must be set again after it"
            command = typed(target.monitor.name, ("block_set_io_throttle", {**device, **_NO_LIMITS}))
            yield Finding("throttle-left", "harm", next(iter(device.values())), what, why, command)


# --- chains -------------------------------------------------------------------------------------------------------


async def _chain(target: Target, disk: Disk) -> list[Finding]:
    assert disk.chain is not None, "empty drives are left out"
    written = await headers.read(disk.chain)
    odd = [_odd(disk.chain, odd) for odd in headers.oddities(disk.chain, written)]
    return [
        *odd,
        *_replaced(target, disk.chain),
        *_deep(target, disk),
        *disguised(disk.chain.images),
        *launch.merged_away(disk.chain),
    ]


WHY_ODD = {
    "disagrees": "the next start reads the headers and shows another disk than the guest sees now",
    "not-seen": "neither its header nor who is built on it can be looked at: a merge is refused, and says the cure",
    "unreadable": "the next start needs it, and a merge cannot be proved without it",
    "replaced": "a merge would have QEMU write to that one: let the name lead to the old image, or start the VM anew",
    "part-of-file": "a start that goes by the header alone shows the guest the file from its first byte on",
    "no-format": "a raw image below could make the next start read any file of this host",
}


def _odd(chain: Chain, odd: Oddity) -> Finding:
    below = dict(zip(chain.files[1:], chain.images, strict=False)).get(odd.file)
    command = None
    if odd.name in ("disagrees", "no-format", "part-of-file"):
        command = rebase(odd.file, below)
    why = WHY_ODD[odd.name] + ("; run the command with the VM off" if command else "")
    severity: Severity = "care" if odd.name in ("no-format", "part-of-file", "not-seen") else "harm"
    return Finding(odd.name, severity, odd.file, odd.message, why, command)


def rebase(image: str, below: Image | None) -> str | None:
    """The command that writes into a header what QEMU uses; to be run while nobody has the image open."""
    if below is None:
        return shlex.join(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", image])
    if below.slice is not None and below.slice.offset is None:
        return None  # nobody tells which part
    name = below.file if below.slice is None else backing.json_name(below, image)
    if below.slice is None and os.path.dirname(name) == os.path.dirname(image) and ":" not in os.path.basename(name):
        name = os.path.basename(name)
    return shlex.join(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", below.format, "-b", name, image])


def _replaced(target: Target, chain: Chain) -> Iterator[Finding]:
    """The file at a path is not the one that QEMU has open; one that is another image of the chain is told as an oddity."""
    for image in chain:
        astray = identity.astray(image, target.pid) if not image.is_renamed else None
        if astray is not None and _is_regular(image.file):
            what = "another file is there now than the one that QEMU has open"
            why = "the next start shows the new file's data, and a merge would write into it: put the old one back"
            yield Finding("replaced", "harm", image.file, what, why)


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _deep(target: Target, disk: Disk) -> Iterator[Finding]:
    if disk.chain is not None and len(disk.chain) >= DEEP:
        yield deep(disk.name, disk.chain, shlex.join([target.name, disk.name]))


def deep(where: str, chain: Chain, arguments: str) -> Finding:
    """A chain of many images; a base that others may use is left out of the merge of what is between."""
    depth = len(chain)
    base = "--base 2 " if is_outside(chain.base, chain.active) else ""
    if depth > DEEPEST:
        base = f"--base {depth - 1 - DEEPEST // 2} "
    command = f"qmpmerge commit {arguments} {base}--top {depth - 1}"
    if depth > DEEPEST:
        why = "QEMU 10 and 11 crash at the first read through some 870 images; no more than 800 are merged at once"
        return Finding("deep-chain", "harm", where, f"its chain has {depth} images", why, command)
    why = "every look at it and every start take longer with each image, and at some 870 QEMU 10 and 11 crash"
    return Finding("deep-chain", "care", where, f"its chain has {depth} images", why, command)


def disguised(images: Collection[Image]) -> Iterator[Finding]:
    """Raw images that begin like qcow2: the first bytes belong to the guest, which can write there what it likes."""
    for image in images:
        if image.format == "raw" and image.has_path and _begins_like_qcow2(image):
            what = "it is used as raw, but begins like qcow2: its guest may have written that"
            why = "whoever opens it without a format follows its header to any file: always name `-f raw` and `format=raw`"
            yield Finding("disguised", "care", image.file, what, why)


def _begins_like_qcow2(image: Image) -> bool:
    try:
        return qcow2.read_of(image) is not None
    except OSError as error:
        return "begins like qcow2" in str(error)
