"""
What can go wrong, sorted by what the caller does next.

    Error
     +-- Untouched                      nothing was changed
     |    +-- Refused            3      a check said no; the hint says what to do instead
     |    +-- Unreachable        4      no session with QEMU could be made
     +-- Failed                  5      the job ran and failed: the old chain is in use and right
     +-- Unknown                 6      the outcome is not proven: ask QEMU again
     +-- StillRunning            7      we stopped waiting, the job goes on
     +-- Cancelled             130      the job was cancelled, or never started: the old chain is in use

An error is a sentence plus its facts: the class holds the sentence and the hint, the constructor keeps the facts as
fields. People read ``str(error)`` and ``error.hint``, tests and JSON read ``error.name`` and ``error.facts``.

Every verdict and its exit code stand in `EXIT_CODES`, here and nowhere else.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar, dataclass_transform

EXIT_CODES = {
    "merged": 0,
    "pivoted": 0,
    "kept": 0,
    "ready": 0,
    "planned": 0,
    "unchanged": 0,
    "created": 0,
    "done": 0,
    "refused": 3,
    "unreachable": 4,
    "failed": 5,
    "unknown": 6,
    "running": 7,
    "cancelled": 130,
}
"""Verdict to exit code. 1 is a bug of ours (a traceback), 2 is a usage error (click's)."""

FORCEABLE = ("dependents", "in-use", "known-bad", "libvirt", "no-format", "no-space", "would-lose")
"""
What `--force` takes: the refusals about which a user can rightly know better than we do.

An image that is built on ours may be rubbish, a reader may be a backup that is wanted, a crash may be mended in this very
QEMU, space may be on its way (the job waits for it), and what would be lost may be worthless. The others say that the merge
would write wrong data, crash QEMU or fail: nobody can know better.
"""


@dataclass_transform(eq_default=False, kw_only_default=True)
class Error(Exception):
    """
    Base of all our errors. What a subclass annotates are its facts, given by keyword, as in a dataclass.

    Not real dataclasses: to make fifty of those takes longer than all else that `qmpmerge disks` imports of ours.
    """

    verdict: ClassVar[str] = "unknown"
    sentence: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    fact_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fact_names = (*cls.fact_names, *cls.__dict__.get("__annotations__", ()))  # noqa: RUF063 - inspect takes 10 ms

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        unknown = facts.keys() - set(self.fact_names)
        missing = [name for name in self.fact_names if name not in facts and not hasattr(type(self), name)]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__}: missing {missing}, unexpected {sorted(unknown)}")
        vars(self).update(facts)

    @property
    def name(self) -> str:
        """The class name as users write it: ``ShorterLayer`` is ``shorter-layer``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()

    @property
    def exit_code(self) -> int:
        """The exit code of the verdict, from `EXIT_CODES`."""
        return EXIT_CODES[self.verdict]

    @property
    def parts(self) -> "Sequence[Error]":
        """The errors that this one stands for, itself where it stands for nothing else."""
        return (self,)

    @property
    def told(self) -> dict[str, object]:
        """Name, message, hint and facts, as JSON shows them."""
        return {"name": self.name, "message": str(self), "hint": self.hint, "facts": self.facts}

    @property
    def facts(self) -> dict[str, object]:
        """The facts by name, for JSON and for tests."""
        return {name: getattr(self, name) for name in self.fact_names}

    @property
    def hint(self) -> str:
        """What to do next, one sentence; empty where there is nothing to say."""
        return self.advice.format_map(self._words())

    def __str__(self) -> str:
        return self.sentence.format_map(self._words())

    def _words(self) -> dict[str, object]:
        return {name: _in_words(name, value) for name, value in self.facts.items()}


def _in_words(name: str, value: object) -> object:
    if name == "target" and isinstance(value, str):
        return shlex.quote(value)  # hints are commands
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return value


class Untouched(Error):
    """Nothing was changed: all of this is found out before anything is sent."""


class Refused(Untouched):
    """A check said no."""

    verdict = "refused"


class Unreachable(Untouched):
    """No session with a QEMU could be made, so nothing was sent."""

    verdict = "unreachable"


class Unknown(Error):
    """
    The outcome is not proven.

    After a lost connection or a missing reply nobody can say whether a command took effect: it may even run later.
    The only cure is to ask QEMU again, and never to send the command again blindly.
    """

    verdict = "unknown"
    advice = "run `qmpmerge doctor {target}`: QEMU knows what happened, and what is left to do"


class Failed(Error):
    """The job ran and failed. The old chain is in use and right; running the command again is safe."""

    verdict = "failed"


# --- refused: what the user asked for is not there, or makes no sense -------------------------------------------


class NoSuchDisk(Refused):
    """DISK names nothing that the target has."""

    disk: str
    target: str
    known: list[str]
    sentence = "no disk {disk} on {target}"
    advice = "disks there: {known}"


class DiskNeeded(Refused):
    """DISK was left out and several disks have a backing chain, or none has."""

    target: str
    known: list[str]
    sentence = "{target} has more than one disk that this could mean: {known}"
    advice = "name the disk, as in `... {target} DISK`"


class NoDisk(Refused):
    """The target has no disk at all."""

    target: str
    sentence = "{target} has no disk with an image"
    advice = "see `qmpmerge disks {target}`"


class NoSuchLayer(Refused):
    """--base or --top names no image of the chain."""

    layer: str
    disk: str
    known: list[str]
    sentence = "no image {layer} in the chain of {disk}"
    advice = "the chain, base first: {known}"


class BaseAboveTop(Refused):
    """The base lies above the top."""

    base: str
    top: str
    sentence = "the base {base} lies above the top {top}"
    advice = "a merge goes down: swap --base and --top"


class BaseIsTop(Refused):
    """Base and top are one image: nothing lies between them."""

    base: str
    sentence = "base and top are both {base}, so there is nothing to merge"
    advice = "name a base further down, or leave --base out to merge into the lowest image"


class OptionsConflict(Refused):
    """Two options of which only one can be meant."""

    options: list[str]
    sentence = "{options} cannot be used together"
    advice = "leave one of them out"


class SeveralRefusals(Refused):
    """More than one check said no: all are told at once, so that they can be dealt with at once."""

    refusals: list[Refused]
    sentence = "{count} checks say no: {sentences}"
    advice = "{hints}"

    @property
    def parts(self) -> "Sequence[Error]":
        """The refusals, in the order of the checks."""
        return self.refusals

    @property
    def facts(self) -> dict[str, object]:
        """Each refusal with its name, message, hint and facts."""
        return {"refusals": [refusal.told for refusal in self.refusals]}

    def _words(self) -> dict[str, object]:
        sentences = "; ".join(f"{refusal.name}: {refusal}" for refusal in self.refusals)
        hints = "; ".join(f"{refusal.name}: {refusal.hint}" for refusal in self.refusals)
        return {"count": len(self.refusals), "sentences": sentences, "hints": hints}


def refuse(refusals: Sequence[Refused]) -> None:
    """Raise what was found: nothing, the one refusal as it is, or SeveralRefusals."""
    if len(refusals) > 1:
        raise SeveralRefusals(refusals=list(refusals))
    for refusal in refusals:
        raise refusal


# --- refused: it would harm ---------------------------------------------------------------------------------------


class ShorterLayer(Refused):
    """
    An image above the base is smaller than the base.

    Above the end of a short layer the guest reads zeros; after the merge it would read what the base holds there.
    QEMU does this without a word, from 5.2 to 11.1: test_merge pins it.
    """

    image: str
    size: int
    base: str
    base_size: int
    sentence = (
        "{image} is shorter than {base} ({size} < {base_size} bytes): the merge would uncover the base's stale data"
    )
    advice = "merge into an image above the short one, or grow it first with `block_resize` or `qemu-img resize`"


class Busy(Refused):
    """A block job is on the disk already; QEMU takes one commit job a disk."""

    disk: str
    job: str
    target: str
    sentence = "{disk} is busy: job {job} is working on it"
    advice = "see `qmpmerge jobs {target}`; `qmpmerge job {target} {job} follow` goes on with it, `cancel` ends it"


class Locked(Refused):
    """Another qmpmerge works on the same base."""

    base: str
    lock: str
    sentence = "another qmpmerge is merging into {base}"
    advice = "wait for it; its lock is {lock}"


class Temporary(Refused):
    """A ``snapshot=on`` drive: the merge would write into the image that the user meant to protect."""

    disk: str
    file: str
    sentence = "{disk} is a snapshot=on drive, its active image {file} is a temporary file"
    advice = "nothing to merge: what the guest wrote there is meant to be thrown away"


class Replaced(Refused):
    """The file at a path is not the inode that QEMU has open; QEMU would reopen the path and write into that file."""

    file: str
    pid: int
    sentence = "{file} was replaced: QEMU (pid {pid}) has another file open under this name"
    advice = "put the file that QEMU has open back under its name, then try again"


class Disagrees(Refused):
    """The header on disk tells another chain than QEMU does."""

    image: str
    header: str
    graph: str
    sentence = "the header of {image} names {header} as its backing file, QEMU uses {graph}"
    advice = "mend the header first (`qemu-img rebase -u`, with the VM off), or merge a range that leaves {image} out"


class BackingString(Refused):
    """The name that the overlay's header would get does not fit there, or would not lead to the base."""

    overlay: str
    backing: str
    reason: str
    sentence = "the header of {overlay} cannot name {backing} as its backing file: {reason}"
    advice = "keep the chain in one folder with relative backing names, or give absolute ones (`qemu-img rebase -u`)"


class NotWritable(Refused):
    """
    QEMU may not write to the base, or could not rewrite the overlay's header with the very string it has.

    The latter at the end of the merge would crash QEMU (5.2 to 11.1: test_merge pins it), so it is tried first.
    """

    file: str
    reason: str
    sentence = "QEMU cannot write to {file}: {reason}"
    advice = "make {file} writable for QEMU (permissions, `chattr -i`, mount options, free space), then try again"


class FlushUnavailable(Refused):
    """
    No flush whose error we would see can be asked for.

    Without one a failing disk would be reported as a merge that went well (test_merge pins it).
    """

    reason: str
    sentence = "QEMU cannot be asked to make the base durable: {reason}"
    advice = "if QEMU's NBD server is in use, stop it for the merge (`nbd-server-stop`), then try again"


class StreamConcluded(Refused):
    """QEMU 7.2 to 10.0 crash when asked for their nodes while a stream job is concluded."""

    job: str
    target: str
    sentence = "stream job {job} has ended but was not dismissed; QEMU may crash if asked about its disks now"
    advice = "run `qmpmerge job {target} {job} dismiss` first"


class InUse(Refused):
    """Another process holds an image of the chain: merging it from here would pull it from under that process's feet."""

    file: str
    holders: list[str]
    command: str
    sentence = "{file} is in use by {holders}"
    advice = "{command}"


class Dependents(Refused):
    """Another image is built on the base or on a merged image: the merge would change what it shows, or break it."""

    images: list[str]
    dependents: list[str]
    sentence = "other images are built on what the merge writes to or takes away ({images}): {dependents}"
    advice = (
        "delete those that an earlier merge left over; the others would be ruined: merge them first, or give them a copy "
        "of it. `--force dependents` merges all the same"
    )


class ForeignName(Refused):
    """
    A header names something that the user has not named: a device, a URL, a file elsewhere.

    Following it could connect to strangers or hang, and a merge could overwrite any file that we may write.
    """

    image: str
    backing: str
    reason: str
    sentence = "{image} names {backing}, which is not followed: {reason}"
    advice = "if you know the image, allow it with `--allow FOLDER` or `--allow FILE`"


class NoFormat(Refused):
    """A backing file without a recorded format; a raw image must not be probed, its first bytes are the guest's."""

    image: str
    backing: str
    sentence = "{image} does not record the format of its backing file {backing}"
    advice = (
        "with the VM off record it with `qemu-img rebase -u -b {backing} -F raw {image}` (or -F qcow2); "
        "`--force no-format` trusts what a running QEMU takes it for"
    )


class Disguised(Refused):
    """A raw image's first bytes belong to its guest, which can write a qcow2 header there and name any file of ours."""

    image: str
    sentence = "{image} is called raw, or is a device, but begins like qcow2: its guest may have written that"
    advice = "if it really is a qcow2 image, give it a name that says so"


class BackingLoop(Refused):
    """The chain comes back to an image that it has passed."""

    image: str
    backing: str
    sentence = "the chain is a loop: {image} names {backing}, which stands above it"
    advice = "one of the headers is wrong; `qemu-img info` shows each, `qemu-img rebase -u` mends one"


class TooDeep(Refused):
    """More images than QEMU can read through."""

    image: str
    limit: int
    sentence = "the chain below {image} has more than {limit} images, QEMU may crash reading through it"
    advice = "merge parts of it first, naming an image further down"


class UnsupportedFormat(Refused):
    """A chain on disk with an image of a format that we do not open offline."""

    image: str
    format: str
    sentence = "{image} is {format}, merging offline is for qcow2, raw and luks images"
    advice = "convert it with `qemu-img convert`, or merge while a VM has it open"


class NoSpace(Refused):
    """
    The base's filesystem cannot take by how much the base would grow.

    QEMU pauses the job when it is full, but so do all others who write there: `free` is what QEMU may still use.
    """

    base: str
    growth: int
    free: int
    sentence = "{base} would grow by {growth} bytes, its filesystem has {free} left for QEMU"
    advice = "free space there, or merge fewer images at a time; `--force no-space` lets the job wait for space when it is full"


class DeviceTooSmall(Refused):
    """The base is a device, which does not grow; QEMU says no better than `Invalid argument`, and only once it has begun."""

    base: str
    size: int
    needed: int
    sentence = "{base} is a device of {size} bytes and cannot grow to {needed}"
    advice = "enlarge the device first, or merge into an image file"


class WouldLose(Refused):
    """Merged images hold what a merge does not carry over: internal snapshots, dirty bitmaps."""

    lost: list[str]
    sentence = "the merge would drop {lost}"
    advice = (
        "`--bitmaps merge` carries dirty bitmaps over, `--bitmaps drop` lets them go; internal snapshots can be copied out "
        "with `qemu-img convert -l NAME`, then `--force would-lose` merges"
    )


class BitmapsStay(Refused):
    """Dirty bitmaps that cannot be carried over to the base, for a reason of each."""

    bitmaps: list[str]
    sentence = "dirty bitmaps cannot be carried over: {bitmaps}"
    advice = "`--bitmaps drop` merges without them: the next backup must be a full one"


class KnownBad(Refused):
    """This QEMU crashes on this, measured; see the reason."""

    reason: str
    instead: str
    sentence = "this QEMU may crash: {reason}"
    advice = "{instead}; `--force known-bad` goes on if you know that yours does not"


class LiveOnly(Refused):
    """An option that leaves a job behind, on images that are opened for as long as the command runs."""

    option: str
    sentence = "{option} is for a running VM: offline the job ends with the command"
    advice = "leave it out, or use --keep-overlay"


class NeedsSecret(Refused):
    """An encrypted image without its passphrase."""

    image: str
    sentence = "{image} is encrypted"
    advice = "give its passphrase with `--secret FILE`"


class SecretUnreadable(Refused):
    """The file with the passphrase cannot be read."""

    file: str
    reason: str
    sentence = "cannot read the passphrase from {file}: {reason}"
    advice = "the file holds the passphrase as text; a line end at its end does not count"


class Suspect(Refused):
    """
    An earlier merge into this base failed on its storage, and now the guest writes where both would be compared.

    QEMU may believe that base holds what the storage has lost (5.2 to 11.1), so it is compared before it is used; a base
    that the guest would move onto can be compared only while the guest stands still.
    """

    base: str
    reason: str
    sentence = "{base} must be compared first: an earlier merge into it failed ({reason}), and the guest writes"
    advice = (
        "put an overlay on top (`qmpmerge snapshot`) and merge with `--top` what is below it, which is compared while the "
        "guest runs; or pause the guest for the merge"
    )


class LibvirtManaged(Refused):
    """The QEMU belongs to libvirt, which keeps its own idea of the chain."""

    vm: str
    sentence = "{vm} is managed by libvirt, which must know of every change to its disks"
    advice = "use `virsh blockcommit`; `--force libvirt` goes on if you know better"


class QemuRefused(Refused):
    """QEMU said no to a command that starts something; the block graph is unchanged."""

    command: str
    reason: str
    sentence = "QEMU refused {command}: {reason}"
    advice = "nothing was changed; `-v` shows the conversation"


class FileExists(Refused):
    """An overlay's file exists already; QEMU itself would overwrite it."""

    file: str
    sentence = "{file} exists already"
    advice = "choose another name, or move the file away"


class CannotCreate(Refused):
    """An overlay's file cannot be created."""

    file: str
    reason: str
    sentence = "cannot create {file}: {reason}"
    advice = "the folder must exist and be writable by you and by QEMU"


class AgentFailed(Refused):
    """The guest agent did not freeze the filesystems; no snapshot was taken."""

    agent: str
    reason: str
    sentence = "the guest agent at {agent} did not freeze the guest: {reason}"
    advice = "is qemu-guest-agent running in the guest? Without --quiesce the snapshot is crash-consistent"


class Unfinished(Refused):
    """
    A merge of the image was begun and not finished, and what remains is not for a merge to decide, or the image's name is
    taken away for as long as nobody has.
    """

    image: str
    found: str
    path: str
    sentence = "a merge of {image} was not finished: {found}"
    advice = "run `qmpmerge recover {path}`"

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "path": shlex.quote(self.path)}


class NothingThere(Refused):
    """`recover` finds neither the path nor anything that a merge has left of it."""

    path: str
    sentence = "nothing is at {path}, and no merge has left anything of it"
    advice = "name the image that the VM is started from, or its folder"


class NoSuchStash(Refused):
    """`clean` removes what a merge has stashed, and nothing else."""

    path: str
    sentence = "{path} is no file that a merge has stashed"
    advice = "name a folder, or a file called NAME.merged"


class JobVerb(Refused):
    """The verb is not legal in the job's state."""

    job: str
    verb: str
    status: str
    verbs: list[str]
    sentence = "job {job} is {status} and cannot {verb} now"
    advice = "possible now: {verbs}"


class NoSuchJob(Refused):
    """No job of this name."""

    job: str
    target: str
    known: list[str]
    sentence = "no job {job} on {target}"
    advice = "jobs there: {known}"


class ToolMissing(Refused):
    """A program of QEMU's that we need is not installed."""

    program: str
    package: str
    sentence = "{program} is not installed"
    advice = "install it, on Debian and Ubuntu with `apt-get install {package}`"


class ImageUnreadable(Refused):
    """qemu-img could not read or make an image."""

    file: str
    reason: str
    sentence = "qemu-img cannot use {file}: {reason}"
    advice = "does the file exist, and may you read it?"


# --- unreachable --------------------------------------------------------------------------------------------------


class NoSuchTarget(Unreachable):
    """TARGET is neither a path that exists nor a running QEMU."""

    target: str
    sentence = "no socket and no running QEMU called {target}"
    advice = "`qmpmerge vms` lists the running QEMUs and their monitors"


class AmbiguousName(Unreachable):
    """Two running QEMUs have the name."""

    target: str
    pids: list[int]
    sentence = "{target} is the name of more than one running QEMU, pids {pids}"
    advice = "name one by its pid, as in `pid:{first}`"

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "first": self.pids[0]}


class NoMonitor(Unreachable):
    """A running QEMU without a QMP monitor socket."""

    target: str
    pid: int
    sentence = "no QMP monitor socket of {target} (pid {pid}) can be found"
    advice = "start it with `-qmp unix:/run/vm.sock,server=on,wait=off`, or name its socket if you know it"


class MonitorTaken(Unreachable):
    """Another QEMU answers on the monitor of the one that was named: it was started later with the same path."""

    target: str
    pid: int
    other: int | None
    sentence = "the monitor of {target} (pid {pid}) now belongs to another QEMU (pid {other})"
    advice = "name that one, as in `pid:{other}`, or give each VM a monitor path of its own"


class NotASocket(Unreachable):
    """TARGET exists but is no socket."""

    path: str
    kind: str
    sentence = "{path} is a {kind}, not a monitor socket"
    advice = "name the QMP monitor of a running QEMU; `qmpmerge vms` lists them"


class Offline(Unreachable):
    """TARGET is an image, and the command is about a running QEMU."""

    path: str
    sentence = "{path} is an image file, and jobs are those of a running QEMU"
    advice = "name the monitor or the VM that uses it (`qmpmerge vms`)"


class NobodyListens(Unreachable):
    """The socket is there, nobody listens on it."""

    address: str
    sentence = "nobody listens on {address}: its QEMU is gone"
    advice = "start the VM again, or see `qmpmerge vms`"


class NoPermission(Unreachable):
    """We may not connect."""

    address: str
    owner: str
    sentence = "no permission to connect to {address}, which belongs to {owner}"
    advice = "run qmpmerge as {owner}"


class CannotConnect(Unreachable):
    """Any other failure of connect(2)."""

    address: str
    reason: str
    sentence = "cannot connect to {address}: {reason}"
    advice = "is the address right? `qmpmerge vms` lists the monitors of this host"


class MonitorSilent(Unreachable):
    """
    Connected, but no greeting came.

    A QEMU monitor serves one client at a time: a second one connects and waits, possibly for ever. A stopped QEMU
    and a socket that speaks another protocol (a guest agent, say) look just the same.
    """

    address: str
    seconds: float
    holder: str
    stopped: bool = False
    sentence = "the monitor {address} did not greet us within {seconds:g} s: {holder}"
    advice = "end that session, or give QEMU a second monitor (`-qmp unix:PATH,server=on,wait=off`)"


class NotQmp(Unreachable):
    """Something else than QMP answers on the socket."""

    address: str
    got: str
    sentence = "{address} does not speak QMP: {got}"
    advice = "a human monitor (-monitor) will not do: QEMU needs `-qmp unix:PATH,server=on,wait=off`"


# --- after the start ------------------------------------------------------------------------------------------------


class JobFailed(Failed):
    """QEMU ended the job with an error."""

    job: str
    reason: str
    sentence = "job {job} failed: {reason}; the old chain is in use and nothing is lost"
    advice = "mend the cause, then run the same command again"


class OutOfQuota(JobFailed):
    """The storage of base refused a write because of a quota; unlike a full disk that ends the job."""

    filesystem: str
    sentence = "job {job} failed: {reason} on {filesystem}; the old chain is in use and nothing is lost"
    advice = "raise the quota there of the user that QEMU runs as, then run the same command again"


class TimedOut(Failed):
    """Offline nothing goes on without us: the merge was cancelled at the time limit, and the old chain is right."""

    job: str
    sentence = "job {job} did not end in time and was cancelled; the old chain is right and nothing is lost"
    advice = "give it more time (`--timeout`), or none at all"


class NotDurable(Failed):
    """A flush failed, so nothing was switched: the job was cancelled and the old chain is in use."""

    node: str
    reason: str
    sentence = "the storage did not make {node} durable: {reason}; nothing was switched, the old chain is in use"
    advice = "look at the storage's logs; once it is well, run the same command again"


class BitmapsNotCarried(Failed):
    """The dirty bitmaps could not be merged into the base's; the job was cancelled, nothing was switched."""

    base: str
    reason: str
    sentence = "the dirty bitmaps could not be carried over to {base}: {reason}; nothing was switched"
    advice = "the old chain is in use and right; `--bitmaps drop` merges without them"


class NotVerified(Failed):
    """What the base shows after the copy is not what the top shows; the job was cancelled, nothing was switched."""

    base: str
    top: str
    reason: str
    sentence = "{base} was compared with {top} before the switch: {reason}; nothing was switched"
    advice = "the old chain is in use and right; look at the storage of {base} before you try again"


class NotWitnessed(Failed):
    """What was about to be done could not be written down, so it was not done; the job was cancelled."""

    path: str
    reason: str
    sentence = "cannot write {path}: {reason}; nothing was switched, the old chain is in use"
    advice = "make room for a small file beside the active image, then run the same command again"


class NotProven(Unknown):
    """What a fresh look shows is not what the plan says."""

    target: str
    expected: str
    found: str
    sentence = "the outcome is not proven: expected {expected}, found {found}"


class HeaderNotDurable(Unknown):
    """The merge is done, but the storage did not confirm the overlay's new header: after a power cut it may be old."""

    target: str
    overlay: str
    reason: str
    sentence = "merged, but the storage did not make the new header of {overlay} durable: {reason}"
    advice = "keep the merged files until the storage is well: after a power cut the header may name them again"


class SessionLost(Unknown):
    """The monitor session ended while a command was under way."""

    target: str
    command: str
    reason: str
    sentence = "the session with {target} was lost during {command}: {reason}"


class NoReply(Unknown):
    """No reply in time. The command may still run."""

    target: str
    command: str
    seconds: float
    sentence = "{target} did not answer {command} within {seconds:g} s"


class ThawUnproven(Unknown):
    """
    The guest may be frozen still: the agent confirmed no thaw, neither to us nor to the guardian.

    Every try wrote the command to the channel, so an agent that was only slow still thaws the guest when it gets there.
    """

    agent: str
    reason: str
    sentence = "THE GUEST MAY STILL BE FROZEN: its agent at {agent} did not confirm the thaw: {reason}"
    advice = (
        'thaw it now: `echo \'{{"execute":"guest-fsfreeze-thaw"}}\' | socat -t5 - UNIX-CONNECT:{agent}`, '
        "or `fsfreeze --unfreeze MOUNTPOINT` in the guest"
    )


class FreezeUnproven(Unknown):
    """
    The guest runs again, but its filesystems were not frozen to the end of the block, or nobody can say.

    Somebody thawed them earlier: the guardian after its limit, a command in the guest, or a Windows guest, where a
    freeze ends by itself after 10 s.
    """

    agent: str
    frozen: int
    held: int
    sentence = (
        "the guest behind {agent} was thawed too early: of {frozen} frozen filesystems, {held} were still frozen "
        "when the snapshot was taken"
    )
    advice = "the guest is thawed and the snapshot is there, but only crash-consistent; take another one"


class PauseUnproven(Unknown):
    """The guest was paused for the pivot, and neither we nor the guard saw it run again."""

    target: str
    reason: str
    sentence = "THE GUEST MAY STILL BE PAUSED: {target} did not confirm `cont`: {reason}"
    advice = "let it run: send `cont` to its monitor; then run `qmpmerge recover` on the folder of its images"


class CannotRecover(Unknown):
    """What is known to be right cannot be put right: nothing more was done, and it can be tried again."""

    file: str
    reason: str
    sentence = "cannot put {file} right: {reason}"
    advice = "mend the cause, then run the same command again: it goes on from there"


class Undecided(Unknown):
    """Nobody can tell which of two images holds the last writes: the evidence is shown, nothing was changed."""

    base: str
    top: str
    evidence: list[str]
    path: str
    sentence = "{base} and {top} both may hold the last writes: {evidence}; nothing was changed"
    advice = (
        "look into both (read-only), then run `qmpmerge recover {path} --use base` to go on from {base}, "
        "or `--use top` to go on from {top}"
    )

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "path": shlex.quote(self.path)}


class StillRunning(Error):
    """We stopped waiting; the job belongs to QEMU and goes on."""

    target: str
    job: str
    option: str = ""
    verdict = "running"
    sentence = "job {job} goes on in QEMU"
    advice = "`qmpmerge job {target} {job} follow{option}` waits for it and finishes the merge, `cancel` ends it"


class LeftCancelling(StillRunning):
    """We were told to leave at once while the job was being cancelled."""

    sentence = "left while job {job} was being cancelled, which QEMU does when it gets to it"
    advice = "where `qmpmerge jobs {target}` still shows it, `qmpmerge job {target} {job} follow{option}` stays with it"


class Cancelled(Error):
    """The user cancelled; where a job ran its end was seen: the old chain is in use."""

    verdict = "cancelled"
    sentence = "the disks are as they were"
    advice = "run the same command again when you like"


class TimeUp(Cancelled):
    """The time limit passed before anything was started, or the user wants the job cancelled then."""

    seconds: float
    sentence = "not done within {seconds:g} s; nothing was switched, the disks are as they were"
    advice = "give it more time (`--timeout`), or let the job go on without us (`--on-timeout leave`)"


class CommandError(Exception):
    """QEMU answered a command with an error. Never shown as it is: whoever sent the command knows what it means."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.description = description
