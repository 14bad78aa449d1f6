"""
The doctor: everything that is odd about the disks and jobs of a QEMU, and the command that mends each.

It only looks: nothing that it asks changes anything, and it names no command that it has not thought through for the
state that it saw. What it finds on disk beside the chains is told by `leftovers`; images that nobody holds are looked at
by `autopsy`.
"""

import asyncio
import contextlib
import json
import os
import shlex
import stat
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qmpmerge import headers, jobs, leftovers, locks, processes, qcow2
from qmpmerge.blockgraph import Disk, Layout
from qmpmerge.chain import Chain, Image
from qmpmerge.diskwalk import DEEPEST
from qmpmerge.errors import CommandError
from qmpmerge.findings import Finding, Severity, sort
from qmpmerge.headers import Oddity
from qmpmerge.hosts import Host
from qmpmerge.jobs import Job

DEEP = 300
"""Images in a chain from which on it costs: `query-block` takes 0.1 s there and 0.4 s at 500, all I/O standing still."""

SETTLE_SECONDS = 0.2
"""A job is paused for a moment at every drain: what is meant by it is seen by looking twice."""

JOB_FILTERS = frozenset({"commit_top", "mirror_top", "backup-top", "copy-before-write"})
"""Nodes that a job puts above a disk and takes away at its end; a backup of our own making may insert the last one."""


async def examine(host: Host, *, search: Collection[str] = ()) -> tuple[Finding, ...]:
    """
    All findings about a running QEMU or qemu-storage-daemon, the worst first; empty where nothing is odd.

    `search` are more folders in which images may be built on those in use. Raises what `Host.layout` raises, but for
    StreamConcluded, which is a finding.
    """
    known = await _settled(host)
    crashing = [job for job in known if job.type == "stream" and job.status == "concluded"]
    if crashing:
        return sort(_stream_concluded(host, job) for job in crashing)
    layout = await host.layout()
    found = [*_jobs(host, layout, known), *_filters(layout), *_unneeded(host, layout), *_bitmaps(host, layout)]
    found += [*await _exports(host), *await _server(host), *await _guest(host, layout)]
    for disk in layout.disks:
        if disk.chain is not None and disk.root in layout.held:
            found += await _chain(host, disk)
            found += leftovers.beside(disk.chain, search, pid=host.pid)
    return sort(found)


# --- jobs ---------------------------------------------------------------------------------------------------------


async def _settled(host: Host) -> list[Job]:
    """The jobs that are in the same state at two looks."""
    first = {job.id: job for job in await jobs.query(host.monitor)}
    if not first:
        return []
    await asyncio.sleep(SETTLE_SECONDS)
    again = await jobs.query(host.monitor)
    return [job for job in again if job.id in first and job.status == first[job.id].status]


def _stream_concluded(host: Host, job: Job) -> Finding:
    why = "QEMU 7.2 to 10.0 crash, with the guest, when anybody asks for their nodes now: nothing else was looked at"
    return Finding(
        "stream-concluded", "harm", job.id, "it has ended and was not dismissed", why, _verb(host, job, "dismiss")
    )


def _jobs(host: Host, layout: Layout, known: list[Job]) -> Iterator[Finding]:
    for job in known:
        is_active = "target" in layout.job_edges.get(job.id, {})
        if not _is_watched(layout, job):
            yield from _job(host, job, is_active=is_active)


def _is_watched(layout: Layout, job: Job) -> bool:
    """Whether a qmpmerge is at work on it, as the lock beside its base tells."""
    disks = [disk for disk in layout.disks if disk.job is not None and disk.job.id == job.id]
    images = [image for disk in disks for image in disk.chain or () if image.has_path]
    beside = [path for path in map(locks.lock_path, images) if os.path.exists(path)]
    return job.ours and any(map(leftovers.is_held, beside))


def _job(host: Host, job: Job, *, is_active: bool) -> Iterator[Finding]:
    """What a job that nobody drives has come to. One that runs or is just ending needs nobody."""
    if job.status == "paused" and job.io_status == "nospace":
        why = "it copies nothing until there is space and somebody resumes it, which `follow` does"
        yield _stuck(host, job, "care", "it ran out of space", why, "follow")
    elif job.status in ("paused", "standby"):
        why = "it goes on only when somebody resumes it; meanwhile the merge comes to no end"
        yield _stuck(host, job, "care", "it is paused", why, "resume")
    elif job.status == "ready":
        why = "every guest write goes to both images until somebody ends it; if QEMU dies, the old chain is right"
        yield _stuck(host, job, "care", "it is ready and waits for somebody to end it", why, "pivot")
    elif job.status == "pending" and is_active:
        why = "all I/O of the guest stands still until it is finalized, and new writes may be lost"
        yield _stuck(host, job, "harm", "it waits to be finalized", why, "follow")
    elif job.status == "pending":
        why = "all is copied and nothing is switched; the merge comes to no end by itself"
        yield _stuck(host, job, "care", "it waits to be finalized", why, "follow")
    elif job.status == "concluded":
        what = "it has ended, and nobody has read how" + (f": {job.error}" if job.error else "")
        why = "it keeps its id and the merged images open" + (
            "; the old chain is in use and right" if job.error else ""
        )
        yield _stuck(host, job, "care" if job.error else "note", what, why, "dismiss")


def _stuck(host: Host, job: Job, severity: Severity, what: str, why: str, verb: str) -> Finding:
    """A finding about a job; where `verb` is none of ours for its type, QEMU's own command is given."""
    possible = f" (possible now: {', '.join(job.verbs)})" if job.verbs else ""
    if verb in job.verbs:
        command = _verb(host, job, verb)
    else:
        own = {"follow": "job-finalize" if job.status == "pending" else "job-resume", "pivot": "job-complete"}
        command = qmp(host, (own.get(verb, f"job-{verb}"), {"id": job.id}))
    name = f"job-{'no-space' if job.io_status == 'nospace' else job.status}"
    return Finding(name, severity, job.id, what + possible, why, command)


def _verb(host: Host, job: Job, verb: str) -> str:
    return f"qmpmerge job {shlex.quote(host.target)} {job.id} {verb}"


def qmp(host: Host, *commands: tuple[str, Mapping[str, object]]) -> str:
    """A line for the shell that sends QMP commands to the target, for what no command of ours does."""
    address = host.monitor.name
    where = f"TCP:{address[4:]}" if address.startswith("tcp:") else f"UNIX-CONNECT:{address}"
    sent: list[tuple[str, Mapping[str, object]]] = [("qmp_capabilities", {}), *commands]
    lines = [json.dumps({"execute": name, **({"arguments": given} if given else {})}) for name, given in sent]
    return f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} | socat -t5 - {shlex.quote(where)}"


# --- nodes --------------------------------------------------------------------------------------------------------


def _filters(layout: Layout) -> Iterator[Finding]:
    """A filter of a job in the path of a disk on which no job works."""
    for disk in layout.disks:
        for name in disk.nodes if disk.job is None else ():
            driver = layout.nodes[name].driver
            if driver in JOB_FILTERS:
                what = f"{disk.name} goes through node {name} ({driver}), but no job is on the disk"
                why = "every write is copied for a backup that nobody makes: whoever inserted it must take it out again"
                yield Finding("filter-left", "care", name, what, why)


def _unneeded(host: Host, layout: Layout) -> Iterator[Finding]:
    """Nodes that no device, export or job reaches, by trees; each is closed from its top down."""
    roots = [*layout.held, *(node for edges in layout.job_edges.values() for nodes in edges.values() for node in nodes)]
    needed = {name for root in roots for name in layout.subtree(root)}
    idle = [name for name in layout.nodes if name not in needed]
    below = {child for name in idle for child in layout.nodes[name].children.values()}
    for top in (name for name in idle if name not in below):
        tree = [name for name in layout.subtree(top) if name not in needed]
        named = [name for name in tree if not name.startswith("#")]  # the others go with them
        writable = [name for name in tree if not layout.nodes[name].info.get("ro", False)]
        what = f"no device, export or job uses it ({', '.join(named)})"
        why = "its files stay open" + (" for writing, and locked: nobody else can use them" if writable else "")
        command = qmp(host, *(("blockdev-del", {"node-name": name}) for name in named))
        yield Finding(
            "unused-node",
            "care" if writable else "note",
            top,
            what,
            f"{why}; keep it if it waits for a device",
            command,
        )


def _bitmaps(host: Host, layout: Layout) -> Iterator[Finding]:
    for name, node in layout.nodes.items():
        for bitmap in node.info.get("dirty-bitmaps", ()):
            if bitmap.get("inconsistent"):
                given: dict[str, object] = {"node": name, "name": bitmap["name"]}
                what = f"dirty bitmap {bitmap['name']} is inconsistent: QEMU was killed while it was in use"
                why = "no incremental backup can be based on it any more, the next one must be full"
                yield Finding(
                    "bitmap-inconsistent", "care", name, what, why, qmp(host, ("block-dirty-bitmap-remove", given))
                )


# --- what a killed qmpmerge left in QEMU ----------------------------------------------------------------------------


async def _exports(host: Host) -> list[Finding]:
    try:
        exports = await host.monitor.execute("query-block-exports")
    except CommandError:
        return []
    return [
        Finding(
            "export-left",
            "care",
            entry["id"],
            f"an NBD export of {entry['node-name']} that a killed qmpmerge left",
            "it keeps the node from being closed",
            qmp(host, ("block-export-del", {"id": entry["id"], "mode": "hard"})),
        )
        for entry in exports
        if leftovers.is_orphan(entry["id"])
    ]


async def _server(host: Host) -> list[Finding]:
    """QEMU does not tell whether its NBD server runs: the folder of the socket tells whose it is."""
    listening = await asyncio.to_thread(processes.listening, host.pid) if host.pid is not None else []
    return [
        Finding(
            "server-left",
            "note",
            path,
            "QEMU's NBD server runs for a qmpmerge that was killed",
            "QEMU has only one: others who want it are refused. The next merge of ours stops it too",
            qmp(host, ("nbd-server-stop", {})),
        )
        for path in listening
        if leftovers.is_orphan(os.path.basename(os.path.dirname(path)))
    ]


async def _guest(host: Host, layout: Layout) -> list[Finding]:
    """A guest that stands still or is throttled. Whether its filesystems are frozen only its agent could tell."""
    found: list[Finding] = []
    with contextlib.suppress(CommandError):  # a storage daemon has no guest
        status = (await host.monitor.execute("query-status"))["status"]
        if status == "io-error":
            why = "the guest stands still since a write failed: see to the storage, for space mostly, then let it go on"
            found.append(
                Finding(
                    "guest-io-error",
                    "harm",
                    host.target,
                    "QEMU has stopped the guest at an I/O error",
                    why,
                    qmp(host, ("cont", {})),
                )
            )
        elif status == "paused":
            why = "it stands still until somebody lets it go on; who has paused it is not told"
            found.append(
                Finding("guest-paused", "care", host.target, "the guest is paused", why, qmp(host, ("cont", {})))
            )
        found += _throttled(host, await host.monitor.execute("query-block"))
    return found


def _throttled(host: Host, devices: list[dict[str, Any]]) -> list[Finding]:
    found = []
    for entry in devices:
        group = str(entry.get("inserted", {}).get("group", ""))
        if leftovers.is_orphan(group):
            name = str(entry["device"] or entry.get("qdev", ""))
            limits: dict[str, object] = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
            device: dict[str, object] = {"device": name} if entry["device"] else {"id": name}
            what = f"a killed qmpmerge left its limit on the guest's writes (throttle group {group})"
            why = "the guest's disk is slow until the limit is lifted; limits of your own must be set again after it"
            found.append(
                Finding(
                    "throttle-left", "harm", name, what, why, qmp(host, ("block_set_io_throttle", {**device, **limits}))
                )
            )
    return found


# --- chains -------------------------------------------------------------------------------------------------------


async def _chain(host: Host, disk: Disk) -> list[Finding]:
    assert disk.chain is not None, "empty drives are left out"
    written = await headers.read(disk.chain)
    odd = [_odd(disk.chain, odd) for odd in headers.oddities(disk.chain, written)]
    return [*odd, *_replaced(host, disk.chain), *_deep(host, disk), *disguised(disk.chain.images)]


_WHY_ODD = {
    "disagrees": "the next start reads the headers and shows another disk than the guest sees now",
    "unreadable": "the next start needs it, and a merge cannot be proved without it",
    "no-format": "a raw image below could make the next start read any file of this host",
}


def _odd(chain: Chain, odd: Oddity) -> Finding:
    below = dict(zip(chain.files[1:], chain.images, strict=False)).get(odd.file)
    command = ""
    if odd.name in ("disagrees", "no-format"):
        command = rebase(odd.file, below)
    why = _WHY_ODD[odd.name] + ("; run the command with the VM off" if command else "")
    return Finding(odd.name, "care" if odd.name == "no-format" else "harm", odd.file, odd.message, why, command)


def rebase(image: str, below: Image | None) -> str:
    """The command that writes into a header what QEMU uses; to be run while nobody has the image open."""
    if below is None:
        return shlex.join(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", image])
    name = below.file
    if os.path.dirname(name) == os.path.dirname(image) and ":" not in os.path.basename(name):
        name = os.path.basename(name)
    return shlex.join(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", below.format, "-b", name, image])


def _replaced(host: Host, chain: Chain) -> Iterator[Finding]:
    """The file at a path is not the one that QEMU has open."""
    opened = processes.open_files(host.pid) if host.pid is not None else None
    for image in chain if opened else ():
        if image.inode is not None and _is_regular(image.file) and image.inode not in (opened or ()):
            what = "another file is there now than the one that QEMU has open"
            why = "the next start shows the new file's data, and a merge would write into it: put the old one back"
            yield Finding("replaced", "harm", image.file, what, why)


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _deep(host: Host, disk: Disk) -> Iterator[Finding]:
    depth = len(disk.chain or ())
    if depth < DEEP:
        return
    command = f"qmpmerge commit {shlex.quote(host.target)} {shlex.quote(disk.name)} --top '[{depth - 1}]'"
    yield deep(disk.name, depth, command)


def deep(where: str, depth: int, command: str) -> Finding:
    """A chain of so many images."""
    if depth > DEEPEST:
        why = "QEMU 10 and 11 crash at the first read through some 870 images"
        return Finding("deep-chain", "harm", where, f"its chain has {depth} images", why, command)
    why = "every look at it and every start take longer with each image, and at some 870 QEMU 10 and 11 crash"
    return Finding("deep-chain", "care", where, f"its chain has {depth} images", why, command)


def disguised(images: Collection[Image]) -> Iterator[Finding]:
    """Raw images that begin like qcow2: the first bytes belong to the guest, which can write there what it likes."""
    for image in images:
        if image.format == "raw" and image.has_path and _begins_like_qcow2(image.file):
            what = "it is used as raw, but begins like qcow2: its guest may have written that"
            why = "whoever opens it without a format follows its header to any file: always name `-f raw` and `format=raw`"
            yield Finding("disguised", "care", image.file, what, why)


def _begins_like_qcow2(path: str) -> bool:
    try:
        return qcow2.read(path) is not None
    except OSError as error:
        return "begins like qcow2" in str(error)
